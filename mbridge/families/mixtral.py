"""Mixtral: experts w1 (gate), w3 (up), w2 (down); scores renormalised over the chosen experts.

Source: transformers/models/mixtral/modeling_mixtral.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..hf_config import HFConfig, require
from . import Family, FusedExperts, MegatronConfig, Row
from ._blocks import attention, check_decoder, decoder_megatron, embedding, mlp_norm, output_head, tied_output
from ._moe import MoeNames, check_softmax_router, experts, fused_experts, layers_after, moe_megatron

_MOE = "model.layers.{layer}.block_sparse_moe."
_NAMES = MoeNames(router=_MOE + "gate.weight", expert=_MOE + "experts.{expert}.", gate="w1", up="w3", down="w2")
_FIELDS = ("num_experts", "num_experts_per_tok")


def _rows(config: HFConfig) -> list[Row]:
    layer = [
        *attention(config, qkv_bias=False, qk_norm=False),
        mlp_norm(config),
        *experts(config, config["num_experts"], config["intermediate_size"], names=_NAMES),
    ]
    return [*embedding(config), *layer, *output_head(config)]


def _megatron(config: HFConfig) -> MegatronConfig:
    moe = moe_megatron(
        config,
        num_experts=config["num_experts"],
        ffn=config["intermediate_size"],
        layers=layers_after(config, 0),
        pre_softmax=False,
    )
    return decoder_megatron(config, qkv_bias=False, qk_norm=False, **moe)


def _check(config: HFConfig, ignored: Sequence[str]) -> None:
    require(config, _FIELDS)
    # Jitter is noise that transformers adds to the router's input in training.
    check_decoder(config, ignored, mapped=_FIELDS, fixed={"router_jitter_noise": (0, 0.0)})
    check_softmax_router({**config, "norm_topk_prob": True})


def _fused(config: HFConfig) -> list[FusedExperts]:
    return fused_experts(_NAMES, prefix="model.layers.{layer}.mlp.")


FAMILY = Family(("mixtral",), _rows, _megatron, _check, fused_experts=_fused, duplicates=tied_output)
