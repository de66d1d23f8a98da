"""How a checkpoint spells the tensors of a table: a layer's experts fused into one tensor, a tensor written twice.

The table speaks of one tensor for each expert, as released checkpoints and engines do. Where a file has another
spelling, pieces and tensor lists are translated on their way to it and from it; a fused expert is a box of a larger
tensor, and one that is stored transposed is a piece with its dims exchanged. Pure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .families import FusedExperts
from .pieces import Box, Piece, Region, Shape, TensorSpec
from .plan import Table, hf_names


class _Place(NamedTuple):
    """Where a matrix (or a bias) lies in a fused tensor: its rows are one after the other, or every second one."""

    fused: str
    expert: int
    first_row: int
    transposed: bool
    parity: int | None  # 0 for even rows, 1 for odd ones, None for rows side by side


class _Member(NamedTuple):
    """A fused tensor: its spec if it is not transposed, and its parts."""

    rule: FusedExperts
    spec: TensorSpec
    parts: Sequence[tuple[str, int, int]]  # the table's name, expert, number among the rule's parts


@dataclass(frozen=True, slots=True)
class Spelling:
    """A translation of the table's names to a checkpoint's. The empty one changes nothing."""

    places: Mapping[str, _Place] = field(default_factory=dict)  # the table's name -> its place
    fused: Mapping[str, TensorSpec] = field(default_factory=dict)
    copies: Mapping[str, Sequence[str]] = field(default_factory=dict)  # the table's name -> further names on disk

    @classmethod
    def of(
        cls,
        table: Table,
        rules: Sequence[FusedExperts],
        duplicates: Mapping[str, str],
        found: Mapping[str, TensorSpec],
    ) -> Spelling:
        """The spelling of a checkpoint that holds the tensors `found`, of the ones that a family knows.

        `duplicates` maps names that some files have besides to the tensors that they repeat.
        """
        members = list(_fused_members(table, rules, found))
        # A square tensor does not show its orientation; the others of the checkpoint do.
        turned = any(
            spec.name in found and found[spec.name].shape == _turned(spec.shape) != spec.shape for _, spec, _ in members
        )
        places: dict[str, _Place] = {}
        fused: dict[str, TensorSpec] = {}
        for rule, spec, parts in members:
            transposed = (turned or rule.transposed) and len(spec.shape) == 3
            fused[spec.name] = spec._replace(shape=_turned(spec.shape)) if transposed else spec
            height = spec.shape[1] // len(rule.parts)
            for matrix, expert, number in parts:
                first_row, parity = (0, number) if rule.interleaved else (number * height, None)
                places[matrix] = _Place(spec.name, expert, first_row, transposed, parity)
        copies: dict[str, list[str]] = defaultdict(list)
        for name, original in duplicates.items():
            if name in found:
                copies[original].append(name)
        return cls(places, fused, copies)

    def groups(self, groups: Iterable[Sequence[TensorSpec]]) -> list[tuple[TensorSpec, ...]]:
        """Groups of tensors as the checkpoint has them, in the same order; a fused tensor comes with its first part."""
        spelled: dict[str, tuple[TensorSpec, ...]] = {}
        for group in groups:
            names = dict.fromkeys(
                self.places[spec.name].fused if spec.name in self.places else spec.name for spec in group
            )
            own = {spec.name: spec for spec in group}
            if next(iter(names)) not in spelled:
                spelled[next(iter(names))] = tuple(self.fused.get(name) or own[name] for name in names)
            for spec in group:
                for copy in self.copies.get(spec.name, ()):
                    spelled[copy] = (spec._replace(name=copy),)
        return list(spelled.values())

    def pieces(self, pieces: Iterable[Piece], *, with_copies: bool) -> list[Piece]:
        """Pieces of the checkpoint's tensors. A repeated tensor is written twice, and read once."""
        spelled = []
        for piece in pieces:
            spelled.append(self._piece(piece))
            if with_copies:
                spelled += [
                    Piece(copy, piece.box, piece.local_name, piece.region)
                    for copy in self.copies.get(piece.hf_name, ())
                ]
        return spelled

    def _piece(self, piece: Piece) -> Piece:
        place = self.places.get(piece.hf_name)
        if place is None:
            return piece
        start, stop = list(piece.box.start), list(piece.box.stop)
        start[0], stop[0] = start[0] + place.first_row, stop[0] + place.first_row
        shape, stride = list(piece.region.shape), list(piece.region.stride)
        if place.transposed:
            for pair in (start, stop, shape, stride):
                pair.reverse()
        if place.parity is not None:  # of the unfolded view (pieces.Box)
            start, stop = [*start, place.parity], [*stop, place.parity + 1]
            shape, stride = [*shape, 1], [*stride, 0]
        box = Box((place.expert, *start), (place.expert + 1, *stop))
        return Piece(place.fused, box, piece.local_name, Region(piece.region.offset, (1, *shape), (0, *stride)))


def _fused_members(table: Table, rules: Sequence[FusedExperts], found: Mapping[str, TensorSpec]) -> Iterator[_Member]:
    """Each fused tensor of `found`, or that there has to be."""
    for row, layer in table.in_layer_order():
        for rule in rules:
            if row.hf != rule.parts:
                continue
            name = rule.name.replace("{layer}", str((layer or 0) + row.hf_offset))
            if name not in found and not rule.only:
                continue
            height, *width = row.shapes[0]
            parts = [
                (matrix, expert, number)
                for expert in range(row.num_experts)
                for number, matrix in enumerate(hf_names(row, layer, expert))
            ]
            shape = (row.num_experts, len(rule.parts) * height, *width)
            yield _Member(rule, TensorSpec(name, shape, table.dtype), parts)


def _turned(shape: Shape) -> Shape:
    return (shape[0], *reversed(shape[1:]))
