"""Which trainer rank broadcasts which bucket, and how the others' pieces come to it. Pure: integers and names.

Ranks that own parts of the same tensors, or of tensors that are loaded together, belong together: those of a pipeline
stage. The lowest of them is their sender. A bucket is sent by the sender of its first tensor; where stages meet, ranks
of the next stage bring their pieces to that sender too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from mbridge.pieces import Box, Copy, Piece, Region

from .buckets import ALIGNMENT, Layout, aligned, fill_copies
from .messages import Grouping, Share
from .transports._process_group import Meeting

OwnedBox = tuple[str, tuple[int, ...], tuple[int, ...]]  # HF name, start, stop: as agreement.Offer carries them
PACKING_BYTES = 16  # pieces begin at multiples of so many bytes


@dataclass(frozen=True)
class BroadcastPlan:
    """Equal on all trainer ranks."""

    senders: list[int]  # of each bucket: a trainer rank
    circles: dict[int, list[int]]  # sender, in rising order -> itself, then the ranks that bring it pieces

    def next_bucket(self, bucket: int) -> int | None:
        """The next bucket of the same sender."""
        sender = self.senders[bucket]
        return next((k for k in range(bucket + 1, len(self.senders)) if self.senders[k] == sender), None)


def plan_broadcasts(layout: Layout, owned_by_rank: Sequence[Sequence[OwnedBox]]) -> BroadcastPlan:
    """Who sends, by the boxes that each trainer rank owns. `owned_by_rank` must cover every tensor."""
    owners: dict[str, set[int]] = {}
    for rank, owned in enumerate(owned_by_rank):
        for name, start, stop in owned:
            if Box(start, stop).numel:
                owners.setdefault(name, set()).add(rank)
    names = [spec.name for spec in layout.tensors]
    stages = _Stages(len(owned_by_rank))
    for group in layout.groups:
        stages.unite(rank for t in group for rank in owners.get(names[t], ()))
    senders: list[int] = []
    members: dict[int, set[int]] = {}
    for parts in layout.by_bucket():
        ranks = [owners[names[part.tensor]] for part in parts if names[part.tensor] in owners]
        # A bucket of empty tensors has no owner; then anyone sends it.
        sender = stages.lowest(min(ranks[0])) if ranks else (senders[-1] if senders else 0)
        senders.append(sender)
        members.setdefault(sender, set()).update(*ranks)
    circles = {sender: [sender, *sorted(members[sender] - {sender})] for sender in sorted(members)}
    return BroadcastPlan(senders, circles)


def wire_bytes(layout: Layout) -> list[int]:
    """Bytes of each bucket that travel: up to the end of its last part, and never 0."""
    sizes = [ALIGNMENT] * layout.num_buckets
    for part in layout.parts:
        spec = layout.tensors[part.tensor]
        rows = spec.shape[0] if spec.shape else 1
        num_bytes = spec.num_bytes * (part.stop - part.start) // rows if rows and spec.shape else spec.num_bytes
        sizes[part.bucket] = max(sizes[part.bucket], aligned(part.offset + num_bytes))
    return sizes


def copies_of(layout: Layout, owned: Iterable[OwnedBox]) -> list[list[Copy]]:
    """The copies of a rank into each bucket, as far as its boxes tell: the sources are not known here.

    In the same order as that rank finds them.
    """
    boxes = [(name, Box(start, stop)) for name, start, stop in owned]
    return fill_copies(layout, [Piece(name, box, "", Region.contiguous(box.shape)) for name, box in boxes])


def packed(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each of several blocks of bytes begins when they are packed one after the other, and where they end."""
    *offsets, end = accumulate((-(-n // PACKING_BYTES) * PACKING_BYTES for n in sizes), initial=0)
    return offsets, end


def shares_of(grouping: Grouping) -> list[Share]:
    """The classes of workers; without sharding, one of all."""
    return grouping.shares or [Share("", list(range(len(grouping.workers))))]


def broadcast_meeting(grouping: Grouping, token: str, sender: int, share: int = 0) -> tuple[Meeting, list[str]]:
    """Where `sender` and the workers of class number `share` meet, and the members' names: the sender is member 0."""
    workers = [grouping.workers[member] for member in shares_of(grouping)[share].members]
    names = [f"trainer rank {sender}", *(f"worker {index} of engine {engine}" for engine, index in workers)]
    return _meeting(grouping, token, f"broadcast/{sender}/{share}"), names


def collect_meeting(grouping: Grouping, token: str, ranks: Sequence[int]) -> tuple[Meeting, list[str]]:
    """Where a sender (`ranks[0]`) and the ranks that bring it pieces meet, and the names of the members."""
    return _meeting(grouping, token, f"collect/{ranks[0]}"), [f"trainer rank {r}" for r in ranks]


def _meeting(grouping: Grouping, token: str, name: str) -> Meeting:
    return Meeting(grouping.host, grouping.port, f"{token}/{grouping.generation}/{name}")


class _Stages:
    """Disjoint sets of ranks; each is known by its lowest."""

    def __init__(self, num_ranks: int) -> None:
        self._parent = list(range(num_ranks))

    def lowest(self, rank: int) -> int:
        while self._parent[rank] != rank:
            self._parent[rank] = self._parent[self._parent[rank]]
            rank = self._parent[rank]
        return rank

    def unite(self, ranks: Iterable[int]) -> None:
        roots = {self.lowest(rank) for rank in ranks}
        for root in roots:
            self._parent[root] = min(roots)
