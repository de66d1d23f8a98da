"""Pieces: which part of which Hugging Face tensor is stored where in which local tensor.

A piece says: *box B of HF tensor T is stored at region R of local tensor P*. Trainers, checkpoints and engines are all
described by lists of pieces, and every movement of weights is a join of two such lists (`join`). Everything here is
pure arithmetic on integers: no model, no process group, no device.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch

from .errors import PlanError

Shape = tuple[int, ...]


class TensorSpec(NamedTuple):
    """Name, shape and dtype of a tensor, without its data."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned block of an HF tensor: `start[d] <= index[d] < stop[d]` for each dim, in HF coordinates.

    A box with one dim more than its tensor is one of the tensor's *unfolded* view, whose last dim is (n, 2): there gate
    and up, which alternate in the tensor (gpt-oss), are a block each.
    """

    start: Shape
    stop: Shape

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> Shape:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def of(self, tensor: torch.Tensor, origin: Shape | None = None) -> torch.Tensor:
        """This block as a view of the HF tensor, or of the part of it that begins at `origin` and holds the block."""
        first = (0,) * tensor.dim() if origin is None else origin
        if len(self.start) > tensor.dim():
            tensor, first = tensor.unflatten(-1, (-1, 2)), (*first[:-1], first[-1] // 2, 0)
        return tensor[tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, first, strict=True))]

    def folded(self) -> Box:
        """The smallest box without the last dim of the unfolded view that holds this one."""
        return Box((*self.start[:-2], 2 * self.start[-2]), (*self.stop[:-2], 2 * self.stop[-2]))

    def unfolded(self) -> Box:
        """This box in the unfolded view. Raises PlanError if it ends between a gate and its up."""
        if not self.start or self.start[-1] % 2 or self.stop[-1] % 2:
            raise PlanError(f"{_text(self)} parts what alternates in the last dim of its tensor; give even bounds")
        return Box((*self.start[:-1], self.start[-1] // 2, 0), (*self.stop[:-1], self.stop[-1] // 2, 2))

    def intersect(self, other: Box) -> Box | None:
        """The common part of two boxes of one tensor, None if they share no element."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if any(a >= b for a, b in zip(start, stop, strict=True)):
            return None
        return Box(start, stop)


@dataclass(frozen=True, slots=True)
class Region:
    """A strided view of a local tensor: offset, shape and stride in elements, counted from the tensor's first."""

    offset: int
    shape: Shape
    stride: Shape

    @classmethod
    def contiguous(cls, shape: Sequence[int], offset: int = 0) -> Region:
        return cls(offset, tuple(shape), row_major(shape))

    def part(self, start: Sequence[int], shape: Sequence[int]) -> Region:
        """The block of `shape` that begins at index `start` of this region."""
        offset = self.offset + sum(a * s for a, s in zip(start, self.stride, strict=True))
        return Region(offset, tuple(shape), self.stride)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This region of `tensor` (contiguous, on any device) as a view."""
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class Piece:
    """Box `box` of HF tensor `hf_name` is stored at `region` of local tensor `local_name`; their shapes are equal."""

    hf_name: str
    box: Box
    local_name: str
    region: Region

    def part(self, box: Box) -> Region:
        """The region that holds `box`, which lies inside this piece's box."""
        return self.region.part(tuple(a - b for a, b in zip(box.start, self.box.start, strict=True)), box.shape)

    def unfolded(self) -> Piece:
        """This piece with its box in the unfolded view."""
        (*shape, last), (*stride, step) = self.region.shape, self.region.stride
        region = Region(self.region.offset, (*shape, last // 2, 2), (*stride, 2 * step, step))
        return Piece(self.hf_name, self.box.unfolded(), self.local_name, region)


class Copy(NamedTuple):
    """One strided copy of a plan: `box` of `hf_name`, from a region of a source to one of a destination."""

    hf_name: str
    box: Box
    source_name: str
    source: Region
    destination_name: str
    destination: Region


def row_major(shape: Sequence[int]) -> Shape:
    """Strides in elements of a contiguous tensor of `shape`."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= size
    return tuple(reversed(stride))


def whole_pieces(specs: Iterable[TensorSpec]) -> list[Piece]:
    """Pieces of a place that stores whole HF tensors under their HF names, such as a checkpoint."""
    return [Piece(s.name, Box.whole(s.shape), s.name, Region.contiguous(s.shape)) for s in specs]


def join(sources: Iterable[Piece], destinations: Iterable[Piece]) -> Iterator[Copy]:
    """Every copy from a source piece to a destination piece that overlaps it, in the order of `destinations`.

    Sources must not overlap each other (drop replicas first); neither may destinations that share storage. What a
    destination asks for and no source has is simply not in the result: `check_cover` finds it.
    """
    sources, destinations = _in_one_view(sources, destinations)
    by_name: dict[str, list[Piece]] = defaultdict(list)
    for piece in sources:
        by_name[piece.hf_name].append(piece)
    # Sorted by first row, so that a destination meets only sources that begin before it ends (and the longest of
    # those before it): linear over experts and attention groups instead of a product.
    tables = {name: _SortedByRow(pieces) for name, pieces in by_name.items()}
    for destination in destinations:
        table = tables.get(destination.hf_name)
        if table is None:
            continue
        for source in table.candidates(destination.box):
            box = source.box.intersect(destination.box)
            if box is not None:
                yield Copy(
                    box=box,
                    hf_name=destination.hf_name,
                    source_name=source.local_name,
                    source=source.part(box),
                    destination_name=destination.local_name,
                    destination=destination.part(box),
                )


def _in_one_view(*lists: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The same pieces; those of a tensor of which one is unfolded are all unfolded: rows must mean the same."""
    pieces = [list(each) for each in lists]
    num_dims: dict[str, int] = {}
    for piece in chain.from_iterable(pieces):
        num_dims[piece.hf_name] = max(len(piece.box.start), num_dims.get(piece.hf_name, 0))
    for each in pieces:
        yield [p if len(p.box.start) == num_dims[p.hf_name] else p.unfolded() for p in each]


class _SortedByRow:
    """Pieces of one HF tensor, found by the rows (dim 0) that a box spans."""

    def __init__(self, pieces: list[Piece]) -> None:
        self._pieces = sorted(pieces, key=_first_row)
        self._starts = [_first_row(p) for p in self._pieces]
        self._longest = max((p.box.shape[0] if p.box.shape else 1) for p in pieces)

    def candidates(self, box: Box) -> list[Piece]:
        if not box.start:
            return self._pieces
        low = bisect.bisect_right(self._starts, box.start[0] - self._longest)
        high = bisect.bisect_left(self._starts, box.stop[0])
        return self._pieces[low:high]


def _first_row(piece: Piece) -> int:
    return piece.box.start[0] if piece.box.start else 0


def check_cover(name: str, shape: Shape, boxes: Sequence[Box], what: str = "HF tensor") -> None:
    """Raise PlanError unless `boxes` cover a tensor of `shape` exactly once."""
    whole = Box.whole(shape)
    if any(len(box.start) == len(shape) + 1 for box in boxes):
        boxes = [box.unfolded() if len(box.start) == len(shape) else box for box in boxes]
        whole = whole.unfolded()
    for box in boxes:
        is_inside = box == whole or (len(box.start) == len(whole.start) and whole.intersect(box) == box)
        if not is_inside:  # an empty tensor's own box intersects nothing
            raise PlanError(f"{what} {name!r} has shape {list(shape)}, but a piece claims {_text(box)}")
    pair = first_overlap(boxes)
    if pair is not None:
        raise PlanError(f"{what} {name!r}: two pieces claim the same elements: {_text(pair[0])} and {_text(pair[1])}")
    covered = sum(box.numel for box in boxes)
    if covered != whole.numel:
        raise PlanError(
            f"{what} {name!r} of shape {list(shape)}: pieces cover {covered} of {whole.numel} elements; "
            f"they are {', '.join(_text(b) for b in boxes[:8]) or 'none'}"
        )


def first_overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element, if there are any. A sweep along dim 0, so disjoint rows cost nothing."""
    if boxes and not boxes[0].start:  # 0-d: every box is the one element
        return (boxes[0], boxes[1]) if len(boxes) > 1 else None
    active: list[Box] = []
    for box in sorted(boxes, key=lambda b: b.start[0]):
        active = [other for other in active if other.stop[0] > box.start[0]]
        for other in active:
            if other.intersect(box) is not None:
                return other, box
        active.append(box)
    return None


def _text(box: Box) -> str:
    return "[" + ", ".join(f"{a}:{b}" for a, b in zip(box.start, box.stop, strict=True)) + "]"
