"""A sender's half of a class of workers: the boxes that they need, packed out of each bucket's slot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .buckets import Layout
from .copy_plan import CopyTable, Executor, executor_for
from .local_copies import typed_views
from .needs import Packing
from .transports.base import NUM_SLOTS


class Packer:
    """Messages of one class, in two buffers: the one of bucket k must have left when k + 2 is packed."""

    def __init__(self, layout: Layout, packing: Packing, buckets: Iterable[int], slots: Sequence[torch.Tensor]) -> None:
        """`buckets`: those that this sender lays out in `slots` (flat uint8; bucket k in slot k % 2)."""
        self._sizes = {bucket: packing.sizes[bucket] for bucket in buckets}
        device = slots[0].device
        size = max(self._sizes.values(), default=0)
        # Zeros: its pages are there before the first refit.
        self._buffers = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(NUM_SLOTS)]
        dtypes = {spec.dtype for spec in layout.tensors}
        names = {str(dtype): dtype for dtype in dtypes}
        typed = [
            (_by_name(typed_views(slot, dtypes)), _by_name(typed_views(buffer, dtypes)))
            for slot, buffer in zip(slots, self._buffers, strict=True)
        ]
        self._executors: dict[int, Executor] = {}
        for bucket in self._sizes:
            executor = executor_for(CopyTable.of(packing.copies[bucket], names, names), device)
            if len(executor.table):
                executor.bind(*typed[bucket % NUM_SLOTS])
            self._executors[bucket] = executor

    @property
    def num_bytes(self) -> int:
        """Of the buffers, and of the tables of copies."""
        tables = (executor.table_bytes for executor in self._executors.values())
        return sum(buffer.numel() for buffer in self._buffers) + sum(tables)

    def pack(self, bucket: int) -> torch.Tensor:
        """The message of `bucket`, which lies in its slot: flat uint8, empty if its class needs nothing of it."""
        self._executors[bucket].run()
        return self._buffers[bucket % NUM_SLOTS][: self._sizes[bucket]]


def _by_name(views: dict[torch.dtype, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {str(dtype): view for dtype, view in views.items()}
