"""The smallest trainer: one rank that holds whole HF tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mbridge.pieces import Box, Piece, Region, Shape, TensorSpec, row_major
from mbridge.plan import TrainerPlan

from ..buckets import aligned

Tensors = Mapping[str, torch.Tensor]
Groups = Sequence[Sequence[str]]


class LiveView(Mapping[str, torch.Tensor]):
    """A view of the dict that `read` returns at each access."""

    def __init__(self, read: Callable[[], Tensors]) -> None:
        self._read = read

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


class WholeBridge:
    """A trainer of one rank that holds `tensors`, HF name -> tensor, whole and under their HF names.

    `tensors` may be set anew between refits. `groups` are fusion groups (a name in none of them is one of its own), in
    the order in which they are to come; `optional` are names that an engine may leave unread.
    """

    def __init__(self, tensors: Tensors, *, groups: Groups = (), optional: Iterable[str] = ()) -> None:
        self.tensors = dict(tensors)
        self.models: Sequence[Any] = ()
        self._groups, self._optional = tuple(map(tuple, groups)), frozenset(optional)

    def plan(self, models: Sequence[Any]) -> TrainerPlan:
        specs = tuple(TensorSpec(name, tuple(t.shape), t.dtype) for name, t in self.tensors.items())
        pieces = tuple(Piece(s.name, Box.whole(s.shape), s.name, self.region(s.shape)) for s in specs)
        grouped = {name for group in self._groups for name in group}
        groups = (*self._groups, *((spec.name,) for spec in specs if spec.name not in grouped))
        return TrainerPlan(specs, groups, pieces, pieces, optional_names=self._optional, digest="whole")

    def live_tensors(self, models: Sequence[Any]) -> Tensors:
        return LiveView(lambda: self.tensors)

    def region(self, shape: Shape) -> Region:
        """Where in its local tensor an HF tensor of `shape` lies."""
        return Region.contiguous(shape)


class StridedBridge(WholeBridge):
    """Its local tensors are larger than what they hold, and lie in one allocation, as a trainer's flat buffer.

    No HF tensor of two elements or more lies there contiguously: matrices are stored transposed and with a spare
    column, vectors in every third element.
    """

    def live_tensors(self, models: Sequence[Any]) -> Tensors:
        return LiveView(lambda: self._local)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """HF name -> tensor, contiguous. Changes in place are not seen: set it anew."""
        return self._tensors

    @tensors.setter
    def tensors(self, tensors: Tensors) -> None:
        self._tensors, self._local = dict(tensors), {}
        stored = {name: _stored_shape(tuple(t.shape)) for name, t in tensors.items()}
        rooms = {name: aligned(math.prod(stored[name]) * t.dtype.itemsize) for name, t in tensors.items()}
        device = next((tensor.device for tensor in tensors.values()), None)
        flat = torch.zeros(sum(rooms.values()), dtype=torch.uint8, device=device)
        for (name, tensor), own in zip(tensors.items(), flat.split(list(rooms.values())), strict=True):
            shape = stored[name]
            self._local[name] = own[: math.prod(shape) * tensor.dtype.itemsize].view(tensor.dtype).view(shape)
            self.region(tuple(tensor.shape)).of(self._local[name]).copy_(tensor)

    def region(self, shape: Shape) -> Region:
        stored = _stored_shape(shape)
        if len(shape) == 1:
            return Region(1, shape, (3,))
        if len(shape) < 2:
            return Region(0, shape, row_major(stored))
        *outer, column, row = row_major(stored)
        return Region(0, shape, (*outer, row, column))


def _stored_shape(shape: Shape) -> Shape:
    if len(shape) == 1:
        return (3 * shape[0] + 1,)
    return (*shape[:-2], shape[-1], shape[-2] + 1) if shape else ()
