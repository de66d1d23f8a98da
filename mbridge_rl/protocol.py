"""The state machine with which trainer rank 0 conducts a refit. No sockets, no clock, no tensors.

One attempt at a refit of one or more engines, seen from rank 0 (peers are trainer ranks, itself included, and engine
workers):

    ENTER   every trainer sends Enter; versions must agree and grow
    PAUSE   all engines pause, while trainers already fill the first buckets
    STREAM  trainers: Fill -> Filled; workers: Load -> Loaded, then Applied once all is written and checked. On the
            direct path there are two: the trainers' own memory, and what of it turns out to have moved. On a lane that
            `meets`, Fill and Load go out together: both sides take part in one transfer
    CHECK   if asked for: Check -> Checked, everyone's checksums, which must agree
    COMMIT  every engine has it all: Commit to the workers
    RESUME  the engines publish the version and serve again
    SETTLE  devices that still copy end: an engine's steps come after the copies in its streams, so it may serve
            before, but the trainers may not change their weights; then Done to the trainers
    DONE

No engine resumes before all of them have committed. Any failure, lost peer or missed deadline sends Abort to everyone
and ends in FAILED, for all engines of the attempt; `culprits` are the engines to blame, if any are. Before STREAM
nothing was written, so the engines resume what they served; from STREAM on they are stale and stay paused, or are
paused again. `Refit` takes events and returns actions: whoever drives it (conductor.py; a test) owns all I/O.

A refit that moves nothing (`moves=False`: `WeightSyncer.verify`) runs the same way for the version that the engines
have: workers go from STREAM to CHECK at once, what is wrong is noted instead of failing, and nothing is published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from .errors import Failure
from .flows import NUM_DIRECT_STEPS, NUM_SLOTS_IN_FLIGHT, Flow, Lane
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
    Filled,
    Goodbye,
    Loaded,
    Settled,
    Verification,
)
from .parties import Action, Call, EngineCall, EngineState, Peer, Phase, Send, Side, Taking
from .waits import Wait, blamed, engines_of, in_words, waits

# The words of this machine, for its callers.
__all__ = [
    "DRAIN_S",
    "NUM_DIRECT_STEPS",
    "NUM_SLOTS_IN_FLIGHT",
    "Action",
    "Call",
    "Compare",
    "EngineCall",
    "EngineState",
    "Lane",
    "Peer",
    "Phase",
    "Refit",
    "Send",
    "Side",
    "Taking",
    "merged",
]

REPORT_S = 2.0  # how long after the engines' last calls their workers' last messages may arrive
FROM_RANK_0 = frozenset(("DeadlineError", "EngineStaleError"))  # what a worker reports if that is silent, or aborts
DRAIN_S = 5.0  # how long after a missed deadline the engines' calls may last
Compare = Callable[[Mapping[Peer, Checked]], Verification]


class Refit:
    """One attempt. Feed it events with the time in seconds; carry out the actions it returns; stop when `finished`."""

    def __init__(
        self,
        *,
        attempt: int,
        last_version: int,
        engines: Sequence[Taking],
        lanes: Mapping[int, Lane],
        num_trainers: int,
        deadline_s: float,
        now: float,
        moves: bool = True,
        check: tuple[int, int] | None = None,
        compare: Compare | None = None,
    ) -> None:
        """`check`: (share, num_shares) of the tensors to compare; `compare` judges what trainers and one engine's
        workers then send.
        """
        self.attempt, self.moves = attempt, moves
        self.verification: Verification | None = None
        self.last_version, self.version = last_version, last_version
        self.phase = Phase.ENTER
        self.failure: Failure | None = None
        self.culprits: set[int] = set()  # engines that this attempt failed for
        self.lost_trainer: Failure | None = None  # also if this attempt could do without it
        self.started = {Phase.ENTER: now}
        self.sides = {
            e.number: Side(tuple(Peer("worker", i, e.number) for i in range(e.num_workers)), e.lane, e.state)
            for e in engines
        }
        self.fill_s = [0.0] * num_trainers
        self.load_s = {worker: 0.0 for side in self.sides.values() for worker in side.workers}
        self.engine_extra_bytes = 0
        self.reloaded: set[str] = set()
        self.reasons: dict[str, str] = {}
        self._check, self._compare = check, compare
        self._checked: dict[Peer, Checked] = {}
        self._deadline_s = self._drain_s = deadline_s
        self._trainers = tuple(Peer("trainer", i) for i in range(num_trainers))
        self._workers = tuple(self.load_s)
        self._flows = {
            number: Flow(
                number,
                lanes[number],
                attempt,
                lanes[number].num_buckets if moves else 0,
                self._trainers,
                tuple(peer for side in self.sides.values() if side.lane == number for peer in side.workers),
                check is not None,
            )
            for number in sorted({side.lane for side in self.sides.values()})
        }
        self._missing: set[Peer] = set(self._trainers)  # who has not sent Enter; then Applied; then Committed
        self._versions: dict[int, int] = {}
        self._told: Failure | None = None  # what Abort said
        self._untold: list[Peer] = []  # trainers that do not know yet that the attempt failed
        self._settling: set[Peer] = set()  # workers whose device still copies
        self._deadline = now + deadline_s

    @property
    def finished(self) -> bool:
        return self.phase in (Phase.DONE, Phase.FAILED)

    @property
    def deadline(self) -> float:
        """When `tick` will fail the refit, unless something happens before."""
        return self._deadline

    def engine_call(self, engine: int) -> EngineCall | None:
        """The call that the engine is busy with."""
        return self.sides[engine].busy

    # --- events ------------------------------------------------------------------------------------------------------

    def receive(self, peer: Peer, message: AnyMessage, now: float) -> list[Action]:
        """A message of this attempt arrived."""
        if self.finished:
            return []
        if self.phase is Phase.FAILING:
            return self._learn(peer, message, now)
        self._deadline = now + self._deadline_s
        match message:
            case Enter(version=version) if self.phase is Phase.ENTER and peer in self._missing:
                return self._entered(peer, version, now)
            case Filled() if flow := self._flow_of(peer, message):
                self.fill_s[peer.index] += message.seconds
                return flow.filled(peer, message)
            case Loaded() if flow := self._flow_of(peer, message):
                self.load_s[peer] += message.seconds
                return flow.loaded(peer, message.bucket)
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
                return self.fail(failure, now, self._blamed(peer, failure))
            case Goodbye():
                return self.lost(peer, "closed its WeightSyncer", now)
            case _:
                what = f"{peer} sent {type(message).__name__} in phase {self.phase}"
                return self.fail(Failure("ProtocolError", what, str(peer), self.phase), now, engines_of([peer]))

    def called(self, engine: int, failure: Failure | None, now: float) -> list[Action]:
        """An engine's current call came back, with an error or without."""
        side = self.sides[engine]
        call, side.busy = side.busy, None
        if self.finished:
            return []
        self._deadline = now + self._deadline_s
        if failure is not None:
            if failure.kind == "EngineGoneError":
                self._explain(failure)
                side.state = EngineState.GONE
            self.culprits.add(engine)
        side.resumed |= call is EngineCall.RESUME  # also if it raised: it may have taken effect
        if self.phase is Phase.FAILING:
            return self._draining(self._drain(now), now)
        if failure is not None:
            side.resume_on_failure |= call is EngineCall.RESUME  # it serves nothing while it is paused: once more
            return self.fail(failure, now)
        match call:
            case EngineCall.PAUSE:
                side.is_paused = True
                return self._stream(now) if all(side.is_paused for side in self.sides.values()) else []
            case EngineCall.UPDATE:
                side.session_open = False
                return [self._call(engine, EngineCall.CLOSE)]
            case EngineCall.CLOSE:
                side.session_closed = True
                if self._are_closed:
                    self._deadline = now + min(self._deadline_s, REPORT_S)
                return self._resume_if_committed(now)
            case _:
                return self._end_if_settled(now)

    def _learn(self, peer: Peer, message: AnyMessage, now: float) -> list[Action]:
        """While it fails: who leaves for good cannot be in the next attempt, nor should who failed by itself."""
        match message:
            case Goodbye():
                return self.lost(peer, "closed its WeightSyncer", now)
            case Failed(failure=failure) if not self._is_echo(failure):
                culprits = self._blamed(peer, failure)
                if culprits:
                    self._explain(failure)
                self.culprits |= culprits
        return []

    def _is_echo(self, failure: Failure) -> bool:
        """Whether it is no more than what Abort said, which ended what the sender was doing."""
        told = self._told
        return told is not None and told.message == failure.message and told.origin in ("", failure.origin)

    def _explain(self, failure: Failure) -> None:
        """`failure` is why a transfer broke, if one did: those at its other ends may be sooner to report that."""
        if self.failure is not None and self.failure.kind == "TransportError" and not self.culprits:
            self.failure = failure

    def lost(self, peer: Peer, how: str, now: float) -> list[Action]:
        """A peer's process is gone."""
        if peer.role == "worker":
            if peer.engine not in self.sides:
                return []
            failure = Failure("EngineGoneError", f"{peer} {how}; start a new engine", str(peer), str(self.phase))
            self._explain(failure)
            self.sides[peer.engine].state = EngineState.GONE
            self.culprits.add(peer.engine)
        else:
            text = f"{peer} {how}; build a new WeightSyncer on the survivors"
            failure = Failure("TrainerLostError", text, str(peer), str(self.phase))
            self._explain(failure)
            self.lost_trainer = self.lost_trainer or failure
        if self.phase is Phase.FAILING and peer.role == "worker":
            return self._drain(now)  # its calls will not come back
        if peer.role == "trainer" and self.phase in (Phase.COMMIT, Phase.RESUME, Phase.SETTLE):
            return []  # it has done its part: this refit commits, the next one fails
        return self.fail(failure, now)

    def tick(self, now: float) -> list[Action]:
        """Time passed."""
        if now < self._deadline or self.finished:
            return []
        if self.phase is Phase.FAILING:
            for number, side in self.sides.items():
                if side.busy is not None and side.state is not EngineState.GONE:
                    side.state = EngineState.GONE  # a call that never comes back: nobody can use this engine
                    self.culprits.add(number)
            return self._drain(now)
        found = self._waits()
        message = f"nothing happened for {self._deadline_s:g} s while waiting for {in_words(found)}"
        return self.fail(Failure("DeadlineError", message, "trainer rank 0", self.phase), now, blamed(found))

    def waiting_for(self) -> str:
        """What has to happen next, in words."""
        return in_words(self._waits())

    def fail(self, failure: Failure, now: float, culprits: Iterable[int] = ()) -> list[Action]:
        """Fail, also for a reason from outside. `culprits`: numbers of the engines to blame."""
        if self.failure is not None or self.finished:
            return []
        self.failure = self._told = failure
        self.culprits.update(culprits)
        for side in self.sides.values():
            if side.state is EngineState.UPDATING:
                side.state = EngineState.STALE
        self._enter_phase(Phase.FAILING, now)
        if failure.kind == "DeadlineError":  # what is under way was waited for in vain already
            self._drain_s = min(DRAIN_S, self._deadline_s)
        # An engine that serves already may still copy from the trainers: they hear of it once it is paused again.
        told = self._workers if self._may_serve else (*self._trainers, *self._workers)
        self._untold = [peer for peer in self._trainers if peer not in told]
        aborts: list[Action] = [Send(peer, Abort(self.attempt, failure)) for peer in told]
        return self._draining(aborts + self._drain(now), now)

    # --- what happens next -------------------------------------------------------------------------------------------

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
        for side in self.sides.values():
            side.resume_on_failure = side.state is EngineState.SERVING
        fills = [action for flow in self._flows.values() for action in flow.prepare()]
        return [*(self._call(number, EngineCall.PAUSE) for number in self.sides), *fills]

    def _stream(self, now: float) -> list[Action]:
        """All engines are paused."""
        self._enter_phase(Phase.STREAM, now)
        for side in self.sides.values():
            side.session_open = True
            if self.moves:
                side.state = EngineState.UPDATING
        self._missing = set(self._workers)
        actions: list[Action] = [self._call(number, EngineCall.UPDATE) for number in self.sides]
        return actions + [action for flow in self._flows.values() for action in flow.open()]

    def _flow_of(self, peer: Peer, message: Filled | Loaded) -> Flow | None:
        """The flow that waits for this."""
        if isinstance(message, Filled):
            flow = self._flows.get(message.lane)
        else:
            side = self._side_of(peer)
            flow = None if side is None else self._flows[side.lane]
        return flow if flow is not None and flow.waits_for(peer, message) else None

    def _side_of(self, peer: Peer) -> Side | None:
        return self.sides.get(peer.engine) if peer.role == "worker" else None

    def _applied(self, peer: Peer, message: Applied, now: float) -> list[Action]:
        self._missing.discard(peer)
        self.load_s[peer] += message.seconds
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
        found = {
            number: self._compare({p: self._checked[p] for p in (*self._trainers, *side.workers)})
            for number, side in self.sides.items()
        }
        self.verification = merged(found)
        wrong = self.verification.wrong
        if not wrong or not self.moves:
            return self._commit(now)
        name, what = next(iter(wrong.items()))
        text = f"{len(wrong)} tensors of the engine are wrong after the refit, such as {name}: {what}"
        failure = Failure("VerifyError", text, phase=self.phase, tensor=name)
        return self.fail(failure, now, {number for number, verification in found.items() if verification.wrong})

    def _commit(self, now: float) -> list[Action]:
        self._enter_phase(Phase.COMMIT, now)
        self._missing = set(self._workers)
        return [Send(worker, Commit(self.attempt)) for worker in self._workers]

    def _resume_if_committed(self, now: float) -> list[Action]:
        if not (self.phase is Phase.COMMIT and not self._missing and self._are_closed):
            return []
        self._enter_phase(Phase.RESUME, now)
        for side in self.sides.values():
            side.resume_on_failure = False
        return [self._call(number, EngineCall.RESUME) for number in self.sides]

    def _end_if_settled(self, now: float) -> list[Action]:
        if not all(side.resumed for side in self.sides.values()):
            return []
        if self._settling:
            self._enter_phase(Phase.SETTLE, now)
            return []
        self._enter_phase(Phase.DONE, now)
        for side in self.sides.values():
            side.state = EngineState.SERVING
        return []

    # --- failing -----------------------------------------------------------------------------------------------------

    def _drain(self, now: float) -> list[Action]:
        """Bring all engines' calls to an end: close update sessions, or resume what was only paused."""
        actions = [call for number in self.sides for call in self._drain_side(number)]
        if any(side.busy is not None and side.state is not EngineState.GONE for side in self.sides.values()):
            return actions  # wait for them
        self._enter_phase(Phase.FAILED, now)
        untold, self._untold = self._untold, []
        return [*actions, *(Send(peer, Abort(self.attempt, self.failure)) for peer in untold if self.failure)]

    def _draining(self, actions: list[Action], now: float) -> list[Action]:
        """Wait for the calls that are left; `actions` are what is done meanwhile."""
        is_pausing = any(side.busy is EngineCall.PAUSE for side in self.sides.values())  # requests may take long
        self._deadline = now + (self._deadline_s if is_pausing else self._drain_s)
        return actions

    def _drain_side(self, number: int) -> list[Action]:
        side = self.sides[number]
        if side.busy is not None or side.state is EngineState.GONE:
            return []
        if side.session_open:
            side.session_open = False
            return [self._call(number, EngineCall.CLOSE)]
        if side.may_serve:
            side.resumed = False
            return [self._call(number, EngineCall.PAUSE)]
        if side.resume_on_failure and side.state is EngineState.SERVING:
            side.resume_on_failure = False
            return [self._call(number, EngineCall.RESUME)]
        return []

    @property
    def _may_serve(self) -> bool:
        return any(side.may_serve for side in self.sides.values())

    @property
    def _are_closed(self) -> bool:
        return all(side.session_closed for side in self.sides.values())

    def _blamed(self, peer: Peer, failure: Failure) -> set[int]:
        """The engines to blame for what `peer` reports: none if others may be its cause."""
        side = self._side_of(peer)
        if side is None or failure.kind in FROM_RANK_0:
            return set()
        if failure.kind == "TransportError" and self._flows[side.lane].lane.meets:
            return set()
        return {peer.engine}

    def _waits(self) -> list[Wait]:
        return waits(self.phase, self.sides, self._flows.values(), self._missing, self._settling)

    def _call(self, engine: int, call: EngineCall) -> Call:
        self.sides[engine].busy = call
        return Call(call, engine)

    def _enter_phase(self, phase: Phase, now: float) -> None:
        self.phase = phase
        self.started[phase] = now


def merged(found: Mapping[int, Verification]) -> Verification:
    """What comparisons with several engines found. With more than one, what is wrong says in which."""
    if len(found) == 1:
        return next(iter(found.values()))

    def labelled(kind: str) -> dict[str, str]:
        return {
            f"{name} of engine {number}": what
            for number, verification in found.items()
            for name, what in getattr(verification, kind).items()
        }

    return Verification(
        min(v.num_compared for v in found.values()),
        max(v.num_tensors for v in found.values()),
        labelled("wrong"),
        labelled("unchecked"),
    )
