"""A family's table, a topology and a model's shapes -> the pieces of a rank. Pure: no collectives, no device.

    table = Table(family.rows(config), num_layers, dtype)
    stored = stored_by(table, topology, coordinates, specs)     # one rank's parameters as pieces of HF tensors
    plan = TrainerPlan.of(table, topology, coordinates, stored)

`check_owned` audits the pieces of several ranks together: each HF tensor is covered exactly once.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .errors import ModelError, PlanError, listed
from .families import Row
from .ops import layout
from .pieces import Box, Piece, Region, TensorSpec, check_cover
from .topology import Coordinates, Topology

_LAYER_NUMBER = r"(?P<layer>\d+)"
_DIGITS = re.compile(r"\d+")


class Table:
    """The rows of a family for one config: lists the HF tensors, and finds the row of a Megatron-Core name."""

    def __init__(self, rows: Sequence[Row], num_layers: int, dtype: torch.dtype) -> None:
        self.rows = tuple(rows)
        self.num_layers = num_layers
        self.dtype = dtype
        self._by_form: dict[str, list[tuple[re.Pattern[str], Row]]] = defaultdict(list)
        for row in self.rows:
            for name in row.mcore:
                pattern = re.escape(name).replace(r"\{layer\}", _LAYER_NUMBER)
                self._by_form[_form(name.replace("{layer}", "0"))].append((re.compile(pattern), row))

    def match(self, mcore_name: str) -> tuple[Row, int | None] | None:
        """The row of a Megatron-Core name (layer numbers global, from 0) and its layer; None if no row has it.

        A layer beyond `num_layers` has no row.
        """
        for pattern, row in self._by_form.get(_form(mcore_name), ()):
            found = pattern.fullmatch(mcore_name)
            if found is None:
                continue
            layer = int(found["layer"]) if row.per_layer else None
            if layer is None or layer < self.num_layers:
                return row, layer
        return None

    def groups(self) -> Iterator[tuple[TensorSpec, ...]]:
        """HF tensors in layer order, those of one parameter together. Copies are left out: they are no tensors more."""
        for row, layer in self._in_layer_order():
            if not row.copy:
                yield tuple(
                    TensorSpec(name, shape, self.dtype)
                    for name, shape in zip(hf_names(row, layer), row.shapes, strict=True)
                )

    def tensors(self) -> list[TensorSpec]:
        """Every HF tensor of the model, in layer order."""
        return list(itertools.chain.from_iterable(self.groups()))

    def missing_in_layers(self, names: Iterable[str]) -> list[str]:
        """Rows of which a rank that has some parameter of a layer lacks the parameter."""
        found = {self.match(name) for name in names}
        layers = sorted({layer for _, layer in filter(None, found) if layer is not None})
        return [
            " or ".join(row.mcore).format(layer=layer)
            for layer in layers
            for row in self.rows
            if row.per_layer and (row, layer) not in found
        ]

    def _in_layer_order(self) -> Iterator[tuple[Row, int | None]]:
        for per_layer, rows in itertools.groupby(self.rows, key=lambda row: row.per_layer):
            block = list(rows)
            for layer in range(self.num_layers) if per_layer else (None,):
                yield from ((row, layer) for row in block)


class Stored(NamedTuple):
    """One rank's parameters as pieces: all of them, those it answers for in its stage, and padding by local name."""

    pieces: tuple[Piece, ...]
    owned: tuple[Piece, ...]
    """Without copies, and without what a lower tensor-parallel rank of the same replica holds too."""
    padding: tuple[tuple[str, Region], ...]


def stored_by(table: Table, topology: Topology, at: Coordinates, specs: Sequence[TensorSpec]) -> Stored:
    """Pieces of the rank at coordinates `at`, whose local tensors are `specs` (names with global layer numbers).

    Raises ModelError listing every tensor that no row describes, has another shape or dtype than its row, or is missing.
    """
    pieces: list[Piece] = []
    owned: list[Piece] = []
    padding: list[tuple[str, Region]] = []
    problems: list[str] = []
    for spec in specs:
        match = table.match(spec.name)
        if match is None:
            problems.append(f"{spec.name!r} {list(spec.shape)}: no row of the family's table has this name")
            continue
        row, layer = match
        if spec.dtype != table.dtype:
            problems.append(f"{spec.name!r} is {spec.dtype}, expected {table.dtype} (pass dtype= to the bridge)")
            continue
        index, size = (at.etp, topology.expert_tp) if row.op.axis == "etp" else (at.tp, topology.tp)
        try:
            found = layout(row.op, hf_names(row, layer), row.shapes, spec.name, spec.shape, index, size)
        except ModelError as error:
            problems.append(str(error))
            continue
        pieces += found.pieces
        padding += [(spec.name, region) for region in found.padding]
        if not row.copy and (row.op.axis is not None or at.tp == 0):
            owned += found.pieces
    problems += [f"{name}: not in this model" for name in table.missing_in_layers(s.name for s in specs)]
    if problems:
        raise ModelError(f"this Megatron-Core model is not the one its config describes:\n{listed(problems)}")
    return Stored(tuple(pieces), tuple(owned), tuple(padding))


@dataclass(frozen=True)
class TrainerPlan:
    """What one trainer rank stores, and what it sends.

    `tensors` and `fusion_groups` are equal on every rank and in layer order; `pieces` and `owned` are this rank's.
    Over all ranks, `owned` covers each tensor exactly once.
    """

    tensors: tuple[TensorSpec, ...]
    fusion_groups: tuple[tuple[str, ...], ...]  # every HF name is in exactly one group; consecutive in `tensors`
    pieces: tuple[Piece, ...]  # of this rank, replicas included
    owned: tuple[Piece, ...]  # the part of `pieces` this rank answers for
    digest: str  # of all that must agree between ranks

    @classmethod
    def of(cls, table: Table, topology: Topology, at: Coordinates, stored: Stored) -> TrainerPlan:
        groups = list(table.groups())
        tensors = tuple(itertools.chain.from_iterable(groups))
        return cls(
            tensors=tensors,
            fusion_groups=tuple(tuple(spec.name for spec in group) for group in groups),
            pieces=stored.pieces,
            owned=stored.owned if at.is_first_replica else (),
            digest=digest(agreement(topology, tensors)),
        )


def agreement(topology: Topology, tensors: Sequence[TensorSpec]) -> list[str]:
    """All that ranks must agree on before a collective, as lines whose first difference reads well."""
    return [str(topology), *(f"{spec.name} {list(spec.shape)} {spec.dtype}" for spec in tensors)]


def digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def first_difference(by_rank: Sequence[Sequence[str]]) -> str | None:
    """The first line that two ranks do not share, named with the ranks; None when all agree."""
    for rank, lines in enumerate(by_rank):
        for mine, other in itertools.zip_longest(by_rank[0], lines, fillvalue="nothing"):
            if mine != other:
                return f"rank 0 has {mine}, rank {rank} has {other}"
    return None


def check_owned(tensors: Sequence[TensorSpec], owned_by_rank: Iterable[Iterable[Piece]]) -> None:
    """Raise PlanError unless the ranks' owned pieces together cover each tensor exactly once."""
    boxes: dict[str, list[Box]] = {spec.name: [] for spec in tensors}
    for rank, owned in enumerate(owned_by_rank):
        for piece in owned:
            if piece.hf_name not in boxes:
                raise PlanError(f"rank {rank} answers for {piece.hf_name!r}, which is no tensor of this model")
            boxes[piece.hf_name].append(piece.box)
    for spec in tensors:
        check_cover(spec.name, spec.shape, boxes[spec.name])


def hf_names(row: Row, layer: int | None) -> tuple[str, ...]:
    """The row's HF names in a layer."""
    return tuple(name.replace("{layer}", str(layer)) for name in row.hf)


def _form(name: str) -> str:
    return _DIGITS.sub("#", name)
