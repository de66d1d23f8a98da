"""The trainer's half of a collective lane: bring a bucket's pieces to its sender, and broadcast it to all workers.

While bucket k is on its way to the workers, the pieces of k+1 are on their way to the sender. On a sharded lane each
class of workers has a group of its own, and gets of the bucket what it needs (needs.py), packed out of the slot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from mbridge.pieces import Copy, Piece

from .broadcast_plan import (
    OwnedBox,
    broadcast_meeting,
    collect_meeting,
    copies_of,
    packed,
    plan_broadcasts,
    shares_of,
    wire_bytes,
)
from .buckets import Layout, fill_copies
from .errors import ProtocolError, SyncError
from .local_copies import LocalCopies, LocalCopy, typed_views
from .messages import Grouping, Share
from .needs import plan_packing, read_needs
from .shard_sender import Packer
from .transports._process_group import Breathe, Group, Operation, no_breath
from .transports.base import NUM_SLOTS


class Broadcaster:
    """One per trainer rank. Same calls as Filler; used by one thread.

    `owned_by_rank` are the boxes of all ranks (`agreement.Offer.owned`), `owned` this rank's own pieces in the same
    order. `token` is the session's, equal on all ranks and workers.
    """

    def __init__(
        self,
        layout: Layout,
        owned_by_rank: Sequence[Sequence[OwnedBox]],
        owned: Sequence[Piece],
        rank: int,
        device: torch.device,
        token: str,
    ) -> None:
        self.plan = plan_broadcasts(layout, owned_by_rank)
        self._rank, self._device, self._token = rank, device, token
        self._layout, self._wire_bytes = layout, wire_bytes(layout)
        self._dtypes = {spec.name: spec.dtype for spec in layout.tensors}
        mine = fill_copies(layout, owned)
        program: list[list[LocalCopy]] = [[] for _ in self.plan.senders]
        self._circles: dict[int, _Circle] = {}  # that this rank is in
        self._slots: list[torch.Tensor] = []  # of a sender
        if rank in self.plan.circles:
            self._slots = [_allocate(layout.bucket_bytes, device) for _ in range(NUM_SLOTS)]
        for sender, ranks in self.plan.circles.items():
            if rank not in ranks:
                continue
            buckets = [k for k, s in enumerate(self.plan.senders) if s == sender]
            copies_by_rank = [mine if r == rank else copies_of(layout, owned_by_rank[r]) for r in ranks]
            self._circles[sender] = _Circle(rank, ranks, buckets, copies_by_rank, self._dtypes, self._slots, device)
            for bucket in buckets:
                program[bucket] = self._circles[sender].local_copies(bucket, mine[bucket])
        self._local = LocalCopies(program, owned, self._dtypes)
        self._generation = 0  # that the groups are of
        self._outlets: list[_Outlet] = []  # of a sender: a group for each class of workers
        self._packers: dict[str, Packer] = {}  # by digest: kept when members come and go
        self._left: list[Group] = []  # that may still use the buffers
        self._sent: list[list[Operation]] = [[] for _ in range(NUM_SLOTS)]  # the last broadcasts out of each slot
        self._is_under_way = False  # an attempt, on this rank

    @property
    def senders(self) -> list[int]:
        """The trainer rank that each bucket comes from: what workers are told in SetUp."""
        return self.plan.senders

    @property
    def num_bytes(self) -> int:
        """Of the buffers of this rank."""
        packers = (packer.num_bytes for packer in self._packers.values())
        circles = (circle.buffer.numel() for circle in self._circles.values())
        return sum(slot.numel() for slot in self._slots) + sum(circles) + sum(packers)

    def begin(self, sources: Mapping[str, torch.Tensor]) -> None:
        """Use these local tensors until `end`. Raises PlanMismatchError if one is not as it was planned."""
        self._local.begin(sources)

    def fill(self, bucket: int, grouping: Grouping | None = None, breathe: Breathe = no_breath) -> None:
        """This rank's part of `bucket`: when it returns, the bucket is on its way, or this rank's pieces have arrived.

        `grouping` comes with bucket 0. `breathe` is called while others are waited for, and ends the wait by raising.
        Raises SyncError; the attempt has then failed, and `end` gives the groups up.
        """
        if bucket == 0:
            self._is_under_way = True
            if grouping is None:
                raise SyncError("bucket 0 came without the members of its group", phase="stream")
            self._join(grouping, breathe)
            for circle in self._circles.values():
                self._collect(circle.buckets[0])
        own = self._circles.get(self.plan.senders[bucket])
        if own is not None:
            own.wait(breathe)
            if own.sender == self._rank:
                self._send(bucket, own, breathe)
            following = self.plan.next_bucket(bucket)
            if following is not None:
                self._collect(following)
        self._is_under_way = bucket + 1 < len(self.plan.senders)

    def end(self, *, succeeded: bool) -> None:
        """The attempt is over. Waits until this rank's broadcasts are complete, or gives the groups up.

        Then holds no reference to the trainer's memory. Raises SyncError if a broadcast fails.
        """
        pending = [operation for operations in self._sent for operation in operations]
        try:
            if succeeded:
                for operation in pending:
                    operation.wait()
                self._is_under_way = False
        finally:
            if self._is_under_way or not all(operation.is_complete for operation in pending):
                self._leave()
            self._is_under_way = False
            self._local.end()

    def close(self) -> None:
        """Leave the groups. Calling it again does nothing."""
        self._local.end()
        self._leave()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _join(self, grouping: Grouping, breathe: Breathe) -> None:
        """Be in the groups of `grouping`. All members join their groups in one order, so nobody waits in a circle."""
        if grouping.generation == self._generation:
            if self._is_broken():
                raise SyncError(f"group generation {grouping.generation} was given up", phase="stream")
            return
        self._leave()
        self._generation = grouping.generation
        while self._left:
            self._left[-1].wait_ended(breathe)
            self._left.pop()
        for circle in self._circles.values():
            if len(circle.ranks) > 1:
                meeting, names = collect_meeting(grouping, self._token, circle.ranks)
                member = circle.ranks.index(self._rank)
                circle.group = Group(
                    meeting, member, names, self._device, grouping.deadline_s, backend=grouping.backend, breathe=breathe
                )
        if self._slots:
            shares = shares_of(grouping)
            digests = {share.digest for share in shares}
            self._packers = {digest: packer for digest, packer in self._packers.items() if digest in digests}
            for share in shares:
                if share.digest and share.digest not in self._packers:
                    self._packers[share.digest] = self._packer(share, grouping)
                    breathe()
            for number, share in enumerate(shares):
                meeting, names = broadcast_meeting(grouping, self._token, self._rank, number)
                group = Group(
                    meeting, 0, names, self._device, grouping.deadline_s, backend=grouping.backend, breathe=breathe
                )
                self._outlets.append(_Outlet(group, self._packers.get(share.digest)))

    def _packer(self, share: Share, grouping: Grouping) -> Packer:
        """Packs what the workers of a class need. Raises ProtocolError if they would unpack it otherwise."""
        engine, index = grouping.workers[share.members[0]]
        who = f"worker {index} of engine {engine}"
        if share.needs is None:
            raise ProtocolError(f"trainer rank {self._rank} does not know what {who} needs", phase="stream")
        packing = plan_packing(self._layout, read_needs(self._layout, share.needs))
        if packing.digest != share.digest:
            raise ProtocolError(
                f"trainer rank {self._rank} packs for {who} by {packing}, but it unpacks by plan {share.digest}; is it "
                "the same version of mbridge?",
                phase="stream",
            )
        return Packer(self._layout, packing, self._circles[self._rank].buckets, self._slots)

    def _is_broken(self) -> bool:
        has_all = all(circle.group is not None for circle in self._circles.values() if len(circle.ranks) > 1)
        return not has_all or (bool(self._slots) and not self._outlets)

    def _leave(self) -> None:
        groups = [*(outlet.group for outlet in self._outlets), *(circle.leave() for circle in self._circles.values())]
        self._left += [group for group in groups if group is not None]
        for group in self._left:
            group.close()
        self._outlets, self._sent = [], [[] for _ in range(NUM_SLOTS)]

    def _collect(self, bucket: int) -> None:
        circle = self._circles[self.plan.senders[bucket]]
        if circle.sender != self._rank:
            self._local.run(bucket)
        circle.start(bucket)

    def _send(self, bucket: int, circle: _Circle, breathe: Breathe) -> None:
        if not self._outlets:
            raise SyncError(f"bucket {bucket} came before the members of its group", phase="stream")
        index = bucket % NUM_SLOTS
        for previous in self._sent[index]:
            previous.wait(breathe)
        self._local.run(bucket)
        circle.lay_out(bucket)
        self._sent[index] = []
        whole = self._slots[index][: self._wire_bytes[bucket]]
        for group, packer in self._outlets:
            message = whole if packer is None else packer.pack(bucket)
            if message.numel():
                what = f"bucket {bucket} to reach {len(group.names) - 1} workers from trainer rank {self._rank}"
                self._sent[index].append(group.broadcast(message, 0, what))


class _Outlet(NamedTuple):
    """A group of this sender and a class of workers, and what packs their messages, unless they get whole buckets."""

    group: Group
    packer: Packer | None


class _Received(NamedTuple):
    source: torch.Tensor
    destination: torch.Tensor


class _Circle:
    """A sender and the ranks that bring it pieces, as one of them sees it."""

    def __init__(
        self,
        rank: int,
        ranks: Sequence[int],
        buckets: Sequence[int],
        copies_by_rank: Sequence[list[list[Copy]]],
        dtypes: Mapping[str, torch.dtype],
        slots: Sequence[torch.Tensor],
        device: torch.device,
    ) -> None:
        self.sender, self.ranks, self.buckets = ranks[0], ranks, buckets
        self.group: Group | None = None
        self._me, self._dtypes = ranks.index(rank), dtypes
        self._operation: Operation | None = None
        # bucket -> of each member: where its pieces begin in what it sends, and how many bytes it sends
        self._packed = {k: [packed([self._size(c) for c in copies[k]]) for copies in copies_by_rank] for k in buckets}
        if self._is_sender:
            for per_member in self._packed.values():
                per_member[0] = ([], 0)  # its own go straight into the slot
        largest = max(self._bytes_at(k) for k in buckets)
        self.buffer = _allocate(largest, device)
        self._typed = typed_views(self.buffer, dtypes.values())
        self._typed_slots = [typed_views(slot, dtypes.values()) for slot in slots]
        self._received = {k: self._layouts(k, copies_by_rank) for k in buckets} if self._is_sender else {}

    @property
    def _is_sender(self) -> bool:
        return self._me == 0

    def local_copies(self, bucket: int, copies: Sequence[Copy]) -> list[LocalCopy]:
        """What this rank copies for `bucket`: a sender into its slot, another rank into what it sends."""
        if self._is_sender:
            typed = self._typed_slots[bucket % NUM_SLOTS]
            return [
                LocalCopy(c.source_name, c.source, c.destination.of(typed[self._dtypes[c.hf_name]])) for c in copies
            ]
        offsets, _ = self._packed[bucket][self._me]
        return [
            LocalCopy(c.source_name, c.source, self._block(c, offset))
            for c, offset in zip(copies, offsets, strict=True)
        ]

    def start(self, bucket: int) -> None:
        """Begin to bring the pieces of `bucket` to the sender."""
        if self.group is None:
            return
        sizes = [num_bytes for _, num_bytes in self._packed[bucket]]
        nothing, none = self.buffer[:0], [0] * len(sizes)
        what = f"the pieces of bucket {bucket} to reach trainer rank {self.sender}"
        if self._is_sender:
            self._operation = self.group.exchange(self.buffer[: sum(sizes)], nothing, sizes, none, what)
            return
        mine = [sizes[self._me], *none[1:]]
        self._operation = self.group.exchange(nothing, self.buffer[: mine[0]], none, mine, what)

    def wait(self, breathe: Breathe) -> None:
        """Until the pieces have arrived."""
        if self._operation is not None:
            self._operation.wait(breathe)
            self._operation = None

    def lay_out(self, bucket: int) -> None:
        """Copy the pieces that came into the slot."""
        for source, destination in self._received[bucket]:
            destination.copy_(source)

    def leave(self) -> Group | None:
        """Forget the group, which the caller closes."""
        group = self.group
        self.group = self._operation = None
        return group

    def _bytes_at(self, bucket: int) -> int:
        """Of the buffer of this rank."""
        sizes = [num_bytes for _, num_bytes in self._packed[bucket]]
        return sum(sizes) if self._is_sender else sizes[self._me]

    def _size(self, copy: Copy) -> int:
        return copy.box.numel * self._dtypes[copy.hf_name].itemsize

    def _block(self, copy: Copy, offset: int) -> torch.Tensor:
        """One packed piece, `offset` bytes from the buffer's begin."""
        dtype, shape = self._dtypes[copy.hf_name], copy.box.shape
        start = offset // dtype.itemsize
        return self._typed[dtype][start : start + math.prod(shape)].view(shape)

    def _layouts(self, bucket: int, copies_by_rank: Sequence[list[list[Copy]]]) -> list[_Received]:
        typed = self._typed_slots[bucket % NUM_SLOTS]
        found, base = [], 0
        for member, copies in enumerate(copies_by_rank):
            offsets, num_bytes = self._packed[bucket][member]
            for copy, offset in zip(copies[bucket], offsets, strict=member > 0):
                destination = copy.destination.of(typed[self._dtypes[copy.hf_name]])
                found.append(_Received(self._block(copy, base + offset), destination))
            base += num_bytes
        return found


def _allocate(num_bytes: int, device: torch.device) -> torch.Tensor:
    # Zeros: its pages are there before the first refit.
    return torch.zeros(max(num_bytes, 256), dtype=torch.uint8, device=device)
