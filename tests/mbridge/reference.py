"""Megatron-Core's layouts written out from their definition, element by element, by plain loops.

The independent side of the layout tests: nothing here uses mbridge. A `Model` is the sizes of a small decoder; from it
follow the names and shapes of its HF tensors and, given their values, what one rank must hold.
Sources: megatron/core/transformer/attention.py and mlp.py, transformers/models/{llama,qwen2,qwen3}.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder. The defaults are small, and no two of them that could be confused are equal."""

    family: str = "qwen2"
    layers: int = 2
    hidden: int = 24
    ffn: int = 40
    heads: int = 8
    groups: int = 2
    head_dim: int = 4
    vocab: int = 37
    tied: bool = False

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    def config(self, **more: Any) -> dict[str, Any]:
        """config.json as transformers 4 wrote it."""
        return {
            "model_type": self.family,
            "architectures": [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[self.family] + "ForCausalLM"],
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-3,
            "rope_theta": 5000.0,
            "torch_dtype": "float32",
            **more,
        }

    def hf_shapes(self) -> dict[str, Shape]:
        """Name -> shape of every tensor of the checkpoint."""
        q, kv = self.heads * self.head_dim, self.groups * self.head_dim
        shapes: dict[str, Shape] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            shapes[at + "input_layernorm.weight"] = (self.hidden,)
            shapes[at + "self_attn.q_proj.weight"] = (q, self.hidden)
            shapes[at + "self_attn.k_proj.weight"] = (kv, self.hidden)
            shapes[at + "self_attn.v_proj.weight"] = (kv, self.hidden)
            if self.qkv_bias:
                shapes[at + "self_attn.q_proj.bias"] = (q,)
                shapes[at + "self_attn.k_proj.bias"] = (kv,)
                shapes[at + "self_attn.v_proj.bias"] = (kv,)
            if self.qk_norm:
                shapes[at + "self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[at + "self_attn.k_norm.weight"] = (self.head_dim,)
            shapes[at + "self_attn.o_proj.weight"] = (self.hidden, q)
            shapes[at + "post_attention_layernorm.weight"] = (self.hidden,)
            shapes[at + "mlp.gate_proj.weight"] = (self.ffn, self.hidden)
            shapes[at + "mlp.up_proj.weight"] = (self.ffn, self.hidden)
            shapes[at + "mlp.down_proj.weight"] = (self.hidden, self.ffn)
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes

    def coded(self, dtype: torch.dtype = torch.int64) -> dict[str, torch.Tensor]:
        """Every tensor filled with integers, none of which occurs twice in the whole model; 0 occurs nowhere."""
        tensors, first = {}, 1
        for name, shape in self.hf_shapes().items():
            numel = math.prod(shape)
            tensors[name] = torch.arange(first, first + numel).to(dtype).reshape(shape)
            first += numel
        assert dtype is torch.int64 or first < 2**24, "float32 cannot tell the integers apart"
        return tensors


def padded_vocab(vocab: int, tp: int, divisor: int = 1) -> int:
    rows = vocab
    while rows % (tp * divisor):
        rows += 1
    return rows


def qkv(model: Model, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    """Group after group the rows of its query heads, its key head, its value head; then an equal share of all."""
    rows = []
    heads_a_group = model.heads // model.groups
    for group in range(model.groups):
        for head in range(group * heads_a_group, (group + 1) * heads_a_group):
            rows += [q[head * model.head_dim + row] for row in range(model.head_dim)]
        for tensor in (k, v):
            rows += [tensor[group * model.head_dim + row] for row in range(model.head_dim)]
    share = len(rows) // tp
    return torch.stack([rows[rank * share + i] for i in range(share)])


def gate_up(gate: torch.Tensor, up: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    """This rank's gate rows, then its up rows."""
    share = gate.shape[0] // tp
    rows = []
    for tensor in (gate, up):
        rows += [tensor[rank * share + i] for i in range(share)]
    return torch.stack(rows)


def row_parallel(weight: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    """This rank's share of the input features, which are the columns."""
    share = weight.shape[1] // tp
    return torch.stack([weight[:, rank * share + i] for i in range(share)], dim=1)


def vocabulary(weight: torch.Tensor, rank: int, tp: int, padded: int) -> torch.Tensor:
    """This rank's share of the rows; those from the vocabulary's size on are padding, which is zero."""
    share = padded // tp
    out = torch.zeros((share, weight.shape[1]), dtype=weight.dtype)
    for i in range(share):
        token = rank * share + i
        if token < weight.shape[0]:
            out[i] = weight[token]
    return out


def local_tensors(
    model: Model,
    hf: Mapping[str, torch.Tensor],
    *,
    rank: int,
    tp: int,
    naming: str = "local",
    layers: Iterable[int] | None = None,
    first: bool = True,
    last: bool = True,
    padded: int | None = None,
) -> dict[str, torch.Tensor]:
    """All that tensor-parallel rank `rank` of a stage holds, under names with global layer numbers.

    `layers` are those of the stage; `first` and `last` say whether it embeds, and whether it makes logits.
    """
    padded = padded_vocab(model.vocab, tp) if padded is None else padded
    out: dict[str, torch.Tensor] = {}
    embedding = vocabulary(hf["model.embed_tokens.weight"], rank, tp, padded)
    if first:
        out["embedding.word_embeddings.weight"] = embedding
    for layer in range(model.layers) if layers is None else layers:
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        before_attention, before_mlp = {
            "local": ("input_layernorm.weight", "pre_mlp_layernorm.weight"),
            "te": ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"),
        }[naming]
        out[ours + before_attention] = hf[theirs + "input_layernorm.weight"]
        out[ours + before_mlp] = hf[theirs + "post_attention_layernorm.weight"]
        for kind in ("weight", "bias") if model.qkv_bias else ("weight",):
            q, k, v = (hf[f"{theirs}self_attn.{letter}_proj.{kind}"] for letter in "qkv")
            out[f"{ours}self_attention.linear_qkv.{kind}"] = qkv(model, q, k, v, rank, tp)
        if model.qk_norm:
            out[ours + "self_attention.q_layernorm.weight"] = hf[theirs + "self_attn.q_norm.weight"]
            out[ours + "self_attention.k_layernorm.weight"] = hf[theirs + "self_attn.k_norm.weight"]
        out[ours + "self_attention.linear_proj.weight"] = row_parallel(hf[theirs + "self_attn.o_proj.weight"], rank, tp)
        gate, up = hf[theirs + "mlp.gate_proj.weight"], hf[theirs + "mlp.up_proj.weight"]
        out[ours + "mlp.linear_fc1.weight"] = gate_up(gate, up, rank, tp)
        out[ours + "mlp.linear_fc2.weight"] = row_parallel(hf[theirs + "mlp.down_proj.weight"], rank, tp)
    if last:
        out["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if not model.tied:
            out["output_layer.weight"] = vocabulary(hf["lm_head.weight"], rank, tp, padded)
        elif not first:  # tied over several stages: the last one has the embedding a second time
            out["output_layer.weight"] = embedding
    return out
