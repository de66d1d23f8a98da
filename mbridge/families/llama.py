"""LLaMA 2, 3, 3.1, 3.2, 3.3: no biases, rope plain, linear or llama3.

Source: transformers/models/llama/modeling_llama.py.
"""

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
    layer = [*attention(config, qkv_bias=False, qk_norm=False), mlp_norm(config), *gated_mlp(config)]
    return [*embedding(config), *layer, *output_head(config)]


def _megatron(config: HFConfig) -> MegatronConfig:
    return decoder_megatron(config, qkv_bias=False, qk_norm=False)


def _check(config: HFConfig, ignored: Sequence[str]) -> None:
    # attention_bias would also put a bias on o_proj, which Megatron-Core has only together with MLP biases.
    check_decoder(config, ignored, fixed={"attention_bias": (False,), "mlp_bias": (False,)})


def _redundant(config: HFConfig) -> list[str]:
    # Checkpoints written by transformers before 4.32 carry the rope table of each layer.
    return ["model.layers.{layer}.self_attn.rotary_emb.inv_freq"]


FAMILY = Family(("llama",), _rows, _megatron, _check, duplicates=tied_output, redundant=_redundant)
