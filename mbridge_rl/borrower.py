"""The worker's half of the direct path: the memory that trainer ranks lend, as local tensors and as pieces.

Segments are mapped once and kept; when a trainer's memory has moved, only what is new is mapped.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from mbridge.pieces import Box, Copy, Piece, Region, Shape, join, row_major, whole_pieces

from .buckets import Layout
from .errors import ProtocolError, SyncError, TransportError
from .messages import Lends, Loan
from .transports.base import Mapped, Transport

SegmentKey = tuple[tuple[str, str | int], ...]  # an address as something that can be looked up


class Borrower:
    """All trainer ranks' local tensors in one worker. Names are `rank:local name`."""

    def __init__(
        self, layout: Layout, lends: Sequence[Lends], transport: type[Transport], device: torch.device
    ) -> None:
        """Map everything. Raises TransportError if a segment cannot be mapped, or is on another kind of device."""
        self.tensors: dict[str, torch.Tensor] = {}  # flat, each of its own dtype
        self.pieces = [piece for rank in lends for piece in _pieces(layout, rank)]
        self._layout, self._transport, self._device = layout, transport, device
        self._local = {
            rank.rank: [(_name(rank, i), *_form(rank, i)) for i in range(len(rank.tensors))] for rank in lends
        }
        self._loans = {rank.rank: rank.loan for rank in lends}
        self._mapped: dict[SegmentKey, Mapped] = {}
        self.generation = 0  # grows whenever tensors have been mapped anew
        self._is_mapped = False
        self._into_whole: dict[str, list[Copy]] | None = None
        try:
            self._map(self._loans)
        except SyncError:
            self.close()
            raise

    def update(self, loans: Mapping[int, Loan]) -> None:
        """Follow memory that has moved. If that fails, it is tried again at the next call."""
        strangers = loans.keys() - self._loans.keys()
        if strangers:
            raise ProtocolError(f"trainer rank {min(strangers)} lends memory, but is none that lent at first")
        wanted = {**self._loans, **loans}
        if wanted != self._loans or not self._is_mapped:
            self._map(wanted)

    def whole(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """HF tensors (default: all) in the order of the layout: views where one trainer has all of one, else put
        together in new memory, which is free again when the consumer drops it.
        """
        if self._into_whole is None:
            self._into_whole = defaultdict(list)
            for copy in join(self.pieces, whole_pieces(self._layout.tensors)):
                self._into_whole[copy.hf_name].append(copy)
        wanted = None if names is None else set(names)
        for spec in self._layout.tensors:
            if wanted is not None and spec.name not in wanted:
                continue
            copies = self._into_whole[spec.name]
            if len(copies) == 1 and _is_all(copies[0], spec.shape):
                yield spec.name, copies[0].source.of(self.tensors[copies[0].source_name])
                continue
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self._device)
            for copy in copies:
                copy.destination.of(tensor).copy_(copy.source.of(self.tensors[copy.source_name]))
            yield spec.name, tensor

    def close(self) -> None:
        """Unmap. No tensor of it may be used any more. Calling it again does nothing."""
        self.tensors.clear()
        for mapped in self._mapped.values():
            mapped.close()
        self._mapped.clear()

    def _map(self, loans: dict[int, Loan]) -> None:
        wanted = {_key(segment): segment for loan in loans.values() for segment in loan.segments}
        self._is_mapped = False
        self.generation += 1
        self.tensors.clear()
        gone = self._mapped.keys() - wanted.keys()
        if gone and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # it may still copy from there
        for address in gone:
            self._mapped.pop(address).close()
        for address, segment in wanted.items():
            if address in self._mapped:
                continue
            mapped = self._mapped[address] = self._open(segment)
            if mapped.bytes.device.type != self._device.type:
                raise TransportError(
                    f"the trainer's parameters are on {mapped.bytes.device.type}, the engine's on {self._device.type}"
                )
        for rank, loan in loans.items():
            segments = [self._mapped[_key(segment)].bytes for segment in loan.segments]
            local = self._local[rank]
            if len(loan.places) != len(local):
                raise ProtocolError(f"trainer rank {rank} lends {len(loan.places)} tensors instead of {len(local)}")
            for (name, dtype, numel), (number, offset) in zip(local, loan.places, strict=True):
                num_bytes = numel * dtype.itemsize
                memory = segments[number] if 0 <= number < len(segments) else None
                if memory is None or offset < 0 or offset % dtype.itemsize or offset + num_bytes > memory.numel():
                    raise ProtocolError(f"trainer rank {rank} lends {name} outside of its segments")
                self.tensors[name] = memory[offset : offset + num_bytes].view(dtype)
        self._loans, self._is_mapped = loans, True

    def _open(self, segment: Mapping[str, str | int]) -> Mapped:
        try:
            return self._transport.map_segment(dict(segment))
        except (KeyError, ValueError, OverflowError) as error:
            raise ProtocolError(f"{self._transport.name} cannot read the address {dict(segment)}: {error!r}") from error


def _pieces(layout: Layout, rank: Lends) -> Iterator[Piece]:
    """Raises ProtocolError for a piece that lies outside of its HF tensor or of its local tensor."""
    for number, start, stop, local, offset, stride in rank.pieces:
        if not (0 <= number < len(layout.tensors) and 0 <= local < len(rank.tensors)):
            raise ProtocolError(f"trainer rank {rank.rank} lends tensor {local} as HF tensor {number}: no such number")
        spec, (name, _, numel) = layout.tensors[number], rank.tensors[local]
        box = Box(start, stop)
        if not (len(start) == len(stop) == len(stride)) or not _is_inside(box, spec.shape):
            raise ProtocolError(f"trainer rank {rank.rank} lends {box} of {list(spec.shape)}", tensor=spec.name)
        last = offset + sum((n - 1) * step for n, step in zip(box.shape, stride, strict=True))
        if min(offset, *stride, 0) < 0 or last >= numel:
            raise ProtocolError(f"trainer rank {rank.rank} lends elements outside of {name}", tensor=spec.name)
        yield Piece(spec.name, box, _name(rank, local), Region(offset, box.shape, stride))


def _is_inside(box: Box, shape: Shape) -> bool:
    """Whether `box` is one of a tensor of `shape`, or of its unfolded view, and not empty."""
    if shape and len(box.start) == len(shape) + 1:
        shape = (*shape[:-1], shape[-1] // 2, 2)
    return len(box.start) == len(shape) and all(
        0 <= start < stop <= size for start, stop, size in zip(box.start, box.stop, shape, strict=True)
    )


def _name(rank: Lends, local: int) -> str:
    return f"{rank.rank}:{rank.tensors[local][0]}"


def _form(rank: Lends, local: int) -> tuple[torch.dtype, int]:
    name, dtype_name, numel = rank.tensors[local]
    dtype = getattr(torch, dtype_name, None)
    if numel < 0:
        raise ProtocolError(f"{name} has {numel} elements", tensor=name)
    if not isinstance(dtype, torch.dtype):
        raise SyncError(f"{name} has dtype {dtype_name!r}, which this torch does not know", tensor=name)
    return dtype, numel


def _key(segment: Mapping[str, str | int]) -> SegmentKey:
    return tuple(sorted(segment.items()))


def _is_all(copy: Copy, shape: tuple[int, ...]) -> bool:
    """Whether the source holds the whole tensor, in its own memory order."""
    return copy.box == Box.whole(shape) and (copy.source.stride == row_major(shape) or math.prod(shape) <= 1)
