"""Strided views of HF tensors, taken apart into boxes. Pure arithmetic on integers.

An engine's loader reads an HF tensor through views (slices, transposes, flattened and split dims) and copies them to
views of its parameters. `boxes_of_view` says what such a copy does in boxes and regions, the terms of `mbridge.pieces`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from mbridge.pieces import Box, Region, Shape, row_major

MAX_BOXES = 4096  # of one view; a plan of more, smaller copies would be slower than the engine's own loader
View = tuple[int, Sequence[int], Sequence[int]]  # offset, size, stride, in elements


class NotABox(ValueError):  # noqa: N818 - what the view is, not a mishap
    """A view that is not a moderate number of boxes. The message says why."""


class _Dim(NamedTuple):
    """One dim of two parallel views: its size, its step in the HF tensor and its step in the other view."""

    size: int
    stride: int
    other: int


def boxes_of_view(
    shape: Sequence[int], offset: int, size: Sequence[int], stride: Sequence[int], other: View | None = None
) -> list[tuple[Box, Region]]:
    """The boxes of a contiguous tensor of `shape` that its view (offset, size, stride; in elements) consists of.

    `other` is a view (offset, size, stride) of another tensor, of the same size and parallel to the first, such as the
    destination of a copy; a contiguous tensor of its own if not given. Each box comes with the region of `other` that
    belongs to it, of the box's shape. A view of every second element of the last dim becomes one box of the *unfolded*
    tensor (see `Box`). No boxes for an empty view.

    Raises NotABox if the view repeats elements (a broadcast), leaves the tensor, or is more than MAX_BOXES boxes.
    """
    other_offset, other_size, other_stride = other or (0, size, row_major(size))
    if tuple(size) != tuple(other_size):
        raise ValueError(f"views of sizes {list(size)} and {list(other_size)} are not parallel")
    if 0 in size:
        return []
    dims = [_Dim(n, s, o) for n, s, o in zip(size, stride, other_stride, strict=True) if n > 1]
    if any(dim.stride == 0 for dim in dims):
        raise NotABox(f"a broadcast: size {list(size)}, stride {list(stride)}")
    last = offset + sum((dim.size - 1) * dim.stride for dim in dims)
    if offset < 0 or last >= math.prod(shape):
        raise NotABox(f"elements {offset} to {last} of a tensor of shape {list(shape)}")
    dims = _coalesced(sorted(dims, key=lambda dim: -dim.stride))
    if dims and dims[-1].stride == 2 and shape[-1] > 2 and shape[-1] % 2 == 0:
        shape = (*shape[:-1], shape[-1] // 2, 2)
    boxes = _Boxes(tuple(shape))
    boxes.add(offset, dims, other_offset)
    return boxes.found


def _coalesced(dims: Sequence[_Dim]) -> list[_Dim]:
    """Neighbours merged where one step of the outer dim is a whole run of the inner one, in both views."""
    merged: list[_Dim] = []
    for dim in dims:
        if merged and merged[-1].stride == dim.size * dim.stride and merged[-1].other == dim.size * dim.other:
            merged[-1] = _Dim(merged[-1].size * dim.size, dim.stride, dim.other)
        else:
            merged.append(dim)
    return merged


class _Boxes:
    """The boxes found so far of views of a contiguous tensor of `shape`."""

    def __init__(self, shape: Shape) -> None:
        self._shape, self._stride = shape, row_major(shape)
        # Innermost first. Dims of size 1 have no step of their own.
        self._steps = [(d, self._stride[d]) for d in reversed(range(len(shape))) if shape[d] > 1]
        self.found: list[tuple[Box, Region]] = []

    def add(self, offset: int, dims: Sequence[_Dim], other_offset: int) -> None:
        """Give each dim of the view a dim of the tensor; divide the view where that cannot be."""
        start = tuple(offset // step % size for step, size in zip(self._stride, self._shape, strict=True))
        placed: dict[int, _Dim] = {}
        todo = list(dims)  # strides descend, so the innermost is last
        while todo:
            dim = todo.pop()
            at, step = self._place(dim.stride)
            extent, multiple = self._shape[at], dim.stride // step
            rest = [*todo, *placed.values()]
            if dim.stride % step or multiple > 1 or at in placed:
                inner, outer = _part_of_each_row(dim, multiple, start[at], extent)
                for i in range(inner.size):
                    self.add(offset + i * inner.stride, _descending([*rest, *outer]), other_offset + i * inner.other)
                return
            if start[at] + dim.size <= extent:
                placed[at] = dim
            elif start[at] == 0 and dim.size % extent == 0:
                placed[at] = dim._replace(size=extent)
                todo = _descending([*todo, _Dim(dim.size // extent, extent * dim.stride, extent * dim.other)])
            else:  # begins or ends within a row: the rows that are whole apart from those that are not
                head = extent - start[at] if start[at] else dim.size - dim.size % extent
                for a, b in ((0, head), (head, dim.size)):
                    part = _descending([*rest, dim._replace(size=b - a)])
                    self.add(offset + a * dim.stride, part, other_offset + a * dim.other)
                return
        self._found(start, placed, other_offset)

    def _place(self, stride: int) -> tuple[int, int]:
        """The tensor's outermost dim whose step is not longer than `stride`, and its step."""
        return next((d, step) for d, step in reversed(self._steps) if step <= stride)

    def _found(self, start: Shape, placed: dict[int, _Dim], other_offset: int) -> None:
        if len(self.found) == MAX_BOXES:
            raise NotABox(f"more than {MAX_BOXES} boxes of a tensor of shape {list(self._shape)}")
        shape, stride, step = [], [], 1
        for d in reversed(range(len(start))):
            dim = placed.get(d, _Dim(1, 0, step))
            shape.append(dim.size)
            stride.append(dim.other)
            step = dim.size * dim.other
        region = Region(other_offset, tuple(reversed(shape)), tuple(reversed(stride)))
        stop = tuple(a + n for a, n in zip(start, region.shape, strict=True))
        self.found.append((Box(start, stop), region))


def _part_of_each_row(dim: _Dim, multiple: int, start: int, extent: int) -> tuple[_Dim, list[_Dim]]:
    """A dim that steps over elements, as its steps within one row, and the rows if it has as many steps in each."""
    if extent % multiple == 0 and start < multiple:
        count = extent // multiple
        if 1 < count < dim.size and dim.size % count == 0:
            rows = _Dim(dim.size // count, count * dim.stride, count * dim.other)
            return dim._replace(size=count), [rows]
    return dim, []


def _descending(dims: Sequence[_Dim]) -> list[_Dim]:
    """In the order that `add` wants, without the dims that a division has left with one element or none."""
    return sorted((dim for dim in dims if dim.size > 1), key=lambda dim: -dim.stride)
