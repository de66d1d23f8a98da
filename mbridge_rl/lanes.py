"""A trainer rank's half of the lanes: what moves its weights along each of them.

A lane is a way for weights to go (a path and a transport) and the engines that are reached that way. There are two at
most: one for engines on the trainers' own host, one for those elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from mbridge.plan import TrainerPlan

from .agreement import Offer
from .buckets import Layout, write_set_up
from .errors import TransportError
from .filler import Filler
from .lender import Lender
from .messages import Fill, Lends, Loan, SetUp
from .protocol import NUM_DIRECT_STEPS, Lane
from .transports.base import NUM_SLOTS, Address, Transport, transport_class

LOCAL, REMOTE = 0, 1  # lane numbers: engines on the trainers' host, and elsewhere
COLLECTIVE = "collective"


class Way(NamedTuple):
    """One way for the weights to go."""

    path: str  # "direct" | "bucket"
    transport: str


class TrainerLanes:
    """One per trainer rank and syncer."""

    def __init__(
        self,
        rank: int,
        plan: TrainerPlan,
        layout: Layout,
        live: Mapping[str, torch.Tensor],
        offers: Sequence[Offer],
    ) -> None:
        self.ways: dict[int, Way] = {}
        self._rank, self._plan, self._layout, self._live, self._offers = rank, plan, layout, live, offers
        self._addresses: dict[int, Address] = {}
        self._slots: dict[int, Transport] = {}
        self._movers: dict[int, Filler | Lender] = {}

    # --- opening, on all ranks together: create, then open -----------------------------------------------------------

    def create(self, lane: int, way: Way) -> Address:
        """Make what does not need the other ranks; returns what they need of rank 0. Raises SyncError."""
        hosts = {offer.host for offer in self._offers}
        if len(hosts) > 1:
            raise TransportError(f"trainer ranks run on several hosts; transport {way.transport!r} needs them on one")
        self.ways[lane] = way
        kind = transport_class(way.transport)
        if way.path == "direct":
            self._movers[lane] = Lender(self._rank, self._plan.tensors, self._plan.owned, self._live, kind)
            return {}
        if self._rank != 0:
            return {}
        self._slots[lane] = kind.create(self._layout.bucket_bytes)
        return self._slots[lane].address

    def open(self, lane: int, address: Address) -> None:
        """Make the rest, with rank 0's `address`. Raises SyncError."""
        self._addresses[lane] = address
        way = self.ways[lane]
        if way.path == "direct":
            return
        if self._rank != 0:
            self._slots[lane] = transport_class(way.transport).open(address)
        slots = [self._slots[lane].slot(i) for i in range(NUM_SLOTS)]
        self._movers[lane] = Filler(self._layout, self._plan.owned, slots)

    # --- rank 0's, for workers that attach ---------------------------------------------------------------------------

    def flows(self) -> dict[int, Lane]:
        """The lanes as the machine of a refit sees them."""
        return {
            lane: Lane(NUM_DIRECT_STEPS, 1) if way.path == "direct" else Lane(self._layout.num_buckets)
            for lane, way in self.ways.items()
        }

    def set_up(self, lane: int, lends: Sequence[Lends]) -> SetUp:
        """What a worker on `lane` is told; `lends` on the direct path."""
        way, slots = self.ways[lane], self._slots.get(lane)
        return write_set_up(self._layout, way.transport, slots.address if slots else {}, lends)

    def lends(self, lanes: Iterable[int] | None = None) -> list[Lends]:
        """What this rank lends on direct lanes, as it lies now. Raises SyncError."""
        movers = (self._movers[lane] for lane in (self._movers if lanes is None else lanes))
        return [mover.lends() for mover in movers if isinstance(mover, Lender)]

    def everyone_attached(self) -> None:
        for slots in self._slots.values():
            slots.everyone_attached()

    # --- a refit -----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Read the sources afresh from the modules that held them when the syncer was built: they may have moved."""
        for mover in self._movers.values():
            mover.begin(self._live)

    def fill(self, message: Fill, breathe: Callable[[], None]) -> Loan | None:
        """This rank's part of a bucket. On the direct path: where its memory has moved to."""
        return self._movers[message.lane].fill(message.bucket)

    def end(self, *, succeeded: bool, is_last: bool = True) -> None:
        """The attempt is over. If it is not the `last` of this refit, some engines have not heard of what moved."""
        for mover in self._movers.values():
            mover.end(succeeded=succeeded and is_last)

    def close(self) -> None:
        self._movers.clear()
        for slots in self._slots.values():
            slots.close()
        self._slots.clear()

    @property
    def extra_bytes(self) -> int:
        """Beside the model: the buckets."""
        return NUM_SLOTS * self._layout.bucket_bytes * sum(way.path == "bucket" for way in self.ways.values())
