"""Rows and config fields of mixture-of-experts layers: router, routed experts, shared experts, MTP layers.

Names and layouts: megatron/core/transformer/moe/{router,experts,shared_experts}.py, multi_token_prediction.py (0.16.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import UnsupportedConfigError
from ..hf_config import HFConfig
from ..ops import Column, GateUp, Replicated, RowParallel
from . import FusedExperts, Row

_MLP = "decoder.layers.{layer}.mlp."
_HF_MLP = "model.layers.{layer}.mlp."


@dataclass(frozen=True, slots=True)
class MoeNames:
    """What a family calls the tensors of an MoE layer on disk."""

    router: str = _HF_MLP + "gate.weight"
    expert: str = _HF_MLP + "experts.{expert}."
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = _HF_MLP + "shared_experts."
    shared_gate: str = _HF_MLP + "shared_expert_gate.weight"
    expert_bias: str = _HF_MLP + "gate.e_score_correction_bias"


def sparse_step_layers(config: HFConfig) -> tuple[int, ...]:
    """MoE layers of Qwen2-MoE and Qwen3-MoE: each `decoder_sparse_step`-th, less `mlp_only_layers`."""
    step = config.get("decoder_sparse_step") or 1
    dense = set(config.get("mlp_only_layers") or ())
    return tuple(n for n in range(config["num_hidden_layers"]) if n not in dense and (n + 1) % step == 0)


def layers_after(config: HFConfig, num_dense: int) -> tuple[int, ...]:
    """MoE layers of families whose first `num_dense` layers are dense."""
    return tuple(range(num_dense, config["num_hidden_layers"]))


def other_layers(config: HFConfig, layers: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for n in range(config["num_hidden_layers"]) if n not in set(layers))


def in_layers(rows: Sequence[Row], layers: tuple[int, ...]) -> list[Row]:
    """The rows for some layers only."""
    return [replace(row, layers=layers) for row in rows] if layers else []


def experts(
    config: HFConfig,
    num_experts: int,
    ffn: int,
    *,
    names: MoeNames,
    shared_ffn: int = 0,
    shared_gate: bool = False,
    expert_bias: bool = False,
) -> list[Row]:
    """Router, experts and shared experts of an MoE layer; the norm before them is the dense MLP's."""
    hidden = config["hidden_size"]
    rows = [Row((_MLP + "router.weight",), (names.router,), ((num_experts, hidden),), Replicated())]
    if expert_bias:
        rows.append(
            Row(
                (_MLP + "router.expert_bias",), (names.expert_bias,), ((num_experts,),), Replicated(),
                dtype=torch.float32,
            )
        )  # fmt: skip
    if shared_ffn:
        shared = _MLP + "shared_experts."
        gate_up = tuple(f"{names.shared}{part}.weight" for part in (names.gate, names.up))
        down = f"{names.shared}{names.down}.weight"
        rows.append(Row((shared + "linear_fc1.weight",), gate_up, ((shared_ffn, hidden),) * 2, GateUp()))
        rows.append(Row((shared + "linear_fc2.weight",), (down,), ((hidden, shared_ffn),), RowParallel()))
    if shared_gate:
        gate = _MLP + "shared_experts.gate_weight"
        rows.append(Row((gate,), (names.shared_gate,), ((1, hidden),), Replicated()))
    gate_up = tuple(f"{names.expert}{part}.weight" for part in (names.gate, names.up))
    rows.append(
        Row(
            _expert_names("linear_fc1"), gate_up, ((ffn, hidden),) * 2, GateUp(axis="etp"),
            num_experts=num_experts, packed=_MLP + "experts.weight1",
        )
    )  # fmt: skip
    rows.append(
        Row(
            _expert_names("linear_fc2"), (f"{names.expert}{names.down}.weight",), ((hidden, ffn),),
            RowParallel(axis="etp"), num_experts=num_experts, packed=_MLP + "experts.weight2",
        )
    )  # fmt: skip
    return rows


def _expert_names(linear: str) -> tuple[str, ...]:
    """Of TEGroupedMLP, and of SequentialMLP."""
    return (f"{_MLP}experts.{linear}.weight{{expert}}", f"{_MLP}experts.local_experts.{{expert}}.{linear}.weight")


def fused_experts(names: MoeNames, *, prefix: str = _HF_MLP) -> list[FusedExperts]:
    """Both orientations of fused expert tensors; which one a file has is seen from its shape, or by the config."""
    gate_up = tuple(f"{names.expert}{part}.weight" for part in (names.gate, names.up))
    down = (f"{names.expert}{names.down}.weight",)
    return [
        FusedExperts(prefix + "experts.gate_up_proj", gate_up),
        FusedExperts(prefix + "experts.down_proj", down),
    ]


def moe_megatron(
    config: HFConfig, *, num_experts: int, ffn: int, layers: Sequence[int], pre_softmax: bool
) -> dict[str, Any]:
    """TransformerConfig fields of MoE layers. Auxiliary losses are off: RL trains without them."""
    chosen = set(layers)
    return {
        "num_moe_experts": num_experts,
        "moe_ffn_hidden_size": ffn,
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_layer_freq": [int(n in chosen) for n in range(config["num_hidden_layers"])],
        "moe_router_pre_softmax": pre_softmax,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
    }


def check_softmax_router(config: HFConfig) -> None:
    """Megatron-Core has no softmax over a single chosen expert, whose weight HF would set to 1."""
    if config["num_experts_per_tok"] == 1 and config.get("norm_topk_prob"):
        raise UnsupportedConfigError(
            "num_experts_per_tok = 1 with norm_topk_prob = True: Megatron-Core cannot renormalise over one expert"
        )


def sigmoid_router(config: HFConfig) -> dict[str, Any]:
    """TransformerConfig fields of DeepSeek-V3's router: sigmoid scores, a bias for choosing, groups, a scale."""
    fields: dict[str, Any] = {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": config.get("routed_scaling_factor") or 1.0,
    }
    if (config.get("n_group") or 1) > 1:
        fields |= {"moe_router_num_groups": config["n_group"], "moe_router_group_topk": config["topk_group"]}
    return fields


def check_sigmoid_router(config: HFConfig) -> None:
    """What Megatron-Core's sigmoid router cannot do (megatron/core/transformer/moe/moe_utils.py)."""
    # A config without the field means True, as transformers' classes do.
    if config["num_experts_per_tok"] == 1 and config.get("norm_topk_prob") is not False:
        raise UnsupportedConfigError(
            "num_experts_per_tok = 1 with norm_topk_prob = True: Megatron-Core leaves a single expert's score as it is"
        )
    if config["num_experts_per_tok"] > 1 and config.get("norm_topk_prob") is False:
        raise UnsupportedConfigError(
            "norm_topk_prob = False with sigmoid scores: Megatron-Core always renormalises the chosen experts' scores"
        )
    groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
    if groups > 1 and config["num_experts_per_tok"] // chosen != 2:
        raise UnsupportedConfigError(
            f"num_experts_per_tok = {config['num_experts_per_tok']} with topk_group = {chosen}: transformers scores a "
            "group by its two best experts, Megatron-Core by num_experts_per_tok // topk_group of them, which must be 2"
        )


def mtp_rows(config: HFConfig, layer: Sequence[Row], num_mtp: int) -> list[Row]:
    """Multi-token-prediction layers: on disk they are the layers after the last, `model.layers.{N+i}`.

    They are HF tensors of their own but for the copies of embedding and head, which `mtp_duplicates` lists.
    """
    if not num_mtp:
        return []
    hidden, offset = config["hidden_size"], config["num_hidden_layers"]
    ours, theirs = "mtp.layers.{layer}.", "model.layers.{layer}."
    rows = [
        Row((f"{ours}{n}.weight",), (f"{theirs}{hf}.weight",), ((hidden,),), Replicated())
        for n, hf in (("enorm", "enorm"), ("hnorm", "hnorm"), ("final_layernorm", "shared_head.norm"))
    ]
    rows.append(Row((ours + "eh_proj.weight",), (theirs + "eh_proj.weight",), ((hidden, 2 * hidden),), Column()))
    for row in layer:
        # Megatron-LM's main branch has renamed the first of these to the second.
        inner = [
            name.replace("decoder.layers.{layer}.", f"{ours}{kind}.")
            for name in row.mcore
            for kind in ("transformer_layer", "mtp_model_layer")
        ]
        packed = row.packed and row.packed.replace("decoder.layers.{layer}.", ours + "transformer_layer.")
        rows.append(replace(row, mcore=tuple(inner), packed=packed))
    return [replace(row, layers=tuple(range(num_mtp)), hf_offset=offset, optional=True) for row in rows]


def mtp_duplicates(config: HFConfig) -> dict[str, str]:
    """Each MTP layer's own copies of embedding and head, which DeepSeek-V3's files carry."""
    head = "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    first, number = config["num_hidden_layers"], config.get("num_nextn_predict_layers") or 0
    copies = {}
    for layer in range(first, first + number):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{layer}.shared_head.head.weight"] = head
    return copies
