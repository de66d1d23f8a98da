"""Layouts of MoE layers, latent attention and MTP layers, written out from their definition by plain loops.

The independent side of the MoE and MLA tests, as reference.py is of the dense ones: nothing here uses mbridge.
Sources: megatron/core/transformer/moe/{router,experts,shared_experts}.py, multi_latent_attention.py,
multi_token_prediction.py; transformers/models/{qwen2_moe,qwen3_moe,mixtral,deepseek_v2,deepseek_v3,glm4_moe}.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tests.mbridge.reference import Shape, gate_up, padded_vocab, qkv, row_parallel, vocabulary

Experts = Literal["grouped", "sequential", "legacy"]

ARCHITECTURES = {
    "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "mixtral": "MixtralForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM", "glm4_moe": "Glm4MoeForCausalLM",
}  # fmt: skip


@dataclass(frozen=True)
class MoeModel:
    """Sizes of a decoder with experts. The defaults are small, and those that could be confused differ."""

    family: str = "qwen3_moe"
    layers: int = 3
    hidden: int = 12
    ffn: int = 16
    moe_ffn: int = 8
    shared_ffn: int = 20  # of families that give it; else moe_ffn * num_shared
    num_shared: int = 2
    num_experts: int = 8
    topk: int = 2
    heads: int = 4
    groups: int = 2
    head_dim: int = 6
    vocab: int = 37
    tied: bool = False
    # Which layers are dense: qwen's two fields, deepseek's and glm's one.
    sparse_step: int = 1
    mlp_only: tuple[int, ...] = ()
    first_dense: int = 0
    # Latent attention. kv_rank + rope is cut over tp=4 inside the latent, inside the rope and between.
    q_rank: int | None = 8
    kv_rank: int = 10
    nope: int = 4
    rope: int = 6
    value: int = 5
    num_mtp: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mla(self) -> bool:
        return self.family in ("deepseek_v2", "deepseek_v3")

    @property
    def qkv_bias(self) -> bool:
        return self.family in ("qwen2_moe", "glm4_moe")

    @property
    def qk_norm(self) -> bool:
        return self.family in ("qwen3_moe", "glm4_moe")

    @property
    def expert_bias(self) -> bool:
        return self.family in ("deepseek_v3", "glm4_moe")

    @property
    def shared(self) -> str | None:
        """What the shared experts' module is called on disk."""
        return {"qwen2_moe": "shared_expert", "qwen3_moe": None, "mixtral": None}.get(self.family, "shared_experts")

    @property
    def shared_width(self) -> int:
        return self.shared_ffn if self.family == "qwen2_moe" else self.moe_ffn * self.num_shared

    @property
    def moe_prefix(self) -> str:
        return "block_sparse_moe" if self.family == "mixtral" else "mlp"

    @property
    def projections(self) -> tuple[str, str, str]:
        """gate, up, down of a routed expert."""
        return ("w1", "w3", "w2") if self.family == "mixtral" else ("gate_proj", "up_proj", "down_proj")

    def is_dense(self, layer: int) -> bool:
        if layer >= self.layers:  # an MTP layer
            return False
        if self.family in ("qwen2_moe", "qwen3_moe"):
            return layer in self.mlp_only or (layer + 1) % self.sparse_step != 0
        return layer < self.first_dense

    def config(self, **more: Any) -> dict[str, Any]:
        """config.json as transformers 4 wrote it."""
        config: dict[str, Any] = {
            "model_type": self.family,
            "architectures": [ARCHITECTURES[self.family]],
            "hidden_size": self.hidden,
            "intermediate_size": self.moe_ffn if self.family == "mixtral" else self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads if self.mla else self.groups,
            "num_experts_per_tok": self.topk,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6 if self.mla else 1e-3,  # transformers' latents are normed with 1e-6 whatever is said
            "rope_theta": 5000.0,
            "torch_dtype": "float32",
        }
        if self.family in ("qwen3_moe", "mixtral", "glm4_moe"):
            config["head_dim"] = self.head_dim
        if self.family in ("qwen2_moe", "qwen3_moe"):
            config |= {
                "num_experts": self.num_experts,
                "moe_intermediate_size": self.moe_ffn,
                "decoder_sparse_step": self.sparse_step,
                "mlp_only_layers": list(self.mlp_only),
            }
        if self.family == "qwen2_moe":
            config["shared_expert_intermediate_size"] = self.shared_ffn
        if self.family == "mixtral":
            config["num_local_experts"] = self.num_experts
        if self.family in ("deepseek_v2", "deepseek_v3", "glm4_moe"):
            config |= {
                "n_routed_experts": self.num_experts,
                "n_shared_experts": self.num_shared,
                "moe_intermediate_size": self.moe_ffn,
                "first_k_dense_replace": self.first_dense,
                "num_nextn_predict_layers": self.num_mtp,
                "n_group": 1,
                "topk_group": 1,
            }
        if self.family == "deepseek_v2":
            del config["num_nextn_predict_layers"]
            config |= {"topk_method": "greedy", "norm_topk_prob": False}
        if self.family == "glm4_moe":
            config |= {"attention_bias": True, "use_qk_norm": True}
        if self.mla:
            config |= {
                "q_lora_rank": self.q_rank,
                "kv_lora_rank": self.kv_rank,
                "qk_nope_head_dim": self.nope,
                "qk_rope_head_dim": self.rope,
                "v_head_dim": self.value,
            }
        return {**config, **self.fields, **more}

    def hf_shapes(self) -> dict[str, Shape]:
        """Name -> shape of every tensor of the checkpoint, duplicates aside."""
        shapes: dict[str, Shape] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            shapes |= self._layer_shapes(layer)
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        for i in range(self.num_mtp):
            at = f"model.layers.{self.layers + i}."
            shapes |= {at + f"{name}.weight": (self.hidden,) for name in ("enorm", "hnorm", "shared_head.norm")}
            shapes[at + "eh_proj.weight"] = (self.hidden, 2 * self.hidden)
            shapes |= self._layer_shapes(self.layers + i)
        return shapes

    def _layer_shapes(self, layer: int) -> dict[str, Shape]:
        at, hidden = f"model.layers.{layer}.", self.hidden
        shapes: dict[str, Shape] = {
            at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
        }
        attention = at + "self_attn."
        if self.mla:
            rows = self.heads * (self.nope + self.rope)
            if self.q_rank is None:
                shapes[attention + "q_proj.weight"] = (rows, hidden)
            else:
                shapes[attention + "q_a_proj.weight"] = (self.q_rank, hidden)
                shapes[attention + "q_a_layernorm.weight"] = (self.q_rank,)
                shapes[attention + "q_b_proj.weight"] = (rows, self.q_rank)
            shapes[attention + "kv_a_proj_with_mqa.weight"] = (self.kv_rank + self.rope, hidden)
            shapes[attention + "kv_a_layernorm.weight"] = (self.kv_rank,)
            shapes[attention + "kv_b_proj.weight"] = (self.heads * (self.nope + self.value), self.kv_rank)
            shapes[attention + "o_proj.weight"] = (hidden, self.heads * self.value)
        else:
            sizes = {
                "q": self.heads * self.head_dim,
                "k": self.groups * self.head_dim,
                "v": self.groups * self.head_dim,
            }
            for letter, size in sizes.items():
                shapes[attention + f"{letter}_proj.weight"] = (size, hidden)
                if self.qkv_bias:
                    shapes[attention + f"{letter}_proj.bias"] = (size,)
            if self.qk_norm:
                shapes[attention + "q_norm.weight"] = (self.head_dim,)
                shapes[attention + "k_norm.weight"] = (self.head_dim,)
            shapes[attention + "o_proj.weight"] = (hidden, sizes["q"])
        if self.is_dense(layer):
            mlp = at + "mlp."
            return shapes | _mlp_shapes(mlp, ("gate_proj", "up_proj", "down_proj"), self.ffn, hidden)
        moe = f"{at}{self.moe_prefix}."
        shapes[moe + "gate.weight"] = (self.num_experts, hidden)
        if self.expert_bias:
            shapes[moe + "gate.e_score_correction_bias"] = (self.num_experts,)
        for expert in range(self.num_experts):
            shapes |= _mlp_shapes(f"{moe}experts.{expert}.", self.projections, self.moe_ffn, hidden)
        if self.shared is not None:
            names = ("gate_proj", "up_proj", "down_proj")
            shapes |= _mlp_shapes(f"{moe}{self.shared}.", names, self.shared_width, hidden)
        if self.family == "qwen2_moe":
            shapes[moe + "shared_expert_gate.weight"] = (1, hidden)
        return shapes

    def coded(self, dtype: torch.dtype = torch.int64) -> dict[str, torch.Tensor]:
        """Every tensor filled with integers, none of which occurs twice; expert biases in fp32, as they always are."""
        tensors, first = {}, 1
        for name, shape in self.hf_shapes().items():
            numel = math.prod(shape)
            kind = torch.float32 if name.endswith("e_score_correction_bias") else dtype
            tensors[name] = torch.arange(first, first + numel).to(kind).reshape(shape)
            first += numel
        assert first < 2**24, "float32 cannot tell the integers apart"
        return tensors


def _mlp_shapes(at: str, names: tuple[str, str, str], ffn: int, hidden: int) -> dict[str, Shape]:
    gate, up, down = names
    return {
        f"{at}{gate}.weight": (ffn, hidden),
        f"{at}{up}.weight": (ffn, hidden),
        f"{at}{down}.weight": (hidden, ffn),
    }


@dataclass(frozen=True)
class Place:
    """A rank's index and the size of each axis."""

    tp: int = 0
    tp_size: int = 1
    ep: int = 0
    ep_size: int = 1
    etp: int = 0
    etp_size: int = 1


def place_of(rank_in_stage: int, tp: int, ep: int, etp: int) -> Place:
    """Megatron-Core's order: tp varies fastest; experts count the same ranks anew, etp fastest, then ep."""
    return Place(rank_in_stage % tp, tp, rank_in_stage // etp % ep, ep, rank_in_stage % etp, etp)


def column(weight: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's share of the output features, which are the rows."""
    share = weight.shape[0] // size
    return torch.stack([weight[rank * share + i] for i in range(share)])


def local_tensors(
    model: MoeModel,
    hf: Mapping[str, torch.Tensor],
    place: Place,
    *,
    naming: Literal["te", "local"] = "local",
    experts: Experts = "sequential",
    layers: Iterable[int] | None = None,
    first: bool = True,
    last: bool = True,
    mtp_name: str = "transformer_layer",
) -> dict[str, torch.Tensor]:
    """All that a rank of a stage holds, under names with global layer numbers."""
    padded = padded_vocab(model.vocab, place.tp_size)
    embedding = vocabulary(hf["model.embed_tokens.weight"], place.tp, place.tp_size, padded)
    out: dict[str, torch.Tensor] = {}
    if first or (last and model.num_mtp):  # MTP layers embed too, on the last stage
        out["embedding.word_embeddings.weight"] = embedding
    for layer in range(model.layers) if layers is None else layers:
        out |= _layer(model, hf, place, f"decoder.layers.{layer}.", layer, naming, experts)
    if last:
        out["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if not model.tied:
            out["output_layer.weight"] = vocabulary(hf["lm_head.weight"], place.tp, place.tp_size, padded)
        elif not first:
            out["output_layer.weight"] = embedding
        for i in range(model.num_mtp):
            ours, theirs = f"mtp.layers.{i}.", f"model.layers.{model.layers + i}."
            out[ours + "enorm.weight"] = hf[theirs + "enorm.weight"]
            out[ours + "hnorm.weight"] = hf[theirs + "hnorm.weight"]
            out[ours + "final_layernorm.weight"] = hf[theirs + "shared_head.norm.weight"]
            out[ours + "eh_proj.weight"] = column(hf[theirs + "eh_proj.weight"], place.tp, place.tp_size)
            out |= _layer(model, hf, place, f"{ours}{mtp_name}.", model.layers + i, naming, experts)
    return out


def _layer(
    model: MoeModel, hf: Mapping[str, torch.Tensor], place: Place, ours: str, layer: int, naming: str, experts: Experts
) -> dict[str, torch.Tensor]:
    theirs = f"model.layers.{layer}."
    tp, size = place.tp, place.tp_size
    out = _latent_attention(model, hf, place, ours, theirs, naming) if model.mla else {}
    if not model.mla:
        norm = "self_attention.linear_qkv.layer_norm_weight" if naming == "te" else "input_layernorm.weight"
        out[ours + norm] = hf[theirs + "input_layernorm.weight"]
        for kind in ("weight", "bias") if model.qkv_bias else ("weight",):
            q, k, v = (hf[f"{theirs}self_attn.{letter}_proj.{kind}"] for letter in "qkv")
            out[f"{ours}self_attention.linear_qkv.{kind}"] = qkv(model, q, k, v, tp, size)  # type: ignore[arg-type]
        if model.qk_norm:
            out[ours + "self_attention.q_layernorm.weight"] = hf[theirs + "self_attn.q_norm.weight"]
            out[ours + "self_attention.k_layernorm.weight"] = hf[theirs + "self_attn.k_norm.weight"]
        out[ours + "self_attention.linear_proj.weight"] = row_parallel(hf[theirs + "self_attn.o_proj.weight"], tp, size)
    dense = model.is_dense(layer)
    fused = dense and naming == "te"
    norm = "mlp.linear_fc1.layer_norm_weight" if fused else "pre_mlp_layernorm.weight"
    out[ours + norm] = hf[theirs + "post_attention_layernorm.weight"]
    names = ("gate_proj", "up_proj", "down_proj")
    if dense:
        fc1, fc2 = _mlp(hf, theirs + "mlp.", names, tp, size)
        return out | {ours + "mlp.linear_fc1.weight": fc1, ours + "mlp.linear_fc2.weight": fc2}
    moe = f"{theirs}{model.moe_prefix}."
    out[ours + "mlp.router.weight"] = hf[moe + "gate.weight"]
    if model.expert_bias:
        out[ours + "mlp.router.expert_bias"] = hf[moe + "gate.e_score_correction_bias"]
    if model.shared is not None:
        fc1, fc2 = _mlp(hf, f"{moe}{model.shared}.", names, tp, size)  # over tp, not over the experts' etp
        out |= {ours + "mlp.shared_experts.linear_fc1.weight": fc1, ours + "mlp.shared_experts.linear_fc2.weight": fc2}
    if model.family == "qwen2_moe":
        out[ours + "mlp.shared_experts.gate_weight"] = hf[moe + "shared_expert_gate.weight"]
    num_local = model.num_experts // place.ep_size
    mine = []
    for i in range(num_local):
        at = f"{moe}experts.{place.ep * num_local + i}."
        mine.append(_mlp(hf, at, model.projections, place.etp, place.etp_size))
    return out | _named_experts(ours + "mlp.experts.", mine, experts)


def _mlp(
    hf: Mapping[str, torch.Tensor], at: str, names: tuple[str, str, str], rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up, down = (hf[f"{at}{name}.weight"] for name in names)
    return gate_up(gate, up, rank, size), row_parallel(down, rank, size)


def _named_experts(at: str, mine: list[tuple[torch.Tensor, torch.Tensor]], experts: Experts) -> dict[str, torch.Tensor]:
    out = {}
    if experts == "legacy":
        # GroupedMLP.forward: w1 = weight1.view(experts, hidden, -1), w2 = weight2.view(experts, -1, hidden), x @ w[i].
        hidden, width = mine[0][0].shape[1], mine[0][0].shape[0]
        inner = mine[0][1].shape[1]
        w1 = torch.stack([fc1.t() for fc1, _ in mine])  # [experts, hidden, gate and up]
        w2 = torch.stack([fc2.t() for _, fc2 in mine])  # [experts, ffn, hidden]
        out[at + "weight1"] = w1.reshape(hidden, len(mine) * width)
        out[at + "weight2"] = w2.reshape(len(mine) * inner, hidden)
        return out
    for i, (fc1, fc2) in enumerate(mine):
        if experts == "grouped":
            out[f"{at}linear_fc1.weight{i}"] = fc1
            out[f"{at}linear_fc2.weight{i}"] = fc2
        else:
            out[f"{at}local_experts.{i}.linear_fc1.weight"] = fc1
            out[f"{at}local_experts.{i}.linear_fc2.weight"] = fc2
    return out


def _latent_attention(
    model: MoeModel, hf: Mapping[str, torch.Tensor], place: Place, ours: str, theirs: str, naming: str
) -> dict[str, torch.Tensor]:
    tp, size = place.tp, place.tp_size
    ours_at, theirs_at = ours + "self_attention.", theirs + "self_attn."

    def down(weight: torch.Tensor) -> torch.Tensor:
        # TransformerEngine's are "duplicated", the local ones ColumnParallelLinear.
        return weight if naming == "te" else column(weight, tp, size)

    def norm(which: str) -> str:
        te = naming == "te"
        return f"{ours_at}linear_{which}_up_proj.layer_norm_weight" if te else f"{ours_at}{which}_layernorm.weight"

    out = {ours + "input_layernorm.weight": hf[theirs + "input_layernorm.weight"]}
    if model.q_rank is None:
        out[ours_at + "linear_q_proj.weight"] = column(hf[theirs_at + "q_proj.weight"], tp, size)
    else:
        out[ours_at + "linear_q_down_proj.weight"] = down(hf[theirs_at + "q_a_proj.weight"])
        out[norm("q")] = hf[theirs_at + "q_a_layernorm.weight"]
        out[ours_at + "linear_q_up_proj.weight"] = column(hf[theirs_at + "q_b_proj.weight"], tp, size)
    out[ours_at + "linear_kv_down_proj.weight"] = down(hf[theirs_at + "kv_a_proj_with_mqa.weight"])
    out[norm("kv")] = hf[theirs_at + "kv_a_layernorm.weight"]
    out[ours_at + "linear_kv_up_proj.weight"] = column(hf[theirs_at + "kv_b_proj.weight"], tp, size)
    out[ours_at + "linear_proj.weight"] = row_parallel(hf[theirs_at + "o_proj.weight"], tp, size)
    return out
