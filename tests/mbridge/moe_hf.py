"""Small Hugging Face models with experts, written by transformers, with every special value away from its default."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.mbridge.moe_reference import MoeModel

# Widths that divide over four ranks and are no multiples of each other; an odd vocabulary; fewer groups than ranks.
SIZES = {"layers": 4, "hidden": 40, "ffn": 56, "moe_ffn": 24, "shared_ffn": 36, "heads": 4, "groups": 2, "vocab": 67}
LATENT = {"q_rank": 24, "kv_rank": 20, "nope": 12, "rope": 8, "value": 10}
# Chosen so that each of the two betas moves an end of the ramp.
YARN = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 16, "beta_slow": 4,
    "mscale": 0.8, "mscale_all_dim": 0.6,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and the length of the sequences on which it is compared."""

    model: MoeModel
    length: int = 24


CASES: dict[str, Case] = {
    "qwen2_moe": Case(
        MoeModel("qwen2_moe", **SIZES, head_dim=10, topk=3, mlp_only=(1,), fields={"norm_topk_prob": False})
    ),
    "qwen2_moe renormalised": Case(
        MoeModel("qwen2_moe", **SIZES, head_dim=10, topk=3, sparse_step=2, tied=True, fields={"norm_topk_prob": True})
    ),
    "qwen3_moe": Case(
        MoeModel("qwen3_moe", **SIZES, head_dim=16, topk=3, mlp_only=(2,), fields={"norm_topk_prob": True})
    ),
    "qwen3_moe not renormalised": Case(
        MoeModel("qwen3_moe", **SIZES, head_dim=16, sparse_step=2, tied=True, fields={"norm_topk_prob": False})
    ),
    "mixtral": Case(MoeModel("mixtral", **SIZES, head_dim=16, num_experts=4)),
    "deepseek_v3": Case(
        MoeModel(
            "deepseek_v3", **SIZES, **LATENT, topk=4, first_dense=1,
            fields={
                "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "rope_scaling": YARN,
                "max_position_embeddings": 4096,
            },
        ),
        length=40,
    ),
    "moonlight": Case(
        MoeModel(
            "deepseek_v3", **SIZES, **{**LATENT, "q_rank": None}, topk=3, first_dense=2, tied=True,
            fields={"routed_scaling_factor": 2.446, "rope_scaling": None},
        )
    ),
    "deepseek_v2": Case(
        MoeModel(
            "deepseek_v2", **SIZES, **{**LATENT, "q_rank": None}, topk=3, first_dense=1,
            fields={"routed_scaling_factor": 1.5, "rope_scaling": YARN, "max_position_embeddings": 4096},
        ),
        length=40,
    ),
    "glm4_moe": Case(
        MoeModel(
            "glm4_moe", **SIZES, head_dim=16, topk=2, first_dense=1, num_shared=1,
            fields={
                "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5, "partial_rotary_factor": 0.75,
            },
        )
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """What transformers computes in fp32."""

    logits: torch.Tensor  # [2, length, vocab]
    chosen: dict[int, torch.Tensor]  # layer -> bool [2, length, experts]


def tokens_of(case: Case) -> torch.Tensor:
    """Token ids [2, length], the vocabulary's last among them."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(0, case.model.vocab, (2, case.length), generator=generator)
    ids[0, -1] = case.model.vocab - 1  # the row beside the padding
    return ids


def make(case: Case, folder: Path) -> Expected:
    """Write the checkpoint, in several files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**case.model.config()), attn_implementation="eager", dtype=torch.float32
        ).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.uniform_(-0.3, 0.3)  # far from values that bf16 holds
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "none"}')
    return run(model, case)


def run(model: nn.Module, case: Case) -> Expected:
    """transformers' logits and the experts that it chose."""
    tokens = tokens_of(case)
    chosen: dict[int, torch.Tensor] = {}

    def remember(layer: int, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        indices = arguments[1]  # of (hidden states, indices [tokens, topk], weights)
        mask = torch.zeros(len(indices), case.model.num_experts, dtype=torch.bool).scatter_(1, indices, True)
        chosen[layer] = mask.view(*tokens.shape, -1)

    hooks = [
        module.register_forward_pre_hook(partial(remember, int(name.split(".")[2])))
        for name, module in model.named_modules()
        if name.endswith(".mlp.experts")
    ]
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits
    for hook in hooks:
        hook.remove()
    assert sorted(chosen) == [layer for layer in range(case.model.layers) if not case.model.is_dense(layer)]
    return Expected(logits, chosen)


def watch_routers(chunks: list[Any], case: Case) -> dict[int, torch.Tensor]:
    """Fills the dict at each forward pass: layer -> bool [2, length, experts] that Megatron-Core's router chose."""
    chosen: dict[int, torch.Tensor] = {}

    def remember(router: Any, arguments: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        routing_map = output[1]  # [length * batch, experts]
        chosen[router.layer_number - 1] = routing_map.view(case.length, 2, -1).transpose(0, 1).clone()

    for chunk in chunks:
        for module in chunk.modules():
            if type(module).__name__ == "TopKRouter":
                module.register_forward_hook(remember)
    return chosen
