"""GLM-4.5 and 4.6: grouped-query attention with partial rope, DeepSeek-V3's routing, MTP layers.

Source: transformers/models/glm4_moe/modeling_glm4_moe.py.
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
    check_sigmoid_router,
    experts,
    fused_experts,
    in_layers,
    layers_after,
    moe_megatron,
    mtp_duplicates,
    mtp_rows,
    other_layers,
    sigmoid_router,
)

_NAMES = MoeNames()
_REQUIRED = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
_MAPPED = frozenset(_REQUIRED) | {
    "n_shared_experts", "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob", "first_k_dense_replace",
    "num_nextn_predict_layers", "use_qk_norm", "attention_bias", "partial_rotary_factor",
}  # fmt: skip


def _with_rope(config: HFConfig) -> HFConfig:
    # transformers 4 has the factor beside the rope, transformers 5 in it; both take 0.5 if it is not written.
    rope = dict(config["rope"])
    rope["partial_rotary_factor"] = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 0.5
    return {**config, "rope": rope}


def _sparse(config: HFConfig) -> tuple[int, ...]:
    return layers_after(config, config.get("first_k_dense_replace") or 0)


def _shared(config: HFConfig) -> int:
    return int(config["moe_intermediate_size"] * (config.get("n_shared_experts") or 0))


def _rows(config: HFConfig) -> list[Row]:
    sparse = _sparse(config)
    num_experts, ffn = config["n_routed_experts"], config["moe_intermediate_size"]
    moe = experts(config, num_experts, ffn, names=_NAMES, shared_ffn=_shared(config), expert_bias=True)
    bias, norm = bool(config.get("attention_bias")), bool(config.get("use_qk_norm"))
    common = [*attention(config, qkv_bias=bias, qk_norm=norm), mlp_norm(config)]
    layer = [*common, *in_layers(gated_mlp(config), other_layers(config, sparse)), *in_layers(moe, sparse)]
    mtp = mtp_rows(config, [*common, *moe], config.get("num_nextn_predict_layers") or 0)
    return [*embedding(config), *layer, *output_head(config), *mtp]


def _megatron(config: HFConfig) -> MegatronConfig:
    more = moe_megatron(
        config,
        num_experts=config["n_routed_experts"],
        ffn=config["moe_intermediate_size"],
        layers=_sparse(config),
        pre_softmax=False,
    )
    more |= sigmoid_router(config)
    if _shared(config):
        more["moe_shared_expert_intermediate_size"] = _shared(config)
    if config.get("num_nextn_predict_layers"):
        more |= {"mtp_num_layers": config["num_nextn_predict_layers"], "mtp_loss_scaling_factor": 0.0}
    bias, norm = bool(config.get("attention_bias")), bool(config.get("use_qk_norm"))
    return decoder_megatron(_with_rope(config), qkv_bias=bias, qk_norm=norm, **more)


def _check(config: HFConfig, ignored: Sequence[str]) -> None:
    require(config, _REQUIRED)
    fixed = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}
    check_decoder(_with_rope(config), ignored, mapped=_MAPPED, fixed=fixed)
    check_sigmoid_router(config)


def _fused(config: HFConfig) -> list[FusedExperts]:
    return fused_experts(_NAMES)


def _duplicates(config: HFConfig) -> dict[str, str]:
    return {**tied_output(config), **mtp_duplicates(config)}


FAMILY = Family(("glm4_moe",), _rows, _megatron, _check, fused_experts=_fused, duplicates=_duplicates)
