"""A bridge without Megatron: a dict of HF tensors, of which each rank holds a share of the rows in one flat local
buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mbridge.pieces import Box, Piece, Region, TensorSpec
from mbridge.plan import TrainerPlan
from mbridge_rl.testing import LiveView

Tensors = dict[str, torch.Tensor]


class FakeBridge:
    """Rank r of n holds rows [r*m/n, (r+1)*m/n) of every tensor with m >= n rows; rank 0 holds the others whole.

    Local tensors are wider than their piece (one spare column where there are columns), so that regions are strided.
    """

    def __init__(
        self, tensors: Tensors, rank: int = 0, num_ranks: int = 1, *, groups: Sequence[Sequence[str]] = ()
    ) -> None:
        self.models: list[Any] = []
        self.rank, self.num_ranks = rank, num_ranks
        self.specs = tuple(TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items())
        grouped = {name for group in groups for name in group}
        rest = tuple((s.name,) for s in self.specs if s.name not in grouped)
        self.groups = (*(tuple(group) for group in groups), *rest)
        self.pieces = tuple(piece for spec in self.specs if (piece := self._piece(spec)) is not None)
        self.digest = "fake"
        self.optional: frozenset[str] = frozenset()
        self.set(tensors)

    def set(self, tensors: Tensors) -> None:
        """New weights, at new addresses."""
        self.local: Tensors = {}
        for piece in self.pieces:
            part = tensors[piece.hf_name][piece.box.slices]
            shape = (*part.shape[:-1], part.shape[-1] + 1) if part.dim() > 1 else part.shape
            store = torch.full(shape, -1, dtype=part.dtype)
            piece.region.of(store).copy_(part)
            self.local[piece.local_name] = store

    def plan(self, models: Sequence[Any]) -> TrainerPlan:
        return TrainerPlan(self.specs, self.groups, self.pieces, self.pieces, self.optional, self.digest)

    def live_tensors(self, models: Sequence[Any]) -> Mapping[str, torch.Tensor]:
        return LiveView(lambda: self.local)

    def _piece(self, spec: TensorSpec) -> Piece | None:
        rows = spec.shape[0] if spec.shape else 0
        if rows < self.num_ranks:
            return (
                Piece(spec.name, Box.whole(spec.shape), f"local.{spec.name}", self._region(spec.shape))
                if self.rank == 0
                else None
            )
        start, stop = rows * self.rank // self.num_ranks, rows * (self.rank + 1) // self.num_ranks
        box = Box((start, *(0 for _ in spec.shape[1:])), (stop, *spec.shape[1:]))
        return Piece(spec.name, box, f"local.{spec.name}", self._region(box.shape))

    @staticmethod
    def _region(shape: tuple[int, ...]) -> Region:
        if len(shape) < 2:
            return Region.contiguous(shape)
        stored = (*shape[:-1], shape[-1] + 1)
        return Region(0, shape, Region.contiguous(stored).stride)
