"""What rank 0's conductor and the other ranks' followers ask of their own rank's weights during a refit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from mbridge.pieces import Piece, TensorSpec

from .checksum import checksums
from .messages import Check, Loan


class Source(NamedTuple):
    """One trainer rank. All of it may raise SyncError, which ends the refit for everyone."""

    begin: Callable[[], None]
    fill: Callable[[int], Loan | None]  # a bucket's number; on the direct path, where the memory has moved to
    totals: Callable[[Check], dict[int, int]]


def totals(
    message: Check, tensors: Sequence[TensorSpec], owned: Sequence[Piece], live: Mapping[str, torch.Tensor]
) -> dict[int, int]:
    """HF tensor number -> checksum over the pieces that this rank owns, of the tensors that `message` asks for."""
    number = {spec.name: i for i, spec in enumerate(tensors)}
    pieces = [p for p in owned if number[p.hf_name] % message.num_shares == message.share]
    found: dict[int, int] = {}
    for piece, total in zip(pieces, checksums(pieces, {s.name: s.shape for s in tensors}, live), strict=True):
        found[number[piece.hf_name]] = found.get(number[piece.hf_name], 0) + total
    # The sums of many pieces leave 64 bits; peers add them modulo 2^64 anyway.
    return {n: (total + (1 << 63)) % (1 << 64) - (1 << 63) for n, total in found.items()}
