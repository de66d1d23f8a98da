"""The state machine of a refit with a model of its peers and engines: every run there is, with up to two faults.

test_protocol.py draws orders of events at random; here all of them are visited, breadth first, so that what violates a
property is found with the shortest sequence of events that leads there. refit_model.py has the model and says what the
properties are, by the letters that errors begin with.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import pytest

from mbridge_rl.errors import Failure
from mbridge_rl.messages import Abort, AnyMessage, Filled
from mbridge_rl.protocol import Action, Call, EngineCall, EngineState, Peer, Phase, Refit, Send
from tests.mbridge_rl.refit_model import (
    DIRECT,
    MEETS,
    MEETS_2,
    NEW,
    SLOTS,
    SLOTS_2,
    Engine,
    EngineSpec,
    Instance,
    Model,
    PropertyError,
    Worker,
    search,
)

SERVING, STALE, GONE = EngineState.SERVING, EngineState.STALE, EngineState.GONE
ANY = {SERVING, STALE, GONE}  # how an attempt that fails may leave an engine
STALE_BEFORE, NOTHING_MOVES = ANY - {SERVING}, ANY - {STALE}

# What is searched, at least how many states that must be, how it leaves an engine if it fails, and whether it may
# succeed. (A refit that moves nothing is only started on an engine that serves: conductor.py.)
ONE = EngineSpec(num_workers=2)
WRONG = ONE._replace(is_wrong=True)
ONE_ENGINE = {
    "one bucket": (Instance((ONE,)), 20_000, ANY, True),
    "two buckets": (Instance((ONE._replace(lane=SLOTS_2),)), 30_000, ANY, True),
    "direct": (Instance((ONE._replace(lane=DIRECT),)), 20_000, ANY, True),
    "meets": (Instance((ONE._replace(lane=MEETS),), faults=1), 10_000, ANY, True),
    "stale before": (Instance((ONE._replace(is_stale=True),)), 10_000, STALE_BEFORE, True),
    "checked": (Instance((ONE,), is_checked=True), 20_000, ANY, True),
    "wrong": (Instance((WRONG,), is_checked=True), 10_000, ANY, False),
    "verify only": (Instance((ONE,), moves=False, is_checked=True), 10_000, NOTHING_MOVES, True),
    "verify, wrong": (Instance((WRONG,), moves=False, is_checked=True), 10_000, NOTHING_MOVES, True),
    "nothing to do": (Instance((ONE,), moves=False), 5_000, NOTHING_MOVES, True),
}


def fleet(*lanes: int, faults: int = 1) -> Instance:
    return Instance(tuple(EngineSpec(lane) for lane in lanes), faults=faults)


TWO = (EngineSpec(), EngineSpec())
ONE_WRONG = (EngineSpec(), EngineSpec(is_wrong=True))
FLEETS = {
    "shared slots": (fleet(SLOTS, SLOTS), 30_000),
    "direct": (fleet(DIRECT, DIRECT), 30_000),
    "meets": (fleet(MEETS, MEETS), 50_000),
    "slots and direct": (fleet(SLOTS, DIRECT), 30_000),
    "direct and meets": (fleet(DIRECT, MEETS), 40_000),
    "one of each": (fleet(SLOTS, DIRECT, MEETS, faults=0), 20_000),
    "one is stale": (Instance((EngineSpec(), EngineSpec(is_stale=True)), faults=1), 20_000),
    "checked": (Instance(TWO, is_checked=True, faults=1), 20_000),
    "one is wrong": (Instance(ONE_WRONG, is_checked=True, faults=1), 20_000),
    "verify only": (Instance(ONE_WRONG, is_checked=True, moves=False, faults=1), 20_000),
}
LARGE = {
    "shared slots": (fleet(SLOTS, SLOTS, faults=2), 200_000),
    "two workers and one": (Instance((ONE, EngineSpec()), faults=1), 50_000),
    "slots and meets": (fleet(SLOTS, MEETS), 50_000),
    "two buckets": (fleet(SLOTS_2, SLOTS_2), 40_000),
    "meets, two buckets": (fleet(MEETS_2, MEETS_2), 100_000),
    "one is stale": (Instance((EngineSpec(), EngineSpec(is_stale=True))), 200_000),
    "verify only": (Instance(ONE_WRONG, is_checked=True, moves=False), 200_000),
    "nothing to do": (Instance(TWO, moves=False), 200_000),
}


@pytest.mark.parametrize("name", ONE_ENGINE)
def test_every_run_with_one_engine_keeps_all_properties(name: str) -> None:
    instance, at_least, left, may_succeed = ONE_ENGINE[name]
    searched = search(Model(instance))
    print(f"{name}: {searched.num_states} states")
    assert searched.num_states > at_least
    assert searched.retries == {}  # nobody is left to try again with
    done = {(Phase.DONE, (SERVING,))} if may_succeed else set()
    assert searched.ends == {(Phase.FAILED, (state,)) for state in left} | done


def check_fleet(instance: Instance, at_least: int) -> None:
    searched = search(Model(instance))
    print(f"{searched.num_states} states, {len(searched.retries)} attempts after those that failed")
    assert searched.num_states > at_least
    assert searched.retries
    may_succeed = not (instance.moves and any(engine.is_wrong for engine in instance.engines))
    done = (Phase.DONE, (SERVING,) * len(instance.engines))
    assert (done in searched.ends) == may_succeed
    for number in range(len(instance.engines)):
        left = {states[number] for phase, states in searched.ends if phase is Phase.FAILED}
        if not instance.moves:
            assert left == NOTHING_MOVES
        else:
            assert left == (STALE_BEFORE if instance.engines[number].is_stale else ANY)


@pytest.mark.parametrize("name", FLEETS)
def test_every_run_of_a_fleet_keeps_all_properties(name: str) -> None:
    check_fleet(*FLEETS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_every_run_of_a_fleet_in_a_larger_model_keeps_all_properties(name: str) -> None:
    check_fleet(*LARGE[name])


ALL_LANES = (SLOTS, SLOTS_2, DIRECT, MEETS, MEETS_2)


def test_if_nothing_goes_wrong_every_run_succeeds() -> None:
    for lanes in product(ALL_LANES, ALL_LANES):
        instance = fleet(*lanes, faults=0)._replace(is_prompt=True)
        assert search(Model(instance)).ends == {(Phase.DONE, (SERVING, SERVING))}, lanes


# --- the search finds what is wrong -----------------------------------------------------------------------------------


class ResumesBeforeAllCommitted(Refit):
    def _resume_if_committed(self, now: float) -> list[Action]:
        if self.phase is Phase.COMMIT and all(side.session_closed for side in self.sides.values()):
            self._missing.clear()
        return super()._resume_if_committed(now)


class PublishesAfterOneCommitted(Refit):
    def _resume_if_committed(self, now: float) -> list[Action]:
        self._missing.clear()
        return super()._resume_if_committed(now)


class ResumesOneEngineEarly(Refit):
    """As soon as its own workers have committed."""

    def called(self, engine: int, failure: Failure | None, now: float) -> list[Action]:
        actions = super().called(engine, failure, now)
        side = self.sides[engine]
        if self.phase is Phase.COMMIT and side.session_closed and not self._missing.intersection(side.workers):
            actions.append(self._call(engine, EngineCall.RESUME))
        return actions


class ServesAgainAfterAnyFailure(Refit):
    """Whatever was written."""

    def fail(self, failure: Failure, now: float, culprits: Iterable[int] = ()) -> list[Action]:
        for side in self.sides.values():
            if side.state is EngineState.UPDATING:
                side.state, side.resume_on_failure = EngineState.SERVING, True
        return super().fail(failure, now, culprits)


class DoesNotPauseTheLastEngine(Refit):
    def _entered(self, peer: Peer, version: int, now: float) -> list[Action]:
        actions = super()._entered(peer, version, now)
        last = self.sides[max(self.sides)]
        last.busy, last.is_paused = None, True
        return [a for a in actions if isinstance(a, Send) or a.engine != max(self.sides)]


class PausesAfterTheStream(Refit):
    """All but the first engine: when the first is paused, it begins."""

    def called(self, engine: int, failure: Failure | None, now: float) -> list[Action]:
        if self.phase is Phase.PAUSE and failure is None:
            for side in self.sides.values():
                side.is_paused = True
        return super().called(engine, failure, now)


class SaysServingBeforeItIs(Refit):
    """A worker that fails after another has committed leaves two versions."""

    def fail(self, failure: Failure, now: float, culprits: Iterable[int] = ()) -> list[Action]:
        actions = super().fail(failure, now, culprits)
        for side in self.sides.values():
            if Phase.COMMIT in self.started and side.state is EngineState.STALE:
                side.state = EngineState.SERVING
        return actions


class HasNoDeadline(Refit):
    def tick(self, now: float) -> list[Action]:
        return []


class RetriesForEver(Refit):
    """PAUSE, as long as the trainers fill."""

    def called(self, engine: int, failure: Failure | None, now: float) -> list[Action]:
        is_filling = any(peers for flow in self._flows.values() for peers in flow.filling.values())
        if self.engine_call(engine) is EngineCall.PAUSE and failure is None and is_filling:
            return [self._call(engine, EngineCall.PAUSE)]
        return super().called(engine, failure, now)


class ForgetsToDrainTheOthers(Refit):
    """It ends when one engine has."""

    def _drain(self, now: float) -> list[Action]:
        actions = super()._drain(now)
        if any(side.busy is None for side in self.sides.values()):
            for side in self.sides.values():
                side.busy = None
            return [*actions, *super()._drain(now)]
        return actions


class DrainsTheFirstOnly(Refit):
    def _drain_side(self, number: int) -> list[Action]:
        return super()._drain_side(number) if number == 0 else []


class StaysPaused(Refit):
    def fail(self, failure: Failure, now: float, culprits: Iterable[int] = ()) -> list[Action]:
        for side in self.sides.values():
            side.resume_on_failure = False
        return super().fail(failure, now, culprits)


class LeavesAStaleEngineServing(Refit):
    """Once all devices have copied."""

    def _drain(self, now: float) -> list[Action]:
        for side in self.sides.values():
            side.resumed &= bool(self._settling)
        return super()._drain(now)


class TellsTrainersTooSoon(Refit):
    def fail(self, failure: Failure, now: float, culprits: Iterable[int] = ()) -> list[Action]:
        actions = super().fail(failure, now, culprits)
        untold, self._untold = self._untold, []
        return [*(Send(peer, Abort(self.attempt, failure)) for peer in untold), *actions]


class TellsWorkersOnly(Refit):
    def fail(self, failure: Failure, now: float, culprits: Iterable[int] = ()) -> list[Action]:
        return [a for a in super().fail(failure, now, culprits) if isinstance(a, Call) or a.peer.role == "worker"]


class TellsOneEngineOnly(Refit):
    def fail(self, failure: Failure, now: float, culprits: Iterable[int] = ()) -> list[Action]:
        return [a for a in super().fail(failure, now, culprits) if isinstance(a, Call) or a.peer.engine == 0]


class TellsTwice(Refit):
    def fail(self, failure: Failure, now: float, culprits: Iterable[int] = ()) -> list[Action]:
        actions = super().fail(failure, now, culprits)
        return [*actions, *(action for action in actions if isinstance(action, Send))]


class DoesNotWaitForDevices(Refit):
    def _end_if_settled(self, now: float) -> list[Action]:
        settling, self._settling = self._settling, set()
        actions = super()._end_if_settled(now)
        self._settling = settling
        return actions


class ForgetsLostWorkers(Refit):
    def lost(self, peer: Peer, how: str, now: float) -> list[Action]:
        states = {number: side.state for number, side in self.sides.items()}
        actions = super().lost(peer, how, now)
        for number, state in states.items():
            if state is not EngineState.UPDATING:
                self.sides[number].state = state
        return actions


class DoesNotHearThatTheEngineIsGone(Refit):
    """While it fails."""

    def called(self, engine: int, failure: Failure | None, now: float) -> list[Action]:
        culprits = set(self.culprits)
        actions = super().called(engine, None if self.phase is Phase.FAILING else failure, now)
        self.culprits = culprits | ({engine} if failure else set())
        return actions


class BlamesEverybody(Refit):
    def fail(self, failure: Failure, now: float, culprits: Iterable[int] = ()) -> list[Action]:
        return super().fail(failure, now, self.sides)


class BlamesWhoWaitsForTheOthers(Refit):
    """An engine whose workers have applied waits in its CLOSE until all have."""

    def tick(self, now: float) -> list[Action]:
        in_close = [n for n, side in self.sides.items() if side.busy is EngineCall.CLOSE]
        is_streaming = self.phase is Phase.STREAM
        actions = super().tick(now)
        self.culprits.update(in_close if is_streaming else ())
        return actions


class BlamesNobodyInTime(Refit):
    """When the deadline passes."""

    def tick(self, now: float) -> list[Action]:
        is_first = self.failure is None
        actions = super().tick(now)
        if is_first:
            self.culprits.clear()
        return actions


class BlamesTheFirstOnly(Refit):
    """Others that fail while it fails are not heard."""

    def called(self, engine: int, failure: Failure | None, now: float) -> list[Action]:
        before = set(self.culprits)
        actions = super().called(engine, failure, now)
        self.culprits = before or self.culprits
        return actions


class BlamesWhoeverReportsABrokenTransfer(Refit):
    def _blamed(self, peer: Peer, failure: Failure) -> set[int]:
        return {peer.engine} if peer.role == "worker" else set()


class LoadsOutOfOrder(Refit):
    """Bucket 1 if an answer about bucket 0 is lost."""

    def receive(self, peer: Peer, message: AnyMessage, now: float) -> list[Action]:
        actions = super().receive(peer, message, now)
        if isinstance(message, Filled) and self.phase is Phase.STREAM:
            flow = self._flows[message.lane]
            for bucket, peers in list(flow.filling.items()):
                if not peers and bucket not in flow.loading:
                    actions += flow._load(bucket)
        return actions


class RefusesStaleEngines(Refit):
    def _entered(self, peer: Peer, version: int, now: float) -> list[Action]:
        if any(side.state is EngineState.STALE for side in self.sides.values()):
            return self.fail(Failure("EngineStaleError", "stale"), now)
        return super()._entered(peer, version, now)


FOR_ONE: list[tuple[type[Refit], str]] = [
    (ResumesBeforeAllCommitted, "b"),
    (PublishesAfterOneCommitted, "b"),
    (ServesAgainAfterAnyFailure, "a"),
    (SaysServingBeforeItIs, "b"),
    (HasNoDeadline, "c"),
    (RetriesForEver, "c"),
    (StaysPaused, "d"),
    (LeavesAStaleEngineServing, "d"),
    (TellsTrainersTooSoon, "h"),
    (TellsWorkersOnly, "e"),
    (TellsTwice, "e"),
    (DoesNotWaitForDevices, "f"),
    (ForgetsLostWorkers, "g"),
    (DoesNotHearThatTheEngineIsGone, "g"),
    (BlamesEverybody, "j"),
    (BlamesNobodyInTime, "k"),
]
FOR_A_FLEET: list[tuple[type[Refit], str, Instance]] = [
    (ResumesOneEngineEarly, "b", fleet(SLOTS, SLOTS)),
    (DoesNotPauseTheLastEngine, "a", fleet(SLOTS, SLOTS)),
    (PausesAfterTheStream, "c", fleet(SLOTS, SLOTS)),
    (ServesAgainAfterAnyFailure, "a", fleet(DIRECT, MEETS)),
    (ForgetsToDrainTheOthers, "c", fleet(SLOTS, SLOTS)),
    (DrainsTheFirstOnly, "d", fleet(SLOTS, SLOTS)),
    (StaysPaused, "d", fleet(SLOTS, SLOTS)),
    (LeavesAStaleEngineServing, "d", fleet(SLOTS, DIRECT)),
    (TellsTrainersTooSoon, "h", fleet(SLOTS, SLOTS)),
    (TellsOneEngineOnly, "e", fleet(SLOTS, SLOTS)),
    (DoesNotWaitForDevices, "f", fleet(SLOTS, SLOTS)),
    (ForgetsLostWorkers, "g", fleet(SLOTS, MEETS)),
    (BlamesEverybody, "j", fleet(SLOTS, SLOTS)),
    (BlamesWhoWaitsForTheOthers, "j", fleet(SLOTS, DIRECT)),
    (BlamesNobodyInTime, "k", fleet(SLOTS, DIRECT)),
    (BlamesTheFirstOnly, "k", fleet(SLOTS, SLOTS, faults=2)),
    (BlamesWhoeverReportsABrokenTransfer, "j", fleet(MEETS, MEETS)),
    (LoadsOutOfOrder, "j", fleet(SLOTS_2, SLOTS_2)),
    (RefusesStaleEngines, "l", fleet(SLOTS, SLOTS, faults=0)),
]


@pytest.mark.parametrize(("kind", "letter"), FOR_ONE, ids=[kind.__name__ for kind, _ in FOR_ONE])
def test_a_broken_machine_is_caught(kind: type[Refit], letter: str) -> None:
    check_caught(kind, letter, Instance(faults=1))


@pytest.mark.parametrize(("kind", "letter", "instance"), FOR_A_FLEET, ids=[kind.__name__ for kind, *_ in FOR_A_FLEET])
def test_a_machine_that_breaks_a_fleet_is_caught(kind: type[Refit], letter: str, instance: Instance) -> None:
    check_caught(kind, letter, instance)


def check_caught(kind: type[Refit], letter: str, instance: Instance) -> None:
    with pytest.raises(PropertyError) as caught:
        search(Model(instance, kind))
    print(*caught.value.args)
    assert caught.value.args[0] == letter


def test_engines_that_serve_two_versions_are_caught() -> None:
    engines = (Engine((Worker(),)), Engine((Worker(version=NEW),)))
    with pytest.raises(PropertyError) as caught:
        search(Model(fleet(SLOTS, SLOTS), engines=engines))
    assert caught.value.args[0] == "i"
