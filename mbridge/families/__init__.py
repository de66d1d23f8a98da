"""Families: one file each, a table of weights and a mapping of the config.

A family is a module of this package (its name does not begin with "_") or of a package that an entry point of the group
`mbridge.families` names. It has one object, `FAMILY`. Families are found by their files: a new family is a new file.
Nothing here imports megatron or transformers.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import torch

from ..errors import UnsupportedModelError
from ..hf_config import HFConfig
from ..ops import Op, Replicated
from ..pieces import Shape


@dataclass(frozen=True, slots=True)
class MegatronConfig:
    """What a family's HF config means in Megatron-Core's words."""

    transformer: Mapping[str, Any]  # keyword arguments of TransformerConfig
    gpt: Mapping[str, Any]  # keyword arguments of GPTModel


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter of Megatron-Core and the HF tensors that it is made of.

    `mcore` lists the names it goes by: TransformerEngine's, the local spec's. `{layer}` stands for a layer number, in
    `mcore` the one of the module's own list (global, from 0) and in `hf` that plus `hf_offset`; `{expert}` for an
    expert, global in `hf` and, in Megatron-Core's names, counted from the rank's first. `hf` and `shapes` give the HF
    tensors in the order that the op lays them out.
    """

    mcore: tuple[str, ...]
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]
    op: Op
    copy: bool = False
    """It holds values that another parameter answers for (a tied output layer): it is loaded, and never sent."""
    first_stage: bool = False
    """The first pipeline stage answers for it; where a later one has it too (to embed for MTP layers), it is a copy."""
    layers: tuple[int, ...] | None = None
    """The layers that have it; None is all of the decoder."""
    hf_offset: int = 0
    num_experts: int = 0
    """There is one for each of so many experts, divided over the ep axis."""
    packed: str | None = None
    """The name of one tensor that holds this parameter of all local experts side by side, each transposed: legacy
    GroupedMLP's weight1 and weight2 (megatron/core/transformer/moe/experts.py)."""
    dtype: torch.dtype | None = None
    """Another dtype than the model's, kept end to end."""
    optional: bool = False
    """An engine may leave it unread: MTP layers, which engines load only to speculate."""

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.mcore[0]


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """One on-disk tensor that holds some matrices of all experts of a layer, where the table has one tensor each.

    `parts` are the table's names (with {layer} and {expert}), stacked along their dim 0 in this order; the tensor is
    [experts, rows of all parts, columns], or with the last two dims exchanged where `transposed`; of biases it is
    [experts, rows of all parts].
    Sources: transformers 5 `conversion_mapping.py` (written with save_original_format=False), and Qwen3-VL-MoE's files.
    """

    name: str
    parts: tuple[str, ...]
    transposed: bool = False
    """Always. Otherwise the shapes in a file tell."""
    interleaved: bool = False
    """The rows of two parts alternate instead; they lie along the tensor's last dim."""
    only: bool = False
    """Files and engines know no other spelling, so it is also that of a model without a checkpoint."""


@dataclass(frozen=True, slots=True)
class ValueHead:
    """A linear layer in the place of the output layer, whole on every rank: a critic's values, a reward model's score.

    Frameworks put it there in a callback after building. On disk it is `score`, as in transformers'
    AutoModelForTokenClassification (with bias) and AutoModelForSequenceClassification (without).
    """

    size: int
    """Values for each token: rows of its weight [size, hidden]."""
    bias: bool = False
    dtype: torch.dtype | None = None
    """Another dtype than the model's."""


LM_HEAD = "lm_head.weight"


def with_value_head(rows: Sequence[Row], head: ValueHead, hidden: int) -> list[Row]:
    """A family's rows with `head` instead of the output layer."""
    kinds: dict[str, Shape] = {"weight": (head.size, hidden), **({"bias": (head.size,)} if head.bias else {})}
    replaced: list[Row] = []
    for row in rows:
        if row.mcore != ("output_layer.weight",):
            replaced.append(row)
            continue
        replaced += [
            Row((f"output_layer.{kind}",), (f"score.{kind}",), (shape,), Replicated(), dtype=head.dtype)
            for kind, shape in kinds.items()
        ]
    return replaced


@dataclass(frozen=True, slots=True)
class Family:
    """All that mbridge knows of a model family. `config` arguments are normalised HF configs (hf_config.normalise)."""

    model_types: tuple[str, ...]
    rows: Callable[[HFConfig], Sequence[Row]]
    """The table, in layer order: rows before the layers, those of a layer, those after."""
    megatron: Callable[[HFConfig], MegatronConfig]
    check: Callable[[HFConfig, Sequence[str]], None]
    """Raises ConfigError for a config that cannot be expressed; the second argument lists fields to pass over."""
    fused_experts: Callable[[HFConfig], Sequence[FusedExperts]] = lambda config: ()
    """How checkpoints that keep a layer's experts in one tensor name and lay them out."""
    duplicates: Callable[[HFConfig], Mapping[str, str]] = lambda config: {}
    """HF names that some checkpoints carry besides, and the tensor that each repeats: not read, but written again."""
    redundant: Callable[[HFConfig], Sequence[str]] = lambda config: ()
    """HF names (`{layer}` allowed) that some checkpoints carry and no parameter needs."""


def find_family(model_type: str | None) -> Family:
    """The family of a `model_type`. Raises UnsupportedModelError, which lists the known ones."""
    family = all_families().get(model_type or "")
    if family is None:
        raise UnsupportedModelError(
            f"no family for model_type {model_type!r}; known are {', '.join(sorted(all_families()))}. "
            "A family is one file: see mbridge/families/qwen2.py"
        )
    return family


@cache
def all_families() -> dict[str, Family]:
    """Every family by each of its model types; one of an entry point wins over a built-in one."""
    return {kind: family for family in _discover() for kind in family.model_types}


def _discover() -> Iterator[Family]:
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            yield importlib.import_module(f"{__name__}.{module.name}").FAMILY
    for entry in entry_points(group="mbridge.families"):
        yield entry.load()
