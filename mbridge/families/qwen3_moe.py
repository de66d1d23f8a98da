"""Qwen3-MoE: normed q and k, no shared expert. Source: transformers/models/qwen3_moe/modeling_qwen3_moe.py."""

from __future__ import annotations

from collections.abc import Sequence

from ..hf_config import HFConfig, require
from . import Family, FusedExperts, MegatronConfig, Row
from ._blocks import (
    attention,
    check_decoder,
    decoder_megatron,
    embedding,
    gated_mlp,
    mlp_norm,
    output_head,
    tied_output,
)
from ._moe import (
    MoeNames,
    check_softmax_router,
    experts,
    fused_experts,
    in_layers,
    moe_megatron,
    other_layers,
    sparse_step_layers,
)

_NAMES = MoeNames()
_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


def _rows(config: HFConfig) -> list[Row]:
    sparse = sparse_step_layers(config)
    layer = [
        *attention(config, qkv_bias=False, qk_norm=True),
        mlp_norm(config),
        *in_layers(gated_mlp(config), other_layers(config, sparse)),
        *in_layers(experts(config, config["num_experts"], config["moe_intermediate_size"], names=_NAMES), sparse),
    ]
    return [*embedding(config), *layer, *output_head(config)]


def _megatron(config: HFConfig) -> MegatronConfig:
    moe = moe_megatron(
        config,
        num_experts=config["num_experts"],
        ffn=config["moe_intermediate_size"],
        layers=sparse_step_layers(config),
        pre_softmax=not config.get("norm_topk_prob", False),
    )
    return decoder_megatron(config, qkv_bias=False, qk_norm=True, **moe)


def _check(config: HFConfig, ignored: Sequence[str]) -> None:
    require(config, _FIELDS)
    mapped = (
        *_FIELDS, "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "sliding_window", "max_window_layers",
    )  # fmt: skip
    # attention_bias would also put a bias on o_proj, which Megatron-Core has only together with MLP biases.
    fixed = {"use_sliding_window": (False,), "attention_bias": (False,)}
    check_decoder(config, ignored, mapped=mapped, fixed=fixed)
    check_softmax_router(config)


def _fused(config: HFConfig) -> list[FusedExperts]:
    return fused_experts(_NAMES)


FAMILY = Family(("qwen3_moe",), _rows, _megatron, _check, fused_experts=_fused, duplicates=tied_output)
