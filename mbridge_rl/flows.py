"""How weights flow along a lane: which buckets are being filled, which loaded, and which come next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from .messages import Fill, Filled, Load, Loaded, Loan
from .parties import Action, Peer, Send

NUM_SLOTS_IN_FLIGHT = 2
NUM_DIRECT_STEPS = 2  # "buckets" of the direct path, one after the other


class Lane(NamedTuple):
    """How weights come to some engines: in so many steps ("buckets")."""

    num_buckets: int
    num_in_flight: int = NUM_SLOTS_IN_FLIGHT
    meets: bool = False  # trainers and workers take part in one transfer, so both are told at once


@dataclass(slots=True)
class Flow:
    """Where a lane stands in one attempt. What its methods return is to be sent."""

    number: int
    lane: Lane
    attempt: int
    num_buckets: int
    trainers: tuple[Peer, ...]
    workers: tuple[Peer, ...]
    is_checked: bool
    is_open: bool = False  # the engines are paused: workers may load
    filling: dict[int, set[Peer]] = field(default_factory=dict)  # bucket -> trainers that have not filled it
    loading: dict[int, set[Peer]] = field(default_factory=dict)  # bucket -> workers that have not loaded it
    loans: dict[int, Loan] = field(default_factory=dict)  # trainer rank -> where its memory has moved to

    @property
    def is_over(self) -> bool:
        """Nothing is under way, so if it is open all is loaded."""
        return not self.filling and not self.loading

    def prepare(self) -> list[Action]:
        """Fill the first buckets while the engines pause, unless workers take part in that."""
        return [] if self.lane.meets else self._first_fills()

    def open(self) -> list[Action]:
        """The engines are paused: what is filled may be loaded."""
        self.is_open = True
        return self._first_fills() if self.lane.meets else self._load_filled()

    def waits_for(self, peer: Peer, message: Filled | Loaded) -> bool:
        waiting = self.filling if isinstance(message, Filled) else self.loading
        return peer in waiting.get(message.bucket, ())

    def filled(self, peer: Peer, message: Filled) -> list[Action]:
        if message.loan is not None:
            self.loans[peer.index] = message.loan
        self.filling[message.bucket].discard(peer)
        return self._next_if_over(message.bucket) if self.lane.meets else self._load_filled()

    def loaded(self, peer: Peer, bucket: int) -> list[Action]:
        self.loading[bucket].discard(peer)
        return self._next_if_over(bucket)

    def _first_fills(self) -> list[Action]:
        return [action for bucket in range(self.lane.num_in_flight) for action in self._fill(bucket)]

    def _fill(self, bucket: int) -> list[Action]:
        if bucket >= self.num_buckets:
            return []
        self.filling[bucket] = set(self.trainers)
        fills: list[Action] = [Send(peer, Fill(self.attempt, bucket, self.number)) for peer in self.trainers]
        return fills + (self._load(bucket) if self.lane.meets else [])

    def _load_filled(self) -> list[Action]:
        """Load what is filled. Workers take buckets in order, also if an answer of a trainer was lost."""
        actions: list[Action] = []
        for bucket in sorted(self.filling):
            if not self.is_open or self.filling[bucket]:
                break
            if bucket not in self.loading:
                actions += self._load(bucket)
        return actions

    def _load(self, bucket: int) -> list[Action]:
        self.loading[bucket] = set(self.workers)
        load = Load(self.attempt, bucket, self.loans, self.is_checked)
        return [Send(peer, load) for peer in self.workers]

    def _next_if_over(self, bucket: int) -> list[Action]:
        """Everyone is done with `bucket`: its slot is free for another."""
        if self.filling[bucket] or self.loading[bucket]:
            return []
        del self.filling[bucket], self.loading[bucket]
        return self._fill(bucket + self.lane.num_in_flight)
