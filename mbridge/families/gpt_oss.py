"""gpt-oss: attention sinks, sliding windows in some layers, biases on every linear layer, experts fused on disk.

`mlp.experts.gate_up_proj` [experts, hidden, 2 * ffn] has gate in its even and up in its odd columns, and so has
`gate_up_proj_bias` [experts, 2 * ffn]; `down_proj` is [experts, ffn, hidden]. The activation is quick_gelu(gate) *
(up + 1), both clamped. Megatron-Core has expert biases at etp=1 only. Files in MXFP4 are not read.
Source: transformers/models/gpt_oss/modeling_gpt_oss.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import ConfigError, UnsupportedConfigError
from ..hf_config import HFConfig, require
from ..ops import Column, GateUp, Replicated
from . import Family, FusedExperts, MegatronConfig, Row
from ._blocks import (
    attention,
    check_decoder,
    decoder_megatron,
    embedding,
    mlp_norm,
    output_head,
    tied_output,
)
from ._moe import MoeNames, check_softmax_router, experts, layers_after, moe_megatron

_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."
_HF_EXPERTS = _HF_LAYER + "mlp.experts."
_NAMES = MoeNames(router=_HF_LAYER + "mlp.router.weight")
_FIELDS = ("num_experts", "num_experts_per_tok", "head_dim")
_SLIDING = "sliding_attention"
_WINDOW = {_SLIDING: 1, "full_attention": 0}
# Fields of yarn that are read besides type and theta; "truncate" rounds the ends of the ramp to whole dims.
_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")


def _rows(config: HFConfig) -> list[Row]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    num_experts, ffn = config["num_experts"], config["intermediate_size"]
    ours, theirs = _LAYER + "self_attention.", _HF_LAYER + "self_attn."
    layer = [
        *attention(config, qkv_bias=True, qk_norm=False),
        Row((ours + "linear_proj.bias",), (theirs + "o_proj.bias",), ((hidden,),), Replicated()),
        Row((ours + "core_attention.softmax_offset",), (theirs + "sinks",), ((heads,),), Column()),
        mlp_norm(config),
        *(replace(row, packed=None) for row in experts(config, num_experts, ffn, names=_NAMES)),
        Row((_LAYER + "mlp.router.bias",), (_HF_LAYER + "mlp.router.bias",), ((num_experts,),), Replicated()),
        Row(
            _bias_names("linear_fc1"), _hf_expert("bias", "gate_proj", "up_proj"), ((ffn,),) * 2, GateUp(axis="etp"),
            num_experts=num_experts,
        ),
        Row(
            _bias_names("linear_fc2"), _hf_expert("bias", "down_proj"), ((hidden,),), Replicated(),
            num_experts=num_experts,
        ),
    ]  # fmt: skip
    return [*embedding(config), *layer, *output_head(config)]


def _bias_names(linear: str) -> tuple[str, ...]:
    """Of TEGroupedMLP, and of SequentialMLP. Legacy GroupedMLP has no biases."""
    mlp = _LAYER + "mlp.experts."
    return (f"{mlp}{linear}.bias{{expert}}", f"{mlp}local_experts.{{expert}}.{linear}.bias")


def _hf_expert(kind: str, *projections: str) -> tuple[str, ...]:
    return tuple(f"{_NAMES.expert}{projection}.{kind}" for projection in projections)


def _fused(config: HFConfig) -> list[FusedExperts]:
    return [
        FusedExperts(
            _HF_EXPERTS + "gate_up_proj", _hf_expert("weight", "gate_proj", "up_proj"),
            transposed=True, interleaved=True, only=True,
        ),
        FusedExperts(_HF_EXPERTS + "down_proj", _hf_expert("weight", "down_proj"), transposed=True, only=True),
        FusedExperts(
            _HF_EXPERTS + "gate_up_proj_bias", _hf_expert("bias", "gate_proj", "up_proj"), interleaved=True, only=True
        ),
        FusedExperts(_HF_EXPERTS + "down_proj_bias", _hf_expert("bias", "down_proj"), only=True),
    ]  # fmt: skip


def _layer_types(config: HFConfig) -> list[str]:
    """One a layer; without the field they alternate, the first with a window."""
    given = config.get("layer_types")
    number = config["num_hidden_layers"]
    return list(given) if given else [(_SLIDING, "full_attention")[n % 2] for n in range(number)]


def _megatron(config: HFConfig) -> MegatronConfig:
    moe = moe_megatron(
        config,
        num_experts=config["num_experts"],
        ffn=config["intermediate_size"],
        layers=layers_after(config, 0),
        pre_softmax=False,
    )
    more = {
        "add_bias_linear": True,
        "activation_func": "quick_gelu",
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": config.get("swiglu_limit", 7.0),
        "softmax_type": "learnable",
        "layernorm_epsilon": config.get("rms_norm_eps", 1e-5),
    }
    if _SLIDING in _layer_types(config):
        # Megatron-Core counts the tokens before the present one, transformers that one too.
        more["window_size"] = (config["sliding_window"] - 1, 0)
        more["window_attn_skip_freq"] = [_WINDOW[kind] for kind in _layer_types(config)]
    rope = config["rope"]
    plain = {**config, "rope": {"type": "default", "theta": rope["theta"]}}
    made = decoder_megatron(plain, qkv_bias=True, qk_norm=False, **moe, **more, **_yarn(rope))
    return replace(made, gpt={**made.gpt, "position_embedding_type": "yarn"})


def _yarn(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of TransformerConfig that GPTModel reads for yarn."""
    both = bool(rope.get("mscale")) and bool(rope.get("mscale_all_dim"))  # transformers uses neither without the other
    truncate = rope.get("truncate")
    return {
        "yarn_rotary_scaling_factor": float(rope["factor"]),
        "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
        "yarn_beta_fast": rope.get("beta_fast") or 32,
        "yarn_beta_slow": rope.get("beta_slow") or 1,
        "yarn_mscale": rope["mscale"] if both else None,
        "yarn_mscale_all_dim": rope["mscale_all_dim"] if both else None,
        "yarn_correction_range_round_to_int": True if truncate is None else bool(truncate),
    }


def _check(config: HFConfig, ignored: Sequence[str]) -> None:
    require(config, _FIELDS)
    mapped = {*_FIELDS, "sliding_window", "swiglu_limit", "initial_context_length"}  # the last is in yarn's fields too
    if (config.get("quantization_config") or {}).get("quant_method") == "mxfp4":
        mapped.add("quantization_config")  # says how the files are written; Checkpoint refuses those
    fixed = {
        "attention_bias": (True,),
        "swiglu_alpha": (1.702,),  # the constant in Megatron-Core's quick_gelu
        "experts_per_token": (config["num_experts_per_tok"],),
    }
    check_decoder(config, ignored, mapped=mapped, fixed=fixed, layer_types=tuple(_WINDOW), check_rope=_check_rope)
    check_softmax_router({**config, "norm_topk_prob": True})
    kinds = _layer_types(config)
    if len(kinds) != config["num_hidden_layers"]:
        raise ConfigError(f"layer_types has {len(kinds)} entries for {config['num_hidden_layers']} layers")
    if _SLIDING in kinds and not config.get("sliding_window"):
        raise ConfigError(f"layer_types has {_SLIDING!r}, but sliding_window = {config.get('sliding_window')!r}")


def _check_rope(config: HFConfig) -> None:
    rope = config["rope"]
    if rope["type"] != "yarn":
        raise UnsupportedConfigError(
            f"rope type {rope['type']!r}: only yarn is mapped for this family (transformers takes one of its own where "
            "a config of gpt-oss has none)"
        )
    left = {k: v for k, v in rope.items() if k not in ("type", "theta", *_YARN) and v is not None}
    if left.pop("partial_rotary_factor", 1.0) != 1.0 or left:
        raise UnsupportedConfigError(f"yarn rope has fields that Megatron-Core cannot express without MLA: {left}")
    for name in ("factor", "original_max_position_embeddings"):
        if not rope.get(name):
            raise ConfigError(f"yarn rope needs {name}, found {rope.get(name)!r}")


FAMILY = Family(("gpt_oss",), _rows, _megatron, _check, fused_experts=_fused, duplicates=tied_output)
