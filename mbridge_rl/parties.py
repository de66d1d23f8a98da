"""Who takes part in a refit, what rank 0 asks of them, and where each engine stands. Plain values."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from .messages import AnyMessage


@dataclass(frozen=True, slots=True, order=True)
class Peer:
    """A trainer rank, or a worker of an engine."""

    role: str  # "trainer" | "worker"
    index: int
    engine: int = 0  # a worker's: number of the engine in the fleet

    def __str__(self) -> str:
        if self.role == "trainer":
            return f"trainer rank {self.index}"
        return f"engine worker {self.index}" + (f" of engine {self.engine}" if self.engine else "")


class Phase(enum.StrEnum):
    ENTER = "enter"
    PAUSE = "pause"
    STREAM = "stream"
    CHECK = "check"
    COMMIT = "commit"
    RESUME = "resume"
    SETTLE = "settle"
    FAILING = "failing"
    DONE = "done"
    FAILED = "failed"


class EngineState(enum.StrEnum):
    SERVING = "serving"
    UPDATING = "updating"
    STALE = "stale"
    GONE = "gone"


class EngineCall(enum.StrEnum):
    """An engine's own calls, made by rank 0 one at a time."""

    PAUSE = "pause"
    UPDATE = "update"  # returns when every worker has started all that writes weights, or given up
    CLOSE = "close_session"  # after UPDATE, always: returns when every worker has committed, or given up
    RESUME = "resume"  # publishes the version first


class Send(NamedTuple):
    peer: Peer
    message: AnyMessage


class Call(NamedTuple):
    call: EngineCall
    engine: int = 0


Action = Send | Call


class Taking(NamedTuple):
    """An engine that takes part."""

    number: int
    num_workers: int
    state: EngineState
    lane: int = 0


@dataclass(slots=True)
class Side:
    """One engine in this attempt."""

    workers: tuple[Peer, ...]
    lane: int
    state: EngineState
    busy: EngineCall | None = None  # the call that it is busy with
    is_paused: bool = False
    resume_on_failure: bool = False
    session_open: bool = False  # UPDATE has been called and CLOSE has not
    session_closed: bool = False
    resumed: bool = False

    @property
    def may_serve(self) -> bool:
        """Whether it was resumed, or may be by the time its call comes back, without being settled."""
        return self.state is EngineState.STALE and (self.resumed or self.busy is EngineCall.RESUME)
