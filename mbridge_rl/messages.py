"""The messages of a refit: msgspec structs, tagged with their class's name. Plain numbers, strings, lists and dicts."""

from __future__ import annotations

import msgspec

from .errors import Failure


class Invitation(msgspec.Struct, frozen=True):
    """How an engine worker reaches trainer rank 0. Travels through the engine's own RPC as plain JSON."""

    endpoint: str
    token: str
    pid: int
    host: str
    deadline_s: float


# --- messages: peer -> rank 0 -----------------------------------------------------------------------------------------


class Message(msgspec.Struct, frozen=True, tag=True):
    """Root of the messages. `attempt` numbers the sync() calls of one syncer, so that late messages are recognised."""


class Hello(Message, frozen=True):
    """First message of a peer. A worker also says what it serves."""

    role: str  # "trainer" | "worker"
    index: int
    pid: int
    host: str
    version: int = 0
    is_stale: bool = False
    session_open: bool = False  # a trainer died inside a refit and left the engine's update session open


class Attached(Message, frozen=True):
    """A worker mapped the slots and its model takes these tensors; `unused` are HF names that it has no place for."""

    unused: list[str]


class Enter(Message, frozen=True):
    attempt: int
    version: int


class Filled(Message, frozen=True):
    attempt: int
    bucket: int
    seconds: float


class Loaded(Message, frozen=True):
    attempt: int
    bucket: int
    seconds: float


class Applied(Message, frozen=True):
    """Everything is written and checked; the worker waits for Commit."""

    attempt: int
    seconds: float
    extra_bytes: int  # most memory the worker held for this refit beside its model


class Committed(Message, frozen=True):
    """The worker got Commit and leaves the refit."""

    attempt: int


class Failed(Message, frozen=True):
    attempt: int
    failure: Failure


class Goodbye(Message, frozen=True):
    """The sender leaves for good. Both ways."""


# --- messages: rank 0 -> peer -----------------------------------------------------------------------------------------


class SetUp(Message, frozen=True):
    """Answer to a worker's Hello: what will come and through which memory."""

    tensors: list[tuple[str, tuple[int, ...], str]]  # name, shape, dtype
    groups: list[tuple[int, ...]]
    parts: list[tuple[int, int, int, int, int]]  # buckets.Part
    bucket_bytes: int
    num_buckets: int
    optional_names: list[str]
    transport: str
    address: dict[str, str | int]


class Connected(Message, frozen=True):
    """Everyone is there; the engine serves `version`."""

    version: int
    num_workers: int


class Alive(Message, frozen=True):
    """Rank 0 is there and waits for others: do not give up."""

    attempt: int


class Fill(Message, frozen=True):
    attempt: int
    bucket: int


class Load(Message, frozen=True):
    attempt: int
    bucket: int


class Commit(Message, frozen=True):
    attempt: int


class Abort(Message, frozen=True):
    attempt: int
    failure: Failure


class Stats(msgspec.Struct, frozen=True):
    """What only rank 0 knows about a refit, in seconds and bytes."""

    engine: str
    total_s: float
    phases: dict[str, float]
    fill_s: float  # of the slowest trainer
    load_s: float  # of the slowest worker
    engine_extra_bytes: int
    num_trainers: int
    num_workers: int
    copy_limit_gb_s: float | None


class Done(Message, frozen=True):
    attempt: int
    version: int
    stats: Stats


AnyMessage = (
    Hello
    | Attached
    | Enter
    | Filled
    | Loaded
    | Applied
    | Committed
    | Failed
    | Goodbye
    | SetUp
    | Connected
    | Alive
    | Fill
    | Load
    | Commit
    | Abort
    | Done
)
