"""Configs of MoE families: published ones are understood, what changes the logits is mapped or refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mbridge import AutoBridge
from mbridge.errors import UnsupportedConfigError
from mbridge.families import find_family
from tests.mbridge.moe_coded import MODELS
from tests.mbridge.moe_hf import CASES

_YARN = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn",
}  # fmt: skip
_FP8 = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
}  # fmt: skip

# As published, in the spelling of transformers 4, with the number of parameters that the files hold (None: not known).
PUBLISHED: dict[str, tuple[dict[str, Any], int | None]] = {
    "Qwen1.5-MoE-A2.7B": ({
        "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
        "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16,
        "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    }, 14_315_784_192),
    "Qwen3-30B-A3B": ({
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 151936,
    }, 30_532_122_624),
    "Mixtral-8x7B": ({
        "architectures": ["MixtralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000,
    }, 46_702_792_704),
    "DeepSeek-V2-Lite": ({
        "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {}, "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001,
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
        "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1,
        "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "rope_theta": 10000,
        "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False,
        "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
        "vocab_size": 102400,
    }, 15_706_484_224),
    "DeepSeek-V3": ({
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {}, "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1,
        "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
        "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 0,
        "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "quantization_config": _FP8, "rms_norm_eps": 1e-06, "rope_scaling": _YARN, "rope_theta": 10000,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
        "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
        "vocab_size": 129280,
    }, 671_026_419_200),
    "Moonlight-16B-A3B": ({
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {}, "aux_loss_alpha": 0.001, "bos_token_id": 163584, "eos_token_id": 163585, "ep_size": 1,
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 11264, "kv_lora_rank": 512, "max_position_embeddings": 8192,
        "model_type": "deepseek_v3", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
        "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": True, "num_attention_heads": 16,
        "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "num_nextn_predict_layers": 0,
        "pad_token_id": 163838, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
        "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
        "vocab_size": 163840,
    }, None),
    "Kimi-K2": ({
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {}, "aux_loss_alpha": 0.001, "bos_token_id": 163584, "eos_token_id": 163585, "ep_size": 1,
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 131072, "model_type": "kimi_k2",
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 384,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "pretraining_tp": 1,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "quantization_config": _FP8,
        "rms_norm_eps": 1e-06, "rope_scaling": {**_YARN, "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
        "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "seq_aux": True,
        "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "use_cache": True, "v_head_dim": 128, "vocab_size": 163840,
    }, None),
    "GLM-4.5-Air": ({
        "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
        "eos_token_id": [151329, 151336, 151338], "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 10944, "max_position_embeddings": 131072,
        "model_type": "glm4_moe", "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96, "num_experts_per_tok": 8,
        "num_hidden_layers": 46, "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "pad_token_id": 151329,
        "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
        "routed_scaling_factor": 1.0, "tie_word_embeddings": False, "topk_group": 1, "torch_dtype": "bfloat16",
        "use_cache": True, "use_qk_norm": False, "vocab_size": 151552,
    }, 110_468_824_832 - 2 * 151552 * 4096),  # less its MTP layer's own copies of embedding and head
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_has_the_tensors_that_its_files_hold(name: str) -> None:
    config, num_parameters = PUBLISHED[name]
    specs = AutoBridge.from_config(config).hf_tensors()
    if num_parameters is not None:
        assert sum(math.prod(spec.shape) for spec in specs) == num_parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_a_published_config_means_to_megatron_core(name: str) -> None:
    config, _ = PUBLISHED[name]
    found = AutoBridge.from_config(config).megatron_config().transformer
    assert found["moe_router_topk"] == config["num_experts_per_tok"]
    assert found["moe_router_dtype"] == "fp32"
    assert found["moe_aux_loss_coeff"] == 0.0
    dense = config.get("first_k_dense_replace", 0)
    layers = config["num_hidden_layers"]
    assert found["moe_layer_freq"] == [0] * dense + [1] * (layers - dense)
    sigmoid = config["model_type"] in ("deepseek_v3", "kimi_k2", "glm4_moe")
    assert found.get("moe_router_score_function", "softmax") == ("sigmoid" if sigmoid else "softmax")
    assert found.get("moe_router_enable_expert_bias", False) is sigmoid
    renormalised = {"mixtral": True}.get(config["model_type"], config.get("norm_topk_prob"))
    if not sigmoid:
        assert found["moe_router_pre_softmax"] is not renormalised
    groups = config.get("n_group", 1)
    assert found.get("moe_router_num_groups") == (groups if groups > 1 else None)
    assert found.get("moe_router_topk_scaling_factor", 1.0) == config.get("routed_scaling_factor", 1.0)
    shared = config.get("n_shared_experts", 0) * config.get("moe_intermediate_size", 0)
    shared = config.get("shared_expert_intermediate_size", shared)
    assert found.get("moe_shared_expert_intermediate_size", 0) == shared
    assert found.get("moe_shared_expert_gate", False) is (config["model_type"] == "qwen2_moe")
    if "kv_lora_rank" in config:
        assert found["rope_type"] == ("yarn" if config["rope_scaling"] else "rope")
        assert found["qk_layernorm"]
        assert found["q_lora_rank"] == config["q_lora_rank"]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "topk_method"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func"),
    ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq"),
    ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("deepseek_v3", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1"),
    ("deepseek_v3", {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 4}, "topk_group"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias"),
    ("deepseek_v3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
    ("deepseek_v3", {"rope_scaling": {**_YARN, "mscale": None}}, "mscale"),
    ("deepseek_v3", {"rope_scaling": {**_YARN, "mscale": 0.7, "mscale_all_dim": 0}}, "mscale"),
    ("deepseek_v3", {"rope_scaling": {**_YARN, "attention_factor": 1.5}}, "attention_factor"),
    ("deepseek_v3", {"rope_scaling": {**_YARN, "truncate": False}}, "truncate"),
    ("glm4_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1"),
    ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("glm4_moe", {"rope_scaling": {**_YARN}}, "rope type 'yarn'"),
    ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen3_moe", {"attention_bias": True}, "attention_bias"),
    ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, "num_experts_per_tok = 1"),
    ("mixtral", {"sliding_window": 4096}, "sliding_window"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
    ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1"),
]


@pytest.mark.parametrize(("name", "changes", "field"), REFUSED, ids=str)
def test_what_megatron_core_cannot_do_is_refused_by_name(name: str, changes: dict[str, Any], field: str) -> None:
    AutoBridge.from_config(MODELS[name].config())
    with pytest.raises(UnsupportedConfigError) as caught:
        AutoBridge.from_config(MODELS[name].config(**changes))
    assert field in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deepseek_v3", {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 5}),  # 5 // 2 is 2 too
        ("deepseek_v3", {"rope_scaling": {**_YARN, "mscale": None, "mscale_all_dim": None}}),
        ("deepseek_v3", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
        ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    ],
    ids=str,
)
def test_what_it_can_do_is_not(name: str, changes: dict[str, Any]) -> None:
    AutoBridge.from_config(MODELS[name].config(**changes))


@pytest.mark.parametrize("case", CASES)
def test_both_generations_of_transformers_mean_the_same(case: str) -> None:
    from transformers import AutoConfig

    config = CASES[case].model.config()
    five = AutoConfig.for_model(**config).to_dict()
    assert "rope_parameters" in five
    ours, theirs = AutoBridge.from_config(config), AutoBridge.from_config(five)
    assert ours.hf_tensors() == theirs.hf_tensors()
    assert ours.megatron_config() == theirs.megatron_config()


def test_rope_tables_in_files_are_passed_over() -> None:
    """Moonlight's and Kimi-K2's checkpoints have them (Megatron-Bridge pull request 1838)."""
    for kind in ("deepseek_v3", "kimi_k2"):
        redundant = find_family(kind).redundant(dict(MODELS["moonlight"].config()))
        assert list(redundant) == ["model.layers.{layer}.self_attn.rotary_emb.inv_freq"]
