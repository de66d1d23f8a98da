"""Rows and config fields of multi-latent attention (DeepSeek-V2, V3 and their kin).

Names and layouts: megatron/core/transformer/multi_latent_attention.py (0.16.1). Neither side permutes rope rows: both
de-interleave at run time.
"""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError, UnsupportedConfigError
from ..hf_config import HFConfig
from ..ops import Column, ColumnOrReplicated, Replicated, RowParallel
from . import Row

MLA_FIELDS = frozenset(
    {"q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "qk_head_dim", "head_dim"}
)
_LAYER, _HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
_ATTENTION, _HF_ATTENTION = _LAYER + "self_attention.", _HF_LAYER + "self_attn."


def mla_attention(config: HFConfig) -> list[Row]:
    """Latent attention with its input norm."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    kv_rank, q_rank = config["kv_lora_rank"], config.get("q_lora_rank")
    q_rows = heads * (nope + rope)
    norm = Row(
        (_LAYER + "input_layernorm.weight",), (_HF_LAYER + "input_layernorm.weight",), ((hidden,),), Replicated()
    )
    if q_rank is None:
        query = [_row("linear_q_proj.weight", "q_proj.weight", (q_rows, hidden), Column())]
    else:
        query = [
            _row("linear_q_down_proj.weight", "q_a_proj.weight", (q_rank, hidden), ColumnOrReplicated()),
            _latent_norm("q", "q_a_layernorm.weight", q_rank),
            _row("linear_q_up_proj.weight", "q_b_proj.weight", (q_rows, q_rank), Column()),
        ]
    return [
        norm,
        *query,
        _row("linear_kv_down_proj.weight", "kv_a_proj_with_mqa.weight", (kv_rank + rope, hidden), ColumnOrReplicated()),
        _latent_norm("kv", "kv_a_layernorm.weight", kv_rank),
        _row("linear_kv_up_proj.weight", "kv_b_proj.weight", (heads * (nope + value), kv_rank), Column()),
        _row("linear_proj.weight", "o_proj.weight", (hidden, heads * value), RowParallel()),
    ]


def _row(mcore: str, hf: str, shape: tuple[int, int], op: Column | RowParallel) -> Row:
    return Row((_ATTENTION + mcore,), (_HF_ATTENTION + hf,), (shape,), op)


def _latent_norm(which: str, hf: str, size: int) -> Row:
    # TransformerEngine fuses it into the projection behind it.
    mcore = (f"{_ATTENTION}linear_{which}_up_proj.layer_norm_weight", f"{_ATTENTION}{which}_layernorm.weight")
    return Row(mcore, (_HF_ATTENTION + hf,), ((size,),), Replicated())


def mla_megatron(config: HFConfig) -> dict[str, Any]:
    """Fields of MLATransformerConfig. Its class defaults are DeepSeek-V3's, so all of them are set."""
    rope = config["rope"]
    fields: dict[str, Any] = {
        "multi_latent_attention": True,
        "q_lora_rank": config.get("q_lora_rank"),
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "qk_layernorm": True,
        "num_query_groups": config["num_attention_heads"],
        "kv_channels": None,
        "rotary_base": rope["theta"],
        "rotary_percent": 1.0,
        "rope_type": "rope",
    }
    if rope["type"] == "yarn":
        fields |= {
            "rope_type": "yarn",
            "rotary_scaling_factor": float(rope["factor"]),
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
            "beta_fast": rope.get("beta_fast") or 32.0,
            "beta_slow": rope.get("beta_slow") or 1.0,
            "mscale": rope.get("mscale") or 1.0,
            "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
        }
    return fields


_YARN_FIELDS = {
    "type", "theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "partial_rotary_factor",
}  # fmt: skip


def check_mla(config: HFConfig) -> None:
    """Raise ConfigError for a rope that MLATransformerConfig cannot express."""
    rope = config["rope"]
    if rope["type"] not in ("default", "yarn"):
        raise UnsupportedConfigError(f"rope type {rope['type']!r}: latent attention has default and yarn only")
    if rope["type"] == "default":
        return
    unknown = {name: value for name, value in rope.items() if name not in _YARN_FIELDS and value is not None}
    if unknown:
        raise UnsupportedConfigError(f"yarn rope has fields that are not mapped: {unknown}")
    for name in ("factor", "original_max_position_embeddings"):
        if not rope.get(name):
            raise ConfigError(f"yarn rope needs {name}, found {rope.get(name)!r}")
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if bool(mscale) != bool(all_dim) and (mscale or 1.0, all_dim or 0.0) != (1.0, 0.0):
        raise UnsupportedConfigError(
            f"yarn rope has mscale = {mscale!r} and mscale_all_dim = {all_dim!r}: with only one of the two given, "
            "transformers scales otherwise than DeepSeek's own code, vLLM and Megatron-Core do"
        )
