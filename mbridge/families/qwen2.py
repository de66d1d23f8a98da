"""Qwen2 and Qwen2.5, dense: biased q, k, v. Source: transformers/models/qwen2/modeling_qwen2.py."""

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


def _rows(config: HFConfig) -> list[Row]:
    layer = [*attention(config, qkv_bias=True, qk_norm=False), mlp_norm(config), *gated_mlp(config)]
    return [*embedding(config), *layer, *output_head(config)]


def _megatron(config: HFConfig) -> MegatronConfig:
    return decoder_megatron(config, qkv_bias=True, qk_norm=False)


def _check(config: HFConfig, ignored: Sequence[str]) -> None:
    # The two windows are read by transformers only when use_sliding_window is true, which is refused.
    fixed = {"use_sliding_window": (False,), "use_mrope": (False,)}
    check_decoder(config, ignored, mapped=("sliding_window", "max_window_layers"), fixed=fixed)


FAMILY = Family(("qwen2",), _rows, _megatron, _check, duplicates=tied_output)
