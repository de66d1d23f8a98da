"""config.json of a Hugging Face model as one plain dict, whichever transformers generation wrote it.

transformers 4 writes `rope_theta` and `rope_scaling`, `torch_dtype`; transformers 5 writes `rope_parameters`, `dtype`,
and `layer_types`. Families see one spelling only: `rope` = {"theta", "type", ...} and the rest as it stands. Which
fields a family understands is checked by `check_fields`: a field that nobody read is refused, not ignored.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError, UnsupportedConfigError, listed

HFConfig = dict[str, Any]

# Fields that do not change the logits: bookkeeping, generation, training-time, and class attributes that
# PretrainedConfig.to_dict() spells out.
NEUTRAL_FIELDS = frozenset(
    """
    model_type architectures auto_map transformers_version _name_or_path _commit_hash _attn_implementation
    _attn_implementation_autoset _attn_implementation_internal _experts_implementation_internal
    _experts_implementation dtype torch_dtype name_or_path
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id
    bos_token eos_token pad_token unk_token
    use_cache return_dict return_dict_in_generate output_hidden_states output_attentions output_scores torchscript
    initializer_range pretraining_tp is_decoder is_encoder_decoder add_cross_attention cross_attention_hidden_size
    tie_encoder_decoder tokenizer_class prefix problem_type num_labels id2label label2id finetuning_task
    task_specific_params chunk_size_feed_forward pruned_heads use_bfloat16 tf_legacy_loss generation_config
    base_model_tp_plan base_model_pp_plan max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    router_aux_loss_coef output_router_logits
    """.split()
)


def read_hf_config(folder: Path) -> HFConfig:
    """The raw dict of `folder`/config.json. Raises ConfigError when it is absent or not JSON."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} has no config.json: expected the folder of a Hugging Face checkpoint") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, expected an object")
    return raw


def as_dict(config: object) -> HFConfig:
    """A config as a dict: a mapping, or anything with `to_dict()` such as a transformers PretrainedConfig."""
    if isinstance(config, Mapping):
        return dict(config)
    to_dict = getattr(config, "to_dict", None)
    if to_dict is None:
        raise ConfigError(f"expected a config dict or a transformers PretrainedConfig, found {type(config).__name__}")
    return dict(to_dict())


def normalise(raw: Mapping[str, Any]) -> HFConfig:
    """One spelling for both generations. The result has `rope`, and none of the fields that it was made from."""
    config = dict(raw)
    parameters = config.pop("rope_parameters", None) or {}
    scaling = config.pop("rope_scaling", None) or {}
    theta = config.pop("rope_theta", None)
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise UnsupportedConfigError(
            f"rope_parameters differ by layer type ({', '.join(parameters)}): Megatron-Core has one rope for all layers"
        )
    rope = {**scaling, **parameters}
    # transformers 4 wrote "type" before it wrote "rope_type", and both for a while.
    legacy = rope.pop("type", None)
    rope_type = rope.pop("rope_type", None) or legacy or "default"
    theta = rope.pop("rope_theta", None) or theta or 10000.0
    config["rope"] = {"type": rope_type, "theta": float(theta), **rope}
    if config.get("num_mtp_layers") is not None:
        config.setdefault("num_nextn_predict_layers", config["num_mtp_layers"])
    config.pop("num_mtp_layers", None)
    if "num_local_experts" in config and "num_experts" not in config:
        config["num_experts"] = config.pop("num_local_experts")
    return config


def as_classifier(raw: Mapping[str, Any], num_labels: int, *, bias: bool) -> HFConfig:
    """config.json of a model that is saved with a value head of `num_labels` rows instead of its output layer.

    transformers reads the number of labels from `id2label`, and takes 2 without it.
    """
    config = dict(raw)
    kind = "ForTokenClassification" if bias else "ForSequenceClassification"
    architectures = config.get("architectures") or []
    config["architectures"] = [
        name.removesuffix("ForCausalLM") + kind if name.endswith("ForCausalLM") else name for name in architectures
    ]
    known = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
    if known != num_labels:
        config["id2label"] = {str(n): f"LABEL_{n}" for n in range(num_labels)}
        config["label2id"] = {f"LABEL_{n}": n for n in range(num_labels)}
        config.pop("num_labels", None)
    return config


def require(config: Mapping[str, Any], fields: Collection[str]) -> None:
    """Raise ConfigError naming every field of `fields` that the config lacks."""
    absent = [field for field in fields if config.get(field) is None]
    if absent:
        raise ConfigError(f"the config of a {config.get('model_type')!r} model lacks {', '.join(absent)}")


def _is_block_fp8(quantisation: Any) -> bool:
    """Whether weights are fp8 in blocks of 128 x 128 (mbridge/fp8.py): they are dequantised while they are read."""
    return (
        isinstance(quantisation, Mapping)
        and quantisation.get("quant_method") == "fp8"
        and list(quantisation.get("weight_block_size") or ()) == [128, 128]
    )


def check_fields(
    config: Mapping[str, Any],
    mapped: Collection[str],
    fixed: Mapping[str, Collection[Any]],
    ignored: Collection[str] = (),
) -> None:
    """Raise UnsupportedConfigError unless every field is understood.

    `mapped` are the fields that the family turns into Megatron-Core's, `fixed` those that it supports at the listed
    values only, `ignored` those that the caller vouches for. A field set to None, or one of NEUTRAL_FIELDS, is fine.
    """
    problems = []
    for field, value in config.items():
        if value is None or field in NEUTRAL_FIELDS or field in mapped or field in ignored:
            continue
        if field == "quantization_config" and _is_block_fp8(value):
            continue
        if field not in fixed:
            problems.append(f"{field} = {value!r}: this family does not know it")
        elif value not in fixed[field]:
            allowed = " or ".join(repr(v) for v in fixed[field])
            problems.append(f"{field} = {value!r}: only {allowed} can be expressed in Megatron-Core")
    if problems:
        raise UnsupportedConfigError(
            f"the config of this {config.get('model_type')!r} model has fields that may change its forward pass and "
            f"are not mapped:\n{listed(problems)}\n"
            "If one of them does not matter, name it in ignore_config_fields=(...)."
        )
