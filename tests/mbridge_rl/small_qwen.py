"""Small random Qwen2 checkpoints, and what a vLLM makes of them. vLLM's processes read the checkpoint from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]
# Vocabulary 1000: vLLM pads it to 1024, so that its embedding is complete only at the end of a refit.
OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "dtype": "bfloat16",
    "block_size": 32,
}
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9] * 6, [11] * 70]  # the last one fills blocks of the prefix cache
Answer = list[tuple[tuple[int, ...], list[dict[int, float]]]]


def make_checkpoint(path: Path, seed: int, *, tied: bool) -> Path:
    """A Qwen2 of 3 layers, bf16, no weight at its default."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def tensors_of(checkpoint: Path) -> Tensors:
    return load_file(checkpoint / "model.safetensors")


def fusion_groups(tensors: Tensors) -> list[tuple[str, ...]]:
    """q, k, v and gate, up of each layer."""
    groups = []
    for name in tensors:
        for first, rest in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
            if first in name:
                groups.append((name, *(name.replace(first, other) for other in rest)))
    return groups


def answer(llm: Any) -> Answer:
    """Greedy tokens with log-probs: two models that differ anywhere differ here."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=12, logprobs=5, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
    return [
        (tuple(o.outputs[0].token_ids), [{t: p.logprob for t, p in step.items()} for step in o.outputs[0].logprobs])
        for o in outputs
    ]
