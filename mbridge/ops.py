"""Layout ops: how one Megatron-Core parameter is assembled from HF tensors and cut over a parallel axis.

Every layout of Megatron-Core's linear, embedding and norm weights is the same two steps. First, blocks of rows of one
or more HF tensors are laid one after the other along one dim: the *segments* of the whole parameter. Then that dim is
cut into equal, contiguous chunks, one for each index on a parallel axis. An op names the axis and the dim and lists the
segments; `layout` does the cutting, for all of them. So a chunk boundary may fall inside an attention group (fewer
groups than ranks) without any op knowing about it.

Pure functions of shapes. Source of the layouts: megatron/core/transformer/attention.py, mlp.py,
tensor_parallel/layers.py (0.16.1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

from .errors import ModelError, TopologyError
from .pieces import Box, Piece, Region, Shape

Axis = Literal["tp", "etp"]


class Segment(NamedTuple):
    """Rows `start:stop` of HF tensor number `tensor` of the row; `tensor` None is padding that no HF tensor holds."""

    tensor: int | None
    start: int
    stop: int


class Layout(NamedTuple):
    """Where a local tensor's elements come from; pieces and padding are all of the tensor, each element once."""

    pieces: tuple[Piece, ...]
    padding: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Op(ABC):
    """How a parameter is assembled along `dim` and over which axis it is cut (None: every rank holds all of it)."""

    axis: Axis | None = field(default="tp", kw_only=True)
    dim: ClassVar[int] = 0

    def at_shape(self, local: Shape, shapes: Sequence[Shape]) -> Op:
        """The op that a local tensor of shape `local` shows; most look the same everywhere."""
        return self

    @abstractmethod
    def segments(self, shapes: Sequence[Shape], size: int, rows: int) -> Sequence[Segment]:
        """The whole parameter as segments along `dim`.

        `shapes` are those of its HF tensors, `size` the number of ranks on the axis, and `rows` the length of `dim` in
        the model at hand, all ranks together (only padding depends on it).
        """


@dataclass(frozen=True, slots=True)
class Replicated(Op):
    """One HF tensor, whole, on every rank: norms, routers, biases of row-parallel layers."""

    axis: Axis | None = field(default=None, kw_only=True)

    def segments(self, shapes: Sequence[Shape], size: int, rows: int) -> Sequence[Segment]:
        return [Segment(0, 0, shapes[0][0])]


@dataclass(frozen=True, slots=True)
class Column(Op):
    """One HF tensor cut along its output features (dim 0)."""

    def segments(self, shapes: Sequence[Shape], size: int, rows: int) -> Sequence[Segment]:
        return [Segment(0, 0, shapes[0][0])]


@dataclass(frozen=True, slots=True)
class ColumnOrReplicated(Column):
    """MLA's down projections: cut by the local spec, whole on every rank with TransformerEngine ("duplicated").

    Only the shape tells: megatron/core/transformer/multi_latent_attention.py builds both under one name.
    """

    def at_shape(self, local: Shape, shapes: Sequence[Shape]) -> Op:
        return Replicated() if local[:1] == shapes[0][:1] else Column(axis=self.axis)


@dataclass(frozen=True, slots=True)
class RowParallel(Op):
    """One HF tensor cut along its input features (dim 1)."""

    dim: ClassVar[int] = 1

    def segments(self, shapes: Sequence[Shape], size: int, rows: int) -> Sequence[Segment]:
        return [Segment(0, 0, shapes[0][1])]


@dataclass(frozen=True, slots=True)
class Vocab(Op):
    """Embedding or output rows, padded at the end to what divides over the ranks. HF tensors hold no padding."""

    def segments(self, shapes: Sequence[Shape], size: int, rows: int) -> Sequence[Segment]:
        vocab = shapes[0][0]
        return [Segment(0, 0, vocab)] + ([Segment(None, vocab, rows)] if rows > vocab else [])


@dataclass(frozen=True, slots=True)
class QKV(Op):
    """q, k, v weights or biases, interleaved by group: for each group its query heads' rows, its k rows, its v rows.

    Megatron-Core does not replicate k and v when there are fewer groups than ranks: the interleaved tensor is cut as
    any other (attention.py `get_query_key_value_tensors`).
    """

    num_groups: int

    def segments(self, shapes: Sequence[Shape], size: int, rows: int) -> Sequence[Segment]:
        per_group = [shape[0] // self.num_groups for shape in shapes]
        return [
            Segment(tensor, group * step, (group + 1) * step)
            for group in range(self.num_groups)
            for tensor, step in enumerate(per_group)
        ]


@dataclass(frozen=True, slots=True)
class GateUp(Op):
    """gate and up of a gated MLP. Each rank holds [its gate rows; its up rows], so the whole depends on the ranks."""

    def segments(self, shapes: Sequence[Shape], size: int, rows: int) -> Sequence[Segment]:
        step = shapes[0][0] // size
        return [Segment(tensor, rank * step, (rank + 1) * step) for rank in range(size) for tensor in (0, 1)]


def whole_rows(op: Op, shapes: Sequence[Shape]) -> int:
    """Length along `op.dim` of the whole parameter, padding aside."""
    return sum(shape[op.dim] for shape in shapes)


def local_shape(op: Op, shapes: Sequence[Shape], size: int, rows: int | None = None) -> Shape:
    """Shape of one rank's part of the parameter. `rows` (default: unpadded) is the whole length along `op.dim`."""
    rows = whole_rows(op, shapes) if rows is None else rows
    parts = 1 if op.axis is None else size
    if rows % parts or (isinstance(op, GateUp) and shapes[0][0] % parts):
        raise TopologyError(
            f"{rows} rows (HF shapes {[list(s) for s in shapes]}) do not divide over {parts} ranks on axis {op.axis}"
        )
    shape = list(shapes[0])
    shape[op.dim] = rows // parts
    return tuple(shape)


def layout(
    op: Op,
    hf_names: Sequence[str],
    shapes: Sequence[Shape],
    local_name: str,
    local: Shape,
    index: int,
    size: int,
    region: Region | None = None,
) -> Layout:
    """Pieces and padding of the local tensor `local_name` of shape `local` at `index` of `size` ranks on the op's axis.

    `region` (default: all of it) is where in the local tensor a parameter of shape `local` lies.
    Raises ModelError when `local` is not the shape that the HF tensors make there.
    """
    if op.axis is None:
        index, size = 0, 1
    rows = local[op.dim] * size if len(local) > op.dim else -1
    at_least = whole_rows(op, shapes)
    if isinstance(op, Vocab) and 0 <= rows < at_least:
        raise ModelError(
            f"{local_name!r} has shape {list(local)} here, on {size} ranks {rows} rows; at least the {at_least} of "
            f"{hf_names[0]} were expected. A value head has to be known: make the bridge with value_head={local[0]}"
        )
    padded = isinstance(op, Vocab)
    expected = local_shape(op, shapes, size, rows if padded else None)
    if local != expected:
        raise ModelError(
            f"{local_name!r} has shape {list(local)} here; from {', '.join(hf_names)} of shapes "
            f"{[list(s) for s in shapes]} over {size} ranks {list(expected)} was expected"
        )
    base = Region.contiguous(local) if region is None else region
    assert base.shape == local
    start, stop = index * local[op.dim], (index + 1) * local[op.dim]
    pieces, padding = [], []
    for segment, at in _cut(op.segments(shapes, size, rows), start, stop):
        origin, extent = [0] * len(local), list(local)
        origin[op.dim], extent[op.dim] = at - start, segment.stop - segment.start
        region = base.part(origin, extent)
        if segment.tensor is None:
            padding.append(region)
            continue
        low, high = [0] * len(local), list(shapes[segment.tensor])
        low[op.dim], high[op.dim] = segment.start, segment.stop
        pieces.append(Piece(hf_names[segment.tensor], Box(tuple(low), tuple(high)), local_name, region))
    assert sum(p.box.numel for p in pieces) + sum(math.prod(r.shape) for r in padding) == math.prod(local)
    return Layout(tuple(pieces), tuple(padding))


def _cut(segments: Sequence[Segment], start: int, stop: int) -> Iterator[tuple[Segment, int]]:
    """The segments inside `start:stop` of the whole, trimmed, each with the position where it begins there."""
    position = 0
    for segment in segments:
        end = position + segment.stop - segment.start
        low, high = max(position, start), min(end, stop)
        if low < high:
            shift = segment.start - position
            yield Segment(segment.tensor, low + shift, high + shift), low
        position = end
