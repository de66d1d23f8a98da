"""Qwen3, dense: normed q and k, no bias. Source: transformers/models/qwen3/modeling_qwen3.py."""

from __future__ import annotations

from collections.abc import Sequence

from ..hf_config import HFConfig
from . import Family, MegatronConfig, Row
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


def _full(config: HFConfig) -> HFConfig:
    # transformers' Qwen3Config: head_dim is 128 unless written, whatever the hidden size is.
    return config if config.get("head_dim") else {**config, "head_dim": 128}


def _rows(config: HFConfig) -> list[Row]:
    config = _full(config)
    layer = [*attention(config, qkv_bias=False, qk_norm=True), mlp_norm(config), *gated_mlp(config)]
    return [*embedding(config), *layer, *output_head(config)]


def _megatron(config: HFConfig) -> MegatronConfig:
    return decoder_megatron(_full(config), qkv_bias=False, qk_norm=True)


def _check(config: HFConfig, ignored: Sequence[str]) -> None:
    # attention_bias would also put a bias on o_proj, which Megatron-Core has only together with MLP biases.
    fixed = {"use_sliding_window": (False,), "attention_bias": (False,)}
    check_decoder(config, ignored, mapped=("sliding_window", "max_window_layers"), fixed=fixed)


FAMILY = Family(("qwen3",), _rows, _megatron, _check, duplicates=tied_output)
