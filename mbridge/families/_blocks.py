"""Rows and config fields that families share: embedding, grouped-query attention, gated MLP, output head, rope.

Names and layouts: megatron/core/models/gpt/gpt_layer_specs.py and transformer/attention.py, mlp.py (0.16.1).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch.nn.functional import silu

from ..errors import ConfigError, UnsupportedConfigError
from ..hf_config import HFConfig, check_fields, require
from ..ops import QKV, GateUp, Op, Replicated, RowParallel, Vocab
from ..pieces import Shape
from . import MegatronConfig, Row

_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."

REQUIRED_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
)  # fmt: skip
MAPPED_FIELDS = frozenset(REQUIRED_FIELDS) | {
    "num_key_value_heads", "head_dim", "rms_norm_eps", "rope", "tie_word_embeddings", "max_position_embeddings",
    "attention_dropout",
}  # fmt: skip
FIXED_FIELDS: dict[str, Collection[Any]] = {"hidden_act": ("silu",)}


def num_groups(config: HFConfig) -> int:
    """Key/value heads."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def head_dim(config: HFConfig) -> int:
    """Width of a head. Not always hidden size / heads: Qwen3 says 128 whatever its hidden size."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def embedding(config: HFConfig) -> list[Row]:
    shape = (config["vocab_size"], config["hidden_size"])
    names = ("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",)
    return [Row(*names, (shape,), Vocab(), first_stage=True)]


def output_head(config: HFConfig) -> list[Row]:
    """Final norm and output layer. Tied over several stages, the last one has a copy of the embedding."""
    shape = (config["vocab_size"], config["hidden_size"])
    tied = bool(config.get("tie_word_embeddings"))
    source = "model.embed_tokens.weight" if tied else "lm_head.weight"
    return [
        _norm("decoder.final_layernorm.weight", hf="model.norm.weight", size=config["hidden_size"]),
        Row(("output_layer.weight",), (source,), (shape,), Vocab(), copy=tied),
    ]


def attention(config: HFConfig, *, qkv_bias: bool, qk_norm: bool) -> list[Row]:
    """Grouped-query attention with its input norm."""
    hidden, groups, width = config["hidden_size"], num_groups(config), head_dim(config)
    sizes = (config["num_attention_heads"] * width, groups * width, groups * width)
    ours, theirs = _LAYER + "self_attention.", _HF_LAYER + "self_attn."
    kinds: list[tuple[str, tuple[Shape, ...]]] = [("weight", tuple((size, hidden) for size in sizes))]
    if qkv_bias:
        kinds.append(("bias", tuple((size,) for size in sizes)))
    rows = [
        _norm(
            ours + "linear_qkv.layer_norm_weight",
            _LAYER + "input_layernorm.weight",
            hf=_HF_LAYER + "input_layernorm.weight",
            size=hidden,
        )
    ]
    for kind, shapes in kinds:
        names = tuple(f"{theirs}{p}_proj.{kind}" for p in "qkv")
        rows.append(Row((f"{ours}linear_qkv.{kind}",), names, shapes, QKV(groups)))
    if qk_norm:
        rows += [_norm(f"{ours}{p}_layernorm.weight", hf=f"{theirs}{p}_norm.weight", size=width) for p in "qk"]
    rows.append(_linear(ours + "linear_proj.weight", theirs + "o_proj.weight", (hidden, sizes[0]), RowParallel()))
    return rows


def mlp_norm(config: HFConfig) -> Row:
    """The norm before the MLP or the experts. TransformerEngine fuses it into a dense fc1, never into experts."""
    return _norm(
        _LAYER + "mlp.linear_fc1.layer_norm_weight",
        _LAYER + "pre_mlp_layernorm.weight",
        hf=_HF_LAYER + "post_attention_layernorm.weight",
        size=config["hidden_size"],
    )


def gated_mlp(config: HFConfig) -> list[Row]:
    """Dense gated MLP."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    ours, theirs = _LAYER + "mlp.", _HF_LAYER + "mlp."
    gate_up = (theirs + "gate_proj.weight", theirs + "up_proj.weight")
    return [
        Row((ours + "linear_fc1.weight",), gate_up, ((ffn, hidden), (ffn, hidden)), GateUp()),
        _linear(ours + "linear_fc2.weight", theirs + "down_proj.weight", (hidden, ffn), RowParallel()),
    ]


def decoder_megatron(config: HFConfig, *, qkv_bias: bool, qk_norm: bool, **more: Any) -> MegatronConfig:
    """TransformerConfig and GPTModel arguments of a decoder with RMSNorm, SwiGLU and rope.

    `more` are further fields of TransformerConfig, such as those of MoE layers or latent attention.
    """
    transformer = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": num_groups(config),
        "kv_channels": head_dim(config),
        "layernorm_epsilon": config.get("rms_norm_eps", 1e-6),
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": silu,
        "add_bias_linear": False,
        "add_qkv_bias": qkv_bias,
        "qk_layernorm": qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": config.get("attention_dropout") or 0.0,
        **more,
    }
    gpt = {
        "vocab_size": config["vocab_size"],
        "max_sequence_length": config.get("max_position_embeddings", 4096),
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": bool(config.get("tie_word_embeddings")),
        # Latent attention makes its own rope, from TransformerConfig.
        **({} if more.get("multi_latent_attention") else rope_arguments(config["rope"])),
    }
    return MegatronConfig(transformer, gpt)


# megatron/core/models/common/embeddings/rotary_pos_embedding.py `_apply_scaling` has these three as constants.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_arguments(rope: Mapping[str, Any]) -> dict[str, Any]:
    """GPTModel arguments of a normalised `rope`. Raises UnsupportedConfigError for what Megatron-Core cannot do."""
    kind, extra = rope["type"], {k: v for k, v in rope.items() if k not in ("type", "theta")}
    arguments: dict[str, Any] = {"rotary_base": rope["theta"]}
    fraction = extra.pop("partial_rotary_factor", None)
    arguments["rotary_percent"] = 1.0 if fraction is None else fraction
    if kind == "linear":
        arguments["seq_len_interpolation_factor"] = _factor(extra)
        extra.pop("original_max_position_embeddings", None)  # has no part in linear scaling
    elif kind == "llama3":
        arguments |= {"rope_scaling": True, "rope_scaling_factor": _factor(extra)}
        for field, value in _LLAMA3_ROPE.items():
            found = extra.pop(field, None)
            if found != value:
                raise UnsupportedConfigError(
                    f"rope {field} = {found!r}: Megatron-Core's llama3 scaling is written for {value} only"
                )
    elif kind != "default":
        raise UnsupportedConfigError(
            f"rope type {kind!r}: only default, linear and llama3 can be expressed in Megatron-Core for this family"
        )
    if kind == "default":
        extra.pop("original_max_position_embeddings", None)
    left = {field: value for field, value in extra.items() if value is not None}
    if left:
        raise UnsupportedConfigError(f"rope of type {kind!r} has fields that are not mapped: {left}")
    return arguments


def _factor(rope: dict[str, Any]) -> float:
    factor = rope.pop("factor", None)
    if not isinstance(factor, (int, float)) or factor <= 0:
        raise ConfigError(f"rope scaling needs a positive factor, found {factor!r}")
    return float(factor)


def check_decoder(
    config: HFConfig,
    ignored: Sequence[str],
    *,
    mapped: Collection[str] = (),
    fixed: Mapping[str, Collection[Any]],
    check_rope: Callable[[HFConfig], object] = lambda config: rope_arguments(config["rope"]),
    layer_types: Collection[str] = ("full_attention",),
) -> None:
    """Checks that every family makes; `mapped` and `fixed` add the family's own fields."""
    require(config, REQUIRED_FIELDS)
    other = sorted(set(config.get("layer_types") or []) - set(layer_types))
    if other:
        raise UnsupportedConfigError(
            f"layer_types has {other}: only {' and '.join(layer_types)} is mapped for this family"
        )
    check_fields(config, MAPPED_FIELDS | {"layer_types", *mapped}, {**FIXED_FIELDS, **fixed}, ignored)
    if config["num_attention_heads"] % num_groups(config):
        raise ConfigError(
            f"num_attention_heads = {config['num_attention_heads']} is no multiple of "
            f"num_key_value_heads = {num_groups(config)}"
        )
    check_rope(config)


def tied_output(config: HFConfig) -> dict[str, str]:
    """Some tools write a tied model's output layer as a second copy of its embedding."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.get("tie_word_embeddings") else {}


def _norm(*mcore: str, hf: str, size: int) -> Row:
    return Row(mcore, (hf,), ((size,),), Replicated())


def _linear(mcore: str, hf: str, shape: tuple[int, int], op: Op) -> Row:
    return Row((mcore,), (hf,), (shape,), op)
