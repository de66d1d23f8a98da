"""An engine worker's half of a verification: checksums of the engine's own memory.

What the engine keeps as it was loaded is compared with the trainers' checksums, box by box. Everything else it holds
(repacked, quantised and derived tensors, padding) is compared with its own checksum from right after a checked refit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mbridge.pieces import Piece

from .buckets import Layout
from .checksum import checksums, whole_checksums
from .errors import EngineError
from .messages import Check, Checked
from .placement import Placement
from .target import Target

NOT_KNOWN = "it is not known yet what the engine does with its tensors after loading; pass verify= to a sync() first"
NO_RECORD = "sync(verify=...) takes a checksum of it"
NOT_SENT = "not all of it comes from the trainer"
UNSEEN = "the engine has packed it into memory that it does not show"


class Checker:
    """One per connection to a trainer."""

    def __init__(self, layout: Layout, target: Target, placement: Placement) -> None:
        self._target, self._placement = target, placement
        self._specs = {spec.name: spec for spec in layout.tensors}
        self._number = {spec.name: i for i, spec in enumerate(layout.tensors)}
        self._records: dict[str, int] = {}  # engine name -> checksum after the last checked refit

    def record(self, changed: Mapping[str, str]) -> None:
        """Right after a refit: take the checksums that later checks of `own` tensors compare with."""
        self._records = whole_checksums(self._own(changed))

    def forget(self) -> None:
        """A refit begins that is not checked."""
        self._records = {}

    def check(self, message: Check, attempt: int, changed: Mapping[str, str] | None) -> Checked:
        """`changed`: engine name -> why it does not hold what was loaded. Raises EngineError if that is not known."""
        if changed is None:
            raise EngineError(NOT_KNOWN)
        live, formats = self._target.live(), self._placement.formats
        unchecked: dict[str, str] = {}
        pieces = []
        for piece in self._placement.pieces:
            name = piece.local_name
            if self._number[piece.hf_name] % message.num_shares != message.share or name in changed:
                continue
            if self._is_cast(piece):
                unchecked[name] = f"sent as {self._specs[piece.hf_name].dtype}, kept as {formats[name].dtype}"
                continue
            pieces.append(piece)
        shapes = {name: spec.shape for name, spec in self._specs.items()}
        totals = checksums(pieces, shapes, live)
        now = whole_checksums(self._own(changed)) if message.share == 0 and self._records else {}
        for name in changed.keys() | self._own(changed).keys():
            if name in live and not live[name].numel():
                unchecked[name] = UNSEEN
            elif name not in self._records:
                unchecked.setdefault(name, f"{changed.get(name, NOT_SENT)}; {NO_RECORD}")
        return Checked(
            attempt,
            boxes=[
                (self._number[p.hf_name], p.box.start, p.box.stop, p.local_name, total)
                for p, total in zip(pieces, totals, strict=True)
            ],
            changed=sorted(name for name, total in now.items() if self._records.get(name) != total),
            unchecked=unchecked,
        )

    def _is_cast(self, piece: Piece) -> bool:
        return self._placement.formats[piece.local_name].dtype != self._specs[piece.hf_name].dtype

    def _own(self, changed: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """Every engine tensor that holds more or other than what was sent."""
        live, pieces = self._target.live(), self._placement.pieces
        cast = {piece.local_name for piece in pieces if self._is_cast(piece)}
        loaded = {piece.local_name for piece in pieces} - changed.keys() - self._placement.unwritten().keys() - cast
        # A name may be there no more: engines drop what they have repacked.
        return {name: live[name] for name in live if name not in loaded and name in live and live[name].numel()}
