"""What rank 0's conductor and the other ranks' followers ask of their own rank's weights during a refit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from mbridge.pieces import Piece, TensorSpec

from .checksum import checksums
from .messages import Check, Fill, Loan


class Source(NamedTuple):
    """One trainer rank. All of it may raise SyncError, which ends the attempt for everyone."""

    begin: Callable[[], None]
    # Returns, on the direct path, where the memory has moved to. While it waits for others, it calls the second
    # argument now and then, which raises what ends the wait.
    fill: Callable[[Fill, Callable[[], None]], Loan | None]
    totals: Callable[[Check], dict[int, int]]
    end: Callable[[bool], None]  # the attempt is over; whether it succeeded


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
