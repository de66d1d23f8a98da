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
    """Where a matrix lies in a fused tensor."""

    fused: str
    expert: int
    first_row: int
    transposed: bool


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
        transposed = any(found[name].shape == _turned(shape) != shape for name, shape, _ in members)
        places: dict[str, _Place] = {}
        fused: dict[str, TensorSpec] = {}
        for name, shape, parts in members:
            fused[name] = TensorSpec(name, _turned(shape) if transposed else shape, table.dtype)
            for matrix, expert, first_row in parts:
                places[matrix] = _Place(name, expert, first_row, transposed)
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
            by_name = {**{spec.name: spec for spec in group}, **self.fused}
            if next(iter(names)) not in spelled:
                spelled[next(iter(names))] = tuple(by_name[name] for name in names)
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
        (row, column), (row_end, column_end) = piece.box.start, piece.box.stop
        start, stop = [row + place.first_row, column], [row_end + place.first_row, column_end]
        shape, stride = list(piece.region.shape), list(piece.region.stride)
        if place.transposed:
            for pair in (start, stop, shape, stride):
                pair.reverse()
        box = Box((place.expert, *start), (place.expert + 1, *stop))
        return Piece(place.fused, box, piece.local_name, Region(piece.region.offset, (1, *shape), (0, *stride)))


def _fused_members(
    table: Table, rules: Sequence[FusedExperts], found: Mapping[str, TensorSpec]
) -> Iterator[tuple[str, Shape, list[tuple[str, int, int]]]]:
    """Each fused tensor of `found`: name, shape if not transposed, and its (matrix, expert, first row)s."""
    for row, layer in table.in_layer_order():
        for rule in rules:
            if row.hf != rule.parts:
                continue
            name = rule.name.replace("{layer}", str((layer or 0) + row.hf_offset))
            if name not in found:
                continue
            height, width = row.shapes[0]
            parts = [
                (matrix, expert, number * height)
                for expert in range(row.num_experts)
                for number, matrix in enumerate(hf_names(row, layer, expert))
            ]
            yield name, (row.num_experts, len(rule.parts) * height, width), parts


def _turned(shape: Shape) -> Shape:
    return (shape[0], shape[2], shape[1])
