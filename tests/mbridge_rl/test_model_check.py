"""The state machine of a refit with a model of its peers and its engine: every run there is, with up to two faults.

test_protocol.py draws orders of events at random; here all of them are visited, breadth first, so that what violates a
property is found with the shortest sequence of events that leads there.

The model: rank 0 with its own Fill and Check messages, one more trainer, two workers of one engine (they do what
receiver.py does) and the engine's calls, as engines/base.py promises them. Peers deliver in their own order, and there
is no order between peers. A call has two steps, its effect and its return; each may come at any time or, since the
deadline may always pass first, never. Faults are what the machine has to live with: a process dies, a message is lost,
a peer or a call fails.

The properties, by the letters that errors begin with:

    a  the engine serves no torn weights, whatever it is said to be
    b  only what all workers have committed is published; an engine that is said to serve has one version on all workers
    c  every run ends: no dead end, no endless run, no deadline that passes in vain, no second call to a busy engine
    d  if nothing was written (UPDATE was not called, or nothing moves), an engine that served serves again; one that is
       said to be stale is paused
    e  if the refit fails, everyone is told, once: workers at once, so that the engine's calls end; all when it is over
    f  it is done only after all workers have committed and their devices have copied
    g  an engine that said that it is gone, or lost a worker, is said to be gone
    h  trainers hear of a failure only when no engine that serves still copies from their memory
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from mbridge_rl.errors import Failure
from mbridge_rl.messages import (
    Abort,
    AnyMessage,
    Applied,
    Checked,
    Committed,
    Enter,
    Failed,
    Filled,
    Loaded,
    Settled,
    Verification,
)
from mbridge_rl.protocol import Action, Call, EngineCall, EngineState, Peer, Phase, Refit, Send

TRAINERS, WORKERS = 2, 2
RANK_0, TRAINER = Peer("trainer", 0), Peer("trainer", 1)
WORKER = [Peer("worker", i) for i in range(WORKERS)]
EVERYONE = [RANK_0, TRAINER, *WORKER]
OLD, NEW = 7, 8
FAILURE, GONE = Failure("EngineLoadError", "moody"), Failure("EngineGoneError", "dead")
PAUSE, UPDATE, CLOSE, RESUME = (
    call.value for call in (EngineCall.PAUSE, EngineCall.UPDATE, EngineCall.CLOSE, EngineCall.RESUME)
)


class Instance(NamedTuple):
    """What is searched: one refit's parameters, and how many faults a run may have."""

    num_buckets: int = 1
    num_in_flight: int = 2
    is_checked: bool = False
    is_wrong: bool = False  # what the check finds
    moves: bool = True
    is_stale: bool = False  # how the engine starts
    faults: int = 2


class PropertyError(AssertionError):
    """A property does not hold. `args`: the letter of the property, then words."""


# --- the machine, as a table that grows as it is asked ----------------------------------------------------------------

# Of no influence on what the machine does next: times, statistics and words.
IGNORED = {
    "started",
    "fill_s",
    "load_s",
    "engine_extra_bytes",
    "reloaded",
    "reasons",
    "_deadline",
    "_compare",
    "_check",
}
# Nor of a machine that fails: it only brings the engine's calls to an end.
IGNORED_FAILING = IGNORED | {"version", "verification", "lost_peer"}
IGNORED_FAILING |= {"_missing", "_versions", "_filling", "_loading", "_loans", "_checked", "_settling"}


class Known(NamedTuple):
    """One state of the machine."""

    refit: Refit
    phase: Phase
    state: EngineState
    has_failed: bool
    is_finished: bool


def frozen(value: Any) -> Any:
    """`value` without what only words or statistics depend on, hashable."""
    if isinstance(value, set | frozenset):
        return frozenset(value)
    if isinstance(value, dict):
        return frozenset((key, frozen(item)) for key, item in value.items())  # checksums come in any order
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, Failure | Checked | Verification):
        return type(value).__name__
    return value


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return value.copy() if isinstance(value, set | list) else value


def message_of(token: str, moves: bool) -> AnyMessage:
    """What a peer sends, by the name that it has in the model: the message's class and, if it has one, its bucket."""
    bucket = int(token[-1]) if token[-1].isdigit() else 0
    match token.rstrip("0123456789"):
        case "Enter":
            return Enter(1, NEW if moves else OLD)
        case "Filled":
            return Filled(1, bucket, 0.0)
        case "Loaded":
            return Loaded(1, bucket, 0.0)
        case "Applied":
            return Applied(1, 0.0, 0)
        case "Checked":
            return Checked(1)
        case "Committed":
            return Committed(1, is_settled=not moves)
        case "Settled":
            return Settled(1)
        case name:
            assert name == "Failed"
            return Failed(1, FAILURE)


def token_of(message: AnyMessage) -> str:
    return f"{type(message).__name__}{getattr(message, 'bucket', '')}"


class Machine:
    """`kind`'s answers to all events in all its states. A state is a number: the index in `known`."""

    def __init__(self, instance: Instance, kind: type[Refit]) -> None:
        self.known: list[Known] = []
        self._instance = instance
        self._numbers: dict[Any, int] = {}
        self._answers: dict[tuple[Any, ...], tuple[int, list[Action]]] = {}
        refit = kind(
            attempt=1,
            last_version=OLD,
            state=EngineState.STALE if instance.is_stale else EngineState.SERVING,
            num_trainers=TRAINERS,
            num_workers=WORKERS,
            num_buckets=instance.num_buckets,
            num_in_flight=instance.num_in_flight,
            deadline_s=1.0,
            now=0.0,
            moves=instance.moves,
            check=(0, 1) if instance.is_checked else None,
            compare=lambda _: Verification(1, 1, {"w": "wrong"} if instance.is_wrong else {}, {}),
        )
        self.start = self._number(refit)

    def answer(self, number: int, event: str, *arguments: Any) -> tuple[int, list[Action]]:
        """The state after `event`, and what the machine then wants done."""
        asked = (number, event, *arguments)
        if asked not in self._answers:
            old = self.known[number].refit
            refit = object.__new__(type(old))
            refit.__dict__.update((name, copied(value)) for name, value in vars(old).items())
            match event:
                case "receive":
                    actions = refit.receive(arguments[0], message_of(arguments[1], self._instance.moves), 0.0)
                case "tick":
                    actions = refit.tick(refit.deadline)
                case "called":
                    actions = refit.called({"": None, "raises": FAILURE, "is gone": GONE}[arguments[0]], 0.0)
                case "lost":
                    actions = refit.lost(arguments[0], "died", 0.0)
                case _:
                    actions = refit.fail(FAILURE, 0.0)
            self._answers[asked] = self._number(refit), actions
        return self._answers[asked]

    def _number(self, refit: Refit) -> int:
        ignored = IGNORED if refit.failure is None else IGNORED_FAILING
        key = frozenset((name, frozen(value)) for name, value in vars(refit).items() if name not in ignored)
        if key not in self._numbers:
            self._numbers[key] = len(self.known)
            self.known.append(Known(refit, refit.phase, refit.state, refit.failure is not None, refit.finished))
        return self._numbers[key]


# --- the world around it ----------------------------------------------------------------------------------------------

# Lives. A death is seen (pidfd) or not before the next message to the dead is refused.
ALIVE, DYING, UNREACHABLE, DEAD = "alive", "dying", "unreachable", "dead"
# Stages of a worker; while it waits for a Load the stage is the message's name.
IDLE, LOADED, APPLIED, CHECKED, GAVE_UP = "idle", "loaded", "applied", "checked", "given up"
COMMITTED, SETTLED, UNSETTLED = "committed", "settled", "committed, and its device failed"
HAS_LEFT_RUN = {IDLE, LOADED, GAVE_UP}
HAS_COMMITTED = {COMMITTED, SETTLED, UNSETTLED}
READS_NO_MORE = {GAVE_UP, *HAS_COMMITTED}
HAS_LEFT_CLOSE = {IDLE, *READS_NO_MORE}
ANSWERS = {"Check": "Checked", "Enter": "Enter"}  # of a trainer; Fill<n> becomes Filled<n>


class OtherTrainer(NamedTuple):
    """The other rank. It does nothing but answer, so that its answers are under way as soon as it is asked."""

    life: str = ALIVE
    outbox: tuple[str, ...] = ("Enter",)


class Worker(NamedTuple):
    stage: str = IDLE
    is_torn: bool = False
    inbox: tuple[str, ...] = ()
    outbox: tuple[str, ...] = ()
    life: str = ALIVE


class World(NamedTuple):
    """One state of everything."""

    machine: int
    workers: tuple[Worker, ...]
    is_paused: bool
    faults: int  # that may still happen
    mine: tuple[str, ...] = ("Enter",)  # what rank 0 asked of itself
    trainer: OtherTrainer = OtherTrainer()
    call: str = ""  # that the engine is busy with
    is_effective: bool = False  # the call has done what it does; it has not returned
    is_updated: bool = False  # UPDATE was called
    is_closing: bool = False  # CLOSE has reached the workers
    failed_call: str = ""  # the last call that returned, if it raised
    has_lost_engine: bool = False  # the machine was told that the engine, or one of its workers, is dead
    aborted: int = 0  # a bit for each of EVERYONE


Label = tuple[object, ...]  # words
Step = tuple[Label, World]


class Model:
    """All that can happen next, in any state of the world."""

    def __init__(self, instance: Instance, kind: type[Refit] = Refit) -> None:
        self.instance = instance
        self.machine = Machine(instance, kind)
        worker = Worker(is_torn=instance.is_stale)
        self.start = World(self.machine.start, (worker,) * WORKERS, instance.is_stale, instance.faults)

    def steps(self, world: World) -> Iterator[Step]:
        if not self.machine.known[world.machine].is_finished:
            yield self._event(world, "tick")
            yield from self._rank_0(world)
            yield from self._trainer(world)
        for i in range(WORKERS):
            yield from self._worker(world, i)
        if world.call:
            yield from self._engine(world)

    # -- events, and what follows from them

    def _event(self, world: World, event: str, *arguments: Any) -> Step:
        """Tell the machine, and do what it says."""
        return (event, *arguments), self._told(world, event, *arguments)

    def _told(self, world: World, event: str, *arguments: Any) -> World:
        if event == "lost" and arguments[0].role == "worker":
            world = world._replace(has_lost_engine=True)
        before = self.machine.known[world.machine]
        number, actions = self.machine.answer(world.machine, event, *arguments)
        if event == "tick" and number == world.machine and not before.is_finished:
            raise PropertyError("c", "the deadline passes and nothing comes of it")
        world = world._replace(machine=number)
        for action in actions:
            world = self._called(world, action) if isinstance(action, Call) else self._sent(world, action)
        after = self.machine.known[world.machine]
        if after.has_failed:
            told = {peer for i, peer in enumerate(EVERYONE) if world.aborted & 1 << i}
            if not told.issuperset(EVERYONE if after.is_finished else WORKER):
                raise PropertyError("e", "the refit fails and not everyone is told")
            # The machine listens to nobody but the engine now, and to those who watch its workers.
            workers = tuple(worker._replace(outbox=()) if worker.outbox else worker for worker in world.workers)
            world = world._replace(mine=(), trainer=OtherTrainer(DEAD, ()), workers=workers)
        if after.is_finished:
            world = world._replace(faults=0, trainer=OtherTrainer(DEAD, ()))
        return world

    def _called(self, world: World, action: Call) -> World:
        if world.call:
            raise PropertyError("c", f"{action.call} is called while the engine is busy with {world.call}")
        call = action.call.value
        return world._replace(call=call, is_effective=False, is_updated=world.is_updated or call == UPDATE)

    def _sent(self, world: World, action: Send) -> World:
        peer, token = action.peer, token_of(action.message)
        if isinstance(action.message, Abort):
            bit = 1 << EVERYONE.index(peer)
            if world.aborted & bit:
                raise PropertyError("e", f"{peer} gets a second Abort")
            world = world._replace(aborted=world.aborted | bit)
            if peer.role == "trainer" and self._serves_and_copies(world):
                raise PropertyError("h", f"{peer} may change its weights while an engine that serves still copies them")
        if peer == RANK_0:
            return world if token == "Abort" else world._replace(mine=(*world.mine, token))
        mate = world.trainer if peer == TRAINER else world.workers[peer.index]
        if mate.life == UNREACHABLE and token != "Abort":  # as conductor.py does: at once, between two actions
            return self._told(with_mate(world, peer, mate._replace(life=DEAD)), "lost", peer)
        if mate.life != ALIVE:
            return world
        if isinstance(mate, Worker):
            return with_mate(
                world, peer, mate if mate.stage in READS_NO_MORE else mate._replace(inbox=(*mate.inbox, token))
            )
        return world if token == "Abort" else with_mate(world, peer, mate._replace(outbox=(*mate.outbox, token)))

    def _serves_and_copies(self, world: World) -> bool:
        is_known_gone = self.machine.known[world.machine].state is EngineState.GONE
        if world.is_paused or is_known_gone or world.failed_call == PAUSE:  # then nothing more can be done
            return False
        return any(worker.life == ALIVE and worker.stage == COMMITTED for worker in world.workers)

    # -- who does what

    def _rank_0(self, world: World) -> Iterator[Step]:
        if not world.mine:
            return
        rest = world._replace(mine=world.mine[1:])
        yield self._event(rest, "receive", RANK_0, trainers_answer(world.mine[0]))
        if world.faults:
            yield self._event(rest._replace(faults=world.faults - 1), "fail")

    def _trainer(self, world: World) -> Iterator[Step]:
        trainer = world.trainer
        if trainer.life == ALIVE and trainer.outbox:
            rest = with_mate(world, TRAINER, trainer._replace(outbox=trainer.outbox[1:]))
            answer = trainers_answer(trainer.outbox[0])
            yield self._event(rest, "receive", TRAINER, answer)
            if world.faults:
                rest = rest._replace(faults=world.faults - 1)
                yield (answer, "of", TRAINER, "is lost"), rest  # or what asked for it
                yield self._event(rest, "receive", TRAINER, "Failed")
        yield from self._death(world, TRAINER, trainer)

    def _death(self, world: World, peer: Peer, mate: OtherTrainer | Worker) -> Iterator[Step]:
        if mate.life == DYING:
            yield self._event(with_mate(world, peer, mate._replace(life=DEAD)), "lost", peer)
        if mate.life == ALIVE and world.faults:
            rest = world._replace(faults=world.faults - 1)
            yield (peer, "dies"), with_mate(rest, peer, bereft(mate, DYING))
            yield (peer, "dies unseen"), with_mate(rest, peer, bereft(mate, UNREACHABLE))

    def _worker(self, world: World, i: int) -> Iterator[Step]:
        worker, peer = world.workers[i], WORKER[i]
        listens = not self.machine.known[world.machine].is_finished
        if listens:
            yield from self._death(world, peer, worker)
        if worker.life != ALIVE:
            return
        if listens and worker.outbox:
            rest = with_mate(world, peer, worker._replace(outbox=worker.outbox[1:]))
            yield self._event(rest, "receive", peer, worker.outbox[0])
            if world.faults:
                yield (worker.outbox[0], "of", peer, "is lost"), rest._replace(faults=world.faults - 1)
        if world.faults and worker.inbox:
            rest = world._replace(faults=world.faults - 1)
            yield (
                (worker.inbox[0], "to", peer, "is lost"),
                with_mate(rest, peer, worker._replace(inbox=worker.inbox[1:])),
            )
        listens = not self.machine.known[world.machine].has_failed
        for label, after, is_fault in self._work(worker, world.is_closing):
            if is_fault and not world.faults:
                continue
            rest = world._replace(faults=world.faults - 1) if is_fault else world
            yield (peer, label), with_mate(rest, peer, after if listens else after._replace(outbox=()))

    def _work(self, worker: Worker, is_closing: bool) -> Iterator[tuple[str, Worker, bool]]:
        """What receiver.py may do next, and whether that is a fault."""
        stage, failed = worker.stage, giving_up(worker)
        if stage == LOADED and is_closing:
            yield "applies", after(worker, APPLIED, "Applied"), False
            yield "fails to apply", failed, True
        if stage == COMMITTED and self.instance.moves:
            yield "settles", after(worker, SETTLED, "Settled"), False
            yield "fails to settle", after(worker, UNSETTLED, "Failed"), True
        if stage in READS_NO_MORE or stage in (IDLE, LOADED):
            return
        yield "fails", failed, True  # in what it was told to do, or because it has waited too long
        if not worker.inbox:
            return
        token, rest = worker.inbox[0], worker._replace(inbox=worker.inbox[1:])
        if token == stage:  # the Load that it waits for
            bucket = int(stage[-1]) + 1
            following = f"Load{bucket}" if bucket < self.instance.num_buckets else LOADED
            yield f"takes {token}", after(rest, following, f"Loaded{bucket - 1}"), False
        elif token == "Check" and stage == APPLIED:
            yield "checks", after(rest, CHECKED, "Checked"), False
        elif token == "Commit" and stage in (APPLIED, CHECKED):
            last = COMMITTED if self.instance.moves else SETTLED
            yield "commits", after(rest._replace(is_torn=False, inbox=()), last, "Committed"), False
        else:
            yield f"gives up: {token} came", failed, False

    def _engine(self, world: World) -> Iterator[Step]:
        call = world.call
        if not world.is_effective:
            yield (call, "takes effect"), self._effect(world)
        returned = world._replace(call="", is_effective=False, failed_call="")
        living = {worker.stage for worker in world.workers if worker.life == ALIVE}
        is_done = {UPDATE: living <= HAS_LEFT_RUN, CLOSE: living <= HAS_LEFT_CLOSE}.get(call, True)
        if self.machine.known[world.machine].is_finished:
            return
        if world.is_effective and is_done:
            yield self._event(returned, "called", "")
        if world.faults:
            rest = returned._replace(faults=world.faults - 1, failed_call=call)
            yield self._event(rest, "called", "raises")
        if world.faults or any(worker.life != ALIVE for worker in world.workers):
            rest = returned._replace(faults=max(world.faults - 1, 0), has_lost_engine=True)
            yield self._event(rest, "called", "is gone")

    def _effect(self, world: World) -> World:
        world = world._replace(is_effective=True)
        match world.call:
            case "pause":
                return world._replace(is_paused=True)
            case "update":
                moves = self.instance.moves
                first = "Load0" if moves else LOADED
                begun = (worker._replace(stage=first, is_torn=moves or worker.is_torn) for worker in world.workers)
                return world._replace(
                    workers=tuple(b if b.life == ALIVE else w for b, w in zip(begun, world.workers, strict=True))
                )
            case "close_session":
                return world._replace(is_closing=True)
            case _:
                publishes = self.instance.moves and not self.machine.known[world.machine].has_failed
                if publishes and not all(worker.stage in HAS_COMMITTED for worker in world.workers):
                    raise PropertyError("b", "a version is published that not all workers have committed")
                return world._replace(is_paused=False)

    # -- what must hold

    def check(self, world: World) -> None:
        """Raise PropertyError if a property does not hold in this state."""
        machine = self.machine.known[world.machine]
        living = [worker for worker in world.workers if worker.life == ALIVE]
        is_torn = any(worker.is_torn for worker in living)
        is_serving = machine.state is EngineState.SERVING
        if not world.is_paused and is_torn:
            raise PropertyError("a", f"the engine serves torn weights and is said to be {machine.state}")
        if not machine.is_finished:
            return
        versions = {NEW if self.instance.moves and worker.stage in HAS_COMMITTED else OLD for worker in living}
        if is_serving and (is_torn or len(versions) > 1):
            raise PropertyError("b", "the engine is said to serve, and its workers do not hold one version")
        if machine.phase is Phase.DONE:
            if not is_serving or world.is_paused or machine.has_failed:
                raise PropertyError("b", "the refit is done and the engine does not serve")
            if any(worker.stage != SETTLED for worker in world.workers):
                raise PropertyError("f", "the refit is done and a worker is not")
        if world.has_lost_engine and machine.state is not EngineState.GONE:
            raise PropertyError("g", f"the engine is gone and said to be {machine.state}")
        if machine.state is EngineState.STALE and not world.is_paused and world.failed_call != PAUSE:
            raise PropertyError("d", "the engine is said to be stale and not paused")
        nothing_written = not (self.instance.is_stale or (world.is_updated and self.instance.moves))
        if nothing_written and machine.state is not EngineState.GONE and world.failed_call != RESUME:
            if world.is_paused:
                raise PropertyError("d", "nothing was written and the engine stays paused")
            if not is_serving:
                raise PropertyError("d", f"nothing was written and the engine is said to be {machine.state}")


def with_mate(world: World, peer: Peer, mate: OtherTrainer | Worker) -> World:
    if isinstance(mate, OtherTrainer):
        return world._replace(trainer=mate)
    workers = world.workers
    return world._replace(workers=(mate, workers[1]) if peer.index == 0 else (workers[0], mate))


def bereft(mate: OtherTrainer | Worker, life: str) -> OtherTrainer | Worker:
    """What it sent and nobody has received goes with it: had it been received, it would have died later."""
    return mate._replace(life=life, inbox=(), outbox=()) if isinstance(mate, Worker) else OtherTrainer(life, ())


def after(worker: Worker, stage: str, message: str) -> Worker:
    return worker._replace(stage=stage, outbox=(*worker.outbox, message))


def giving_up(worker: Worker) -> Worker:
    return worker._replace(stage=GAVE_UP, inbox=(), outbox=(*worker.outbox, "Failed"))


def trainers_answer(token: str) -> str:
    return ANSWERS.get(token) or token.replace("Fill", "Filled")


# --- the search -------------------------------------------------------------------------------------------------------


class Searched(NamedTuple):
    num_states: int
    ends: set[tuple[Phase, EngineState]]


def search(model: Model) -> Searched:
    """Visit every state once. Raises PropertyError with the shortest way to one that violates a property."""
    numbers = {model.start: 0}
    worlds = [model.start]
    came_from: list[tuple[int, Label]] = [(0, ())]
    following: list[list[int]] = []
    ends: set[tuple[Phase, EngineState]] = set()
    for number, world in enumerate(worlds):  # which grow
        machine = model.machine.known[world.machine]
        try:
            model.check(world)
            steps = list(model.steps(world))
            if machine.is_finished:
                ends.add((machine.phase, machine.state))
            elif not steps:
                raise PropertyError("c", "nothing can happen and the refit is not over")
        except PropertyError as error:
            raise PropertyError(*error.args, trace(came_from, number)) from None
        following.append([])
        for label, new in steps:
            count = numbers.setdefault(new, len(worlds))
            following[number].append(count)
            if count == len(worlds):
                worlds.append(new)
                came_from.append((number, label))
    if not is_acyclic(following):
        raise PropertyError("c", "a run can go on forever")
    return Searched(len(worlds), ends)


def is_acyclic(following: list[list[int]]) -> bool:
    """Whether all states can be put in an order that every step keeps to: then no run is infinite."""
    num_ways_in = Counter(new for news in following for new in news)
    ready, num_ordered = [0], 0
    while ready:
        num_ordered += 1
        for new in following[ready.pop()]:
            num_ways_in[new] -= 1
            if not num_ways_in[new]:
                ready.append(new)
    return num_ordered == len(following)


def trace(came_from: list[tuple[int, Label]], number: int) -> str:
    lines: list[str] = []
    while number:
        number, label = came_from[number]
        lines.append("\n  " + " ".join(map(str, label)))
    return "".join(reversed(lines))


SERVES, STALE, IS_GONE = (
    (Phase.FAILED, EngineState.SERVING),
    (Phase.FAILED, EngineState.STALE),
    (Phase.FAILED, EngineState.GONE),
)
DONE = (Phase.DONE, EngineState.SERVING)
# What is searched, at least how many states that must be, and how its runs end. (A refit that moves nothing is only
# started on an engine that serves: conductor.py.)
INSTANCES = {
    "one bucket": (Instance(), 10_000, {DONE, SERVES, STALE, IS_GONE}),
    "two buckets": (Instance(num_buckets=2), 20_000, {DONE, SERVES, STALE, IS_GONE}),
    "two steps": (Instance(num_buckets=2, num_in_flight=1), 10_000, {DONE, SERVES, STALE, IS_GONE}),
    "stale before": (Instance(is_stale=True), 10_000, {DONE, STALE, IS_GONE}),
    "checked": (Instance(is_checked=True), 10_000, {DONE, SERVES, STALE, IS_GONE}),
    "wrong": (Instance(is_checked=True, is_wrong=True), 5_000, {SERVES, STALE, IS_GONE}),
    "verify only": (Instance(moves=False, is_checked=True), 5_000, {DONE, SERVES, IS_GONE}),
    "verify, wrong": (Instance(moves=False, is_checked=True, is_wrong=True), 5_000, {DONE, SERVES, IS_GONE}),
    "nothing to do": (Instance(moves=False), 3_000, {DONE, SERVES, IS_GONE}),
}


@pytest.mark.parametrize("name", INSTANCES)
def test_every_run_keeps_all_properties(name: str) -> None:
    instance, at_least, ends = INSTANCES[name]
    searched = search(Model(instance))
    print(f"{name}: {searched.num_states} states")
    assert searched.num_states > at_least
    assert searched.ends == ends


# --- the search finds what is wrong -----------------------------------------------------------------------------------


class ResumesBeforeAllCommitted(Refit):
    def _resume_if_committed(self, now: float) -> list[Action]:
        if self.phase is Phase.COMMIT and self._session_closed:
            self._missing.clear()
        return super()._resume_if_committed(now)


class PublishesAfterOneCommitted(Refit):
    def _resume_if_committed(self, now: float) -> list[Action]:
        self._missing.clear()
        return super()._resume_if_committed(now)


class ServesAgainAfterAnyFailure(Refit):
    """Whatever was written."""

    def fail(self, failure: Failure, now: float) -> list[Action]:
        if self.state is EngineState.UPDATING:
            self.state, self._resume_on_failure = EngineState.SERVING, True
        return super().fail(failure, now)


class SaysServingBeforeItIs(Refit):
    """A worker that fails after another has committed leaves two versions."""

    def fail(self, failure: Failure, now: float) -> list[Action]:
        actions = super().fail(failure, now)
        if Phase.COMMIT in self.started and self.state is EngineState.STALE:
            self.state = EngineState.SERVING
        return actions


class HasNoDeadline(Refit):
    def tick(self, now: float) -> list[Action]:
        return []


class RetriesForEver(Refit):
    """PAUSE, as long as the trainers fill."""

    def called(self, failure: Failure | None, now: float) -> list[Action]:
        if self.engine_call is EngineCall.PAUSE and failure is None and self._filling:
            return [self._call(EngineCall.PAUSE)]
        return super().called(failure, now)


class StaysPaused(Refit):
    def fail(self, failure: Failure, now: float) -> list[Action]:
        self._resume_on_failure = False
        return super().fail(failure, now)


class LeavesAStaleEngineServing(Refit):
    """Once all devices have copied."""

    def _drain(self, now: float) -> list[Action]:
        self._resumed &= bool(self._settling)
        return super()._drain(now)


class TellsTrainersTooSoon(Refit):
    def fail(self, failure: Failure, now: float) -> list[Action]:
        actions = super().fail(failure, now)
        untold, self._untold = self._untold, []
        return [*(Send(peer, Abort(self.attempt, failure)) for peer in untold), *actions]


class TellsWorkersOnly(Refit):
    def fail(self, failure: Failure, now: float) -> list[Action]:
        return [a for a in super().fail(failure, now) if isinstance(a, Call) or a.peer.role == "worker"]


class TellsTwice(Refit):
    def fail(self, failure: Failure, now: float) -> list[Action]:
        actions = super().fail(failure, now)
        return [*actions, *(action for action in actions if isinstance(action, Send))]


class DoesNotWaitForDevices(Refit):
    def _end_if_settled(self, now: float) -> list[Action]:
        self._settling.clear()
        return super()._end_if_settled(now)


class ForgetsLostWorkers(Refit):
    def lost(self, peer: Peer, how: str, now: float) -> list[Action]:
        state = self.state
        actions = super().lost(peer, how, now)
        if state is not EngineState.UPDATING:
            self.state = state
        return actions


class DoesNotHearThatTheEngineIsGone(Refit):
    """While it fails."""

    def called(self, failure: Failure | None, now: float) -> list[Action]:
        return super().called(None if self.phase is Phase.FAILING else failure, now)


BROKEN: list[tuple[type[Refit], str]] = [
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
]


@pytest.mark.parametrize(("kind", "letter"), BROKEN, ids=[kind.__name__ for kind, _ in BROKEN])
def test_a_broken_machine_is_caught(kind: type[Refit], letter: str) -> None:
    with pytest.raises(PropertyError) as caught:
        search(Model(Instance(faults=1), kind))
    print(*caught.value.args)
    assert caught.value.args[0] == letter
