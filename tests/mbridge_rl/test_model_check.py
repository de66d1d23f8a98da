"""The state machine of a refit, together with a model of its peers and its engine: every run there is, up to two faults.

test_protocol.py draws orders of events at random; here all of them are visited, breadth first, so that what violates a
property is found with the shortest sequence of events that leads there.

The model: rank 0 with its own Fill and Check messages, one more trainer, two workers of one engine (they do what
receiver.py does) and the engine's calls, as engines/base.py promises them. Peers deliver in their own order, and there
is no order between peers. A call has two steps, its effect and its return; each may come at any time or, since the
deadline may always pass first, never. Faults are what the machine has to live with: a process dies, a message is lost,
a peer or a call fails.
"""

from __future__ import annotations

from collections import deque
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
PAUSE, UPDATE, CLOSE, RESUME = (call.value for call in (EngineCall.PAUSE, EngineCall.UPDATE, EngineCall.CLOSE, EngineCall.RESUME))


class Instance(NamedTuple):
    """What is searched: one refit's parameters, and how many faults a run may have."""

    num_buckets: int = 1
    num_in_flight: int = 2
    is_checked: bool = False
    is_wrong: bool = False  # what the check finds
    moves: bool = True
    is_stale: bool = False  # how the engine starts
    faults: int = 2


class Violation(AssertionError):
    """A property does not hold. `args`: the letter of the property, then words."""


# --- the machine, as a table that grows as it is asked ----------------------------------------------------------------

# Of no influence on what the machine does next: times, statistics and words.
IGNORED = {"started", "fill_s", "load_s", "engine_extra_bytes", "reloaded", "reasons", "_deadline", "_compare", "_check"}
# What a machine that fails still looks at: it only brings the engine's calls to an end.
FAILING = ("phase", "state", "_engine_busy", "_resume_on_failure", "_session_open", "_session_closed", "_resumed")


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
        return tuple((key, frozen(item)) for key, item in value.items())
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
        names = FAILING if refit.failure is not None else [name for name in vars(refit) if name not in IGNORED]
        key = tuple((name, frozen(getattr(refit, name))) for name in names)
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


class Trainer(NamedTuple):
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
    trainer: Trainer = Trainer()
    call: str = ""  # that the engine is busy with
    is_effective: bool = False  # the call has done what it does; it has not returned
    is_updated: bool = False  # UPDATE was called
    is_closing: bool = False  # CLOSE has reached the workers
    resume_failed: bool = False  # the last one
    has_lost_engine: bool = False  # the machine was told that the engine, or one of its workers, is dead
    aborted: int = 0  # a bit for each of EVERYONE


Step = tuple[str, World]


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
        label = " ".join([event, *map(str, arguments)])
        return label, self._told(world, event, *arguments)

    def _told(self, world: World, event: str, *arguments: Any) -> World:
        if event == "lost" and arguments[0].role == "worker":
            world = world._replace(has_lost_engine=True)
        before = self.machine.known[world.machine]
        number, actions = self.machine.answer(world.machine, event, *arguments)
        if event == "tick" and number == world.machine and not before.is_finished:
            raise Violation("c", "the deadline passes and nothing comes of it")
        world = world._replace(machine=number)
        for action in actions:
            world = self._called(world, action) if isinstance(action, Call) else self._sent(world, action)
        after = self.machine.known[world.machine]
        if after.has_failed:
            if world.aborted != (1 << len(EVERYONE)) - 1:
                raise Violation("e", "the refit fails and not everyone is told")
            # The machine listens to nobody but the engine now, and to those who watch its workers.
            workers = tuple(worker._replace(outbox=()) if worker.outbox else worker for worker in world.workers)
            world = world._replace(mine=(), trainer=Trainer(DEAD, ()), workers=workers)
        if after.is_finished:
            world = world._replace(faults=0, trainer=Trainer(DEAD, ()))
        return world

    def _called(self, world: World, action: Call) -> World:
        if world.call:
            raise Violation("c", f"{action.call} is called while the engine is busy with {world.call}")
        call = action.call.value
        return world._replace(call=call, is_effective=False, is_updated=world.is_updated or call == UPDATE)

    def _sent(self, world: World, action: Send) -> World:
        peer, token = action.peer, token_of(action.message)
        if isinstance(action.message, Abort):
            bit = 1 << EVERYONE.index(peer)
            if world.aborted & bit:
                raise Violation("e", f"{peer} gets a second Abort")
            world = world._replace(aborted=world.aborted | bit)
        if peer == RANK_0:
            return world if token == "Abort" else world._replace(mine=(*world.mine, token))
        mate = world.trainer if peer == TRAINER else world.workers[peer.index]
        if mate.life == UNREACHABLE and token != "Abort":  # as conductor.py does: at once, between two actions
            return self._told(with_mate(world, peer, mate._replace(life=DEAD)), "lost", peer)
        if mate.life != ALIVE:
            return world
        if isinstance(mate, Worker):
            return with_mate(world, peer, mate if mate.stage in READS_NO_MORE else mate._replace(inbox=(*mate.inbox, token)))
        return world if token == "Abort" else with_mate(world, peer, mate._replace(outbox=(*mate.outbox, token)))

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
                yield f"{answer} of {TRAINER} is lost", rest  # or what asked for it
                yield self._event(rest, "receive", TRAINER, "Failed")
        yield from self._death(world, TRAINER, trainer)

    def _death(self, world: World, peer: Peer, mate: Trainer | Worker) -> Iterator[Step]:
        if mate.life == DYING:
            yield self._event(with_mate(world, peer, mate._replace(life=DEAD)), "lost", peer)
        if mate.life == ALIVE and world.faults:
            rest = world._replace(faults=world.faults - 1)
            yield f"{peer} dies", with_mate(rest, peer, bereft(mate, DYING))
            yield f"{peer} dies unseen", with_mate(rest, peer, bereft(mate, UNREACHABLE))

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
                yield f"{worker.outbox[0]} of {peer} is lost", rest._replace(faults=world.faults - 1)
        if world.faults and worker.inbox:
            rest = world._replace(faults=world.faults - 1)
            yield f"{worker.inbox[0]} to {peer} is lost", with_mate(rest, peer, worker._replace(inbox=worker.inbox[1:]))
        listens = not self.machine.known[world.machine].has_failed
        for label, after, is_fault in self._work(worker, world.is_closing):
            if is_fault and not world.faults:
                continue
            rest = world._replace(faults=world.faults - 1) if is_fault else world
            yield f"{peer} {label}", with_mate(rest, peer, after if listens else after._replace(outbox=()))

    def _work(self, worker: Worker, is_closing: bool) -> Iterator[tuple[str, Worker, bool]]:
        """What receiver.py may do next, and whether that is a fault."""
        stage, failed = worker.stage, giving_up(worker)
        if stage == LOADED and is_closing:
            yield "applies", after(worker, APPLIED, "Applied"), False
            yield "fails to apply", failed, True
        if stage == COMMITTED and self.instance.moves:
            yield "settles", after(worker, SETTLED, "Settled"), False
            yield "fails to settle", after(worker, UNSETTLED, "Failed"), True
        if not worker.inbox or stage in READS_NO_MORE | {IDLE, LOADED}:
            return
        token, rest = worker.inbox[0], worker._replace(inbox=worker.inbox[1:])
        if token == stage:  # the Load that it waits for
            bucket = int(stage[-1]) + 1
            following = f"Load{bucket}" if bucket < self.instance.num_buckets else LOADED
            yield f"takes {token}", after(rest, following, f"Loaded{bucket - 1}"), False
            yield f"fails in {token}", failed, True
        elif token == "Check" and stage == APPLIED:
            yield "checks", after(rest, CHECKED, "Checked"), False
            yield "fails to check", failed, True
        elif token == "Commit" and stage in (APPLIED, CHECKED):
            last = COMMITTED if self.instance.moves else SETTLED
            yield "commits", after(rest._replace(is_torn=False, inbox=()), last, "Committed"), False
        else:
            yield f"gives up: {token} came", failed, False

    def _engine(self, world: World) -> Iterator[Step]:
        call = world.call
        if not world.is_effective:
            yield f"{call} takes effect", self._effect(world)
        returned = world._replace(call="", is_effective=False, resume_failed=False)
        living = {worker.stage for worker in world.workers if worker.life == ALIVE}
        is_done = {UPDATE: living <= HAS_LEFT_RUN, CLOSE: living <= HAS_LEFT_CLOSE}.get(call, True)
        if self.machine.known[world.machine].is_finished:
            return
        if world.is_effective and is_done:
            yield self._event(returned, "called", "")
        if world.faults:
            rest = returned._replace(faults=world.faults - 1, resume_failed=call == RESUME)
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
                return world._replace(workers=tuple(b if b.life == ALIVE else w for b, w in zip(begun, world.workers, strict=True)))
            case "close_session":
                return world._replace(is_closing=True)
            case _:
                publishes = self.instance.moves and not self.machine.known[world.machine].has_failed
                if publishes and not all(worker.stage in HAS_COMMITTED for worker in world.workers):
                    raise Violation("b", "a version is published that not all workers have committed")
                return world._replace(is_paused=False)

    # -- what must hold

    def check(self, world: World) -> None:
        """Raise Violation if a property does not hold in this state."""
        machine = self.machine.known[world.machine]
        living = [worker for worker in world.workers if worker.life == ALIVE]
        is_torn = any(worker.is_torn for worker in living)
        is_serving = machine.state is EngineState.SERVING
        if not world.is_paused and is_torn:
            raise Violation("a", f"the engine serves torn weights and is said to be {machine.state}")
        if not machine.is_finished:
            return
        versions = {NEW if self.instance.moves and worker.stage in HAS_COMMITTED else OLD for worker in living}
        if is_serving and (is_torn or len(versions) > 1):
            raise Violation("b", "the engine is said to serve, and its workers do not hold one version")
        if machine.phase is Phase.DONE:
            if not is_serving or world.is_paused or machine.has_failed:
                raise Violation("b", "the refit is done and the engine does not serve")
            if any(worker.stage != SETTLED for worker in world.workers):
                raise Violation("f", "the refit is done and a worker is not")
        if world.has_lost_engine and machine.state is not EngineState.GONE:
            raise Violation("g", f"the engine is gone and said to be {machine.state}")
        nothing_written = not (self.instance.is_stale or (world.is_updated and self.instance.moves))
        if nothing_written and machine.state is not EngineState.GONE and not world.resume_failed:
            if world.is_paused:
                raise Violation("d", "nothing was written and the engine stays paused")
            if not is_serving:
                raise Violation("d", f"nothing was written and the engine is said to be {machine.state}")


def with_mate(world: World, peer: Peer, mate: Trainer | Worker) -> World:
    if isinstance(mate, Trainer):
        return world._replace(trainer=mate)
    workers = world.workers
    return world._replace(workers=(mate, workers[1]) if peer.index == 0 else (workers[0], mate))


def bereft(mate: Trainer | Worker, life: str) -> Trainer | Worker:
    """What it sent and nobody has received goes with it: had it been received, it would have died later."""
    return mate._replace(life=life, inbox=(), outbox=()) if isinstance(mate, Worker) else Trainer(life, ())


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
    """Visit every state once. Raises Violation with the shortest way to one that violates a property."""
    came_from: dict[World, tuple[World, str] | None] = {model.start: None}
    num_ways_in: dict[World, int] = {model.start: 0}
    known = model.machine.known
    ends: set[tuple[Phase, EngineState]] = set()
    queue, order = deque([model.start]), []
    while queue:
        world = queue.popleft()
        try:
            model.check(world)
            steps = list(model.steps(world))
        except Violation as violation:
            raise Violation(*violation.args, trace(came_from, world)) from None
        order.append((world, [new for _, new in steps]))
        machine = known[world.machine]
        if machine.is_finished:
            ends.add((machine.phase, machine.state))
        elif not steps:
            raise Violation("c", "nothing can happen and the refit is not over", trace(came_from, world))
        for label, new in steps:
            num_ways_in[new] = num_ways_in.get(new, 0) + 1
            if new not in came_from:
                came_from[new] = (world, label)
                queue.append(new)
    if not is_acyclic(model.start, dict(order), num_ways_in):
        raise Violation("c", "a run can go on forever")
    return Searched(len(came_from), ends)


def is_acyclic(start: World, following: dict[World, list[World]], num_ways_in: dict[World, int]) -> bool:
    """Whether all states can be put in an order that every step keeps to: then no run is infinite."""
    ready, num_ordered = [start], 0
    while ready:
        num_ordered += 1
        for new in following[ready.pop()]:
            num_ways_in[new] -= 1
            if not num_ways_in[new]:
                ready.append(new)
    return num_ordered == len(following)


def trace(came_from: dict[World, tuple[World, str] | None], world: World) -> str:
    labels = []
    while (origin := came_from[world]) is not None:
        world, label = origin
        labels.append(label)
    return "\n  ".join(["", *reversed(labels)])
