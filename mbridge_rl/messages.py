"""The messages of a refit: msgspec structs, tagged with their class's name. Plain numbers, strings, lists and dicts."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from .errors import Failure

Natural = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class Invitation(msgspec.Struct, frozen=True):
    """How an engine worker reaches trainer rank 0. Travels through the engine's own RPC as plain JSON."""

    endpoint: str
    token: str
    pid: int
    host: str
    deadline_s: float
    engine: int = 0  # the engine's number in the fleet
    server_key: str = ""  # public; of a hub that encrypts

    def __repr__(self) -> str:  # engines log the arguments of their calls
        return f"Invitation(to {self.endpoint}, as engine {self.engine})"


class Needs(msgspec.Struct, frozen=True):
    """What a worker needs of the HF tensors on a sharded lane, once it has learnt it."""

    digest: str  # of the plan by which both sides pack it
    boxes: list[tuple[tuple[int, ...], tuple[int, ...], list[int]]]  # start, stop, HF tensors' numbers


class Share(msgspec.Struct, frozen=True):
    """What a class of workers gets of each bucket."""

    digest: str  # of the plan by which it is packed; "" for whole buckets
    members: list[int]  # positions in Grouping.workers
    needs: Needs | None = None  # for trainers, with a new generation


class Grouping(msgspec.Struct, frozen=True):
    """Who takes part in a collective lane, and where they meet. A higher generation replaces the last one."""

    generation: int
    host: str  # of the TCPStore that trainer rank 0 serves
    port: int
    backend: str  # "gloo" | "nccl"
    deadline_s: float
    workers: list[tuple[int, int]]  # (engine, worker index) of all workers that take part, in rank order
    shares: list[Share] = []  # each worker is in one; none: all get whole buckets


class Loan(msgspec.Struct, frozen=True):
    """Where the memory is that one trainer rank lends: segments that a worker can map, and its tensors in them."""

    segments: list[dict[str, str | int]]  # addresses, as the transport writes them
    places: list[tuple[int, int]]  # of each local tensor: segment number, byte offset of its first element


class Lends(msgspec.Struct, frozen=True):
    """What one trainer rank lends on the direct path: local tensors, and which boxes of HF tensors they hold."""

    rank: int
    tensors: list[tuple[str, str, int]]  # local name, dtype, number of elements
    # HF tensor number, box start, box stop, local tensor number, region offset, region stride
    pieces: list[tuple[int, tuple[int, ...], tuple[int, ...], int, int, tuple[int, ...]]]
    loan: Loan


# --- messages: peer -> rank 0 -----------------------------------------------------------------------------------------


class Message(msgspec.Struct, frozen=True, tag=True):
    """Root of the messages. `attempt` numbers the sync() calls of one syncer, so that late messages are recognised."""


class Hello(Message, frozen=True):
    """First message of a peer. A worker also says what it serves."""

    role: Literal["trainer", "worker"]
    index: Natural
    pid: int
    host: str
    engine: Natural = 0
    version: int = 0
    is_stale: bool = False
    session_open: bool = False  # a trainer died inside a refit and left the engine's update session open


class Offered(Message, frozen=True):
    """On the direct path, a trainer's second message."""

    lends: Lends


class Attached(Message, frozen=True):
    """A worker mapped the memory and its model takes these tensors."""

    unused: list[str]  # HF names that it has no place for
    unwritten: dict[str, int] = {}  # engine tensor -> elements that no HF tensor goes to


class Enter(Message, frozen=True):
    attempt: int
    version: int


class Filled(Message, frozen=True):
    """The bucket holds this rank's part. On the direct path: its parameters are complete; in `loan` if moved."""

    attempt: int
    bucket: int
    seconds: float
    loan: Loan | None = None
    lane: int = 0


class Loaded(Message, frozen=True):
    attempt: int
    bucket: int
    seconds: float


class Applied(Message, frozen=True):
    """All that writes weights is done or under way in the device's own order; the worker waits for Check or Commit."""

    attempt: int
    seconds: float
    extra_bytes: int  # most memory the worker held for this refit beside its model
    reloaded: list[str] = []  # HF names that went through the engine's own loading, on the direct path
    reasons: dict[str, str] = {}  # engine module -> why it cannot be written directly
    wire_bytes: int = 0  # that came to the worker on a collective lane
    needs: Needs | None = None  # on a sharded lane, if this refit has shown them


class Checked(Message, frozen=True):
    """Checksums (checksum.py) of what the sender holds of the tensors it was asked for."""

    attempt: int
    totals: dict[int, int] = {}  # a trainer: HF tensor number -> sum over the pieces it owns
    # A worker: HF tensor number, box start, box stop, engine name, sum.
    boxes: list[tuple[int, tuple[int, ...], tuple[int, ...], str, int]] = []
    changed: list[str] = []  # a worker: engine tensors that are no longer what was loaded
    unchecked: dict[str, str] = {}  # a worker: engine tensor -> why its values cannot be compared


class Committed(Message, frozen=True):
    """The worker got Commit. If its device still copies, in an order that engine steps keep to, Settled follows."""

    attempt: int
    is_settled: bool


class Settled(Message, frozen=True):
    """The worker's device has read all that it reads of the trainers' memory."""

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
    lends: list[Lends] = []  # of every trainer, on the direct path
    senders: list[int] = []  # of each bucket, on a collective lane: the trainer rank that it comes from
    is_sharded: bool = False  # on a collective lane: each worker gets what it needs


class Connected(Message, frozen=True):
    """Everyone is there; `version` is the highest that an engine serves."""

    version: int


class Alive(Message, frozen=True):
    """Rank 0 is there and waits for others: do not give up."""

    attempt: int


class Fill(Message, frozen=True):
    attempt: int
    bucket: int
    lane: int = 0
    grouping: Grouping | None = None  # with bucket 0 of a collective lane


class Load(Message, frozen=True):
    attempt: int
    bucket: int
    loans: dict[int, Loan] = {}  # trainer rank -> where its memory is now, if it moved
    is_checked: bool = False  # a Check will follow
    grouping: Grouping | None = None  # with bucket 0 of a collective lane


class Check(Message, frozen=True):
    """Send the checksums of the tensors whose number leaves the remainder `share` when divided by `num_shares`."""

    attempt: int
    share: int
    num_shares: int


class Commit(Message, frozen=True):
    attempt: int


class Abort(Message, frozen=True):
    attempt: int
    failure: Failure
    is_final: bool = True  # if not, a trainer waits for what comes of it: a Next, or an Abort that is
    version: int = 0  # the highest that an engine may serve by now


class Next(Message, frozen=True):
    """To trainers: `attempt` is over, and another one follows (without an engine that failed, or with the next one)."""

    attempt: int


class Verification(msgspec.Struct, frozen=True):
    """What a comparison of the engine's own memory with the trainer's found."""

    num_compared: int  # HF tensors whose checksums were compared
    num_tensors: int  # HF tensors in all
    wrong: dict[str, str]  # HF tensor, or engine tensor -> what is wrong
    unchecked: dict[str, str]  # HF tensor, or engine tensor -> why it could not be compared


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
    reloaded: list[str] = []  # as in Applied, of all workers
    reasons: dict[str, str] = {}
    verification: Verification | None = None
    calls_s: dict[str, float] = {}  # engine call -> seconds
    unwritten: dict[str, int] = {}  # as in Attached
    quarantined: dict[str, str] = {}  # engine -> why this refit left it behind
    mode: str = ""  # as in SyncReport
    wire_bytes: int = 0  # as in Applied, of the worker to which most came


class Done(Message, frozen=True):
    attempt: int
    version: int
    stats: Stats


AnyMessage = (
    Hello
    | Offered
    | Attached
    | Enter
    | Filled
    | Loaded
    | Applied
    | Checked
    | Committed
    | Settled
    | Failed
    | Goodbye
    | SetUp
    | Connected
    | Alive
    | Fill
    | Load
    | Check
    | Commit
    | Abort
    | Next
    | Done
)
