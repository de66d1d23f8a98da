"""Trainer pieces -> whole HF tensors, by collectives inside one pipeline stage, bucket by bucket.

Everything is planned before the first tensor moves: each rank packs its pieces of a bucket into one buffer, one
collective brings the buffers together, and planned copies lay the pieces out as HF tensors. Buffers are allocated once
and used in turn, and bucket k+1 is under way while the caller works on bucket k. This is the only module of mbridge,
besides megatron/, that calls torch.distributed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from .errors import MBridgeError, PeerError, PlanError
from .pieces import Piece, TensorSpec
from .plan import check_owned, first_difference

ALIGNMENT = 256  # bytes; what cudaMalloc aligns to, so a tensor in a bucket is as aligned as one of its own
BUCKET_BYTES = 64 * 1024**2  # larger ones gain nothing over gloo and cost page faults (benchmarks/bridge.py)

# torch 2.13 renamed it and warns at each call of the old name; torch 2.11 has only that one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


T = TypeVar("T")


class Placed(NamedTuple):
    """An HF tensor and where it begins in a bucket, in bytes."""

    spec: TensorSpec
    offset: int


class _Packed(NamedTuple):
    """A piece and where it begins in its rank's packed buffer, in bytes."""

    rank: int  # within the stage group
    piece: Piece
    offset: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Whole HF tensors as views of one flat buffer of bytes."""

    tensors: tuple[tuple[str, torch.Tensor], ...]
    flat: torch.Tensor


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """One bucket of a stage: its tensors, and the pieces of each rank of the stage group that they are made of."""

    placed: tuple[Placed, ...]
    num_bytes: int
    packed: tuple[_Packed, ...]
    packed_bytes: int  # of the rank that sends most

    def bucket(self, flat: torch.Tensor) -> Bucket:
        """The bucket's tensors as views of `flat`, uint8 of at least `num_bytes`."""
        views = ((spec.name, _view(flat, offset, spec.shape, spec.dtype)) for spec, offset in self.placed)
        return Bucket(tuple(views), flat[: self.num_bytes])


def plan_buckets(
    groups: Sequence[Sequence[TensorSpec]],
    owned_by_rank: Sequence[Sequence[Piece]] | None,
    bucket_bytes: int = BUCKET_BYTES,
) -> list[BucketPlan]:
    """Divide a stage's tensors into buckets of about `bucket_bytes`, and list which rank packs what.

    A group stays in one bucket (engines fuse its tensors), and one that is larger gets a bucket of its own size.
    `owned_by_rank` None is for another stage, of which only the buckets matter here.
    Raises PlanError unless the ranks' pieces cover each tensor exactly once.
    """
    if owned_by_rank is None:
        owned_by_rank = [()]
    else:
        check_owned([spec for group in groups for spec in group], owned_by_rank)
    pieces: dict[str, list[tuple[int, Piece]]] = {}
    for rank, owned in enumerate(owned_by_rank):
        for piece in owned:
            pieces.setdefault(piece.hf_name, []).append((rank, piece))
    plans: list[BucketPlan] = []
    placed: list[Placed] = []
    end = 0
    for group in groups:
        size = sum(_aligned(spec.num_bytes) for spec in group)
        if placed and end + size > bucket_bytes:
            plans.append(_bucket_plan(placed, end, pieces, len(owned_by_rank)))
            placed, end = [], 0
        for spec in group:
            placed.append(Placed(spec, end))
            end += _aligned(spec.num_bytes)
    if placed:
        plans.append(_bucket_plan(placed, end, pieces, len(owned_by_rank)))
    return plans


def _bucket_plan(
    placed: Sequence[Placed], num_bytes: int, pieces: Mapping[str, Sequence[tuple[int, Piece]]], num_ranks: int
) -> BucketPlan:
    ends = [0] * num_ranks
    packed = []
    for spec, _ in placed:
        for rank, piece in pieces.get(spec.name, ()):
            packed.append(_Packed(rank, piece, ends[rank]))
            ends[rank] += _aligned(piece.box.numel * spec.dtype.itemsize, 16)
    return BucketPlan(tuple(placed), num_bytes, tuple(packed), max(ends))


def gather_buckets(
    plans: Sequence[BucketPlan],
    tensors: Mapping[str, torch.Tensor],
    group: dist.ProcessGroup | None,
    *,
    to_all: bool,
    reuse: bool,
) -> Iterator[Bucket | None]:
    """Run the plans over the ranks of `group` (None: a stage of one rank), in order; one item a bucket.

    On every rank if `to_all`, else on the group's first rank only: the others get None. With `reuse`, a bucket is valid
    until the second next one is asked for; without, each has memory of its own.
    """
    if not plans:
        return
    device = next(iter(tensors.values())).device
    allocate = _Buffers(device)
    flats = [allocate(max(p.num_bytes for p in plans)) for _ in range(2)] if reuse else None
    gathering = _Gathering(group, to_all, allocate, max(p.packed_bytes for p in plans))
    with torch.no_grad():
        gathering.start(0, plans[0], tensors)
        for k, plan in enumerate(plans):
            sources = gathering.wait(k, plan, tensors)
            if k + 1 < len(plans):
                gathering.start(k + 1, plans[k + 1], tensors)
            if sources is None:
                yield None
                continue
            bucket = plan.bucket(flats[k % 2] if flats is not None else allocate(plan.num_bytes))
            views = dict(bucket.tensors)
            for (_, piece, _), source in zip(plan.packed, sources, strict=True):
                piece.box.of(views[piece.hf_name]).copy_(source)
            yield bucket


class _Buffers:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)


class _Gathering:
    """The collective of one bucket, two in flight. A stage of one rank needs none and no staging."""

    def __init__(self, group: dist.ProcessGroup | None, to_all: bool, allocate: _Buffers, packed_bytes: int) -> None:
        self._group = group
        self._size = 1 if group is None else dist.get_world_size(group)
        self._rank = 0 if group is None else dist.get_rank(group)
        self._to_all = to_all
        self._receives = to_all or self._rank == 0
        if self._size > 1:
            self._send = allocate(packed_bytes)  # one: bucket k has arrived when k + 1 is packed
            self._received = [allocate(packed_bytes * self._size) for _ in range(2)] if self._receives else None
        self._work: list[Any] = [None, None]

    def start(self, k: int, plan: BucketPlan, tensors: Mapping[str, torch.Tensor]) -> None:
        """Pack this rank's pieces of bucket k and begin its collective."""
        if self._size == 1:
            return
        send = self._send[: plan.packed_bytes]
        for rank, piece, offset in plan.packed:
            if rank == self._rank:
                local = tensors[piece.local_name]
                _view(send, offset, piece.box.shape, local.dtype).copy_(piece.region.of(local))
        if self._to_all:
            assert self._received is not None
            received = self._received[k % 2][: plan.packed_bytes * self._size]
            self._work[k % 2] = _all_gather(received, send, group=self._group, async_op=True)
        else:
            parts = self._parts(k, plan) if self._receives else None
            self._work[k % 2] = dist.gather(send, parts, group=self._group, group_dst=0, async_op=True)

    def wait(self, k: int, plan: BucketPlan, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor] | None:
        """The pieces of bucket k as views, in the order of `plan.packed`; None where nothing is received."""
        if self._size == 1:
            return [piece.region.of(tensors[piece.local_name]) for _, piece, _ in plan.packed]
        self._work[k % 2].wait()
        if not self._receives:
            return None
        parts = self._parts(k, plan)
        return [
            _view(parts[rank], offset, piece.box.shape, tensors[piece.local_name].dtype)
            for rank, piece, offset in plan.packed
        ]

    def _parts(self, k: int, plan: BucketPlan) -> list[torch.Tensor]:
        assert self._received is not None
        return list(self._received[k % 2][: plan.packed_bytes * self._size].chunk(self._size))


def broadcast_buckets(
    stage_plans: Sequence[Sequence[BucketPlan]],
    tensors: Mapping[str, torch.Tensor],
    stage_group: dist.ProcessGroup | None,
    pipeline_group: dist.ProcessGroup | None,
) -> Iterator[Bucket]:
    """Every bucket of every stage on every rank: gathered in its stage, then broadcast along the pipeline."""
    my_stage = 0 if pipeline_group is None else dist.get_rank(pipeline_group)
    device = next(iter(tensors.values())).device
    for stage, plans in enumerate(stage_plans):
        if stage == my_stage:
            mine = gather_buckets(plans, tensors, stage_group, to_all=True, reuse=False)
            for bucket in mine:
                assert bucket is not None
                if pipeline_group is not None:
                    dist.broadcast(bucket.flat, group=pipeline_group, group_src=stage)
                yield bucket
            continue
        for plan in plans:
            flat = torch.empty(plan.num_bytes, dtype=torch.uint8, device=device)
            dist.broadcast(flat, group=pipeline_group, group_src=stage)
            yield plan.bucket(flat)


def world_group() -> dist.ProcessGroup | None:
    """The group of all ranks, None in a world of one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD


def raise_on_all(error: MBridgeError | None, group: dist.ProcessGroup | None) -> None:
    """Called on every rank of `group` with its own error or None: if any has one, every rank raises."""
    said = exchange(None if error is None else f"{type(error).__name__}: {error}", group)
    if error is not None:
        raise error
    for rank, text in enumerate(said):
        if text is not None:
            raise PeerError(f"rank {rank} failed, so this rank stops too. {text}")


def on_all(action: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """`action()`, called on every rank of `group`; if it fails on one, every rank raises and none is left waiting."""
    outcome: list[T] = []
    error: MBridgeError | None = None
    try:
        outcome.append(action())
    except MBridgeError as caught:
        error = caught
    raise_on_all(error, group)
    return outcome[0]


def exchange(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """`value` of every rank of a group, by rank. While planning only; never in the loop over buckets."""
    if group is None or dist.get_world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def check_agreement(digest: str, lines: Sequence[str], group: dist.ProcessGroup | None) -> None:
    """Raise PlanError on every rank of `group` if two of them have different plans, naming the first difference."""
    if len(set(exchange(digest, group))) == 1:
        return
    difference = first_difference(exchange(list(lines), group))
    raise PlanError(f"ranks disagree on the plan, so no collective was started: {difference}")


def _view(flat: torch.Tensor, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    num_bytes = math.prod(shape) * dtype.itemsize
    return flat[offset : offset + num_bytes].view(dtype).view(tuple(shape))


def _aligned(num_bytes: int, to: int = ALIGNMENT) -> int:
    return -(-num_bytes // to) * to
