"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): a gated shared expert beside the routed ones.

Source: transformers/models/qwen2_moe/modeling_qwen2_moe.py.
"""

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

_NAMES = MoeNames(shared="model.layers.{layer}.mlp.shared_expert.")
_FIELDS = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
)  # fmt: skip


def _rows(config: HFConfig) -> list[Row]:
    sparse = sparse_step_layers(config)
    layer = [
        *attention(config, qkv_bias=config.get("qkv_bias", True), qk_norm=False),
        mlp_norm(config),
        *in_layers(gated_mlp(config), other_layers(config, sparse)),
        *in_layers(
            experts(
                config,
                config["num_experts"],
                config["moe_intermediate_size"],
                names=_NAMES,
                shared_ffn=config["shared_expert_intermediate_size"],
                shared_gate=True,
            ),
            sparse,
        ),
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
    moe |= {
        "moe_shared_expert_intermediate_size": config["shared_expert_intermediate_size"],
        "moe_shared_expert_gate": True,
    }
    return decoder_megatron(config, qkv_bias=config.get("qkv_bias", True), qk_norm=False, **moe)


def _check(config: HFConfig, ignored: Sequence[str]) -> None:
    require(config, _FIELDS)
    mapped = (
        *_FIELDS, "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "qkv_bias", "sliding_window",
        "max_window_layers",
    )  # fmt: skip
    check_decoder(config, ignored, mapped=mapped, fixed={"use_sliding_window": (False,)})
    check_softmax_router(config)


def _fused(config: HFConfig) -> list[FusedExperts]:
    return fused_experts(_NAMES)


FAMILY = Family(("qwen2_moe",), _rows, _megatron, _check, fused_experts=_fused, duplicates=tied_output)
