"""The trainer's half of a refit: copy the pieces a rank owns into the buckets.

Destinations are planned once and replayed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mbridge.pieces import Piece

from .buckets import Layout, fill_copies
from .errors import SyncError
from .local_copies import LocalCopies, LocalCopy, typed_views


class Filler:
    """One per trainer rank. `slots` are flat uint8 tensors; bucket k lies in slot k % len(slots)."""

    def __init__(self, layout: Layout, owned: Sequence[Piece], slots: Sequence[torch.Tensor]) -> None:
        dtypes = {spec.name: spec.dtype for spec in layout.tensors}
        typed = [typed_views(slot, dtypes.values()) for slot in slots]
        program = [
            [
                LocalCopy(c.source_name, c.source, c.destination.of(typed[bucket % len(slots)][dtypes[c.hf_name]]))
                for c in copies
            ]
            for bucket, copies in enumerate(fill_copies(layout, owned))
        ]
        self._copies = LocalCopies(program, owned, dtypes)
        self._device = slots[0].device

    def begin(self, sources: Mapping[str, torch.Tensor]) -> None:
        """Use these local tensors until `end`. Raises PlanMismatchError if one is not as it was planned."""
        self._copies.begin(sources)

    def fill(self, bucket: int) -> None:
        """Copy this rank's part of `bucket`.

        When it returns, the bytes are there (also from a GPU). Raises SyncError.
        """
        self._copies.run(bucket)
        if self._device.type == "cuda":
            try:
                torch.cuda.synchronize(self._device)
            except RuntimeError as error:  # an accelerator that failed
                raise SyncError(f"the copies into bucket {bucket} failed: {error}", phase="stream") from error

    def end(self, *, succeeded: bool) -> None:
        """Hold no reference to the trainer's memory between refits: it may be offloaded or moved."""
        self._copies.end()
