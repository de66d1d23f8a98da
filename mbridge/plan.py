"""A family's table, a topology and a model's shapes -> the pieces of a rank. Pure: no collectives, no device.

    table = Table(family.rows(config), num_layers, dtype)
    stored = stored_by(table, topology, coordinates, specs)     # one rank's parameters as pieces of HF tensors
    plan = TrainerPlan.of(table, topology, coordinates, stored)

`check_owned` audits the pieces of several ranks together: each HF tensor is covered exactly once.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .errors import ModelError, PlanError, listed
from .families import Row
from .ops import Layout, Op, layout, local_shape
from .pieces import Box, Piece, Region, Shape, TensorSpec, check_cover
from .topology import Coordinates, Topology

_DIGITS = re.compile(r"\d+")


class Found(NamedTuple):
    """The row that describes a Megatron-Core name, and what its `{layer}` and `{expert}` stand for there.

    `expert` counts from the rank's first. With `packed`, the tensor holds all of the rank's experts.
    """

    row: Row
    layer: int | None
    expert: int | None
    packed: bool


class Table:
    """The rows of a family for one config: lists the HF tensors, and finds the row of a Megatron-Core name."""

    def __init__(self, rows: Sequence[Row], num_layers: int, dtype: torch.dtype) -> None:
        self.rows = tuple(rows)
        self.num_layers = num_layers
        self.dtype = dtype
        self._by_form: dict[str, list[tuple[re.Pattern[str], Row, bool]]] = defaultdict(list)
        for row in self.rows:
            for name in (*row.mcore, *([row.packed] if row.packed else [])):
                pattern = (
                    re.escape(name).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)")
                )
                form = _form(name.replace("{layer}", "0").replace("{expert}", "0"))
                self._by_form[form].append((re.compile(pattern), row, name == row.packed))

    def match(self, mcore_name: str) -> Found | None:
        """The row of a Megatron-Core name (layer numbers global, from 0); None if no row has it in that layer."""
        for pattern, row, packed in self._by_form.get(_form(mcore_name), ()):
            found = pattern.fullmatch(mcore_name)
            if found is None:
                continue
            numbers = found.groupdict()
            layer = int(numbers["layer"]) if row.per_layer else None
            if layer is None or layer in self.layers_of(row):
                expert = numbers.get("expert")
                return Found(row, layer, None if expert is None else int(expert), packed)
        return None

    def layers_of(self, row: Row) -> Sequence[int]:
        """The layers that have the row."""
        return range(self.num_layers) if row.layers is None else row.layers

    def groups(self) -> Iterator[tuple[TensorSpec, ...]]:
        """HF tensors in layer order, those of one parameter together. Copies are left out: they are no tensors more."""
        for row, layer in self.in_layer_order():
            if row.copy:
                continue
            dtype = row.dtype or self.dtype
            for expert in range(row.num_experts) if row.num_experts else (None,):
                names = hf_names(row, layer, expert)
                yield tuple(TensorSpec(name, shape, dtype) for name, shape in zip(names, row.shapes, strict=True))

    def tensors(self) -> list[TensorSpec]:
        """Every HF tensor of the model, in layer order."""
        return list(itertools.chain.from_iterable(self.groups()))

    def optional_names(self) -> frozenset[str]:
        """HF names that an engine may leave unread."""
        optional = [(row, layer) for row, layer in self.in_layer_order() if row.optional]
        return frozenset(
            name
            for row, layer in optional
            for expert in (range(row.num_experts) if row.num_experts else (None,))
            for name in hf_names(row, layer, expert)
        )

    def missing_in_layers(self, names: Iterable[str], ep: int = 1) -> list[str]:
        """Parameters that a rank lacks of layers of which it has others. `ep` divides the experts."""
        found = self._found(names)
        layers = sorted({(row.hf_offset, layer) for row, layer, _ in found if layer is not None})
        return [
            name
            for offset, layer in layers
            for row in self.rows
            if row.per_layer and row.hf_offset == offset and layer in self.layers_of(row)
            for name in self._missing(row, layer, found, ep)
        ]

    def missing_in_stage(self, names: Iterable[str], *, first: bool, last: bool, ep: int = 1) -> list[str]:
        """Parameters a stage lacks: those before the layers if it is the `first`, after them if `last`, all if both.

        Copies are not asked for, and which layers belong to one stage of several is not known here.
        """
        found = self._found(names)
        sides: dict[bool, bool] = {False: first, True: last}
        after_layers = False
        missing: list[str] = []
        for row, layer in self.in_layer_order():
            after_layers = after_layers or layer is not None
            # Layers that predict further tokens (their HF numbers go on after the last) live on the last stage.
            wanted = sides[after_layers] if layer is None or row.hf_offset else first and last
            if wanted and not row.copy:
                missing += self._missing(row, layer, found, ep)
        return missing

    def _found(self, names: Iterable[str]) -> set[tuple[Row, int | None, int | None]]:
        return {(f.row, f.layer, f.expert) for f in map(self.match, names) if f is not None}

    def _missing(
        self, row: Row, layer: int | None, found: set[tuple[Row, int | None, int | None]], ep: int
    ) -> Iterator[str]:
        if (row, layer, None) in found:
            return
        for expert in range(row.num_experts // ep) if row.num_experts else (None,):
            if (row, layer, expert) not in found:
                yield " or ".join(row.mcore).format(layer=layer, expert=expert)

    def in_layer_order(self) -> Iterator[tuple[Row, int | None]]:
        """Every row with every layer that has it (None: outside layers), in the order of the model."""
        for (per_layer, _), rows in itertools.groupby(self.rows, key=lambda row: (row.per_layer, row.hf_offset)):
            block = list(rows)
            if not per_layer:
                yield from ((row, None) for row in block)
                continue
            for layer in sorted({layer for row in block for layer in self.layers_of(row)}):
                yield from ((row, layer) for row in block if layer in self.layers_of(row))


class Stored(NamedTuple):
    """One rank's parameters as pieces: all of them, those it answers for in its replica, and padding by local name."""

    pieces: tuple[Piece, ...]
    owned: tuple[Piece, ...]
    """Without copies, and without what a lower rank of the same replica (Topology.replica_size ranks) holds too."""
    padding: tuple[tuple[str, Region], ...]


def stored_by(table: Table, topology: Topology, at: Coordinates, specs: Sequence[TensorSpec]) -> Stored:
    """Pieces of the rank at coordinates `at`, whose local tensors are `specs` (names with global layer numbers).

    Raises ModelError listing every tensor that no row describes, differs from its row in shape or dtype, or is missing.
    """
    pieces: list[Piece] = []
    owned: list[Piece] = []
    padding: list[tuple[str, Region]] = []
    problems: list[str] = []
    for spec in specs:
        found = table.match(spec.name)
        if found is None:
            problems.append(f"{spec.name!r} {list(spec.shape)}: no row of the family's table has this name")
            continue
        row = found.row
        dtype = row.dtype or table.dtype
        if spec.dtype != dtype:
            problems.append(f"{spec.name!r} is {spec.dtype}, expected {dtype} ({_DTYPE_HINT[row.dtype is None]})")
            continue
        try:
            parts = list(_parts(found, spec, topology, at))
        except ModelError as error:
            problems.append(str(error))
            continue
        for part in parts:
            pieces += part.pieces
            padding += [(spec.name, region) for region in part.padding]
            if _is_copy(row, at):
                continue
            if topology.owns(at, row.op.at_shape(spec.shape, row.shapes).axis, expert=row.num_experts > 0):
                owned += part.pieces
    problems += [f"{name}: not in this model" for name in table.missing_in_layers((s.name for s in specs), topology.ep)]
    if problems:
        raise ModelError(f"this Megatron-Core model is not the one its config describes:\n{listed(problems)}")
    return Stored(tuple(pieces), tuple(owned), tuple(padding))


def _is_copy(row: Row, at: Coordinates) -> bool:
    return row.copy or (row.first_stage and at.pp > 0)


_DTYPE_HINT = {
    True: "pass dtype= to the bridge",
    False: "it must not be cast with the model: load after wrapping in Float16Module, or keep it in fp32",
}


def _parts(found: Found, spec: TensorSpec, topology: Topology, at: Coordinates) -> Iterator[Layout]:
    """The layout of a local tensor; one for each expert in it if it is packed."""
    row, layer = found.row, found.layer
    index, size = (at.etp, topology.expert_tp) if row.num_experts else (at.tp, topology.tp)
    op = row.op.at_shape(spec.shape, row.shapes)
    if not row.num_experts:
        yield layout(op, hf_names(row, layer), row.shapes, spec.name, spec.shape, index, size)
        return
    num_local = row.num_experts // topology.ep
    first = at.ep * num_local
    if not found.packed:
        assert found.expert is not None  # the row's names have {expert}
        if found.expert >= num_local:
            raise ModelError(
                f"{spec.name!r}: this rank has {num_local} of {row.num_experts} experts (ep={topology.ep})"
            )
        names = hf_names(row, layer, first + found.expert)
        yield layout(op, names, row.shapes, spec.name, spec.shape, index, size)
        return
    for expert in range(num_local):
        names = hf_names(row, layer, first + expert)
        local, region = _packed_region(op, row, spec, size, expert, num_local)
        yield layout(op, names, row.shapes, spec.name, local, index, size, region)


def _packed_region(op: Op, row: Row, spec: TensorSpec, size: int, expert: int, num_local: int) -> tuple[Shape, Region]:
    """Where expert number `expert` lies in GroupedMLP's weight1 or weight2: [experts, in, out], seen as [out, in].

    The tensor's own shape hides that: weight1 is [in, experts * out], yet its memory is that of [experts, in, out].
    """
    rows, columns = local_shape(op, row.shapes, size)
    if math.prod(spec.shape) != num_local * rows * columns:
        raise ModelError(
            f"{spec.name!r} has shape {list(spec.shape)}; {num_local} experts of {rows} x {columns} were expected"
        )
    return (rows, columns), Region(expert * rows * columns, (rows, columns), (1, rows))


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
    optional_names: frozenset[str]  # HF names that an engine may leave unread
    digest: str  # of all that must agree between ranks

    @classmethod
    def of(
        cls,
        table: Table,
        topology: Topology,
        at: Coordinates,
        stored: Stored,
        groups: Sequence[tuple[TensorSpec, ...]] | None = None,
    ) -> TrainerPlan:
        """`groups` (default: the table's) and `stored` may both be spelled otherwise than the table does."""
        groups = list(table.groups()) if groups is None else groups
        tensors = tuple(itertools.chain.from_iterable(groups))
        return cls(
            tensors=tensors,
            fusion_groups=tuple(tuple(spec.name for spec in group) for group in groups),
            pieces=stored.pieces,
            owned=stored.owned if topology.replica(at) == 0 else (),
            optional_names=table.optional_names(),
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


def hf_names(row: Row, layer: int | None, expert: int | None = None) -> tuple[str, ...]:
    """The row's HF names in a layer, for a (global) expert."""
    number = str((layer or 0) + row.hf_offset)
    return tuple(name.replace("{layer}", number).replace("{expert}", str(expert)) for name in row.hf)


def _form(name: str) -> str:
    return _DIGITS.sub("#", name)
