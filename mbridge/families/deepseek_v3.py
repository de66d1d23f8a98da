"""DeepSeek-V3 and R1, Kimi-K2, Moonlight: latent attention, group-limited sigmoid routing, MTP layers.

Source: transformers/models/deepseek_v3/modeling_deepseek_v3.py. One field differs on purpose: transformers norms the
latents with epsilon 1e-6 whatever `rms_norm_eps` says; Megatron-Core, like vLLM, takes `rms_norm_eps` everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..hf_config import HFConfig, require
from . import Family, FusedExperts, MegatronConfig, Row
from ._blocks import check_decoder, decoder_megatron, embedding, gated_mlp, mlp_norm, output_head, tied_output
from ._mla import MLA_FIELDS, check_mla, mla_attention, mla_megatron
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
_REQUIRED = (
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "num_experts_per_tok",
    "moe_intermediate_size",
)  # fmt: skip
_MAPPED = frozenset(_REQUIRED) | MLA_FIELDS | {
    "n_shared_experts", "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob", "first_k_dense_replace",
    "num_nextn_predict_layers",
}  # fmt: skip
_FIXED = {
    "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,), "attention_bias": (False,),
    "rope_interleave": (True,), "ep_size": (1,), "seq_aux": (True, False), "aux_loss_alpha": (0, 0.0, 0.001, 0.0001),
}  # fmt: skip


def _sparse(config: HFConfig) -> tuple[int, ...]:
    return layers_after(config, config.get("first_k_dense_replace") or 0)


def _rows(config: HFConfig) -> list[Row]:
    sparse = _sparse(config)
    moe = experts(
        config,
        config["n_routed_experts"],
        config["moe_intermediate_size"],
        names=_NAMES,
        shared_ffn=config["moe_intermediate_size"] * (config.get("n_shared_experts") or 0),
        expert_bias=True,
    )
    common = [*mla_attention(config), mlp_norm(config)]
    layer = [*common, *in_layers(gated_mlp(config), other_layers(config, sparse)), *in_layers(moe, sparse)]
    mtp = mtp_rows(config, [*common, *moe], config.get("num_nextn_predict_layers") or 0)
    return [*embedding(config), *layer, *output_head(config), *mtp]


def _megatron(config: HFConfig) -> MegatronConfig:
    shared = config["moe_intermediate_size"] * (config.get("n_shared_experts") or 0)
    more = moe_megatron(
        config,
        num_experts=config["n_routed_experts"],
        ffn=config["moe_intermediate_size"],
        layers=_sparse(config),
        pre_softmax=False,
    )
    more |= {**sigmoid_router(config), **mla_megatron(config)}
    if shared:
        more["moe_shared_expert_intermediate_size"] = shared
    if config.get("num_nextn_predict_layers"):
        more |= {"mtp_num_layers": config["num_nextn_predict_layers"], "mtp_loss_scaling_factor": 0.0}
    return decoder_megatron(config, qkv_bias=False, qk_norm=True, **more)


def _check(config: HFConfig, ignored: Sequence[str]) -> None:
    require(config, _REQUIRED)
    check_decoder(config, ignored, mapped=_MAPPED, fixed=_FIXED, check_rope=check_mla)
    check_sigmoid_router(config)


def _fused(config: HFConfig) -> list[FusedExperts]:
    return fused_experts(_NAMES)


def _duplicates(config: HFConfig) -> dict[str, str]:
    return {**tied_output(config), **mtp_duplicates(config)}


def _redundant(config: HFConfig) -> list[str]:
    # Moonlight's and Kimi-K2's files carry the rope table of each layer.
    return ["model.layers.{layer}.self_attn.rotary_emb.inv_freq"]


FAMILY = Family(
    ("deepseek_v3", "kimi_k2"),
    _rows,
    _megatron,
    _check,
    fused_experts=_fused,
    duplicates=_duplicates,
    redundant=_redundant,
)
