"""A trainer rank's half of the lanes: what moves its weights along each of them.

A lane is a way for weights to go (a path and a transport) and the engines that are reached that way. There are two at
most: one for engines on the trainers' own host, one for those elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import msgspec
import torch

from mbridge.plan import TrainerPlan

from .agreement import Offer
from .broadcaster import Broadcaster
from .buckets import Layout, write_set_up
from .errors import TransportError
from .filler import Filler
from .lender import Lender
from .messages import Fill, Lends, Loan, SetUp
from .protocol import NUM_DIRECT_STEPS, Lane
from .transports._process_group import backend_for
from .transports.base import COLLECTIVE, NUM_SLOTS, Address, Transport, transport_class
from .transports.collective import Collective

LOCAL, REMOTE = 0, 1  # lane numbers: engines on the trainers' host, and elsewhere


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
        host: str,
        *,
        is_sharded: bool = False,
    ) -> None:
        """`host`: a numeric address of rank 0's that workers and other ranks reach. `is_sharded`: a collective lane."""
        self.ways: dict[int, Way] = {}
        self._rank, self._plan, self._layout, self._live, self._offers = rank, plan, layout, live, offers
        self._host, self._is_sharded = host, is_sharded
        self._transports: dict[int, Transport] = {}  # on the bucket path
        self._movers: dict[int, Filler | Lender | Broadcaster] = {}

    # --- opening, on all ranks together: create, then open -----------------------------------------------------------

    def create(self, lane: int, way: Way) -> Address:
        """Make what does not need the other ranks; returns what they need of rank 0. Raises SyncError."""
        self.ways[lane] = way
        if way.transport == COLLECTIVE:
            if self._rank == 0:
                self._transports[lane] = Collective.create(self._layout.bucket_bytes, self._host)
            return self._address(lane)
        if len({offer.host for offer in self._offers}) > 1:
            raise TransportError(f"trainer ranks run on several hosts; transport {way.transport!r} needs them on one")
        kind = transport_class(way.transport)
        if way.path == "direct":
            self._movers[lane] = Lender(self._rank, self._plan.tensors, self._plan.owned, self._live, kind)
            return {}
        if self._rank == 0:
            self._transports[lane] = kind.create(self._layout.bucket_bytes)
        return self._address(lane)

    def open(self, lane: int, address: Address) -> None:
        """Make the rest, with rank 0's `address`. Raises SyncError."""
        way, plan = self.ways[lane], self._plan
        if way.path == "direct":
            return
        if way.transport == COLLECTIVE:
            owned_by_rank = [offer.owned for offer in self._offers]
            device, token = self._device, str(address["token"])
            self._movers[lane] = Broadcaster(self._layout, owned_by_rank, plan.owned, self._rank, device, token)
            return
        if self._rank != 0:
            self._transports[lane] = transport_class(way.transport).open(address)
        slots = [self._transports[lane].slot(i) for i in range(NUM_SLOTS)]
        self._movers[lane] = Filler(self._layout, plan.owned, slots)

    # --- rank 0's, for workers that attach ---------------------------------------------------------------------------

    def flows(self) -> dict[int, Lane]:
        """The lanes as the machine of a refit sees them."""
        direct, buckets = Lane(NUM_DIRECT_STEPS, 1), partial(Lane, self._layout.num_buckets)
        return {
            lane: direct if way.path == "direct" else buckets(meets=way.transport == COLLECTIVE)
            for lane, way in self.ways.items()
        }

    @property
    def store(self) -> tuple[str, int, str] | None:
        """Host, port and backend of the collective lane, if there is one."""
        place = self._transports.get(REMOTE)
        return (place.host, place.port, backend_for(self._device)) if isinstance(place, Collective) else None

    def set_up(self, lane: int, lends: Sequence[Lends]) -> SetUp:
        """What a worker on `lane` is told; `lends` on the direct path."""
        set_up = write_set_up(self._layout, self.ways[lane].transport, self._address(lane), lends)
        mover = self._movers[lane]
        if not isinstance(mover, Broadcaster):
            return set_up
        return msgspec.structs.replace(set_up, senders=mover.senders, is_sharded=self._is_sharded)

    def lends(self, lanes: Iterable[int] | None = None) -> list[Lends]:
        """What this rank lends on direct lanes, as it lies now. Raises SyncError."""
        movers = (self._movers[lane] for lane in (self._movers if lanes is None else lanes))
        return [mover.lends() for mover in movers if isinstance(mover, Lender)]

    def everyone_attached(self) -> None:
        for transport in self._transports.values():
            transport.everyone_attached()

    # --- a refit -----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Read the sources afresh from the modules that held them when the syncer was built: they may have moved."""
        for mover in self._movers.values():
            mover.begin(self._live)

    def fill(self, message: Fill, breathe: Callable[[], None]) -> Loan | None:
        """This rank's part of a bucket. On the direct path: where its memory has moved to."""
        mover = self._movers[message.lane]
        if isinstance(mover, Broadcaster):
            mover.fill(message.bucket, message.grouping, breathe)
            return None
        return mover.fill(message.bucket)

    def end(self, *, succeeded: bool, is_last: bool = True) -> None:
        """The attempt is over. If it is not the `last` of this refit, some engines have not heard of what moved."""
        for mover in self._movers.values():
            mover.end(succeeded=succeeded and (is_last or isinstance(mover, Broadcaster)))

    def close(self) -> None:
        for mover in self._movers.values():
            if isinstance(mover, Broadcaster):
                mover.close()
        self._movers.clear()
        for transport in self._transports.values():
            transport.close()
        self._transports.clear()

    @property
    def extra_bytes(self) -> int:
        """Beside the model: the buckets, shared by all ranks or this one's own."""
        own = sum(mover.num_bytes for mover in self._movers.values() if isinstance(mover, Broadcaster))
        num_shared = sum(way.path == "bucket" and way.transport != COLLECTIVE for way in self.ways.values())
        return own + NUM_SLOTS * self._layout.bucket_bytes * num_shared

    @property
    def _device(self) -> torch.device:
        """Of the parameters."""
        return next((tensor.device for tensor in self._live.values()), torch.device("cpu"))

    def _address(self, lane: int) -> Address:
        transport = self._transports.get(lane)
        return {} if transport is None else transport.address
