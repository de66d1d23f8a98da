"""Where each HF tensor lies in the flat buckets of a refit. Pure: integers and shapes, no memory.

Tensors keep the plan's order. A fusion group (tensors that the engine's loader wants in one call) is never parted
between two load calls: it either fits into one bucket whole, or it is cut into rows over buckets of its own and put
together again by the receiver (`Layout.split_groups`). Offsets are multiples of `ALIGNMENT` bytes, so any dtype can lie
anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from mbridge.pieces import Box, Copy, Piece, Region, TensorSpec, join

from .errors import SyncError
from .messages import Lends, SetUp

ALIGNMENT = 256
DEFAULT_LIMIT_BYTES = 512 << 20  # larger fusion groups are cut, unless `bucket_bytes` asks for more
NUM_TARGET_BUCKETS = 8  # enough for fill and load to overlap, few enough for messages not to matter


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `start` to `stop` of tensor number `tensor`, at `offset` bytes of bucket number `bucket`."""

    tensor: int
    bucket: int
    offset: int
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """All buckets of a refit, equal on every trainer rank and in every engine worker."""

    tensors: tuple[TensorSpec, ...]
    groups: tuple[tuple[int, ...], ...]  # tensor numbers; a group is loaded in one call
    parts: tuple[Part, ...]  # in the order of their buckets
    bucket_bytes: int  # of the largest bucket
    num_buckets: int
    optional_names: frozenset[str] = frozenset()  # HF names that an engine may leave unread

    @cached_property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.tensors)

    @property
    def split_groups(self) -> tuple[tuple[int, ...], ...]:
        """Groups that do not lie in one bucket."""
        buckets: dict[int, set[int]] = {}
        for part in self.parts:
            buckets.setdefault(part.tensor, set()).add(part.bucket)
        return tuple(group for group in self.groups if len(set().union(*(buckets[t] for t in group))) > 1)

    def by_bucket(self) -> list[list[Part]]:
        buckets: list[list[Part]] = [[] for _ in range(self.num_buckets)]
        for part in self.parts:
            buckets[part.bucket].append(part)
        return buckets


def plan_buckets(
    tensors: Sequence[TensorSpec],
    fusion_groups: Sequence[Sequence[str]],
    bucket_bytes: int | None = None,
    optional_names: frozenset[str] = frozenset(),
) -> Layout:
    """Lay `tensors` out in buckets of at most `bucket_bytes` (by default sized so that filling and loading overlap).

    Raises SyncError if `fusion_groups` do not name each tensor exactly once, or `bucket_bytes` is not positive.
    """
    number = {spec.name: i for i, spec in enumerate(tensors)}
    groups = tuple(tuple(number[name] for name in group if name in number) for group in fusion_groups)
    named = [name for group in fusion_groups for name in group]
    if sorted(named) != sorted(number) or len(number) != len(tensors):
        raise SyncError(
            f"fusion groups name {len(named)} tensors, the plan has {len(tensors)}: each must be in one group"
        )
    if bucket_bytes is not None and bucket_bytes < 1:
        raise SyncError(f"bucket_bytes must be positive, found {bucket_bytes}")

    sizes = [sum(_room(tensors[t].num_bytes) for t in group) for group in groups]
    target, capacity = _sizes(sizes, bucket_bytes)
    capacity = max(capacity, max((aligned(_row_bytes(spec)) for spec in tensors), default=0))
    cursor = _Cursor()
    for group, size in zip(groups, sizes, strict=True):
        if size <= capacity:
            if cursor.used and cursor.used + size > min(target, capacity):
                cursor.next_bucket()
            for t in group:
                cursor.place(t, 0, _num_rows(tensors[t]), tensors[t].num_bytes)
            continue
        cursor.next_bucket_if_used()
        for t in group:
            _split(t, tensors[t], capacity, cursor)
        cursor.next_bucket_if_used()
    largest = max(cursor.largest, ALIGNMENT)  # slots have some size, also of a model without tensors
    return Layout(tuple(tensors), groups, tuple(cursor.parts), largest, cursor.num_buckets, optional_names)


def write_set_up(layout: Layout, transport: str, address: dict[str, str | int], lends: Sequence[Lends] = ()) -> SetUp:
    """`layout` as a message, with the slots' address on the bucket path, or with `lends` on the direct path."""
    return SetUp(
        tensors=[(t.name, t.shape, str(t.dtype).removeprefix("torch.")) for t in layout.tensors],
        groups=list(layout.groups),
        parts=[(p.tensor, p.bucket, p.offset, p.start, p.stop) for p in layout.parts],
        bucket_bytes=layout.bucket_bytes,
        num_buckets=layout.num_buckets,
        optional_names=sorted(layout.optional_names),
        transport=transport,
        address=address,
        lends=list(lends),
    )


def read_set_up(message: SetUp) -> Layout:
    """The layout that `write_set_up` wrote. Raises SyncError for a dtype that this torch does not have."""
    tensors = []
    for name, shape, dtype_name in message.tensors:
        dtype = getattr(torch, dtype_name, None)
        if not isinstance(dtype, torch.dtype):
            raise SyncError(f"{name} has dtype {dtype_name!r}, which this torch does not know", tensor=name)
        tensors.append(TensorSpec(name, shape, dtype))
    parts = tuple(Part(*part) for part in message.parts)
    return Layout(
        tuple(tensors),
        tuple(message.groups),
        parts,
        message.bucket_bytes,
        message.num_buckets,
        frozenset(message.optional_names),
    )


def destination_pieces(layout: Layout) -> list[Piece]:
    """The buckets as pieces: local name = bucket number, region in elements of the tensor's own dtype."""
    pieces = []
    for part in layout.parts:
        spec = layout.tensors[part.tensor]
        box = part_box(spec, part)
        region = Region.contiguous(box.shape, part.offset // spec.dtype.itemsize)
        pieces.append(Piece(spec.name, box, str(part.bucket), region))
    return pieces


def part_box(spec: TensorSpec, part: Part) -> Box:
    """The box of an HF tensor that `part` holds."""
    whole = Box.whole(spec.shape)
    if not spec.shape:
        return whole
    return Box((part.start, *whole.start[1:]), (part.stop, *whole.stop[1:]))


def fill_copies(layout: Layout, owned: Iterable[Piece]) -> list[list[Copy]]:
    """For each bucket, the copies that a trainer rank owning `owned` makes into it."""
    buckets: list[list[Copy]] = [[] for _ in range(layout.num_buckets)]
    for copy in join(owned, destination_pieces(layout)):
        buckets[int(copy.destination_name)].append(copy)
    return buckets


def part_view(slot: torch.Tensor, spec: TensorSpec, part: Part) -> torch.Tensor:
    """The rows of `part` as a tensor over `slot` (flat uint8): no copy."""
    shape = part_box(spec, part).shape
    num_bytes = math.prod(shape) * spec.dtype.itemsize
    return slot[part.offset : part.offset + num_bytes].view(spec.dtype).view(shape)


class _Cursor:
    """Places parts one after the other."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.bucket, self.used, self.largest = 0, 0, 0

    @property
    def num_buckets(self) -> int:
        return self.bucket + (1 if self.used else 0)

    def place(self, tensor: int, start: int, stop: int, num_bytes: int) -> None:
        self.parts.append(Part(tensor, self.bucket, self.used, start, stop))
        self.used += _room(num_bytes)
        self.largest = max(self.largest, self.used)

    def next_bucket(self) -> None:
        self.bucket, self.used = self.bucket + 1, 0

    def next_bucket_if_used(self) -> None:
        if self.used:
            self.next_bucket()


def _split(tensor: int, spec: TensorSpec, capacity: int, cursor: _Cursor) -> None:
    row_bytes, num_rows = _row_bytes(spec), _num_rows(spec)
    if num_rows == 0:
        cursor.place(tensor, 0, 0, 0)
    for start, stop in _row_ranges(num_rows, row_bytes, capacity, cursor):
        cursor.place(tensor, start, stop, (stop - start) * row_bytes)


def _row_ranges(num_rows: int, row_bytes: int, capacity: int, cursor: _Cursor) -> Iterator[tuple[int, int]]:
    start = 0
    while start < num_rows:
        room = (capacity - cursor.used) // max(row_bytes, 1)
        if room == 0:
            cursor.next_bucket()
            continue
        # Even, so that what alternates in a one-dimensional tensor (gate and up biases) is not parted.
        stop = min(num_rows, start + max(room - room % 2, 1))
        yield start, stop
        start = stop


def _sizes(group_bytes: list[int], bucket_bytes: int | None) -> tuple[int, int]:
    """(bytes after which a bucket is closed, most bytes in a bucket)."""
    total, largest = sum(group_bytes), max(group_bytes, default=0)
    if bucket_bytes is not None:
        size = max(aligned(min(bucket_bytes, total)), ALIGNMENT)
        return size, size
    target = aligned(min(max(total // NUM_TARGET_BUCKETS, 1 << 20), DEFAULT_LIMIT_BYTES))
    return target, min(max(target, largest), DEFAULT_LIMIT_BYTES)


def _num_rows(spec: TensorSpec) -> int:
    return spec.shape[0] if spec.shape else 1


def _row_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape[1:]) * spec.dtype.itemsize


def _room(num_bytes: int) -> int:
    """Bytes that a part takes up in a bucket: an empty tensor still has a place."""
    return max(aligned(num_bytes), ALIGNMENT)


def aligned(num_bytes: int) -> int:
    """`num_bytes` rounded up to ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
