"""Copies out of a trainer rank's local tensors, planned once and replayed in every refit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from mbridge.pieces import Piece, Region

from .errors import PlanMismatchError, SyncError


class LocalCopy(NamedTuple):
    """From `region` of local tensor `name` into memory that stays where it is."""

    name: str
    region: Region
    destination: torch.Tensor


class LocalCopies:
    """The copies of one rank, bucket by bucket. Holds no local tensor between `begin` and `end`."""

    def __init__(
        self, program: list[list[LocalCopy]], owned: Sequence[Piece], dtypes: Mapping[str, torch.dtype]
    ) -> None:
        """`dtypes` of HF tensors; what `owned` needs of local tensors is checked in each `begin`."""
        self._program = program
        self._needs: dict[str, tuple[torch.dtype, int]] = {}  # local name -> dtype, elements
        for piece in owned:
            _, numel = self._needs.get(piece.local_name, (None, 0))
            self._needs[piece.local_name] = (dtypes[piece.hf_name], max(numel, _extent(piece.region)))
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
    def run(self, bucket: int) -> None:
        """Make the copies of `bucket`; on a GPU, in the current stream. Raises SyncError."""
        name = None
        try:
            for name, region, destination in self._program[bucket]:
                destination.copy_(region.of(self._sources[name]))
        except RuntimeError as error:  # an accelerator that failed
            raise SyncError(f"cannot copy from local tensor {name!r}: {error}", phase="stream", tensor=name) from error

    def end(self) -> None:
        """Hold no reference to the trainer's memory: it may be offloaded or moved."""
        self._sources = {}


def typed_views(flat: torch.Tensor, dtypes: Iterable[torch.dtype]) -> dict[torch.dtype, torch.Tensor]:
    """`flat` (uint8) as a tensor of each of `dtypes`, as many elements as fit."""
    return {d: flat[: flat.numel() // d.itemsize * d.itemsize].view(d) for d in set(dtypes)}


def _extent(region: Region) -> int:
    """Elements from a tensor's first to the last that `region` touches."""
    if 0 in region.shape:
        return 0
    return region.offset + sum((n - 1) * stride for n, stride in zip(region.shape, region.stride, strict=True)) + 1
