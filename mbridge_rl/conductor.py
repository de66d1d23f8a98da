"""Rank 0's side of a syncer: carries out what the state machine of protocol.py decides.

Owns the switchboard and the fleet. One loop (`_pump`) turns what happens (messages, deaths, engine calls that return,
time) into events of the machine, and its actions into messages and calls. Rank 0 is a trainer too: its own Fill
messages are carried out here, between two looks at the hub. One `run` is as many attempts as it takes: one, unless
engines fail and are left behind, or are refitted one after the other.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NoReturn

import msgspec

from mbridge.pieces import TensorSpec

from .control import Hub
from .engines.base import Engine, InFlight
from .errors import EngineGoneError, EngineStaleError, Failure, SyncError, as_failure, raised
from .fleet import Fleet, Member
from .messages import (
    Abort,
    AnyMessage,
    Applied,
    Check,
    Checked,
    Connected,
    Done,
    Enter,
    Failed,
    Fill,
    Filled,
    Goodbye,
    Grouping,
    Lends,
    Load,
    Needs,
    Next,
    Offered,
    SetUp,
    Share,
    Stats,
)
from .observe import EngineStatus, FleetStatus, Observer, PhaseRange, phase_range
from .protocol import Action, Call, EngineCall, EngineState, Lane, Peer, Phase, Refit, Send, Taking
from .source import Source
from .switchboard import NO_CONNECTION, Switchboard
from .verification import compare

ME = Peer("trainer", 0)
ORDER = (Phase.ENTER, Phase.PAUSE, Phase.STREAM, Phase.CHECK, Phase.COMMIT, Phase.RESUME, Phase.SETTLE, Phase.DONE)
OnError = Literal["raise", "quarantine"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How engines are treated, in every refit."""

    deadline_s: float
    in_flight: InFlight = "wait"
    reset_prefix_cache: bool = True
    on_error: OnError = "raise"
    rolling: bool = False


@dataclass
class _Attempt:
    """One attempt under way."""

    refit: Refit
    source: Source
    mine: deque[Fill | Check] = field(default_factory=deque)  # messages for rank 0 itself
    calls_s: dict[str, float] = field(default_factory=dict)
    grouping: Grouping | None = None  # of its collective lane
    wire_bytes: int = 0  # that came along it to the worker to which most came
    shown: Phase | None = None  # the phase whose range is open
    range: PhaseRange | None = None


class Conductor:
    """Connects trainers and engine workers, and conducts refits. Used by one thread."""

    def __init__(
        self, tensors: Sequence[TensorSpec], *, num_trainers: int, options: Options, hub: Hub, observer: Observer
    ) -> None:
        self.hub, self.observer = hub, observer
        self.options = options
        self.version = 0  # the last that was committed
        self.board = Switchboard(hub, options.deadline_s)
        self.fleet = Fleet(self.board, options.deadline_s)
        self.board.expects = self._expects
        self.broken: Failure | None = None  # why no later refit can succeed
        self.copy_limit_gb_s: float | None = None
        self.lanes: dict[int, Lane] = {}
        self.store: tuple[str, int, str] | None = None  # host, port and backend of a collective lane
        self._number = 0  # of the current attempt
        # Of the collective lane's process groups: the current generation, that trainers know, and its workers' plans.
        self._generation, self._told, self._grouped = 0, 0, dict[tuple[int, int], str]()
        self._needs: dict[tuple[int, int], Needs] = {}  # (engine, worker) -> what it needs of the buckets
        self._tensors = tuple(tensors)
        self._num_trainers = num_trainers
        # Messages of the next attempt, from a rank that gave up sooner than rank 0 did.
        self._early: list[tuple[Peer, AnyMessage]] = []

    # --- connecting --------------------------------------------------------------------------------------------------

    def invite(self, engines: Iterable[object]) -> list[Member]:
        """Have the workers of engines connect, and find out where they are. They wait for `connect`."""
        return self.fleet.invite(engines)

    def connect(self, joining: Sequence[Member], set_ups: Mapping[int, SetUp]) -> Connected:
        """Set up the workers of `joining`, and tell all trainers the outcome. Raises SyncError.

        A set-up that holds what rank 0 lends gets what the other ranks lend.
        """
        answer: Connected | Abort
        try:
            set_ups = self._with_others_loans(set_ups)
            self.fleet.set_up(joining, set_ups)
            answer = Connected(max([self.version, *(member.version for member in joining)]))
        except SyncError as error:
            answer = Abort(0, error.failure)
        # Trainers are waited for even after a failure, so that all of them hear of it.
        try:
            self.board.wait_until(
                lambda: len(self.board.trainers) == self._num_trainers - 1, "every trainer rank to connect", engines=()
            )
        except SyncError as error:
            answer = Abort(0, error.failure) if isinstance(answer, Connected) else answer
        self.hub.hide_endpoint()
        self.board.send_all(self.board.trainers, answer)
        if isinstance(answer, Abort):
            raise raised(answer.failure)
        return answer

    def _with_others_loans(self, set_ups: Mapping[int, SetUp]) -> Mapping[int, SetUp]:
        lending = [lane for lane, set_up in set_ups.items() if set_up.lends]
        if not lending or self._num_trainers == 1:
            return set_ups
        lends: dict[int, Lends] = {}

        def arrived(peer: Peer, message: AnyMessage) -> None:
            if isinstance(message, Offered):
                lends[peer.index] = message.lends

        what = "every trainer rank to lend its memory"
        self.board.wait_until(lambda: len(lends) == self._num_trainers - 1, what, arrived)
        others = [lends[rank] for rank in sorted(lends)]
        return {
            lane: msgspec.structs.replace(set_up, lends=[*set_up.lends, *others]) if lane in lending else set_up
            for lane, set_up in set_ups.items()
        }

    def status(self, ways: Mapping[int, tuple[str, str]]) -> FleetStatus:
        """What is known of each engine; `ways`: path and transport of each lane."""
        engines = tuple(
            EngineStatus(m.name, m.engine.state, m.version, *ways[m.lane], m.num_workers, m.engine.failure, m.refit_s)
            for m in self.fleet
        )
        return FleetStatus(self.version, engines, self.broken)

    def _expects(self, peer: Peer) -> bool:
        """Whether there is such a rank or worker."""
        if peer.role == "trainer":
            return 0 < peer.index < self._num_trainers
        member = self.fleet.members.get(peer.engine)
        return member is not None and peer.index < member.num_workers

    def close(self) -> None:
        """Say Goodbye to everyone and let the engines detach. Calling it again does nothing."""
        self.board.send_all(self.board.trainers, Goodbye())
        for member in list(self.fleet):
            self.fleet.dismiss(member)
        self.hub.close()

    # --- one refit ---------------------------------------------------------------------------------------------------

    def run(
        self,
        version: int,
        source: Source,
        *,
        moves: bool = True,
        check: tuple[int, int] | None = None,
        only: Sequence[Member] | None = None,
    ) -> Done:
        """One refit as trainer rank 0, with its weights, of all engines or of `only` some, to the version that the
        others have. See protocol.Refit for `moves` and `check`. Raises SyncError.
        """
        started = time.monotonic()
        self._number += 1
        floor = self.version if only is None else version - 1
        refusal = self.broken
        try:
            members = list(self._taking_part(moves=moves) if only is None else only)
        except SyncError as error:
            refusal, members = refusal or error.failure, []
        if refusal is not None:
            self._give_up(refusal)
        one_by_one = self.options.rolling and moves
        cohorts = deque([member] for member in members) if one_by_one else deque([members])
        left_behind: dict[str, str] = {}
        finished: _Attempt | None = None
        while cohorts:
            cohort = cohorts.popleft()
            current = self._attempt(version, floor, source, cohort, moves=moves, check=check)
            if current.refit.failure is None:
                finished = current
            else:
                failure = self._in_words(current.refit)
                rest = self._without_culprits(cohort, current.refit, failure)
                if rest is None or not (rest or cohorts or finished):
                    self._give_up(failure)
                left_behind |= {m.name: failure.message for m in cohort if m not in rest}
                if rest:
                    cohorts.appendleft(rest)
            if cohorts and self.broken is not None:  # a trainer that had done its part was lost
                self._give_up(self.broken)
            if cohorts:
                self.board.send_all(self.board.trainers, Next(self._number))
                source.end(current.refit.failure is None)
                self._number += 1
        assert finished is not None
        stats = self._stats(finished, members, time.monotonic() - started, left_behind)
        done = Done(self._number, finished.refit.version, stats)
        self.board.send_all(self.board.trainers, done)
        return done

    def _give_up(self, failure: Failure) -> NoReturn:
        """No attempt follows: tell the other ranks, and raise."""
        self.board.send_all(self.board.trainers, Abort(self._number, failure, version=self.version))
        raise raised(failure)

    def _taking_part(self, *, moves: bool) -> list[Member]:
        """Raises EngineError if there is nobody to refit, or one of whom it is known that it will fail."""
        members = list(self.fleet)
        for peer, how in self.board.lost.items():
            if peer.engine in self.fleet.members:
                self._note_gone(self.fleet.members[peer.engine], f"{peer} {how}")
        self.board.lost.clear()
        if self.options.on_error == "quarantine":
            members = [member for member in members if member.quarantine is None]
        for member in members:
            if member.quarantine is not None:
                raise raised(member.quarantine)
            if not moves:
                member.check_serving()
        if not members:
            reasons = "; ".join(f"{m.name}: {m.quarantine.message}" for m in self.fleet if m.quarantine)
            raise EngineStaleError(f"no engine is left to refit ({reasons or 'the fleet is empty'}); add_engine() one")
        return members

    def _note_gone(self, member: Member, how: str) -> None:
        member.engine.state = EngineState.GONE
        self.observer.engine(member.name, member.engine.state, member.version)
        failure = EngineGoneError(f"{how}; start a new engine", origin=member.name).failure
        self.fleet.leave_behind(member, failure)

    def _without_culprits(self, cohort: Sequence[Member], refit: Refit, failure: Failure) -> list[Member] | None:
        """The engines to try again with after a failure, its culprits left behind; None if it is everyone's."""
        culprits = [member for member in cohort if member.number in refit.culprits]
        may_go_on = self.options.on_error == "quarantine" and self.broken is None and refit.moves
        for member in culprits:
            if may_go_on and member.engine.state is EngineState.SERVING:  # nothing had been written: the old weights
                self._pause(member)
            if member.engine.state is EngineState.GONE or may_go_on:
                self.fleet.leave_behind(member, failure)
        if not may_go_on or not culprits:
            return None
        for member in culprits:
            _log.warning("%s is left behind: %s", member.name, failure.message)
        return [member for member in cohort if member not in culprits]

    def _pause(self, member: Member) -> None:
        """Keep an engine that is left behind from serving. If that fails, nothing more can be done about it."""
        member.calls.start(lambda: member.engine.pause(self.options.in_flight))
        patience_s = self.options.deadline_s
        member.calls.join(patience_s)
        failure = member.calls.take().failure if member.calls.is_returned else None
        if failure is not None or member.calls.is_busy:
            why = failure.message if failure else f"no answer for {patience_s:g} s"
            _log.error("%s cannot be paused, and may serve older weights: %s", member.name, why)
            member.engine.state = EngineState.GONE

    def _in_words(self, refit: Refit) -> Failure:
        """The attempt's failure; in a fleet, with the name of the engine to blame."""
        assert refit.failure is not None
        names = [self.fleet.members[n].name for n in sorted(refit.culprits) if n in self.fleet.members]
        if len(self.fleet.members) < 2 or not names or any(name in refit.failure.message for name in names):
            return refit.failure
        return replace(refit.failure, message=f"{', '.join(names)}: {refit.failure.message}")

    # --- one attempt -------------------------------------------------------------------------------------------------

    def _attempt(
        self,
        version: int,
        floor: int,
        source: Source,
        members: Sequence[Member],
        *,
        moves: bool,
        check: tuple[int, int] | None,
    ) -> _Attempt:
        refit = Refit(
            attempt=self._number,
            last_version=floor,
            engines=[Taking(m.number, m.num_workers, m.engine.state, m.lane) for m in members],
            lanes=self.lanes,
            num_trainers=self._num_trainers,
            deadline_s=self.options.deadline_s,
            now=time.monotonic(),
            moves=moves,
            check=check,
            compare=partial(compare, self._tensors),
        )
        current = _Attempt(refit, source)
        try:
            self._carry_out(current, self._entering(current, version))
            early, self._early = self._early, []
            for peer, message in early:
                self._carry_out(current, self._deliver(current, peer, message))
            self._pump(current)
        except BaseException as error:  # also Ctrl-C: nobody may be left waiting, and no engine call half made
            what = f"trainer rank 0 left the refit: {type(error).__name__}: {error}"
            current.mine.clear()
            self._carry_out(current, refit.fail(Failure("SyncError", what, str(ME), refit.phase), time.monotonic()))
            self._pump(current)
            self.board.send_all(
                self.board.trainers,
                Abort(self._number, refit.failure or as_failure(error, str(ME)), version=self.version),
            )
            raise
        finally:
            _show(current)
            self._conclude(refit, members)
        return current

    def _pump(self, current: _Attempt) -> None:
        """Turn what happens into events of the machine until the attempt is over."""
        refit = current.refit
        while not refit.finished:
            _show(current)
            self._look(current, 0 if current.mine else refit.deadline - time.monotonic())
            if current.mine and not refit.finished:
                self._carry_out(current, self._answer(current, current.mine.popleft()))

    def _look(self, current: _Attempt, timeout_s: float) -> None:
        """Handle what has happened, or what happens within `timeout_s`."""
        refit = current.refit
        for peer, message, how in self.board.hear(timeout_s, refit.attempt):
            if message is not None:
                self._carry_out(current, self._deliver(current, peer, message))
                continue
            self.board.forget([peer])
            if peer.role == "worker" and peer.engine not in refit.sides:
                self.board.lost[peer] = how
            else:
                self._carry_out(current, refit.lost(peer, how, time.monotonic()))
        for number in refit.sides:
            calls = self.fleet.members[number].calls
            if calls.is_returned:
                returned = calls.take()
                call = refit.engine_call(number)
                if call is not None:
                    current.calls_s[call.value] = max(returned.seconds, current.calls_s.get(call.value, 0.0))
                failure = returned.failure and _located(returned.failure, refit, self.fleet.members[number].name)
                self._carry_out(current, refit.called(number, failure, time.monotonic()))
        self._carry_out(current, refit.tick(time.monotonic()))

    def _entering(self, current: _Attempt, version: int) -> list[Action]:
        refit = current.refit
        try:
            current.source.begin()
        except SyncError as error:
            return refit.fail(as_failure(error, str(ME), refit.phase), time.monotonic())
        return refit.receive(ME, Enter(refit.attempt, version), time.monotonic())

    def _answer(self, current: _Attempt, message: Fill | Check) -> list[Action]:
        refit, source = current.refit, current.source
        if refit.failure is not None:
            return []

        def breathe() -> None:
            """While rank 0 waits for others in a transfer, it still hears them."""
            self._look(current, 0)
            if refit.failure is not None:
                raise raised(refit.failure)

        answer: Filled | Checked
        started = time.monotonic()
        try:
            if isinstance(message, Check):
                answer = Checked(refit.attempt, source.totals(message))
            else:
                with phase_range("fill"):
                    loan = source.fill(message, breathe)
                seconds = time.monotonic() - started
                answer = Filled(refit.attempt, message.bucket, seconds, loan, message.lane)
        except SyncError as error:
            return refit.fail(as_failure(error, str(ME), refit.phase), time.monotonic())
        return refit.receive(ME, answer, time.monotonic())

    def _deliver(self, current: _Attempt, peer: Peer, message: AnyMessage) -> list[Action]:
        refit = current.refit
        attempt = getattr(message, "attempt", refit.attempt)
        if attempt > refit.attempt:
            self._early.append((peer, message))
        if isinstance(message, Failed):
            message = msgspec.structs.replace(message, failure=_located(message.failure, refit, str(peer)))
        is_ours = peer.role == "trainer" or peer.engine in refit.sides
        if attempt != refit.attempt or not is_ours:
            return []
        if isinstance(message, Applied):
            current.wire_bytes = max(current.wire_bytes, message.wire_bytes)
            if message.needs is not None:
                self._needs[peer.engine, peer.index] = message.needs
        return refit.receive(peer, message, time.monotonic())

    def _carry_out(self, current: _Attempt, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Call):
                member = self.fleet.members[action.engine]
                member.calls.start(self._engine_call(action.call, current.refit, member))
            else:
                self._send(current, action)

    def _send(self, current: _Attempt, action: Send) -> None:
        peer, message = action
        refit = current.refit
        if isinstance(message, Abort) and peer.role == "trainer":
            message = msgspec.structs.replace(message, is_final=False)  # what comes of it is told in `run`
        if isinstance(message, Fill | Load) and message.bucket == 0:
            lane = message.lane if isinstance(message, Fill) else refit.sides[peer.engine].lane
            if self.lanes[lane].meets:
                grouping = self._grouping(current, lane)
                grouping = grouping if isinstance(message, Fill) else _without_needs(grouping)
                message = msgspec.structs.replace(message, grouping=grouping)
        if peer != ME:
            if not self.board.send(peer, message) and not isinstance(message, Abort):
                self._carry_out(current, refit.lost(peer, NO_CONNECTION, time.monotonic()))
        elif isinstance(message, Fill | Check):
            current.mine.append(message)

    def _grouping(self, current: _Attempt, lane: int) -> Grouping:
        """Who takes part in the collective lane, and what each gets; the same throughout an attempt."""
        if current.grouping is not None:
            return current.grouping
        assert self.store is not None
        host, port, backend = self.store
        sides = current.refit.sides.values()
        workers = [(w.engine, w.index) for side in sides if side.lane == lane for w in side.workers]
        plans = {worker: self._needs[worker].digest if worker in self._needs else "" for worker in workers}
        if list(plans.items()) != list(self._grouped.items()):
            self._generation, self._grouped = self._generation + 1, plans
        is_new, self._told = self._told != self._generation, self._generation
        members: dict[str, list[int]] = {}
        for position, plan in enumerate(plans.values()):
            members.setdefault(plan, []).append(position)
        shares = [
            Share(plan, of, self._needs[workers[of[0]]] if plan and is_new else None) for plan, of in members.items()
        ]
        current.grouping = Grouping(self._generation, host, port, backend, self.options.deadline_s, workers, shares)
        return current.grouping

    def _engine_call(self, call: EngineCall, refit: Refit, member: Member) -> Callable[[], None]:
        engine = member.engine
        match call:
            case EngineCall.PAUSE:
                return lambda: engine.pause(self.options.in_flight)
            case EngineCall.UPDATE:
                return lambda: self._update_engine(refit, engine)
            case EngineCall.CLOSE:
                return engine.close_session
            case EngineCall.RESUME:
                return lambda: self._resume_engine(refit, engine)

    def _update_engine(self, refit: Refit, engine: Engine) -> None:
        engine.update(refit.attempt, refit.version, refit.moves)
        if refit.moves and self.options.reset_prefix_cache and refit.failure is None:
            engine.reset_cache()  # now: workers of the direct path are still copying

    @staticmethod
    def _resume_engine(refit: Refit, engine: Engine) -> None:
        if refit.moves and refit.failure is None:
            engine.publish(refit.version)
        engine.resume()

    def _conclude(self, refit: Refit, members: Sequence[Member]) -> None:
        """What this attempt leaves for the next."""
        for member in members:
            member.engine.state, member.engine.failure = refit.sides[member.number].state, refit.failure
            if refit.failure is None:
                member.version = refit.version
                member.refit_s = refit.started[Phase.DONE] - refit.started[Phase.ENTER]
            self.observer.engine(member.name, member.engine.state, member.version)
        if refit.moves and Phase.RESUME in refit.started:
            self.version = max(self.version, refit.version)  # also if it failed then: an engine may serve it
        if refit.failure is not None:
            self._generation += 1
            # Their workers trust nothing of what they have learnt.
            stale = {number for number, side in refit.sides.items() if side.state is not EngineState.SERVING}
            self._needs = {worker: needs for worker, needs in self._needs.items() if worker[0] not in stale}
            seconds = refit.started[refit.phase] - refit.started[Phase.ENTER]
            self.observer.refit_failed(self._in_words(refit), seconds, refit.attempt, refit.version)
        if refit.lost_trainer is not None:
            self.broken = refit.lost_trainer

    def _stats(
        self, current: _Attempt, members: Sequence[Member], total_s: float, left_behind: dict[str, str]
    ) -> Stats:
        refit = current.refit
        order = [phase for phase in ORDER if phase in refit.started]
        times = [refit.started[phase] for phase in order]
        took_part = [member for member in members if member.name not in left_behind]
        return Stats(
            engine=", ".join(member.name for member in took_part),
            total_s=times[-1] - times[0] if len(refit.sides) == len(members) else total_s,
            phases={phase.value: b - a for phase, a, b in zip(order, times, times[1:], strict=False)},
            fill_s=max(refit.fill_s),
            load_s=max(refit.load_s.values(), default=0.0),
            engine_extra_bytes=refit.engine_extra_bytes,
            num_trainers=self._num_trainers,
            num_workers=sum(member.num_workers for member in took_part),
            copy_limit_gb_s=self.copy_limit_gb_s,
            reloaded=sorted(refit.reloaded),
            reasons=refit.reasons,
            verification=refit.verification,
            calls_s=current.calls_s,
            unwritten={name: n for m in took_part for a in m.attached.values() for name, n in a.unwritten.items()},
            quarantined={m.name: m.quarantine.message for m in self.fleet if m.quarantine is not None},
            mode=_mode(current.grouping),
            wire_bytes=current.wire_bytes,
        )


def _without_needs(grouping: Grouping) -> Grouping:
    """For workers, who know their own."""
    shares = [msgspec.structs.replace(share, needs=None) for share in grouping.shares]
    return msgspec.structs.replace(grouping, shares=shares)


def _mode(grouping: Grouping | None) -> str:
    """As in SyncReport."""
    shares = grouping.shares if grouping is not None else []
    return "+".join(sorted({"sharded" if share.digest else "broadcast" for share in shares}))


def _located(failure: Failure, refit: Refit, origin: str) -> Failure:
    """`failure` with what it does not say itself of where it began."""
    return replace(failure, origin=failure.origin or origin, phase=failure.phase or str(refit.phase))


def _show(current: _Attempt) -> None:
    """Keep the profiler's range at the attempt's phase."""
    phase = current.refit.phase
    if phase is current.shown:
        return
    if current.range is not None:
        current.range.end()
    current.shown = phase
    current.range = None if current.refit.finished else phase_range(phase.value).begin()
