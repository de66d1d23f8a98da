"""The worker's half of a collective lane: two slots of its own, and broadcasts that arrive in them.

Bucket k+1 travels while the engine loads bucket k. A bucket comes whole, or packed by what is needed of it (needs.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .broadcast_plan import broadcast_meeting, shares_of, wire_bytes
from .buckets import Layout
from .errors import ProtocolError, SyncError
from .messages import Grouping, Needs
from .transports._process_group import Breathe, Group, Operation, no_breath
from .transports.base import NUM_SLOTS


class BroadcastSlots:
    """One per engine worker and trainer; used by one thread. `me` is (engine number, worker index).

    `senders[k]` is the trainer rank that broadcasts bucket k, `token` the session's: both come in SetUp.
    """

    def __init__(
        self, layout: Layout, senders: Sequence[int], me: tuple[int, int], device: torch.device, token: str
    ) -> None:
        if len(senders) != layout.num_buckets:
            raise ProtocolError(f"{len(senders)} senders came for {layout.num_buckets} buckets", phase="connect")
        self._senders, self._me, self._device, self._token = list(senders), me, device, token
        self.plan = ""  # by which this attempt's buckets are packed; "": they come whole
        self.wire_bytes = 0  # that this attempt has brought so far
        self.needs: Needs | None = None  # that are known here
        self._whole_bytes = wire_bytes(layout)
        self._needed_bytes: list[int] = []  # of each bucket, packed by what is needed
        # Zeros: its pages are there before the first refit.
        size = max(layout.bucket_bytes, 1)
        self._slots = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(NUM_SLOTS)]
        self._generation = 0
        self._groups: dict[int, Group] = {}  # by sender
        self._left: list[Group] = []  # that may still write into the slots
        self._pending: tuple[int, Operation | None] | None = None  # bucket that is on its way, if anything of it is

    @property
    def num_bytes(self) -> int:
        """Of the slots."""
        return sum(slot.numel() for slot in self._slots)

    @property
    def news(self) -> Needs | None:
        """What rank 0 does not know yet: needs, if they have become known in a refit with whole buckets."""
        return None if self.plan else self.needs

    def slot(self, index: int) -> torch.Tensor:
        """Slot `index` as a flat uint8 tensor; bucket k lies in slot k % 2. Valid until `close`."""
        return self._slots[index]

    def expect(self, needs: Needs | None, needed_bytes: Sequence[int] = ()) -> None:
        """From a later generation on, buckets may come packed by `needs`, in so many bytes each. None: only whole."""
        self.needs, self._needed_bytes = needs, list(needed_bytes)

    def join(self, grouping: Grouping, breathe: Breathe = no_breath) -> None:
        """Be in the groups of `grouping`; at the begin of each attempt. Raises SyncError.

        `breathe` is called while others are waited for, and ends the wait by raising. ProtocolError if buckets would
        come packed otherwise than `expect` has said.
        """
        self.wire_bytes = 0
        if self._pending is not None:
            self.abandon()  # an attempt that ended in the middle
        if grouping.generation == self._generation:
            if not self._groups and self._senders:
                raise SyncError(f"group generation {grouping.generation} was given up", phase="stream")
            return
        self.abandon()
        if self._me not in grouping.workers:
            raise ProtocolError(f"worker {self._me[1]} of engine {self._me[0]} is not in the group", phase="stream")
        number, rank = self._place_in(grouping)
        self._generation = grouping.generation
        while self._left:
            self._left[-1].wait_ended(breathe)
            self._left.pop()
        try:
            # In one order on all workers, so that nobody waits in a circle.
            for sender in sorted(set(self._senders)):
                meeting, names = broadcast_meeting(grouping, self._token, sender, number)
                self._groups[sender] = Group(
                    meeting, rank, names, self._device, grouping.deadline_s, backend=grouping.backend, breathe=breathe
                )
        except BaseException:
            self.abandon()
            raise

    def receive(self, bucket: int, breathe: Breathe = no_breath) -> None:
        """Wait until `bucket` is in its slot; the next one is then on its way into the other slot.

        Buckets come in order, and bucket - 1 must have been loaded. Raises SyncError; then `abandon`.
        """
        if self._pending is None:
            self._post(bucket)
        assert self._pending is not None
        posted, operation = self._pending
        if posted != bucket:
            raise ProtocolError(f"bucket {posted} is on its way, but bucket {bucket} is asked for", phase="stream")
        if operation is not None:
            operation.wait(breathe)
        self._pending = None
        if bucket + 1 < len(self._senders):
            self._post(bucket + 1)

    def abandon(self) -> None:
        """The attempt failed: leave the groups, which ends what is on its way. The next generation is joined anew."""
        for group in self._groups.values():
            group.close()
        self._left += self._groups.values()
        self._groups, self._pending = {}, None

    def close(self) -> None:
        """Leave the groups and free the slots. Calling it again does nothing."""
        self.abandon()
        self._slots = []

    def _place_in(self, grouping: Grouping) -> tuple[int, int]:
        """Number of this worker's class, and its rank in it. Takes the class's plan."""
        me = grouping.workers.index(self._me)
        for number, share in enumerate(shares_of(grouping)):
            if me not in share.members:
                continue
            known = "" if self.needs is None else self.needs.digest
            if share.digest not in ("", known):
                raise ProtocolError(
                    f"buckets for worker {self._me[1]} of engine {self._me[0]} are packed by plan {share.digest}, "
                    f"but it unpacks {f'by plan {known}' if known else 'whole buckets only'}",
                    phase="stream",
                )
            self.plan = share.digest
            return number, 1 + share.members.index(me)
        raise ProtocolError(f"worker {self._me[1]} of engine {self._me[0]} is in no class", phase="stream")

    def _post(self, bucket: int) -> None:
        sender = self._senders[bucket]
        group = self._groups.get(sender)
        if group is None:
            raise ProtocolError(f"bucket {bucket} came before the members of its group", phase="stream")
        num_bytes = (self._needed_bytes if self.plan else self._whole_bytes)[bucket]
        self.wire_bytes += num_bytes
        slot = self._slots[bucket % NUM_SLOTS][:num_bytes]
        what = f"bucket {bucket} to come from trainer rank {sender}"
        self._pending = (bucket, group.broadcast(slot, 0, what) if num_bytes else None)
