"""The trainer's half of a refit: copy the pieces a rank owns into the buckets.

Destinations are planned once and replayed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mbridge.pieces import Piece, Region

from .buckets import Layout, fill_copies
from .errors import PlanMismatchError, SyncError


class Filler:
    """One per trainer rank. `slots` are flat uint8 tensors; bucket k lies in slot k % len(slots)."""

    def __init__(self, layout: Layout, owned: Sequence[Piece], slots: Sequence[torch.Tensor]) -> None:
        dtypes = {spec.name: spec.dtype for spec in layout.tensors}
        self._needs: dict[str, tuple[torch.dtype, int]] = {}  # local name -> dtype, elements
        for piece in owned:
            _, numel = self._needs.get(piece.local_name, (None, 0))
            self._needs[piece.local_name] = (dtypes[piece.hf_name], max(numel, _extent(piece.region)))
        self._program: list[list[tuple[str, Region, torch.Tensor]]] = []
        for bucket, copies in enumerate(fill_copies(layout, owned)):
            slot = slots[bucket % len(slots)]
            typed = {dtype: _whole(slot, dtype) for dtype in set(dtypes.values())}
            self._program.append(
                [(c.source_name, c.source, c.destination.of(typed[dtypes[c.hf_name]])) for c in copies]
            )
        self._device = slots[0].device
        self._sources: Mapping[str, torch.Tensor] = {}

    def begin(self, sources: Mapping[str, torch.Tensor]) -> None:
        """Use these local tensors until `end`. Raises PlanMismatchError if one is not as it was planned."""
        for name, (dtype, numel) in self._needs.items():
            source = sources.get(name)
            if source is None:
                raise PlanMismatchError(f"the models no longer have local tensor {name!r}", tensor=name)
            if source.dtype != dtype or source.numel() < numel or not source.is_contiguous():
                raise PlanMismatchError(
                    f"local tensor {name!r} must be {dtype}, contiguous, with {numel} elements or more; "
                    f"found {source.dtype}, shape {list(source.shape)}, stride {list(source.stride())}",
                    tensor=name,
                )
        self._sources = sources

    @torch.no_grad()
    def fill(self, bucket: int) -> None:
        """Copy this rank's part of `bucket`.

        When it returns, the bytes are there (also from a GPU). Raises SyncError.
        """
        name = None
        try:
            for name, region, destination in self._program[bucket]:
                destination.copy_(region.of(self._sources[name]))
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        except RuntimeError as error:  # an accelerator that failed
            raise SyncError(f"cannot copy from local tensor {name!r}: {error}", phase="stream", tensor=name) from error

    def end(self, *, succeeded: bool) -> None:
        """Hold no reference to the trainer's memory between refits: it may be offloaded or moved."""
        self._sources = {}


def _whole(slot: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return slot[: slot.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


def _extent(region: Region) -> int:
    """Elements from a tensor's first to the last that `region` touches."""
    if 0 in region.shape:
        return 0
    return region.offset + sum((n - 1) * stride for n, stride in zip(region.shape, region.stride, strict=True)) + 1
