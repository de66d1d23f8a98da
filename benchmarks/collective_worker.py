"""The engine worker of collective.py: it can also take part in a raw broadcast, and tell what a profiler saw in it."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from multi_gpu_engine import Worker
from torch.profiler import ProfilerActivity, profile

from mbridge_rl.transports._process_group import Group, Meeting

NUM_IN_FLIGHT = 2
SHOWN = {  # profiler's event -> what it is called in the timeline
    "gloo:all_to_all": "gather",
    "gloo:broadcast": "broadcast",
    "nccl:all_to_all": "gather",
    "nccl:broadcast": "broadcast",
    "mbridge.fill": "fill",
    "mbridge.load": "load",
}


class Span(NamedTuple):
    """Something that lasted, in seconds of this host's clock."""

    what: str
    start: float
    stop: float


class Raw:
    """A member of a plain broadcast by mbridge's group, in pieces, two at a time."""

    def __init__(self, meeting: Meeting, rank: int, names: list[str], piece_bytes: int, device: torch.device) -> None:
        self._group = Group(meeting, rank, names, device, 60.0)
        self._pieces = [torch.ones(piece_bytes, dtype=torch.uint8, device=device) for _ in range(NUM_IN_FLIGHT)]

    def run(self, num_bytes: int) -> float:
        """Seconds until all has come, or gone."""
        start, pending = time.perf_counter(), list[Any]()
        size = self._pieces[0].numel()
        for number, sent in enumerate(range(0, num_bytes, size)):
            if len(pending) == NUM_IN_FLIGHT:
                pending.pop(0).wait()
            piece = self._pieces[number % NUM_IN_FLIGHT][: min(size, num_bytes - sent)]
            pending.append(self._group.broadcast(piece, 0, "a raw piece"))
        for operation in pending:
            operation.wait()
        return time.perf_counter() - start

    def close(self) -> None:
        self._group.close()
        self._pieces = []


class Trace:
    """A profiler of this thread. What it saw, as spans of one clock for all processes of the host."""

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU])
        self._profile.__enter__()

    def stop(self) -> list[Span]:
        self._profile.__exit__(None, None, None)
        results = self._profile.profiler.kineto_results
        return [
            Span(SHOWN[event.name()], event.start_ns() / 1e9, (event.start_ns() + event.duration_ns()) / 1e9)
            for event in results.events()
            if event.name() in SHOWN
        ]


class MeasuredWorker(Worker):
    raw: Raw | None = None
    tracing: Trace | None = None

    def raw_join(self, meeting: Meeting, rank: int, names: list[str], piece_bytes: int) -> None:
        self.raw = Raw(meeting, rank, names, piece_bytes, self.device)

    def raw_run(self, num_bytes: int) -> float:
        assert self.raw is not None
        return self.raw.run(num_bytes)

    def raw_close(self) -> None:
        assert self.raw is not None
        self.raw.close()

    def cpu_s(self) -> float:
        """CPU seconds of this process so far."""
        return time.process_time()

    def trace(self) -> None:
        self.tracing = Trace()

    def traced(self) -> list[Span]:
        assert self.tracing is not None
        return self.tracing.stop()
