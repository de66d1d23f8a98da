"""Small Hugging Face models, written by transformers, with every special value away from its default."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.mbridge.reference import Model

# hidden != heads * head_dim, groups < 4 ranks, an odd vocabulary, ffn that is no multiple of the hidden size.
SIZES = {"layers": 4, "hidden": 40, "ffn": 56, "heads": 4, "groups": 2, "head_dim": 16, "vocab": 67}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and what its config says beyond sizes."""

    model: Model
    fields: dict[str, Any] = field(default_factory=dict)
    length: int = 24  # of the sequences whose logits are compared


CASES: dict[str, Case] = {
    "llama": Case(Model("llama", **SIZES)),
    # Positions have to be large enough for the scaled, slow frequencies to show.
    "llama3": Case(Model("llama", **SIZES), {"rope_scaling": LLAMA3, "rope_theta": 100000.0}, length=200),
    "llama linear": Case(Model("llama", **SIZES), {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    # transformers' Qwen2 has no head_dim of its own: hidden / heads.
    "qwen2": Case(Model("qwen2", **{**SIZES, "head_dim": 10})),
    "qwen2 tied": Case(Model("qwen2", **{**SIZES, "head_dim": 10}, tied=True)),
    "qwen3": Case(Model("qwen3", **SIZES)),
    "qwen3 tied": Case(Model("qwen3", **SIZES, tied=True)),
}


def config_of(case: Case) -> dict[str, Any]:
    config = case.model.config(max_position_embeddings=131072, **case.fields)
    if case.model.family == "qwen2":
        del config["head_dim"]
    return config


def tokens_of(case: Case) -> torch.Tensor:
    """Token ids [2, length], each token of the vocabulary among them where there is room."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(0, case.model.vocab, (2, case.length), generator=generator)
    ids[0, -1] = case.model.vocab - 1  # the row beside the padding
    return ids


def make(case: Case, folder: Path) -> torch.Tensor:
    """Write the checkpoint, in several files; returns transformers' logits [2, length, vocab] in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_of(case)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), attn_implementation="eager", dtype=torch.float32
        ).eval()
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "none"}')
    with torch.no_grad():
        logits: torch.Tensor = model(tokens_of(case)).logits
    return logits
