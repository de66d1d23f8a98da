"""The state machine with which trainer rank 0 conducts a refit. No sockets, no clock, no tensors.

One refit, seen from rank 0 (peers are trainer ranks, itself included, and engine workers):

    ENTER   every trainer sends Enter; versions must agree and grow
    PAUSE   the engine pauses, while trainers already fill the first buckets
    STREAM  trainers: Fill -> Filled; workers: Load -> Loaded, then Applied once all is written and checked. On the
            direct path there are two: the trainers' own memory, and what of it turns out to have moved
    CHECK   if asked for: Check -> Checked, everyone's checksums, which must agree
    COMMIT  Commit to the workers
    RESUME  the engine publishes the version and serves again
    SETTLE  devices that still copy end: the engine's steps come after the copies in their streams, so it may serve
            before, but the trainers may not change their weights; then Done to the trainers
    DONE

Any failure, lost peer or missed deadline sends Abort to everyone and ends in FAILED. Before STREAM nothing was written,
so the engine resumes what it served; from STREAM on it is stale and stays paused, or is paused again. `Refit` takes
events and returns actions: whoever drives it (conductor.py; a test) owns all I/O.

A refit that moves nothing (`moves=False`: `WeightSyncer.verify`) runs the same way for the version that the engine has:
workers go from STREAM to CHECK at once, what is wrong is noted instead of failing, and nothing is published.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .errors import Failure
from .messages import (
    Abort,
    AnyMessage,
    Applied,
    Check,
    Checked,
    Commit,
    Committed,
    Enter,
    Failed,
    Fill,
    Filled,
    Goodbye,
    Load,
    Loaded,
    Loan,
    Settled,
    Verification,
)

NUM_SLOTS_IN_FLIGHT = 2
NUM_DIRECT_STEPS = 2  # "buckets" of the direct path, one after the other
REPORT_S = 2.0  # how long after the engine's last call its workers' last messages may arrive


@dataclass(frozen=True, slots=True, order=True)
class Peer:
    """A trainer rank or an engine worker."""

    role: str  # "trainer" | "worker"
    index: int

    def __str__(self) -> str:
        return f"trainer rank {self.index}" if self.role == "trainer" else f"engine worker {self.index}"


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
    """The engine's own calls, made by rank 0 one at a time."""

    PAUSE = "pause"
    UPDATE = "update"  # returns when every worker has started all that writes weights, or given up
    CLOSE = "close_session"  # after UPDATE, always: returns when every worker has committed, or given up
    RESUME = "resume"  # publishes the version first


class Send(NamedTuple):
    peer: Peer
    message: AnyMessage


class Call(NamedTuple):
    call: EngineCall


Action = Send | Call
Compare = Callable[[Mapping[Peer, Checked]], Verification]


class Refit:
    """One refit. Feed it events with the time in seconds; carry out the actions it returns; stop when `finished`."""

    def __init__(
        self,
        *,
        attempt: int,
        last_version: int,
        state: EngineState,
        num_trainers: int,
        num_workers: int,
        num_buckets: int,
        deadline_s: float,
        now: float,
        num_in_flight: int = NUM_SLOTS_IN_FLIGHT,
        moves: bool = True,
        check: tuple[int, int] | None = None,
        compare: Compare | None = None,
    ) -> None:
        """`check`: (share, num_shares) of the tensors to compare; `compare` judges what the peers then send."""
        self.attempt, self.moves = attempt, moves
        self.verification: Verification | None = None
        self.last_version, self.version = last_version, last_version
        self.state = state
        self.phase = Phase.ENTER
        self.failure: Failure | None = None
        self.lost_peer: Failure | None = None  # also if this refit could do without it
        self.started = {Phase.ENTER: now}
        self.fill_s, self.load_s = [0.0] * num_trainers, [0.0] * num_workers
        self.engine_extra_bytes = 0
        self.reloaded: set[str] = set()
        self.reasons: dict[str, str] = {}
        self._check, self._compare = check, compare
        self._checked: dict[Peer, Checked] = {}
        self._loans: dict[int, Loan] = {}  # trainer rank -> where its memory has moved to
        self._num_buckets, self._deadline_s = num_buckets if moves else 0, deadline_s
        self._trainers = [Peer("trainer", i) for i in range(num_trainers)]
        self._workers = [Peer("worker", i) for i in range(num_workers)]
        self._missing: set[Peer] = set(self._trainers)  # who has not sent Enter; then Applied; then Committed
        self._versions: dict[int, int] = {}
        self._filling: dict[int, set[Peer]] = {}
        self._loading: dict[int, set[Peer]] = {}
        self._engine_busy: EngineCall | None = None
        self._resume_on_failure = False
        self._session_open = False  # UPDATE has been called and CLOSE has not
        self._session_closed = False
        self._resumed = False
        self._untold: list[Peer] = []  # trainers that do not know yet that the refit failed
        self._settling: set[Peer] = set()  # workers whose device still copies
        self._num_in_flight = num_in_flight
        self._deadline = now + deadline_s

    @property
    def finished(self) -> bool:
        return self.phase in (Phase.DONE, Phase.FAILED)

    @property
    def engine_call(self) -> EngineCall | None:
        """The call that the engine is busy with."""
        return self._engine_busy

    @property
    def deadline(self) -> float:
        """When `tick` will fail the refit, unless something happens before."""
        return self._deadline

    def receive(self, peer: Peer, message: AnyMessage, now: float) -> list[Action]:
        """A message of this attempt arrived."""
        if self.phase in (Phase.FAILING, Phase.DONE, Phase.FAILED):
            return []
        self._deadline = now + self._deadline_s
        match message:
            case Enter(version=version) if self.phase is Phase.ENTER and peer in self._missing:
                return self._entered(peer, version, now)
            case Filled(bucket=bucket) if peer in self._filling.get(bucket, ()):
                self.fill_s[peer.index] += message.seconds
                if message.loan is not None:
                    self._loans[peer.index] = message.loan
                self._filling[bucket].discard(peer)
                return list(self._load_if_ready(bucket))
            case Loaded(bucket=bucket) if peer in self._loading.get(bucket, ()):
                self.load_s[peer.index] += message.seconds
                self._loading[bucket].discard(peer)
                return self._fill(bucket + self._num_in_flight) if not self._loading[bucket] else []
            case Applied() if self.phase is Phase.STREAM and peer in self._missing:
                return self._applied(peer, message, now)
            case Checked() if self.phase is Phase.CHECK and peer in self._missing:
                return self._note_checked(peer, message, now)
            case Committed() if self.phase is Phase.COMMIT and peer in self._missing:
                self._missing.discard(peer)
                if not message.is_settled:
                    self._settling.add(peer)
                return self._resume_if_committed(now)
            case Settled() if peer in self._settling:
                self._settling.discard(peer)
                return self._end_if_settled(now)
            case Failed(failure=failure):
                return self.fail(failure, now)
            case Goodbye():
                return self.lost(peer, "closed its WeightSyncer", now)
            case _:
                what = f"{peer} sent {type(message).__name__} in phase {self.phase}"
                return self.fail(Failure("ProtocolError", what, str(peer), self.phase), now)

    def called(self, failure: Failure | None, now: float) -> list[Action]:
        """The engine's current call came back, with an error or without."""
        call, self._engine_busy = self._engine_busy, None
        self._deadline = now + self._deadline_s
        if self.phase in (Phase.DONE, Phase.FAILED):
            return []
        if failure is not None and failure.kind == "EngineGoneError":
            self.state = EngineState.GONE
        self._resumed |= call is EngineCall.RESUME  # also if it raised: it may have taken effect
        if self.phase is Phase.FAILING:
            return self._drain(now)
        if failure is not None:
            self._resume_on_failure |= call is EngineCall.RESUME  # it serves nothing while it is paused: once more
            return self.fail(failure, now)
        match call:
            case EngineCall.PAUSE:
                self._enter_phase(Phase.STREAM, now)
                self._session_open = True
                if self.moves:
                    self.state = EngineState.UPDATING
                self._missing = set(self._workers)
                loads = [action for bucket in list(self._filling) for action in self._load_if_ready(bucket)]
                return [self._call(EngineCall.UPDATE), *loads]
            case EngineCall.UPDATE:
                self._session_open = False
                return [self._call(EngineCall.CLOSE)]
            case EngineCall.CLOSE:
                self._session_closed = True
                self._deadline = now + min(self._deadline_s, REPORT_S)
                return self._resume_if_committed(now)
            case _:
                return self._end_if_settled(now)

    def lost(self, peer: Peer, how: str, now: float) -> list[Action]:
        """A peer's process is gone."""
        if peer.role == "worker":
            self.state = EngineState.GONE
            failure = Failure("EngineGoneError", f"{peer} {how}; start a new engine", str(peer), str(self.phase))
        else:
            text = f"{peer} {how}; build a new WeightSyncer on the survivors"
            failure = Failure("TrainerLostError", text, str(peer), str(self.phase))
        self.lost_peer = self.lost_peer or failure
        if self.phase is Phase.FAILING and peer.role == "worker":
            return self._end(now)  # its calls will not come back
        if peer.role == "trainer" and self.phase in (Phase.COMMIT, Phase.RESUME, Phase.SETTLE):
            return []  # it has done its part: this refit commits, the next one fails
        return self.fail(failure, now)

    def tick(self, now: float) -> list[Action]:
        """Time passed."""
        if now < self._deadline or self.finished:
            return []
        if self.phase is Phase.FAILING:
            if self._engine_busy is not None and self.state is not EngineState.GONE:
                self.state = EngineState.GONE  # a call that never comes back: nobody can use this engine
            return self._end(now)
        message = f"nothing happened for {self._deadline_s:g} s while waiting for {self.waiting_for()}"
        return self.fail(Failure("DeadlineError", message, "trainer rank 0", self.phase), now)

    def waiting_for(self) -> str:
        """What has to happen next, in words."""
        if self.phase is Phase.ENTER:
            return f"{_names(self._missing)} to call sync()"
        waits = [f"{_names(peers)} to fill bucket {k}" for k, peers in sorted(self._filling.items()) if peers]
        waits += [f"{_names(peers)} to load bucket {k}" for k, peers in sorted(self._loading.items()) if peers]
        if self.phase is Phase.CHECK:
            waits.append(f"{_names(self._missing)} to send checksums")
        elif self._engine_busy is not None and self._engine_busy is not EngineCall.UPDATE:
            waits.append(f"the engine to {self._engine_busy}")
        elif not waits:
            waits.append(f"{_names(self._missing or self._settling) or 'the engine'} to finish")
        return ", ".join(waits)

    def _entered(self, peer: Peer, version: int, now: float) -> list[Action]:
        self._missing.discard(peer)
        self._versions[peer.index] = version
        if self._missing:
            return []
        if len(set(self._versions.values())) > 1:
            text = ", ".join(f"rank {rank}: {v}" for rank, v in sorted(self._versions.items()))
            failure = Failure(
                "VersionError", f"trainer ranks called sync() with different versions ({text})", phase=self.phase
            )
            return self.fail(failure, now)
        if version <= self.last_version and self.moves:
            message = f"version {version} does not grow: the engine already had version {self.last_version}"
            return self.fail(Failure("VersionError", message, phase=self.phase), now)
        self.version = version
        self._enter_phase(Phase.PAUSE, now)
        self._resume_on_failure = self.state is EngineState.SERVING
        fills = [action for k in range(self._num_in_flight) for action in self._fill(k)]
        return [self._call(EngineCall.PAUSE), *fills]

    def _fill(self, bucket: int) -> list[Action]:
        if bucket >= self._num_buckets:
            return []
        self._filling[bucket] = set(self._trainers)
        return [Send(peer, Fill(self.attempt, bucket)) for peer in self._trainers]

    def _load_if_ready(self, bucket: int) -> Iterator[Action]:
        if self._filling[bucket] or self.phase is not Phase.STREAM:
            return
        del self._filling[bucket]
        self._loading[bucket] = set(self._workers)
        for peer in self._workers:
            yield Send(peer, Load(self.attempt, bucket, self._loans, self._check is not None))

    def _applied(self, peer: Peer, message: Applied, now: float) -> list[Action]:
        self._missing.discard(peer)
        self.load_s[peer.index] += message.seconds
        self.engine_extra_bytes = max(self.engine_extra_bytes, message.extra_bytes)
        self.reloaded.update(message.reloaded)
        self.reasons.update(message.reasons)
        if self._missing:
            return []
        if self._check is None:
            return self._commit(now)
        self._enter_phase(Phase.CHECK, now)
        everyone = [*self._trainers, *self._workers]
        self._missing = set(everyone)
        return [Send(peer, Check(self.attempt, *self._check)) for peer in everyone]

    def _note_checked(self, peer: Peer, message: Checked, now: float) -> list[Action]:
        self._missing.discard(peer)
        self._checked[peer] = message
        if self._missing or self._compare is None:
            return []
        self.verification = self._compare(self._checked)
        wrong = self.verification.wrong
        if not wrong or not self.moves:
            return self._commit(now)
        name, what = next(iter(wrong.items()))
        text = f"{len(wrong)} tensors of the engine are wrong after the refit, such as {name}: {what}"
        return self.fail(Failure("VerifyError", text, phase=self.phase, tensor=name), now)

    def _commit(self, now: float) -> list[Action]:
        self._enter_phase(Phase.COMMIT, now)
        self._missing = set(self._workers)
        return [Send(worker, Commit(self.attempt)) for worker in self._workers]

    def _resume_if_committed(self, now: float) -> list[Action]:
        if not (self.phase is Phase.COMMIT and not self._missing and self._session_closed):
            return []
        self._enter_phase(Phase.RESUME, now)
        self._resume_on_failure = False
        return [self._call(EngineCall.RESUME)]

    def _end_if_settled(self, now: float) -> list[Action]:
        if not self._resumed:
            return []
        if self._settling:
            self._enter_phase(Phase.SETTLE, now)
            return []
        self._enter_phase(Phase.DONE, now)
        self.state = EngineState.SERVING
        return []

    def fail(self, failure: Failure, now: float) -> list[Action]:
        """Fail, also for a reason from outside."""
        if self.failure is not None or self.finished:
            return []
        self.failure = failure
        if self.state is EngineState.UPDATING:
            self.state = EngineState.STALE
        self._enter_phase(Phase.FAILING, now)
        self._deadline = now + self._deadline_s  # a worker may be in the middle of a long load
        # An engine that serves already may still copy from the trainers: they hear of it once it is paused again.
        told = self._workers if self._may_serve else (*self._trainers, *self._workers)
        self._untold = [peer for peer in self._trainers if peer not in told]
        aborts: list[Action] = [Send(peer, Abort(self.attempt, failure)) for peer in told]
        return aborts + self._drain(now)

    @property
    def _may_serve(self) -> bool:
        """Whether the engine was resumed, or may be by the time its call comes back, without being settled."""
        return self.state is EngineState.STALE and (self._resumed or self._engine_busy is EngineCall.RESUME)

    def _drain(self, now: float) -> list[Action]:
        """Bring the engine's calls to an end: close the update session, or resume what was only paused."""
        if self.state is EngineState.GONE:
            return self._end(now)
        if self._engine_busy is not None:
            return []  # wait for it
        if self._session_open:
            self._session_open = False
            return [self._call(EngineCall.CLOSE)]
        if self._may_serve:
            self._resumed = False
            return [self._call(EngineCall.PAUSE)]
        if self._resume_on_failure and self.state is EngineState.SERVING:
            self._resume_on_failure = False
            return [self._call(EngineCall.RESUME)]
        return self._end(now)

    def _end(self, now: float) -> list[Action]:
        self._enter_phase(Phase.FAILED, now)
        untold, self._untold = self._untold, []
        return [Send(peer, Abort(self.attempt, self.failure)) for peer in untold] if self.failure else []

    def _call(self, call: EngineCall) -> Call:
        self._engine_busy = call
        return Call(call)

    def _enter_phase(self, phase: Phase, now: float) -> None:
        self.phase = phase
        self.started[phase] = now


def _names(peers: set[Peer]) -> str:
    return ", ".join(str(peer) for peer in sorted(peers))
