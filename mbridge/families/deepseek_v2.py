"""DeepSeek-V2-Lite: latent attention, softmax routing. The routing of the 236B model is refused.

Source: transformers/models/deepseek_v2/modeling_deepseek_v2.py; on epsilon see deepseek_v3.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UnsupportedConfigError
from ..hf_config import HFConfig, require
from . import Family, FusedExperts, MegatronConfig, Row
from ._blocks import check_decoder, decoder_megatron, embedding, gated_mlp, mlp_norm, output_head, tied_output
from ._mla import MLA_FIELDS, check_mla, mla_attention, mla_megatron
from ._moe import MoeNames, experts, fused_experts, in_layers, layers_after, moe_megatron, other_layers

_NAMES = MoeNames()
_REQUIRED = (
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "num_experts_per_tok",
    "moe_intermediate_size",
)  # fmt: skip
_MAPPED = frozenset(_REQUIRED) | MLA_FIELDS | {
    "n_shared_experts", "routed_scaling_factor", "first_k_dense_replace", "n_group", "topk_group", "topk_method",
}  # fmt: skip
_FIXED = {
    "scoring_func": ("softmax",), "norm_topk_prob": (False,), "moe_layer_freq": (1,), "attention_bias": (False,),
    "mlp_bias": (False,), "ep_size": (1,), "seq_aux": (True, False), "aux_loss_alpha": (0, 0.0, 0.001),
}  # fmt: skip


def _sparse(config: HFConfig) -> tuple[int, ...]:
    return layers_after(config, config.get("first_k_dense_replace") or 0)


def _shared(config: HFConfig) -> int:
    return int(config["moe_intermediate_size"] * (config.get("n_shared_experts") or 0))


def _rows(config: HFConfig) -> list[Row]:
    sparse = _sparse(config)
    num_experts, ffn = config["n_routed_experts"], config["moe_intermediate_size"]
    moe = experts(config, num_experts, ffn, names=_NAMES, shared_ffn=_shared(config))
    layer = [
        *mla_attention(config),
        mlp_norm(config),
        *in_layers(gated_mlp(config), other_layers(config, sparse)),
        *in_layers(moe, sparse),
    ]
    return [*embedding(config), *layer, *output_head(config)]


def _megatron(config: HFConfig) -> MegatronConfig:
    more = moe_megatron(
        config,
        num_experts=config["n_routed_experts"],
        ffn=config["moe_intermediate_size"],
        layers=_sparse(config),
        pre_softmax=True,
    )
    more |= {"moe_router_topk_scaling_factor": config.get("routed_scaling_factor") or 1.0, **mla_megatron(config)}
    if _shared(config):
        more["moe_shared_expert_intermediate_size"] = _shared(config)
    return decoder_megatron(config, qkv_bias=False, qk_norm=True, **more)


def _check(config: HFConfig, ignored: Sequence[str]) -> None:
    require(config, _REQUIRED)
    if config.get("topk_method", "greedy") != "greedy":
        raise UnsupportedConfigError(
            f"topk_method = {config['topk_method']!r}: DeepSeek-V2 scores a group of experts by its best one, "
            "Megatron-Core by several, so it would choose other experts"
        )
    check_decoder(config, ignored, mapped=_MAPPED, fixed=_FIXED, check_rope=check_mla)


def _fused(config: HFConfig) -> list[FusedExperts]:
    return fused_experts(_NAMES)


FAMILY = Family(("deepseek_v2",), _rows, _megatron, _check, fused_experts=_fused, duplicates=tied_output)
