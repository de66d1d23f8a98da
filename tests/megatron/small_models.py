"""A small Qwen2-like model for the tests of mbridge.megatron; conftest.py puts this folder on the path."""

from __future__ import annotations

from typing import Any

import torch

from mbridge.families import MegatronConfig

NUM_LAYERS, HIDDEN, FFN, HEADS, GROUPS, HEAD_DIM, VOCAB = 4, 32, 48, 4, 2, 8, 64
BATCH, LENGTH, NUM_MICROBATCHES = 2, 8, 4


def small_qwen2(*, tied: bool = False, num_layers: int = NUM_LAYERS, **transformer: Any) -> MegatronConfig:
    return MegatronConfig(
        transformer={
            "num_layers": num_layers,
            "hidden_size": HIDDEN,
            "ffn_hidden_size": FFN,
            "num_attention_heads": HEADS,
            "num_query_groups": GROUPS,
            "kv_channels": HEAD_DIM,
            "normalization": "RMSNorm",
            "layernorm_epsilon": 1e-6,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "add_qkv_bias": True,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            **transformer,
        },
        gpt={
            "vocab_size": VOCAB,
            "max_sequence_length": 64,
            "position_embedding_type": "rope",
            "rotary_base": 10000,
            "share_embeddings_and_output_weights": tied,
        },
    )


def small_moe(**transformer: Any) -> MegatronConfig:
    return small_qwen2(
        num_moe_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=16,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_router_dtype="fp32",
        moe_grouped_gemm=True,
        moe_token_dispatcher_type="alltoall",
        **transformer,
    )


def small_mla(**transformer: Any) -> MegatronConfig:
    return small_qwen2(
        multi_latent_attention=True,
        num_query_groups=HEADS,
        add_qkv_bias=False,
        qk_layernorm=True,
        kv_lora_rank=12,
        qk_head_dim=8,
        qk_pos_emb_head_dim=4,
        v_head_dim=6,
        rope_type="rope",
        rotary_base=10000,
        **transformer,
    )
