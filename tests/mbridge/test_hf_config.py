"""Configs: both generations of transformers mean the same; whatever changes the forward pass is mapped or refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mbridge import AutoBridge
from mbridge.errors import CheckpointError, ConfigError, MBridgeError, UnsupportedConfigError, UnsupportedModelError
from mbridge.hf_config import as_dict, normalise, read_hf_config
from tests.mbridge.reference import Model
from tests.mbridge.small_hf import CASES, LLAMA3, config_of

FAMILIES = ["llama", "qwen2", "qwen3"]

# As published (trimmed to what the files hold), in the spelling of transformers 4.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7b": {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
    },
    "Qwen2.5-7B": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2",
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 40960,
        "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_accepted_in_both_spellings(name: str) -> None:
    from transformers import AutoConfig

    four = PUBLISHED[name]
    five = AutoConfig.for_model(**{key: value for key, value in four.items() if key != "torch_dtype"})
    written_by_five = json.loads(five.to_json_string(use_diff=False))
    assert "rope_theta" not in written_by_five, "this transformers does not write the new spelling: test it otherwise"
    ours = [AutoBridge.from_config(config).megatron_config() for config in (four, five, written_by_five)]
    assert ours[0] == ours[1] == ours[2]
    assert ours[0].gpt["rotary_base"] == four.get("rope_theta", 10000.0)
    assert ours[0].transformer["kv_channels"] == four.get(
        "head_dim", four["hidden_size"] // four["num_attention_heads"]
    )
    assert ours[0].transformer["layernorm_epsilon"] == four["rms_norm_eps"]
    assert ours[0].gpt["share_embeddings_and_output_weights"] is four["tie_word_embeddings"]
    if "3.2" in name:
        assert (ours[0].gpt["rope_scaling"], ours[0].gpt["rope_scaling_factor"]) == (True, 32.0)


def test_spellings_of_rope() -> None:
    def rope(**fields: Any) -> dict[str, Any]:
        found: dict[str, Any] = normalise(fields)["rope"]
        return found

    assert rope() == {"type": "default", "theta": 10000.0}
    assert rope(rope_theta=5e5, rope_scaling=None) == {"type": "default", "theta": 5e5}
    assert rope(rope_scaling={"type": "linear", "factor": 2.0}) == {"type": "linear", "theta": 1e4, "factor": 2.0}
    new = rope(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    assert new == {"type": "linear", "theta": 5e5, "factor": 2.0}
    both = rope(rope_theta=5e5, rope_scaling={"type": "linear", "rope_type": "linear", "factor": 2.0})
    assert both == new


def test_padding_of_the_vocabulary() -> None:
    bridge = AutoBridge.from_config(Model(vocab=67).config(), make_vocab_size_divisible_by=8)
    assert [bridge.megatron_config(tp).gpt["vocab_size"] for tp in (1, 2, 4)] == [72, 80, 96]
    plain = AutoBridge.from_config(Model(vocab=67).config())
    assert [plain.megatron_config(tp).gpt["vocab_size"] for tp in (1, 2, 4)] == [67, 68, 68]


def test_head_dim_of_qwen3_is_128_unless_written() -> None:
    config = Model("qwen3").config()
    del config["head_dim"]
    assert AutoBridge.from_config(config).megatron_config().transformer["kv_channels"] == 128


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"foo_scale": 2.0}, "foo_scale = 2.0"),
        ({"foo_scale": 0}, "foo_scale = 0"),
        ({"foo_flag": False}, "foo_flag = False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, "longrope"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 2.0}}, "low_freq_factor = 2.0"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 4096}}, "original_max_position_embeddings"),
        ({"rope_scaling": {**LLAMA3, "foo": 1}}, "foo"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "foo": 1}}, "foo"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ],
)  # fmt: skip
def test_what_changes_the_forward_pass_and_is_not_mapped_is_refused_by_name(
    family: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedConfigError) as caught:
        AutoBridge.from_config(Model(family).config(**fields))
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AutoBridge.from_config(Model().config(**fields))
    assert named in str(caught.value)


def test_every_unknown_field_is_listed_and_can_be_vouched_for() -> None:
    config = Model().config(foo_scale=2.0, bar_scale=3.0)
    with pytest.raises(UnsupportedConfigError, match=r"(?s)foo_scale.*bar_scale.*ignore_config_fields"):
        AutoBridge.from_config(config)
    with pytest.raises(UnsupportedConfigError, match="bar_scale"):
        AutoBridge.from_config(config, ignore_config_fields=["foo_scale"])
    AutoBridge.from_config(config, ignore_config_fields=["foo_scale", "bar_scale"])


@pytest.mark.parametrize("model_type", ["gpt_neox", "", None, 3])
def test_an_unknown_model_type_lists_the_known(model_type: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"known are .*llama.*qwen2.*qwen3"):
        AutoBridge.from_config(Model().config(model_type=model_type))
    assert set(FAMILIES) <= set(AutoBridge.list_supported_models())


def test_unknown_keyword_arguments_are_a_type_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="torch_dtype"):
        AutoBridge.from_pretrained(tmp_path, torch_dtype=torch.float32)  # type: ignore[call-arg]
    bridge = AutoBridge.from_config(Model().config())
    with pytest.raises(TypeError, match="weights_path"):
        bridge.get_model(weights_path=tmp_path)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="strict"):
        bridge.load_weights([], tmp_path, strict=True)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("text", "named"),
    [(None, "no config.json"), (b"{", "cannot be read as JSON"), (b"[1]", "list"), (b"\xff\xfe", "cannot be read")],
)
def test_a_folder_without_a_usable_config(tmp_path: Path, text: bytes | None, named: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=named):
        AutoBridge.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "/no/such/folder", "not a hub id!", ""])
def test_neither_a_folder_nor_in_the_cache(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MBridgeError, match=r"downloads nothing|config\.json") as caught:
        AutoBridge.from_pretrained(name)
    assert isinstance(caught.value, CheckpointError | ConfigError)


def test_without_huggingface_hub_a_wrong_folder_is_still_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # its import then fails as if it were not installed
    with pytest.raises(CheckpointError, match="/no/such/folder is not a folder"):
        AutoBridge.from_pretrained("/no/such/folder")


def test_configs_of_other_kinds(tmp_path: Path) -> None:
    from transformers import Qwen3Config

    assert as_dict(Qwen3Config(vocab_size=7))["vocab_size"] == 7
    with pytest.raises(ConfigError, match="found int"):
        AutoBridge.from_config(3)
    (tmp_path / "config.json").write_text(json.dumps(config_of(CASES["qwen3"])))
    assert read_hf_config(tmp_path) == config_of(CASES["qwen3"])
    bridge = AutoBridge.from_pretrained(str(tmp_path))
    assert bridge.hf_config.rms_norm_eps == 1e-3
    assert bridge.path == tmp_path
