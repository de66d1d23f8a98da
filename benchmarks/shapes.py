"""Configs of public models, and random checkpoints of their shapes. Nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from mbridge import AutoBridge

_QWEN2 = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "max_position_embeddings": 32768, "use_sliding_window": False, "torch_dtype": "bfloat16",
    "bos_token_id": 151643, "eos_token_id": 151645,
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
    "qwen3-moe-small": {  # the layer of Qwen3-30B-A3B, narrower, with 16 experts: 0.5 GB
        **_QWEN2, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 1024,
        "intermediate_size": 3072, "moe_intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 16, "num_experts_per_tok": 4, "vocab_size": 32000,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
    },
}  # fmt: skip


def make_checkpoint(shape: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint of a shape with random weights in `folder`/`shape`, made once."""
    target = folder / shape
    if (target / "model.safetensors").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    config = SHAPES[shape]
    (target / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for spec in AutoBridge.from_config(config, dtype=dtype).hf_tensors():
        tensors[spec.name] = (torch.randn(spec.shape, generator=generator) * 0.02).to(spec.dtype)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
