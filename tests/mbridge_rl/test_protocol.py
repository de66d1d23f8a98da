"""The state machine of a refit, driven by a simulated world: every order of events, every failure at every moment."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest

from mbridge_rl.errors import Failure, SyncError, TrainerLostError, raised
from mbridge_rl.messages import (
    Abort,
    AnyMessage,
    Applied,
    Check,
    Checked,
    Commit,
    Committed,
    Done,
    Enter,
    Failed,
    Fill,
    Filled,
    Goodbye,
    Hello,
    Load,
    Loaded,
    Settled,
    Stats,
    Verification,
)
from mbridge_rl.protocol import (
    DRAIN_S,
    Action,
    Call,
    EngineCall,
    EngineState,
    Lane,
    Peer,
    Phase,
    Refit,
    Send,
    Taking,
)

BUCKETS, TRAINERS, WORKERS, DEADLINE_S = 4, 2, 2, 100.0


def one_engine(state: EngineState, **options: Any) -> Refit:
    return Refit(
        attempt=1,
        last_version=7,
        engines=[Taking(0, WORKERS, state)],
        lanes={0: Lane(BUCKETS)},
        num_trainers=TRAINERS,
        deadline_s=DEADLINE_S,
        now=0.0,
        **options,
    )


class World:
    """Peers and an engine that behave, with one event after the other in an order drawn from `seed`."""

    def __init__(
        self, seed: int = 0, state: EngineState = EngineState.SERVING, versions: tuple[int, ...] = (8, 8)
    ) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.refit = one_engine(state)
        self.events: list[Callable[[], list[Action]]] = []
        self.calls: list[EngineCall] = []
        self.log: list[Action] = []
        self.is_calling = False
        self.dead: set[Peer] = set()
        self.queues: dict[Peer, list[AnyMessage]] = {}
        self.loaded = dict.fromkeys((Peer("worker", i) for i in range(WORKERS)), 0)
        self.left: set[Peer] = set()  # workers that are out of the refit
        self.silent: set[object] = set()  # peers and calls that never answer
        for rank in range(TRAINERS):
            self.post(Peer("trainer", rank), Enter(1, versions[rank]))

    @property
    def state(self) -> EngineState:
        return self.refit.sides[0].state

    def step(self) -> bool:
        """One event; False if nothing is under way."""
        if not self.events:
            return False
        self.now += 0.1
        self.react(self.events.pop(self.random.randrange(len(self.events)))())
        return True

    def react(self, actions: list[Action]) -> None:
        for action in actions:
            self.log.append(action)
            if isinstance(action, Call):
                assert not self.is_calling, "two engine calls at once"
                self.is_calling = True
                self.calls.append(action.call)
                if action.call is EngineCall.UPDATE:
                    self.left.clear()
                elif action.call not in self.silent:
                    self.events.append(self.returned)
            elif action.peer not in self.dead | self.silent:
                self.answer(action.peer, action.message)

    def returned(self, failure: Failure | None = None) -> list[Action]:
        self.is_calling = False
        return self.refit.called(0, failure, self.now)

    def answer(self, peer: Peer, message: AnyMessage) -> None:
        match message:
            case Fill(bucket=bucket):
                self.post(peer, Filled(1, bucket, 0.5))
            case Load(bucket=bucket):
                assert bucket == self.loaded[peer], "buckets come in order"
                self.loaded[peer] += 1
                self.post(peer, Loaded(1, bucket, 0.25))
                if self.loaded[peer] == BUCKETS:
                    self.post(peer, Applied(1, 0.1, 5))
            case Commit():
                self.post(peer, Committed(1, True))
                self.leave(peer)
            case Abort() if peer.role == "worker" and EngineCall.UPDATE in self.calls:
                self.leave(peer)

    def post(self, peer: Peer, message: AnyMessage) -> None:
        """One peer's messages do not overtake each other."""
        queue = self.queues.setdefault(peer, [])
        queue.append(message)
        self.events.append(lambda: [] if peer in self.dead else self.refit.receive(peer, queue.pop(0), self.now))

    def leave(self, peer: Peer) -> None:
        if peer in self.left:
            return
        self.left.add(peer)
        if len(self.left) == WORKERS and EngineCall.UPDATE not in self.silent:
            self.events.append(self.returned)

    def run(self) -> None:
        """Until the refit is over: events, and when there are none, time."""
        for _ in range(1000):
            if self.refit.finished:
                return
            if not self.step():
                self.now = max(self.now, self.refit.deadline)
                self.react(self.refit.tick(self.now))
        raise AssertionError(f"the refit never ends; it waits for {self.refit.waiting_for()}")

    def num_steps(self) -> int:
        count = 0
        while not self.refit.finished and self.step():
            count += 1
        return count

    def sent(self, kind: type) -> list[Peer]:
        return [a.peer for a in self.log if isinstance(a, Send) and isinstance(a.message, kind)]


ALL = sorted([*(Peer("trainer", i) for i in range(TRAINERS)), *(Peer("worker", i) for i in range(WORKERS))])


@pytest.mark.parametrize("seed", range(50))
def test_success_in_any_order(seed: int) -> None:
    world = World(seed)
    world.run()
    refit = world.refit
    assert (refit.phase, world.state, refit.version, refit.failure) == (Phase.DONE, EngineState.SERVING, 8, None)
    assert world.calls == [EngineCall.PAUSE, EngineCall.UPDATE, EngineCall.CLOSE, EngineCall.RESUME]
    assert sorted(world.sent(Fill)) == sorted(ALL[:TRAINERS] * BUCKETS)
    assert sorted(world.sent(Load)) == sorted(ALL[TRAINERS:] * BUCKETS)
    assert refit.fill_s == [0.5 * BUCKETS] * TRAINERS
    assert refit.load_s == pytest.approx(dict.fromkeys(ALL[TRAINERS:], 0.25 * BUCKETS + 0.1))
    assert refit.engine_extra_bytes == 5
    phases = [Phase.ENTER, Phase.PAUSE, Phase.STREAM, Phase.COMMIT, Phase.RESUME, Phase.DONE]
    times = [refit.started[phase] for phase in phases]
    assert times == sorted(times)


def test_a_slot_is_filled_again_only_after_everyone_has_loaded_it() -> None:
    for seed in range(50):
        world = World(seed)
        loaded: dict[int, set[Peer]] = {}
        original = world.refit.receive

        def receive(peer: Peer, message: AnyMessage, now: float, loaded=loaded, original=original) -> list[Action]:  # type: ignore[no-untyped-def]
            if isinstance(message, Loaded):
                loaded.setdefault(message.bucket, set()).add(peer)
            actions = original(peer, message, now)
            for action in actions:
                if isinstance(action, Send) and isinstance(action.message, Fill) and action.message.bucket >= 2:
                    assert len(loaded[action.message.bucket - 2]) == WORKERS
            return actions

        world.refit.receive = receive  # type: ignore[method-assign]
        world.run()
        assert world.refit.phase is Phase.DONE


def lost(peer: Peer) -> Callable[[World], list[Action]]:
    def inject(world: World) -> list[Action]:
        world.dead.add(peer)
        return world.refit.lost(peer, "died", world.now)

    return inject


def failed(peer: Peer) -> Callable[[World], list[Action]]:
    failure = Failure("EngineLoadError", "bad", str(peer), "stream", "x")
    return lambda world: world.refit.receive(peer, Failed(1, failure), world.now)


def left(peer: Peer) -> Callable[[World], list[Action]]:
    return lambda world: world.refit.receive(peer, Goodbye(), world.now)


def interrupted(world: World) -> list[Action]:
    return world.refit.fail(Failure("SyncError", "Ctrl-C"), world.now)


def nonsense(peer: Peer) -> Callable[[World], list[Action]]:
    return lambda world: world.refit.receive(peer, Filled(1, 99, 0.0), world.now)


def stalled(peer: Peer) -> Callable[[World], list[Action]]:
    def inject(world: World) -> list[Action]:
        world.silent.add(peer)
        return []

    return inject


TRAINER, WORKER = Peer("trainer", 1), Peer("worker", 1)
INJECTIONS = {
    "a trainer dies": lost(TRAINER),
    "a worker dies": lost(WORKER),
    "a trainer fails": failed(TRAINER),
    "a worker fails": failed(WORKER),
    "a trainer leaves": left(TRAINER),
    "rank 0 is interrupted": interrupted,
    "a peer talks nonsense": nonsense(TRAINER),
    "a trainer stalls": stalled(TRAINER),
    "a worker stalls": stalled(WORKER),
}


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_any_failure_at_any_moment_ends_the_refit_cleanly(injection: str, seed: int) -> None:
    for moment in range(World(seed).num_steps()):
        world = World(seed)
        for _ in range(moment):
            world.step()
        before = world.refit.phase
        world.react(INJECTIONS[injection](world))
        world.run()
        refit = world.refit
        where = f"{injection} at step {moment} in {before}"
        if refit.phase is Phase.DONE:  # it was too late to matter
            assert world.state is EngineState.SERVING
            assert before in (Phase.COMMIT, Phase.RESUME) or "stalls" in injection, where
            assert not world.sent(Abort)
            continue
        assert refit.failure is not None, where
        assert sorted(world.sent(Abort)) == ALL, where  # everyone is told, once
        assert refit.phase is Phase.FAILED
        if world.state is EngineState.SERVING:
            assert EngineCall.UPDATE not in world.calls, where
            assert world.calls.count(EngineCall.RESUME) == world.calls.count(EngineCall.PAUSE), where
        elif world.state is EngineState.STALE:
            assert EngineCall.UPDATE in world.calls, where
            assert EngineCall.CLOSE in world.calls, where  # no session stays open
            resumed_last = world.calls[-1] is EngineCall.RESUME
            assert not resumed_last or before in (Phase.RESUME, Phase.COMMIT), where  # else it stays paused
        else:
            assert world.state is EngineState.GONE, where
            assert "worker" in injection, where
        blamed = any(what in injection for what in ("worker dies", "worker fails", "worker stalls"))
        assert refit.culprits == ({0} if blamed else set()), where
        if "dies" in injection or "leaves" in injection:
            assert (refit.lost_trainer is not None) == ("trainer" in injection), where


@pytest.mark.parametrize("call", list(EngineCall))
def test_an_engine_call_that_never_returns(call: EngineCall) -> None:
    world = World()
    world.silent.add(call)
    world.run()
    assert world.refit.phase is Phase.FAILED
    assert world.state is EngineState.GONE
    assert world.refit.failure is not None
    assert world.refit.failure.kind == "DeadlineError"


@pytest.mark.parametrize("call", list(EngineCall))
def test_an_engine_call_that_raises(call: EngineCall) -> None:
    world = World()
    world.silent.add(call)
    while world.calls[-1:] != [call]:
        assert world.step()
    world.silent.discard(call)
    world.react(world.returned(Failure("EngineLoadError", "moody")))
    world.run()
    assert world.refit.phase is Phase.FAILED
    assert world.refit.failure == Failure("EngineLoadError", "moody")
    if call is EngineCall.PAUSE:
        assert world.state is EngineState.SERVING
        assert world.calls == [EngineCall.PAUSE, EngineCall.RESUME]
    else:
        assert world.state is EngineState.STALE
        assert EngineCall.CLOSE in world.calls


def test_an_update_that_returns_before_its_workers_have_reported() -> None:
    """vLLM's RPC and the control channel are two ways: the RPC may come back first; then the reason is waited for."""
    world = World()
    while EngineCall.UPDATE not in world.calls:
        world.step()
    world.react(world.returned())
    assert world.refit.failure is None
    world.react(failed(WORKER)(world))
    assert world.refit.failure is not None
    assert world.refit.failure.tensor == "x"


def test_an_engine_that_reports_its_own_death() -> None:
    world = World()
    while EngineCall.UPDATE not in world.calls:
        world.step()
    world.react(world.returned(Failure("EngineGoneError", "dead")))
    assert world.refit.finished
    assert world.state is EngineState.GONE


@pytest.mark.parametrize(
    ("versions", "text"),
    [((7, 7), "already had version 7"), ((8, 9), "rank 0: 8, rank 1: 9"), ((0, 0), "does not grow")],
)
@pytest.mark.parametrize("state", [EngineState.SERVING, EngineState.STALE])
def test_versions(versions: tuple[int, int], text: str, state: EngineState) -> None:
    world = World(versions=versions, state=state)
    world.run()
    assert world.refit.failure is not None
    assert text in world.refit.failure.message
    assert (world.state, world.calls, world.refit.version) == (state, [], 7)


def test_a_stale_engine_is_not_resumed_by_a_refit_that_fails_early() -> None:
    world = World(state=EngineState.STALE)
    while EngineCall.PAUSE not in world.calls:
        world.step()
    world.react(failed(TRAINER)(world))
    world.run()
    assert (world.state, world.calls) == (EngineState.STALE, [EngineCall.PAUSE])


def test_deadline_names_who_is_missing() -> None:
    world = World()
    world.silent.add(TRAINER)
    world.run()
    assert world.refit.failure is not None
    assert "trainer rank 1 to fill bucket 0, trainer rank 1 to fill bucket 1" in world.refit.failure.message
    alone = World()
    alone.events.pop()
    alone.run()
    assert alone.refit.failure is not None
    assert "trainer rank 1 to call sync()" in alone.refit.failure.message


def test_progress_moves_the_deadline() -> None:
    world = World()
    first = world.refit.deadline
    world.step()
    assert world.refit.deadline > first
    assert world.refit.tick(world.refit.deadline - 0.01) == []


def test_no_buckets() -> None:
    refit = Refit(
        attempt=1,
        last_version=0,
        engines=[Taking(0, 1, EngineState.SERVING)],
        lanes={0: Lane(0)},
        num_trainers=1,
        deadline_s=1,
        now=0,
    )
    assert refit.receive(Peer("trainer", 0), Enter(1, 1), 0) == [Call(EngineCall.PAUSE)]
    assert refit.called(0, None, 0) == [Call(EngineCall.UPDATE)]
    assert refit.receive(Peer("worker", 0), Applied(1, 0.0, 0), 0) == [Send(Peer("worker", 0), Commit(1))]


# --- refits that are checked, and those that only check ---------------------------------------------------------------

CHECKS = {"checked": True, "verify only": False}  # -> moves


class CheckedWorld(World):
    """A refit with a Check. Workers apply and commit inside of the engine's CLOSE, as they really do."""

    def __init__(
        self,
        seed: int = 0,
        *,
        moves: bool = True,
        wrong: dict[str, str] | None = None,
        versions: tuple[int, ...] | None = None,
        state: EngineState = EngineState.SERVING,
    ) -> None:
        super().__init__(seed, state, versions or ((8, 8) if moves else (7, 7)))
        self.mute: Peer | None = None  # answers no Check
        self.compared: list[Mapping[Peer, Checked]] = []
        self.verification = Verification(3, 4, wrong or {}, {"y": "repacked"})
        self.refit = one_engine(state, moves=moves, check=(3, 16), compare=self.compare)

    def compare(self, checked: Mapping[Peer, Checked]) -> Verification:
        self.compared.append(dict(checked))
        return self.verification

    def react(self, actions: list[Action]) -> None:
        super().react(actions)
        for action in actions:
            if isinstance(action, Call) and action.call is EngineCall.UPDATE and not self.refit.moves:
                self.events.append(self.returned)
            if isinstance(action, Call) and action.call is EngineCall.CLOSE:
                self.events = [event for event in self.events if event != self.returned]  # when all workers have left
                for worker in ALL[TRAINERS:]:
                    if worker not in self.dead | self.silent | self.left:
                        self.post(worker, Applied(1, 0.1, 5))
                self.close_if_left()

    def answer(self, peer: Peer, message: AnyMessage) -> None:
        match message:
            case Load(bucket=bucket):
                assert message.is_checked
                self.loaded[peer] += 1
                self.post(peer, Loaded(1, bucket, 0.25))
                if set(self.loaded.values()) == {BUCKETS}:
                    self.events.append(self.returned)
            case Check() if peer == self.mute:
                pass
            case Check(share=share, num_shares=num_shares):
                assert (share, num_shares) == (3, 16)
                self.post(peer, Checked(1, totals={0: peer.index}))
            case Commit():
                self.post(peer, Committed(1, True))
                self.leave(peer)
            case Abort() if peer.role == "worker":
                self.leave(peer)
            case Fill():
                super().answer(peer, message)

    def leave(self, peer: Peer) -> None:
        self.left.add(peer)
        if EngineCall.CLOSE in self.calls:
            self.close_if_left()
        elif EngineCall.UPDATE in self.calls and self.is_calling and self.refit.engine_call(0) is EngineCall.UPDATE:
            self.events.append(self.returned)  # a worker that gives up ends the call

    def close_if_left(self) -> None:
        busy = self.refit.engine_call(0) is EngineCall.CLOSE and self.returned not in self.events
        if busy and self.left | self.dead >= set(ALL[TRAINERS:]) and EngineCall.CLOSE not in self.silent:
            self.events.append(self.returned)

    def returned(self, failure: Failure | None = None) -> list[Action]:
        return super().returned(failure) if self.is_calling else []


@pytest.mark.parametrize("moves", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("seed", range(20))
def test_a_check_comes_between_all_writes_and_the_commit(seed: int, moves: bool) -> None:
    world = CheckedWorld(seed, moves=moves)
    world.run()
    refit = world.refit
    version = 8 if moves else 7
    assert (refit.phase, world.state, refit.version, refit.failure) == (
        Phase.DONE,
        EngineState.SERVING,
        version,
        None,
    )
    assert world.calls == [EngineCall.PAUSE, EngineCall.UPDATE, EngineCall.CLOSE, EngineCall.RESUME]
    assert len(world.sent(Fill)) == (TRAINERS * BUCKETS if moves else 0)
    assert len(world.sent(Load)) == (WORKERS * BUCKETS if moves else 0)
    assert sorted(world.sent(Check)) == ALL
    assert sorted(world.sent(Commit)) == ALL[TRAINERS:]
    assert world.compared == [{peer: Checked(1, totals={0: peer.index}) for peer in ALL}]
    assert refit.verification == world.verification
    kinds = [type(action.message) for action in world.log if isinstance(action, Send)]
    assert kinds.index(Commit) > max(i for i, kind in enumerate(kinds) if kind is Check)
    if moves:
        assert kinds.index(Check) > max(i for i, kind in enumerate(kinds) if kind is Load)
    phases = [Phase.ENTER, Phase.PAUSE, Phase.STREAM, Phase.CHECK, Phase.COMMIT, Phase.RESUME, Phase.DONE]
    times = [refit.started[phase] for phase in phases]
    assert times == sorted(times)


def test_what_is_wrong_fails_a_refit_before_its_commit() -> None:
    for seed in range(10):
        world = CheckedWorld(seed, wrong={"w": "other values", "x": "too"})
        world.run()
        refit = world.refit
        assert (refit.phase, world.state) == (Phase.FAILED, EngineState.STALE)
        text = "2 tensors of the engine are wrong after the refit, such as w: other values"
        assert refit.failure == Failure("VerifyError", text, phase="check", tensor="w")
        assert world.sent(Commit) == []
        assert sorted(world.sent(Abort)) == ALL
        assert world.calls == [EngineCall.PAUSE, EngineCall.UPDATE, EngineCall.CLOSE]  # it stays paused


def test_what_is_wrong_is_only_reported_if_nothing_moved() -> None:
    for seed in range(10):
        world = CheckedWorld(seed, moves=False, wrong={"w": "other values"})
        world.run()
        refit = world.refit
        assert (refit.phase, world.state, refit.failure) == (Phase.DONE, EngineState.SERVING, None)
        assert refit.verification is not None
        assert refit.verification.wrong == {"w": "other values"}
        assert world.calls[-1] is EngineCall.RESUME
        assert world.sent(Abort) == []


@pytest.mark.parametrize("moves", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("injection", INJECTIONS)
def test_any_failure_at_any_moment_of_a_checked_refit(injection: str, moves: bool) -> None:
    seen: set[Phase] = set()
    for moment in range(CheckedWorld(1, moves=moves).num_steps()):
        world = CheckedWorld(1, moves=moves)
        for _ in range(moment):
            world.step()
        before = world.refit.phase
        seen.add(before)
        world.react(INJECTIONS[injection](world))
        if "worker dies" in injection:
            world.close_if_left()
        world.run()
        refit, where = world.refit, f"{injection} at step {moment} in {before}"
        if refit.phase is Phase.DONE:  # it was too late to matter
            assert world.state is EngineState.SERVING
            assert before in (Phase.COMMIT, Phase.RESUME) or "stalls" in injection, where
            continue
        assert refit.phase is Phase.FAILED, where
        assert refit.failure is not None, where
        assert refit.version == 7 or moves, where
        assert sorted(world.sent(Abort)) == ALL, where
        if world.state is EngineState.SERVING:
            assert not moves or EngineCall.UPDATE not in world.calls, where
            assert world.calls.count(EngineCall.RESUME) == world.calls.count(EngineCall.PAUSE), where
        elif world.state is EngineState.STALE:
            assert moves, where  # nothing was written
        else:
            assert "worker" in injection, where
        if EngineCall.UPDATE in world.calls and world.state is not EngineState.GONE:
            assert EngineCall.CLOSE in world.calls, where
    assert {Phase.ENTER, Phase.PAUSE, Phase.STREAM, Phase.CHECK, Phase.COMMIT} <= seen


def in_check(moves: bool) -> CheckedWorld:
    world = CheckedWorld(moves=moves)
    while world.refit.phase is not Phase.CHECK:
        assert world.step()
    return world


@pytest.mark.parametrize("moves", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("peer", [TRAINER, WORKER])
def test_who_sends_no_checksums_is_named(peer: Peer, moves: bool) -> None:
    world = CheckedWorld(moves=moves)
    world.mute = peer
    world.run()
    assert world.refit.failure is not None
    text = f"nothing happened for 100 s while waiting for {peer} to send checksums"
    assert world.refit.failure == Failure("DeadlineError", text, "trainer rank 0", "check")
    assert world.state is (EngineState.STALE if moves else EngineState.SERVING)


@pytest.mark.parametrize("call", list(EngineCall))
def test_an_engine_call_that_raises_in_a_verification(call: EngineCall) -> None:
    world = CheckedWorld(moves=False)
    world.silent.add(call)
    while world.calls[-1:] != [call]:
        assert world.step()
    world.silent.discard(call)
    world.events = [event for event in world.events if event != world.returned]
    world.react(world.returned(Failure("EngineLoadError", "moody")))
    world.run()
    assert (world.refit.phase, world.state) == (Phase.FAILED, EngineState.SERVING)
    assert world.calls[-1] is EngineCall.RESUME
    assert world.calls.count(EngineCall.RESUME) == (2 if call is EngineCall.RESUME else 1)  # paused, it serves nothing


@pytest.mark.parametrize("moves", CHECKS.values(), ids=CHECKS)
def test_a_peer_that_cannot_make_its_checksums(moves: bool) -> None:
    for peer in (TRAINER, WORKER):
        world = in_check(moves)
        world.react(failed(peer)(world))
        world.run()
        assert world.refit.failure is not None
        assert world.refit.failure.tensor == "x"
        assert world.state is (EngineState.STALE if moves else EngineState.SERVING)
        assert (world.calls[-1] is EngineCall.RESUME) == (not moves)
        assert world.compared == []


def test_a_second_answer_to_a_check_is_an_error() -> None:
    world = in_check(moves=True)
    world.react(world.refit.receive(TRAINER, Checked(1), world.now))
    world.react(world.refit.receive(TRAINER, Checked(1), world.now))
    assert world.refit.failure is not None
    assert world.refit.failure.kind == "ProtocolError"
    assert "trainer rank 1 sent Checked in phase check" in world.refit.failure.message


def test_a_verification_is_of_the_version_that_the_engine_has() -> None:
    world = CheckedWorld(moves=False, versions=(7, 6))
    world.run()
    assert world.refit.failure is not None
    assert world.refit.failure.kind == "VersionError"
    assert (world.state, world.calls) == (EngineState.SERVING, [])


# --- several engines: who is to blame, and how long what is left may take ---------------------------------------------

FIRST, SECOND = Peer("worker", 0, 0), Peer("worker", 0, 1)


def two_engines(lane: Lane, until: Phase = Phase.STREAM) -> Refit:
    """One trainer and two engines of one worker each on one lane, up to the beginning of a phase."""
    refit = Refit(
        attempt=1,
        last_version=7,
        engines=[Taking(n, 1, EngineState.SERVING) for n in range(2)],
        lanes={0: lane},
        num_trainers=1,
        deadline_s=DEADLINE_S,
        now=0.0,
    )
    refit.receive(ALL[0], Enter(1, 8), 0.0)
    steps: list[Callable[[int], object]] = [
        lambda n: refit.called(n, None, 0.0),  # PAUSE
        lambda n: refit.called(n, None, 0.0),  # UPDATE
        lambda n: refit.receive(Peer("worker", 0, n), Applied(1, 0.0, 0), 0.0),
        lambda n: refit.receive(Peer("worker", 0, n), Committed(1, True), 0.0),
        lambda n: refit.called(n, None, 0.0),  # CLOSE
    ]
    for step in steps:
        for number in range(2):
            if refit.phase is not until:
                step(number)
    assert refit.phase is until
    return refit


def test_an_engine_that_waits_for_another_is_not_to_blame() -> None:
    refit = two_engines(Lane(0))
    for number in range(2):
        assert refit.called(number, None, 0.0) == [Call(EngineCall.CLOSE, number)]
    assert refit.receive(SECOND, Applied(1, 0.0, 0), 0.0) == []
    assert refit.waiting_for() == "engine worker 0 to apply what it loaded"
    refit.tick(refit.deadline)
    assert refit.culprits == {0}
    assert refit.failure is not None
    assert refit.failure.message.endswith("waiting for engine worker 0 to apply what it loaded")


def test_buckets_are_loaded_in_order_though_an_answer_is_lost() -> None:
    refit = two_engines(Lane(2))
    assert refit.receive(ALL[0], Filled(1, 1, 0.0), 0.0) == []
    loads = refit.receive(ALL[0], Filled(1, 0, 0.0), 0.0)
    assert [(a.peer, a.message.bucket) for a in loads if isinstance(a, Send) and isinstance(a.message, Load)] == [
        (FIRST, 0),
        (SECOND, 0),
        (FIRST, 1),
        (SECOND, 1),
    ]


def test_what_was_waited_for_in_vain_gets_little_more_time() -> None:
    refit = two_engines(Lane(1))
    refit.receive(ALL[0], Filled(1, 0, 0.0), 0.0)
    refit.receive(FIRST, Loaded(1, 0, 0.0), 0.0)
    missed = refit.deadline
    refit.tick(missed)
    assert refit.culprits == {1}
    assert refit.deadline == missed + DRAIN_S
    refit.called(0, None, missed + 1)  # nor does the call that ends the other engine's update
    assert refit.deadline == missed + 1 + DRAIN_S


def test_an_engine_that_is_paused_again_gets_its_time() -> None:
    """Its requests may take long, and it is not to blame."""
    refit = two_engines(Lane(0), Phase.RESUME)
    refit.called(0, None, 0.0)
    missed = refit.deadline
    actions = refit.tick(missed)
    assert Call(EngineCall.PAUSE, 0) in actions
    assert refit.culprits == {1}
    assert refit.deadline == missed + DEADLINE_S


def test_who_reports_a_broken_transfer_is_not_to_blame_and_who_broke_it_is() -> None:
    broken = Failure("TransportError", "connection closed", str(FIRST), "stream")
    reason = Failure("EngineLoadError", "out of memory", str(SECOND), "stream", "w")
    refit = two_engines(Lane(1, meets=True))
    refit.receive(FIRST, Failed(1, broken), 0.0)
    assert (refit.phase, refit.failure, refit.culprits) == (Phase.FAILING, broken, set())
    refit.receive(SECOND, Failed(1, reason), 0.0)
    assert (refit.failure, refit.culprits) == (reason, {1})
    refit.receive(FIRST, Failed(1, Failure("EngineLoadError", "another", str(FIRST))), 0.0)
    assert (refit.failure, refit.culprits) == (reason, {0, 1})
    dying = two_engines(Lane(1, meets=True))
    dying.receive(FIRST, Failed(1, broken), 0.0)
    dying.lost(SECOND, "died", 0.0)
    assert dying.culprits == {1}
    assert dying.failure is not None
    assert dying.failure.kind == "EngineGoneError"


@pytest.mark.parametrize("origin", ["", "trainer rank 1"])
def test_who_only_hands_on_the_abort_is_not_to_blame(origin: str) -> None:
    refit = two_engines(Lane(1))
    refit.fail(Failure("EngineLoadError", "on purpose", origin), 0.0)
    refit.receive(FIRST, Failed(1, Failure("EngineLoadError", "on purpose", origin or str(FIRST))), 0.0)
    refit.receive(SECOND, Failed(1, Failure("EngineStaleError", "aborted: on purpose", origin or str(SECOND))), 0.0)
    assert refit.culprits == set()


@pytest.mark.parametrize("meets", [False, True])
def test_a_worker_to_which_rank_0_was_silent_is_not_to_blame(meets: bool) -> None:
    refit = two_engines(Lane(1, meets=meets))
    refit.receive(FIRST, Failed(1, Failure("DeadlineError", "nothing came from trainer rank 0", str(FIRST))), 0.0)
    assert (refit.phase, refit.culprits) == (Phase.FAILING, set())


def test_a_trainer_that_leaves_while_an_attempt_fails_is_known_to_be_lost() -> None:
    refit = two_engines(Lane(1))
    refit.receive(FIRST, Failed(1, Failure("EngineLoadError", "bad", str(FIRST))), 0.0)
    refit.receive(ALL[0], Goodbye(), 0.0)
    assert refit.lost_trainer is not None
    assert refit.lost_trainer.kind == "TrainerLostError"
    assert refit.culprits == {0}


def test_messages_survive_the_wire() -> None:
    stats = Stats("e", 1.0, {"enter": 0.5}, 0.1, 0.2, 3, 4, 5, None)
    messages: list[AnyMessage] = [Done(1, 2, stats), Failed(1, Failure("A", "b")), Hello("worker", 1, 2, "h")]
    for message in messages:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=AnyMessage) == message


def test_errors_cross_as_failures() -> None:
    error = TrainerLostError("gone", origin="trainer rank 1", phase="stream", tensor="w")
    again = raised(error.failure)
    assert type(again) is TrainerLostError
    assert str(again) == str(error) == "gone [trainer rank 1, phase stream, tensor w]"
    assert type(raised(Failure("NeverHeard", "x"))) is SyncError


# --- devices that still copy when the engine serves again -------------------------------------------------------------


class SettlingWorld(CheckedWorld):
    """Workers say that they have committed, and later that their device is done."""

    held = False  # they do not say the latter

    def answer(self, peer: Peer, message: AnyMessage) -> None:
        if not isinstance(message, Commit):
            super().answer(peer, message)
            return
        self.post(peer, Committed(1, False))
        if not self.held:
            self.post(peer, Settled(1))
        self.leave(peer)


@pytest.mark.parametrize("seed", range(20))
def test_trainers_wait_for_devices_and_the_engine_does_not(seed: int) -> None:
    world = SettlingWorld(seed)
    world.run()
    assert (world.refit.phase, world.state) == (Phase.DONE, EngineState.SERVING)
    held = SettlingWorld(seed)
    held.held = True
    while held.step():
        pass
    assert held.refit.phase is Phase.SETTLE
    assert held.calls[-1] is EngineCall.RESUME
    assert not held.is_calling
    for worker in ALL[TRAINERS:]:
        assert not held.refit.finished
        held.react(held.refit.receive(worker, Settled(1), held.now))
    assert (held.refit.phase, held.state) == (Phase.DONE, EngineState.SERVING)


def test_a_device_that_is_never_done() -> None:
    world = SettlingWorld()
    world.held = True
    world.run()
    assert (world.refit.phase, world.state) == (Phase.FAILED, EngineState.STALE)
    assert world.refit.failure is not None
    assert world.refit.failure.kind == "DeadlineError"
    assert "engine worker 0, engine worker 1 to finish" in world.refit.failure.message


@pytest.mark.parametrize(("peer", "phase"), [(TRAINER, Phase.DONE), (WORKER, Phase.FAILED)])
def test_a_peer_that_dies_while_devices_copy(peer: Peer, phase: Phase) -> None:
    world = SettlingWorld()
    world.held = True
    while world.step():
        pass
    world.react(world.refit.lost(peer, "died", world.now))
    for worker in ALL[TRAINERS:]:
        world.react(world.refit.receive(worker, Settled(1), world.now))
    assert world.refit.phase is phase
    assert (world.refit.lost_trainer is not None) == (peer is TRAINER)
