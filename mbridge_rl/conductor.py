"""Rank 0's side of a syncer: carries out what the state machine of protocol.py decides.

Owns the hub, the engine and the thread of the engine's calls. One loop (`_pump`) turns what happens (messages, deaths,
engine calls that return, time) into events of the machine, and its actions into messages and calls. Rank 0 is a trainer
too: its own Fill messages are carried out here, between two looks at the hub.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import msgspec

from mbridge.pieces import TensorSpec

from .control import Hub, Lost, Received, Woken, host_id
from .engines._thread import EngineThread
from .engines.base import Engine, InFlight
from .errors import (
    DeadlineError,
    EngineError,
    EngineGoneError,
    EngineMismatchError,
    Failure,
    SyncError,
    TrainerLostError,
    as_failure,
    raised,
)
from .messages import (
    Abort,
    Alive,
    AnyMessage,
    Attached,
    Check,
    Checked,
    Connected,
    Done,
    Enter,
    Failed,
    Fill,
    Filled,
    Goodbye,
    Hello,
    Invitation,
    Lends,
    Offered,
    SetUp,
    Stats,
)
from .protocol import (
    NUM_DIRECT_STEPS,
    NUM_SLOTS_IN_FLIGHT,
    Action,
    Call,
    EngineCall,
    EngineState,
    Peer,
    Phase,
    Refit,
)
from .source import Source
from .verification import compare

ME = Peer("trainer", 0)
ORDER = (Phase.ENTER, Phase.PAUSE, Phase.STREAM, Phase.CHECK, Phase.COMMIT, Phase.RESUME, Phase.SETTLE, Phase.DONE)
ATTACH_GRACE_S = 5.0  # how long a worker's answer may take after the engine's own call has returned
DETACH_S = 5.0
BEAT_S = 5.0  # how often the others hear that rank 0 still waits; a quarter of the deadline if that is less
Arrived = Callable[[Peer, AnyMessage], None]
_log = logging.getLogger(__name__)


class Conductor:
    """Connects trainers and engine workers, and conducts refits. Used by one thread."""

    def __init__(
        self,
        engine: Engine,
        tensors: Sequence[TensorSpec],
        *,
        num_trainers: int,
        deadline_s: float,
        in_flight: InFlight,
        reset_prefix_cache: bool,
        address: str | None,
    ) -> None:
        self.engine, self.hub = engine, Hub(address)
        self._tensors = tuple(tensors)
        self._num_trainers, self._deadline_s = num_trainers, deadline_s
        self._in_flight, self._reset_prefix_cache = in_flight, reset_prefix_cache
        self._num_workers = self._num_buckets = self._num_in_flight = self._version = 0
        self._is_attached = False
        self._routes: dict[Peer, bytes] = {}
        self._peers: dict[bytes, Peer] = {}
        # Messages of the next attempt, from a rank that gave up sooner than rank 0 did.
        self._early: list[tuple[Peer, AnyMessage]] = []
        self._calls = EngineThread(self.hub.wake)
        self._calls_s: dict[str, float] = {}  # of the last refit
        self._unwritten: dict[str, int] = {}
        self._broken: Failure | None = None  # why no later refit can succeed
        self._copy_limit_gb_s: float | None = None
        self._beat_s = min(BEAT_S, deadline_s / 4)
        self._next_beat = 0.0

    # --- connecting --------------------------------------------------------------------------------------------------

    def connect(self, set_up: SetUp, copy_limit_gb_s: float | None) -> Connected:
        """Have all trainers and the engine's workers connect, and tell the trainers. Raises SyncError.

        If `set_up` holds what rank 0 lends, what the other ranks lend is waited for first.
        """
        self._copy_limit_gb_s = copy_limit_gb_s
        if set_up.lends:
            self._num_buckets, self._num_in_flight = NUM_DIRECT_STEPS, 1
        else:
            self._num_buckets, self._num_in_flight = set_up.num_buckets, NUM_SLOTS_IN_FLIGHT
        answer: Connected | Abort
        try:
            if set_up.lends:
                set_up = msgspec.structs.replace(set_up, lends=[*set_up.lends, *self._others_lend()])
            answer = self._attach_workers(set_up)
        except SyncError as error:
            answer = Abort(0, error.failure)
        # Trainers are waited for even after a failure, so that all of them hear of it.
        try:
            self._wait_until(lambda: len(self._trainers) == self._num_trainers - 1, "every trainer rank to connect")
        except SyncError as error:
            answer = Abort(0, error.failure) if isinstance(answer, Connected) else answer
        self.hub.hide_endpoint()
        for peer in self._trainers:
            self.hub.send(self._routes[peer], answer)
        if isinstance(answer, Abort):
            raise raised(answer.failure)
        self._version = answer.version
        return answer

    def _others_lend(self) -> list[Lends]:
        lends: dict[int, Lends] = {}

        def arrived(peer: Peer, message: AnyMessage) -> None:
            if isinstance(message, Offered):
                lends[peer.index] = message.lends

        self._wait_until(lambda: len(lends) == self._num_trainers - 1, "every trainer rank to lend its memory", arrived)
        return [lends[rank] for rank in sorted(lends)]

    def _attach_workers(self, set_up: SetUp) -> Connected:
        invitation = Invitation(self.hub.endpoint, self.hub.token, os.getpid(), host_id(), self._deadline_s)
        self._num_workers = int(self._call(self.engine.num_workers, "the engine to answer"))
        if self._num_workers < 1:
            raise EngineError(f"{self.engine.name} has no workers", phase="connect")
        hellos: dict[Peer, Hello] = {}
        unused: dict[Peer, list[str]] = {}

        def arrived(peer: Peer, message: AnyMessage) -> None:
            if isinstance(message, Hello) and peer.role == "worker":
                hellos[peer] = message
                self.hub.send(self._routes[peer], set_up)
            elif isinstance(message, Attached):
                self._is_attached = True
                unused[peer] = message.unused
                self._unwritten |= message.unwritten

        what = f"{self._num_workers} engine workers to attach"
        self._call(lambda: self.engine.attach(invitation), what, arrived)
        self._wait_until(lambda: len(unused) == self._num_workers, what, arrived, min(self._deadline_s, ATTACH_GRACE_S))
        # A worker that holds a part of the layers has a place for their tensors only.
        nowhere = set.intersection(*map(set, unused.values())) - set(set_up.optional_names)
        if nowhere:
            first = min(nowhere)
            raise EngineMismatchError(
                f"{self.engine.name} has no place for {len(nowhere)} of the trainer's {len(set_up.tensors)} tensors, "
                f"such as {first}. Is it the same model?",
                phase="connect",
                tensor=first,
            )
        if any(hello.session_open for hello in hellos.values()):
            self._call(self.engine.close_session, "the engine to close the session of a dead trainer")
        is_stale = any(hello.is_stale for hello in hellos.values())
        self.engine.state = EngineState.STALE if is_stale else EngineState.SERVING
        return Connected(max(hello.version for hello in hellos.values()), self._num_workers)

    def _call(self, call: Callable[[], Any], what: str, arrived: Arrived | None = None) -> Any:
        """Make an engine call outside of a refit, and handle what comes meanwhile. Returns what the call returns."""
        self._calls.start(call)
        self._wait_until(lambda: not self._calls.is_busy, what, arrived)
        returned = self._calls.take()
        if returned.failure is not None:
            raise raised(returned.failure)
        return returned.value

    def _wait_until(
        self,
        is_complete: Callable[[], bool],
        what: str,
        arrived: Arrived | None = None,
        patience_s: float | None = None,
    ) -> None:
        """Handle what comes until `is_complete()`.

        Raises SyncError, at the latest after `patience_s` (`deadline_s`).
        """
        patience_s = self._deadline_s if patience_s is None else patience_s
        end = time.monotonic() + patience_s
        while not is_complete():
            left = end - time.monotonic()
            if left <= 0:
                raise DeadlineError(f"waited {patience_s:g} s for {what}", origin="trainer rank 0", phase="connect")
            for event in self._wait(left, attempt=0):
                match event:
                    case Received(_, Failed(failure=failure)):
                        raise raised(failure)
                    case Received(route, message):
                        if isinstance(message, Hello):
                            self._register(route, message)
                        if route in self._peers and arrived is not None:
                            arrived(self._peers[route], message)
                    case Lost(route):
                        kind = EngineGoneError if self._peers[route].role == "worker" else TrainerLostError
                        raise kind("died while connecting", origin=str(self._peers[route]), phase="connect")

    def _wait(self, timeout_s: float, attempt: int) -> Iterator[Received | Lost | Woken]:
        """What has happened, or nothing after `timeout_s` or a beat.

        Tells the others now and then that rank 0 is there.
        """
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + self._beat_s
            for route in self._peers:
                self.hub.send(route, Alive(attempt))
        return self.hub.wait(min(timeout_s, self._beat_s))

    def _register(self, route: bytes, hello: Hello) -> None:
        peer = Peer(hello.role, hello.index)
        if peer in self._routes or route in self._peers:
            _log.warning("ignored a second Hello of %s", peer)
            return
        self._routes[peer], self._peers[route] = route, peer
        if hello.host == host_id():
            self.hub.watch(route, hello.pid)

    @property
    def _trainers(self) -> list[Peer]:
        """The other trainer ranks that are connected."""
        return [peer for peer in self._routes if peer.role == "trainer"]

    # --- one refit ---------------------------------------------------------------------------------------------------

    def run(
        self, attempt: int, version: int, source: Source, *, moves: bool = True, check: tuple[int, int] | None = None
    ) -> Done:
        """One refit as trainer rank 0, with its weights. See protocol.Refit for `moves` and `check`."""
        refusal = self._broken or (None if moves else self._why_not_serving())
        if refusal is not None:
            for peer in self._trainers:
                self.hub.send(self._routes[peer], Abort(attempt, refusal))
            raise raised(refusal)
        refit = Refit(
            attempt=attempt,
            last_version=self._version,
            state=self.engine.state,
            num_trainers=self._num_trainers,
            num_workers=self._num_workers,
            num_buckets=self._num_buckets,
            deadline_s=self._deadline_s,
            now=time.monotonic(),
            num_in_flight=self._num_in_flight,
            moves=moves,
            check=check,
            compare=partial(compare, self._tensors),
        )
        mine: deque[Fill | Check] = deque()
        self._calls_s = {}
        try:
            self._carry_out(refit, self._entering(refit, version, source.begin), mine)
            early, self._early = self._early, []
            for peer, message in early:
                self._carry_out(refit, self._deliver(refit, peer, message), mine)
            self._pump(refit, mine, source)
        except BaseException as error:  # also Ctrl-C: nobody may be left waiting, and no engine call half made
            what = f"trainer rank 0 left the refit: {type(error).__name__}: {error}"
            mine.clear()
            self._carry_out(refit, refit.fail(Failure("SyncError", what, str(ME), refit.phase), time.monotonic()), mine)
            self._pump(refit, mine, source)
            raise
        finally:
            self._conclude(refit)
        if refit.failure is not None:
            raise raised(refit.failure)
        done = Done(attempt, refit.version, self._stats(refit))
        for peer in self._trainers:
            self.hub.send(self._routes[peer], done)
        return done

    def _why_not_serving(self) -> Failure | None:
        try:
            self.engine.check_serving()
        except SyncError as error:
            return error.failure
        return None

    def _pump(self, refit: Refit, mine: deque[Fill | Check], source: Source) -> None:
        """Turn what happens into events of `refit` until it is over. `mine`: messages for rank 0 itself."""
        while not refit.finished:
            for event in self._wait(0 if mine else refit.deadline - time.monotonic(), refit.attempt):
                match event:
                    case Received(route, message) if route in self._peers:
                        self._carry_out(refit, self._deliver(refit, self._peers[route], message), mine)
                    case Received(_, message):
                        _log.warning("ignored %s from a stranger", type(message).__name__)
                    case Lost(route):
                        self._carry_out(refit, refit.lost(self._peers[route], "died", time.monotonic()), mine)
            if self._calls.is_returned:
                returned = self._calls.take()
                if refit.engine_call is not None:
                    self._calls_s[refit.engine_call.value] = returned.seconds
                self._carry_out(refit, refit.called(returned.failure, time.monotonic()), mine)
            self._carry_out(refit, refit.tick(time.monotonic()), mine)
            if mine and not refit.finished:
                self._carry_out(refit, self._answer(refit, mine.popleft(), source), mine)

    def _entering(self, refit: Refit, version: int, begin: Callable[[], None]) -> list[Action]:
        try:
            begin()
        except SyncError as error:
            return refit.fail(as_failure(error, str(ME), refit.phase), time.monotonic())
        return refit.receive(ME, Enter(refit.attempt, version), time.monotonic())

    def _answer(self, refit: Refit, message: Fill | Check, source: Source) -> list[Action]:
        if refit.failure is not None:
            return []
        answer: Filled | Checked
        started = time.monotonic()
        try:
            if isinstance(message, Check):
                answer = Checked(refit.attempt, source.totals(message))
            else:
                loan = source.fill(message.bucket)
                answer = Filled(refit.attempt, message.bucket, time.monotonic() - started, loan)
        except SyncError as error:
            return refit.fail(as_failure(error, str(ME), refit.phase), time.monotonic())
        return refit.receive(ME, answer, time.monotonic())

    def _deliver(self, refit: Refit, peer: Peer, message: AnyMessage) -> list[Action]:
        attempt = getattr(message, "attempt", refit.attempt)
        if attempt > refit.attempt:
            self._early.append((peer, message))
        return refit.receive(peer, message, time.monotonic()) if attempt == refit.attempt else []

    def _carry_out(self, refit: Refit, actions: list[Action], mine: deque[Fill | Check]) -> None:
        for action in actions:
            if isinstance(action, Call):
                self._calls.start(self._engine_call(action.call, refit))
            elif action.peer != ME:
                if not self.hub.send(self._routes[action.peer], action.message) and not isinstance(
                    action.message, Abort
                ):
                    self._carry_out(
                        refit, refit.lost(action.peer, "has no connection any more", time.monotonic()), mine
                    )
            elif isinstance(action.message, Fill | Check):
                mine.append(action.message)

    def _engine_call(self, call: EngineCall, refit: Refit) -> Callable[[], None]:
        engine = self.engine
        match call:
            case EngineCall.PAUSE:
                return lambda: engine.pause(self._in_flight)
            case EngineCall.UPDATE:
                return lambda: self._update_engine(refit)
            case EngineCall.CLOSE:
                return engine.close_session
            case EngineCall.RESUME:
                return lambda: self._resume_engine(refit)

    def _update_engine(self, refit: Refit) -> None:
        self.engine.update(refit.attempt, refit.version, refit.moves)
        if refit.moves and self._reset_prefix_cache and refit.failure is None:
            self.engine.reset_cache()  # now: workers of the direct path are still copying

    def _resume_engine(self, refit: Refit) -> None:
        if refit.moves and refit.failure is None:
            self.engine.publish(refit.version)
        self.engine.resume()

    def _conclude(self, refit: Refit) -> None:
        """What this refit leaves for the next."""
        self.engine.state, self.engine.failure = refit.state, refit.failure
        if refit.failure is None and refit.moves:
            self._version = refit.version
        if refit.lost_peer is not None or refit.state is EngineState.GONE:
            self._broken = refit.lost_peer or refit.failure

    def _stats(self, refit: Refit) -> Stats:
        order = [phase for phase in ORDER if phase in refit.started]
        times = [refit.started[phase] for phase in order]
        return Stats(
            engine=self.engine.name,
            total_s=times[-1] - times[0],
            phases={phase.value: b - a for phase, a, b in zip(order, times, times[1:], strict=False)},
            fill_s=max(refit.fill_s),
            load_s=max(refit.load_s, default=0.0),
            engine_extra_bytes=refit.engine_extra_bytes,
            num_trainers=self._num_trainers,
            num_workers=self._num_workers,
            copy_limit_gb_s=self._copy_limit_gb_s,
            reloaded=sorted(refit.reloaded),
            reasons=refit.reasons,
            verification=refit.verification,
            calls_s=self._calls_s,
            unwritten=self._unwritten,
        )

    # --- leaving -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Say Goodbye to everyone and let the engine detach."""
        for route in self._peers:
            self.hub.send(route, Goodbye())
        if self.engine.state is not EngineState.GONE:
            self._calls.join(DETACH_S)  # a call under way must not meet those of the next connection
            if self._calls.is_returned:
                self._calls.take()
            if self._is_attached and not self._calls.is_busy:
                self._calls.start(self.engine.detach)
                self._calls.join(DETACH_S)
        self._calls.close()
        self.hub.close()
