"""Configs of public models, and random checkpoints of their shapes. Nothing is downloaded.

`make_config` writes a folder with config.json only: enough for vLLM's load_format="dummy" and for `get_model()`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from mbridge import AutoBridge

_QWEN2 = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "max_position_embeddings": 32768, "use_sliding_window": False, "torch_dtype": "bfloat16",
    "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
_LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 8192, "torch_dtype": "bfloat16", "bos_token_id": 128000,
    "eos_token_id": 128001,
}  # fmt: skip
_QWEN3_MOE = {
    **_QWEN2, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 128,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
}  # fmt: skip
_DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
    "bos_token_id": 0, "eos_token_id": 1, "n_shared_experts": 1, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "num_nextn_predict_layers": 0,
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    "tiny": {
        **_QWEN2, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 4096, "tie_word_embeddings": False,
    },
    "qwen2.5-0.5b": {
        **_QWEN2, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        **_QWEN2, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "qwen3-moe-tiny": {
        **_QWEN3_MOE, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 8,
        "num_experts_per_tok": 2, "vocab_size": 1024,
    },
    "qwen3-moe-small": {  # the layer of Qwen3-30B-A3B, narrower, with 16 experts: 0.5 GB
        **_QWEN3_MOE, "hidden_size": 1024, "intermediate_size": 3072, "moe_intermediate_size": 512,
        "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4, "num_experts": 16,
        "num_experts_per_tok": 4, "vocab_size": 32000,
    },
    "qwen3-30b-a3b": {
        **_QWEN3_MOE, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128,
        "num_experts_per_tok": 8, "vocab_size": 151936,
    },
    "deepseek-v3-tiny": {
        **_DEEPSEEK_V3, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 64,
        "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "q_lora_rank": 64,
        "qk_nope_head_dim": 32, "v_head_dim": 32, "vocab_size": 1024,
    },
    "deepseek-v3-slice": {  # the three dense layers and one of the 58 MoE layers: 30 GB
        **_DEEPSEEK_V3, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 4, "first_k_dense_replace": 3, "num_attention_heads": 128, "num_key_value_heads": 128,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 129280,
    },
}  # fmt: skip


def make_config(shape: str, folder: Path) -> Path:
    """`folder`/`shape` with config.json and no weights. Several processes may call it at once."""
    target = folder / shape
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps(SHAPES[shape], indent=2)
    file = target / "config.json"
    if not file.exists() or file.read_text() != text:
        whole = target / f"config.{os.getpid()}.tmp"
        whole.write_text(text)
        whole.replace(file)
    return target


def make_checkpoint(shape: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint of a shape with random weights in `folder`/`shape`, made once."""
    target = make_config(shape, folder)
    if (target / "model.safetensors").exists():
        return target
    config = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for spec in AutoBridge.from_config(config, dtype=dtype).hf_tensors():
        tensors[spec.name] = (torch.randn(spec.shape, generator=generator) * 0.02).to(spec.dtype)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
