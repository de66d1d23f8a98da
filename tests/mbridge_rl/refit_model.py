"""A model of a refit's peers and engines, for test_model_check.py: all that can happen next in any state of the world.

Rank 0 with its own Fill and Check messages, one more trainer, engines of one or two workers each (they do what
receiver.py does) and the engines' calls, as engines/base.py promises them. Peers deliver in their own order, and there
is no order between peers. A call has two steps, its effect and its return; each may come at any time or, since the
deadline may always pass first, never. On a lane that meets, a transfer happens when all who take part are at it; who
waits for others there may give up at any time. Faults are what the machine has to live with: a process dies, a message
is lost, a peer or a call fails.

The properties, by the letters that errors begin with:

    a  no engine serves torn weights, whatever it is said to be
    b  only what all workers of all engines have committed is published; an engine that is said to serve has one version
       on all workers
    c  every run ends: no dead end, no endless run, no deadline that passes in vain, no second call to a busy engine
    d  if nothing was written (UPDATE was not called, or nothing moves), an engine that served serves again; one that is
       said to be stale is paused
    e  if the attempt fails, everyone is told, once: workers at once, so that the engines' calls end, all when it ends
    f  it is done only after all workers have committed and their devices have copied
    g  an engine that said that it is gone, or lost a worker, is said to be gone
    h  trainers hear of a failure only when no engine that serves still copies from their memory
    i  engines that serve have the same version
    j  an engine is blamed only if something was wrong with it: it, or a message to or from it, was subject to a fault,
       or the deadline passed while it had something to do
    k  an engine that is known to be lost, or to have failed, is blamed; and somebody is when the deadline passes though
       the trainers have done their part (unless workers wait for each other, in a transfer)
    l  what an attempt that failed leaves of the engines that it does not blame can be refitted
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from mbridge_rl.errors import Failure
from mbridge_rl.flows import Flow
from mbridge_rl.messages import (
    Abort,
    AnyMessage,
    Applied,
    Checked,
    Committed,
    Enter,
    Failed,
    Fill,
    Filled,
    Loaded,
    Settled,
    Verification,
)
from mbridge_rl.parties import Side
from mbridge_rl.protocol import Action, Call, EngineCall, EngineState, Lane, Peer, Phase, Refit, Send, Taking

RANK_0, TRAINER = TRAINERS = (Peer("trainer", 0), Peer("trainer", 1))
OLD, NEW = 7, 8
FAILURE, GONE = Failure("EngineLoadError", "moody"), Failure("EngineGoneError", "dead")
BROKEN, ABORTED = Failure("TransportError", "closed"), Failure("EngineStaleError", "aborted")
REPORTS = {"Failed": FAILURE, "FailedTransport": BROKEN, "FailedAborted": ABORTED}
OUTCOMES = {"": None, "raises": Failure("EngineLoadError", "raised"), "is gone": GONE}
PAUSE, UPDATE, CLOSE, RESUME = (
    call.value for call in (EngineCall.PAUSE, EngineCall.UPDATE, EngineCall.CLOSE, EngineCall.RESUME)
)
SLOTS, SLOTS_2, DIRECT, MEETS, MEETS_2 = range(5)
LANES = {
    SLOTS: Lane(1),
    SLOTS_2: Lane(2),
    DIRECT: Lane(2, num_in_flight=1),
    MEETS: Lane(1, meets=True),
    MEETS_2: Lane(2, meets=True),
}


class EngineSpec(NamedTuple):
    lane: int = SLOTS
    num_workers: int = 1
    is_stale: bool = False  # how it starts
    is_wrong: bool = False  # what a check finds


class Instance(NamedTuple):
    """What is searched: one attempt's parameters, and how many faults a run may have."""

    engines: tuple[EngineSpec, ...] = (EngineSpec(num_workers=2),)
    is_checked: bool = False
    moves: bool = True
    faults: int = 2
    is_prompt: bool = False  # no deadline passes


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
    "attempt",
    "moves",
    "last_version",
    "_deadline_s",
    "_drain_s",
    "_trainers",
    "_workers",
    "_told",
    "_deadline",
    "_compare",
    "_check",
}
# Nor of a machine that fails: it only brings the engines' calls to an end.
IGNORED_FAILING = IGNORED | {"version", "verification", "_missing", "_versions", "_flows", "_checked", "_settling"}

SIDE_FIELDS = [field.name for field in dataclasses.fields(Side) if field.name != "workers"]


class Known(NamedTuple):
    """One state of the machine."""

    refit: Refit
    phase: Phase
    states: tuple[EngineState, ...]  # of each engine
    culprits: frozenset[int]
    has_failed: bool
    is_finished: bool
    may_go_on: bool  # with another attempt, as conductor.py does


def frozen(value: Any) -> Any:
    """`value` without what only words or statistics depend on, hashable."""
    match value:
        case set() | frozenset():
            return frozenset(value)
        case dict():
            return frozenset((key, frozen(item)) for key, item in value.items())  # checksums come in any order
        case list():
            return tuple(value)
        case Failure():
            return value.kind
        case Checked() | Verification():
            return type(value).__name__
        case Side():
            return tuple(getattr(value, name) for name in SIDE_FIELDS)
        case Flow():
            return value.is_open, frozen(value.filling), frozen(value.loading)
    return value


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, Side):
        return dataclasses.replace(value)
    if isinstance(value, Flow):
        return dataclasses.replace(
            value, filling=copied(value.filling), loading=copied(value.loading), loans=copied(value.loans)
        )
    return value.copy() if isinstance(value, set | list) else value


def message_of(peer: Peer, token: str, moves: bool) -> AnyMessage:
    """What a peer sends, by the name that it has in the model: the message's class and, if it has them, bucket/lane."""
    if token in REPORTS:
        return Failed(1, dataclasses.replace(REPORTS[token], origin=str(peer)))
    numbers = token.lstrip("ACEFSabcdefghijklmnopqrstuvwxyzL")
    bucket, _, lane = numbers.partition("/")
    match token.removesuffix(numbers):
        case "Enter":
            return Enter(1, NEW if moves else OLD)
        case "Filled":
            return Filled(1, int(bucket), 0.0, lane=int(lane))
        case "Loaded":
            return Loaded(1, int(bucket), 0.0)
        case "Applied":
            return Applied(1, 0.0, 0)
        case "Checked":
            return Checked(1)
        case "Committed":
            return Committed(1, is_settled=not moves)
        case name:
            assert name == "Settled"
            return Settled(1)


def token_of(message: AnyMessage) -> str:
    lane = f"/{message.lane}" if isinstance(message, Fill) else ""
    return f"{type(message).__name__}{getattr(message, 'bucket', '')}{lane}"


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
            engines=[
                Taking(n, e.num_workers, EngineState.STALE if e.is_stale else EngineState.SERVING, e.lane)
                for n, e in enumerate(instance.engines)
            ],
            lanes=LANES,
            num_trainers=len(TRAINERS),
            deadline_s=1.0,
            now=0.0,
            moves=instance.moves,
            check=(0, 1) if instance.is_checked else None,
            compare=self._compare,
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
                    actions = refit.receive(arguments[0], message_of(*arguments, self._instance.moves), 0.0)
                case "tick":
                    actions = refit.tick(refit.deadline)
                case "called":
                    actions = refit.called(arguments[0], OUTCOMES[arguments[1]], 0.0)
                case "lost":
                    actions = refit.lost(arguments[0], "died", 0.0)
                case _:
                    actions = refit.fail(dataclasses.replace(REPORTS[arguments[0]], origin=str(RANK_0)), 0.0)
            self._answers[asked] = self._number(refit), actions
        return self._answers[asked]

    def _compare(self, checked: Mapping[Peer, Checked]) -> Verification:
        engine = next(peer.engine for peer in checked if peer.role == "worker")
        return Verification(1, 1, {"w": "wrong"} if self._instance.engines[engine].is_wrong else {}, {})

    def _number(self, refit: Refit) -> int:
        ignored = IGNORED if refit.failure is None else IGNORED_FAILING
        key = frozenset((name, frozen(value)) for name, value in vars(refit).items() if name not in ignored)
        if key not in self._numbers:
            self._numbers[key] = len(self.known)
            self.known.append(
                Known(
                    refit,
                    refit.phase,
                    tuple(side.state for side in refit.sides.values()),
                    frozenset(refit.culprits),
                    refit.failure is not None,
                    refit.finished,
                    bool(refit.culprits) and refit.lost_trainer is None,
                )
            )
        return self._numbers[key]


# --- the world around it ----------------------------------------------------------------------------------------------

# Lives. A death is seen (pidfd) or not before the next message to the dead is refused. Who was told that the attempt
# failed, or is over, does nothing more in it.
ALIVE, DYING, UNREACHABLE, DEAD, TOLD = "alive", "dying", "unreachable", "dead", "told"
# Stages of a worker; while it waits for a Load the stage is the message's name.
IDLE, LOADED, APPLIED, CHECKED, GAVE_UP = "idle", "loaded", "applied", "checked", "given up"
COMMITTED, SETTLED, UNSETTLED = "committed", "settled", "committed, and its device failed"
HAS_LEFT_RUN = {IDLE, LOADED, GAVE_UP}
HAS_COMMITTED = {COMMITTED, SETTLED, UNSETTLED}
READS_NO_MORE = {GAVE_UP, *HAS_COMMITTED}
HAS_LEFT_CLOSE = {IDLE, *READS_NO_MORE}
LOADS = [f"Load{bucket}" for bucket in range(2)]
AT_TRAINER = 1 << 8  # a fault's bit, beside those of the engines


class Trainer(NamedTuple):
    """It does what it is asked in that order. Answers are under way as soon as they can be given."""

    life: str = ALIVE
    asked: tuple[str, ...] = ("Enter",)
    num_met: int = 0  # buckets that it has sent on a lane that meets


class Worker(NamedTuple):
    stage: str = IDLE
    is_torn: bool = False
    version: int = OLD
    num_met: int = 0  # buckets that it has had on a lane that meets
    inbox: tuple[str, ...] = ()
    outbox: tuple[str, ...] = ()
    life: str = ALIVE


class Engine(NamedTuple):
    workers: tuple[Worker, ...]
    is_paused: bool = False
    call: str = ""  # that it is busy with
    is_effective: bool = False  # the call has done what it does; it has not returned
    is_updated: bool = False  # UPDATE was called
    is_closing: bool = False  # CLOSE has reached the workers
    failed_call: str = ""  # the last call that returned, if it raised
    is_lost: bool = False  # the machine was told that it, or one of its workers, is dead


class World(NamedTuple):
    """One state of everything."""

    machine: int
    trainers: tuple[Trainer, ...]
    engines: tuple[Engine, ...]
    faults: int  # that may still happen
    at_fault: int = 0  # a bit for each engine that a fault has struck, and AT_TRAINER
    aborted: int = 0  # a bit for each of Model.everyone


Label = tuple[object, ...]  # words
Step = tuple[Label, World]


class Model:
    """All that can happen next, in any state of the world."""

    def __init__(
        self, instance: Instance, kind: type[Refit] = Refit, engines: tuple[Engine, ...] | None = None
    ) -> None:
        """`engines`: how they are to begin with, if not as new."""
        self.instance = instance
        self.machine = Machine(instance, kind)
        self.workers = [Peer("worker", i, n) for n, e in enumerate(instance.engines) for i in range(e.num_workers)]
        self.everyone = [*TRAINERS, *self.workers]
        self._lanes = [LANES[engine.lane] for engine in instance.engines]
        self._bits = {peer: 1 << i for i, peer in enumerate(self.everyone)}
        if engines is None:
            engines = tuple(
                Engine((Worker(is_torn=e.is_stale),) * e.num_workers, is_paused=e.is_stale) for e in instance.engines
            )
        wrong = sum(1 << n for n, e in enumerate(instance.engines) if e.is_wrong)
        self.start = World(self.machine.start, (Trainer(), Trainer()), engines, instance.faults, wrong)

    def steps(self, world: World) -> Iterator[Step]:
        if not self.machine.known[world.machine].is_finished:
            if not self.instance.is_prompt:
                yield self._event(world, "tick")
            for trainer in TRAINERS:
                yield from self._trainer(world, trainer)
        for peer in self.workers:
            yield from self._worker(world, peer)
        for number, engine in enumerate(world.engines):
            if engine.call:
                yield from self._engine(world, number, engine)

    def retried(self, world: World) -> tuple[Instance, tuple[Engine, ...]] | None:
        """The next attempt with the engines that are not to blame, as conductor.py makes it; None if it does not."""
        machine = self.machine.known[world.machine]
        if not machine.may_go_on or any(trainer.life != TOLD for trainer in world.trainers):
            return None
        specs, engines = [], []
        for number, engine in enumerate(world.engines):
            if number in machine.culprits:
                continue
            if any(worker.life != ALIVE for worker in engine.workers):
                return None  # it will be noticed
            is_stale = machine.states[number] is EngineState.STALE
            specs.append(self.instance.engines[number]._replace(is_stale=is_stale, is_wrong=False))
            # Messages of the last attempt are told from those of the next, which waits for devices.
            workers = tuple(w._replace(stage=IDLE, num_met=0, inbox=(), outbox=()) for w in engine.workers)
            engines.append(Engine(workers, engine.is_paused))
        instance = self.instance._replace(engines=tuple(specs), faults=0, is_prompt=True)
        return (instance, tuple(engines)) if specs else None

    # -- events, and what follows from them

    def _event(self, world: World, event: str, *arguments: Any) -> Step:
        """Tell the machine, and do what it says."""
        return (event, *arguments), self._told(world, event, *arguments)

    def _told(self, world: World, event: str, *arguments: Any) -> World:
        culprit = self._revealed(event, arguments)
        if culprit is not None and event == "lost":
            world = with_engine(world, culprit, is_lost=True)
        before = self.machine.known[world.machine]
        number, actions = self.machine.answer(world.machine, event, *arguments)
        after = self.machine.known[number]
        if event == "tick":
            if number == world.machine and not before.is_finished:
                raise PropertyError("c", "the deadline passes and nothing comes of it")
            world = self._too_late(world, is_first=not before.has_failed, someone_is_blamed=bool(after.culprits))
        if not before.is_finished:
            if culprit is not None and culprit not in after.culprits:
                raise PropertyError("k", f"engine {culprit} is not blamed: {event} {arguments}")
            for engine in after.culprits - before.culprits:
                if not world.at_fault & 1 << engine:
                    raise PropertyError("j", f"engine {engine} is blamed: {event}")
        world = world._replace(machine=number)
        for action in actions:
            world = self._called(world, action) if isinstance(action, Call) else self._sent(world, action)
        return self._heard(world)

    def _heard(self, world: World) -> World:
        """Drop what can make no difference any more."""
        after = self.machine.known[world.machine]
        if not after.has_failed and not after.is_finished:
            return world
        if after.has_failed:
            needed = self.everyone if after.is_finished else self.workers
            if not all(world.aborted & self._bits[peer] for peer in needed):
                raise PropertyError("e", "the attempt fails and not everyone is told")
        trainers = tuple(Trainer(TOLD if t.life in (ALIVE, TOLD) else DEAD, ()) for t in world.trainers)
        heard = () if after.is_finished else ("Failed",)  # a machine that fails wants to know no more than that
        if any(worker.outbox for engine in world.engines for worker in engine.workers):
            engines = tuple(
                e._replace(
                    workers=tuple(
                        w._replace(outbox=tuple(t for t in w.outbox if t in heard)) if w.outbox else w
                        for w in e.workers
                    )
                )
                for e in world.engines
            )
            world = world._replace(engines=engines)
        return world._replace(trainers=trainers, faults=0 if after.is_finished else world.faults)

    def _revealed(self, event: str, arguments: tuple[Any, ...]) -> int | None:
        """The engine that is to be blamed for this event."""
        match event, arguments:
            case "lost", (Peer(role="worker", engine=engine),):
                return engine
            case "called", (engine, outcome):
                return engine if outcome else None
            case "receive", (Peer(role="worker", engine=engine), "Failed"):
                return engine
        return None

    def _too_late(self, world: World, *, is_first: bool, someone_is_blamed: bool) -> World:
        """The deadline passes: whoever has something to do is at fault."""
        at_fault = world.at_fault
        for number, engine in enumerate(world.engines):
            if self._could_go_on(world, number, engine):
                at_fault |= 1 << number
        for trainer in world.trainers:
            if trainer.life == DYING or (trainer.asked and not self._is_blocked(world, trainer.asked[0])):
                at_fault |= AT_TRAINER
        can_be_told = is_first and not at_fault & AT_TRAINER and not any(lane.meets for lane in self._lanes)
        if can_be_told and not someone_is_blamed:
            raise PropertyError("k", "nobody is blamed, and the trainers have done their part")
        return world._replace(at_fault=at_fault)

    def _could_go_on(self, world: World, number: int, engine: Engine) -> bool:
        if engine.call and (not engine.is_effective or has_ended(engine)):
            return True
        return any(
            w.outbox
            or w.life == DYING
            or (w.life == ALIVE and any(not cost for _, _, cost in self._work(world, w, number)))
            for w in engine.workers
        )

    def _called(self, world: World, action: Call) -> World:
        engine = world.engines[action.engine]
        if engine.call:
            raise PropertyError("c", f"{action.call} is called while the engine is busy with {engine.call}")
        call = action.call.value
        return with_engine(
            world,
            action.engine,
            call=call,
            is_effective=False,
            is_updated=engine.is_updated or call == UPDATE,
        )

    def _sent(self, world: World, action: Send) -> World:
        peer, token = action.peer, token_of(action.message)
        if isinstance(action.message, Abort):
            bit = self._bits[peer]
            if world.aborted & bit:
                raise PropertyError("e", f"{peer} gets a second Abort")
            world = world._replace(aborted=world.aborted | bit)
            if peer.role == "trainer" and any(self._serves_and_copies(world, n) for n in range(len(world.engines))):
                raise PropertyError("h", f"{peer} may change its weights while an engine that serves still copies them")
        mate = mate_of(world, peer)
        if mate.life == UNREACHABLE and token != "Abort":  # as conductor.py does: at once, between two actions
            return self._told(with_mate(world, peer, mate._replace(life=DEAD)), "lost", peer)
        if mate.life != ALIVE:
            return world
        if isinstance(mate, Trainer):
            return world if token == "Abort" else with_mate(world, peer, mate._replace(asked=(*mate.asked, token)))
        if mate.stage in READS_NO_MORE:
            return world
        return with_mate(world, peer, mate._replace(inbox=(*mate.inbox, token)))

    def _serves_and_copies(self, world: World, number: int) -> bool:
        engine = world.engines[number]
        is_known_gone = self.machine.known[world.machine].states[number] is EngineState.GONE
        if engine.is_paused or is_known_gone or engine.failed_call == PAUSE:  # then nothing more can be done
            return False
        return any(worker.life == ALIVE and worker.stage == COMMITTED for worker in engine.workers)

    # -- transfers that several take part in

    def _is_blocked(self, world: World, token: str) -> bool:
        """Whether a trainer that is asked for this waits for another one: they gather first."""
        bucket = bucket_met(token)
        return bucket is not None and not all(has_sent(trainer, bucket) for trainer in world.trainers)

    def _is_complete(self, world: World, number: int, bucket: int) -> bool:
        """Whether all who take part in the transfer of this bucket have begun with it."""
        lane = self.instance.engines[number].lane
        at_it = [
            worker
            for engine, spec in zip(world.engines, self.instance.engines, strict=True)
            if spec.lane == lane
            for worker in engine.workers
        ]
        return all(has_sent(trainer, bucket) for trainer in world.trainers) and all(
            w.num_met > bucket or (w.stage == LOADS[bucket] and w.inbox[:1] == (LOADS[bucket],)) for w in at_it
        )

    # -- who does what

    def _trainer(self, world: World, peer: Peer) -> Iterator[Step]:
        trainer = mate_of(world, peer)
        assert isinstance(trainer, Trainer)
        if trainer.life == ALIVE and trainer.asked:
            token = trainer.asked[0]
            met = bucket_met(token)
            silent = with_mate(world, peer, trainer._replace(asked=trainer.asked[1:]))  # as if it had not been asked
            rest = silent
            if met is not None:
                rest = with_mate(world, peer, trainer._replace(asked=trainer.asked[1:], num_met=met + 1))
            answer = trainers_answer(token)
            if not self._is_blocked(world, token):
                yield self._event(rest, "receive", peer, answer)
            elif not self.instance.is_prompt:
                yield self._fails(silent, peer, "FailedTransport")
            if world.faults:
                faulty = struck(silent, AT_TRAINER)
                yield self._fails(faulty, peer, "Failed")
                if peer != RANK_0:
                    yield (answer, "of", peer, "is lost"), struck(rest, AT_TRAINER)  # or what asked for it
                    if met is not None:
                        yield (token, "to", peer, "is lost"), faulty
        if peer != RANK_0:
            yield from self._death(world, peer, trainer)

    def _fails(self, world: World, peer: Peer, report: str) -> Step:
        return self._event(world, "fail", report) if peer == RANK_0 else self._event(world, "receive", peer, report)

    def _death(self, world: World, peer: Peer, mate: Trainer | Worker) -> Iterator[Step]:
        if mate.life == DYING:
            yield self._event(with_mate(world, peer, mate._replace(life=DEAD)), "lost", peer)
        if mate.life == ALIVE and world.faults:
            rest = struck(world, bit_of(peer))
            yield (peer, "dies"), with_mate(rest, peer, bereft(mate, DYING))
            yield (peer, "dies unseen"), with_mate(rest, peer, bereft(mate, UNREACHABLE))

    def _worker(self, world: World, peer: Peer) -> Iterator[Step]:
        worker = mate_of(world, peer)
        assert isinstance(worker, Worker)
        machine = self.machine.known[world.machine]
        if not machine.is_finished:
            yield from self._death(world, peer, worker)
        if worker.life != ALIVE:
            return
        if not machine.is_finished and worker.outbox:
            rest = with_mate(world, peer, worker._replace(outbox=worker.outbox[1:]))
            yield self._event(rest, "receive", peer, worker.outbox[0])
            if world.faults:
                yield (worker.outbox[0], "of", peer, "is lost"), struck(rest, bit_of(peer))
        if world.faults and worker.inbox:
            rest = struck(world, bit_of(peer))
            yield (
                (worker.inbox[0], "to", peer, "is lost"),
                with_mate(rest, peer, worker._replace(inbox=worker.inbox[1:])),
            )
        for label, after, cost in self._work(world, worker, peer.engine):
            if (cost == FAULT and not world.faults) or (cost == IMPATIENCE and self.instance.is_prompt):
                continue
            rest = struck(world, bit_of(peer)) if cost == FAULT else world
            if machine.has_failed and after.outbox and after.outbox[-1] != "Failed":
                after = after._replace(outbox=worker.outbox)
            yield (peer, label), with_mate(rest, peer, after if not machine.is_finished else after._replace(outbox=()))

    def _work(self, world: World, worker: Worker, number: int) -> Iterator[tuple[str, Worker, str]]:
        """What receiver.py may do next, and at what cost."""
        stage, lane = worker.stage, self._lanes[number]
        if stage == LOADED and world.engines[number].is_closing:
            yield "applies", after(worker, APPLIED, "Applied"), ""
            yield "fails to apply", giving_up(worker, "Failed"), FAULT
        if stage == COMMITTED and self.instance.moves:
            yield "settles", after(worker, SETTLED, "Settled"), ""
            yield "fails to settle", after(worker, UNSETTLED, "Failed"), FAULT
        if stage in READS_NO_MORE or stage in (IDLE, LOADED):
            return
        yield "fails", giving_up(worker, "Failed"), FAULT  # in what it was told to do
        if not worker.inbox:
            return
        token, rest = worker.inbox[0], worker._replace(inbox=worker.inbox[1:])
        if token == stage and lane.meets and not self._is_complete(world, number, int(stage[-1])):
            aborted = "Abort" in worker.inbox
            yield "gives up a transfer", giving_up(worker, "FailedTransport"), "" if aborted else IMPATIENCE
        elif token == stage:  # the Load that it waits for
            bucket = int(stage[-1]) + 1
            following = f"Load{bucket}" if bucket < lane.num_buckets else LOADED
            rest = rest._replace(num_met=bucket if lane.meets else 0)
            yield f"takes {token}", after(rest, following, f"Loaded{bucket - 1}"), ""
        elif token == "Check" and stage == APPLIED:
            yield "checks", after(rest, CHECKED, "Checked"), ""
        elif token == "Commit" and stage in (APPLIED, CHECKED):
            last, version = (COMMITTED, NEW) if self.instance.moves else (SETTLED, worker.version)
            yield "commits", after(rest._replace(is_torn=False, version=version, inbox=()), last, "Committed"), ""
        else:
            yield f"gives up: {token} came", giving_up(worker, "FailedAborted" if token == "Abort" else "Failed"), ""

    def _engine(self, world: World, number: int, engine: Engine) -> Iterator[Step]:
        call = engine.call
        if not engine.is_effective:
            yield (call, "of", number, "takes effect"), self._effect(world, number, engine)
        if self.machine.known[world.machine].is_finished:
            return
        returned = partial(with_engine, world, number, call="", is_effective=False)
        if engine.is_effective and has_ended(engine):
            yield self._event(returned(failed_call=""), "called", number, "")
        if world.faults:
            rest = struck(returned(failed_call=call), 1 << number)
            yield self._event(rest, "called", number, "raises")
        is_dead = any(worker.life != ALIVE for worker in engine.workers)
        if world.faults or is_dead:
            rest = returned(failed_call="", is_lost=True)
            yield self._event(struck(rest, 1 << number) if world.faults else rest, "called", number, "is gone")

    def _effect(self, world: World, number: int, engine: Engine) -> World:
        match engine.call:
            case "pause":
                return with_engine(world, number, is_effective=True, is_paused=True)
            case "update":
                moves = self.instance.moves
                first = "Load0" if moves else LOADED
                begun = tuple(
                    w._replace(stage=first, is_torn=moves or w.is_torn) if w.life == ALIVE else w
                    for w in engine.workers
                )
                return with_engine(world, number, is_effective=True, workers=begun)
            case "close_session":
                return with_engine(world, number, is_effective=True, is_closing=True)
            case _:
                publishes = self.instance.moves and not self.machine.known[world.machine].has_failed
                workers = [worker for each in world.engines for worker in each.workers]
                if publishes and not all(worker.stage in HAS_COMMITTED for worker in workers):
                    raise PropertyError("b", "a version is published that not all workers have committed")
                return with_engine(world, number, is_effective=True, is_paused=False)

    # -- what must hold

    def check(self, world: World) -> None:
        """Raise PropertyError if a property does not hold in this state."""
        machine = self.machine.known[world.machine]
        served: set[int] = set()
        for number, engine in enumerate(world.engines):
            living = [worker for worker in engine.workers if worker.life == ALIVE]
            if not engine.is_paused and any(worker.is_torn for worker in living):
                raise PropertyError("a", f"an engine serves torn weights and is said to be {machine.states[number]}")
            is_gone = engine.is_lost or machine.states[number] is EngineState.GONE
            if not engine.is_paused and not is_gone and engine.failed_call != PAUSE:
                served.update(worker.version for worker in living)
            if machine.is_finished:
                self._check_end(machine, machine.states[number], self.instance.engines[number], engine, living)
        if len(served) > 1:
            raise PropertyError("i", "engines serve two versions")

    def _check_end(
        self, machine: Known, state: EngineState, spec: EngineSpec, engine: Engine, living: list[Worker]
    ) -> None:
        is_serving = state is EngineState.SERVING
        is_torn = any(worker.is_torn for worker in living)
        if engine.call and state is not EngineState.GONE:
            raise PropertyError("c", f"the attempt is over and an engine is still busy with {engine.call}")
        if is_serving and (is_torn or len({worker.version for worker in living}) > 1):
            raise PropertyError("b", "an engine is said to serve, and its workers do not hold one version")
        if machine.phase is Phase.DONE:
            if not is_serving or engine.is_paused or machine.has_failed:
                raise PropertyError("b", "the refit is done and an engine does not serve")
            if any(worker.stage != SETTLED for worker in engine.workers):
                raise PropertyError("f", "the refit is done and a worker is not")
            if self.instance.moves and any(worker.version != NEW for worker in engine.workers):
                raise PropertyError("b", "the refit is done and a worker has the old version")
        if engine.is_lost and state is not EngineState.GONE:
            raise PropertyError("g", f"an engine is gone and said to be {state}")
        if state is EngineState.STALE and not engine.is_paused and engine.failed_call != PAUSE:
            raise PropertyError("d", "an engine is said to be stale and not paused")
        nothing_written = not (spec.is_stale or (engine.is_updated and self.instance.moves))
        if nothing_written and state is not EngineState.GONE and engine.failed_call != RESUME:
            if engine.is_paused:
                raise PropertyError("d", "nothing was written and an engine stays paused")
            if not is_serving:
                raise PropertyError("d", f"nothing was written and an engine is said to be {state}")


FAULT, IMPATIENCE = "a fault", "waiting too long"


def mate_of(world: World, peer: Peer) -> Trainer | Worker:
    return world.trainers[peer.index] if peer.role == "trainer" else world.engines[peer.engine].workers[peer.index]


def with_mate(world: World, peer: Peer, mate: Trainer | Worker) -> World:
    if isinstance(mate, Trainer):
        return world._replace(trainers=replaced(world.trainers, peer.index, mate))
    return with_engine(world, peer.engine, workers=replaced(world.engines[peer.engine].workers, peer.index, mate))


def with_engine(world: World, number: int, **fields: Any) -> World:
    return world._replace(engines=replaced(world.engines, number, world.engines[number]._replace(**fields)))


def replaced(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


def struck(world: World, bit: int) -> World:
    """One fault less to come."""
    return world._replace(faults=world.faults - 1, at_fault=world.at_fault | bit)


def bit_of(peer: Peer) -> int:
    return AT_TRAINER if peer.role == "trainer" else 1 << peer.engine


def bereft(mate: Trainer | Worker, life: str) -> Trainer | Worker:
    """What it sent and nobody has received goes with it: had it been received, it would have died later."""
    if isinstance(mate, Worker):
        return mate._replace(life=life, inbox=(), outbox=())
    return mate._replace(life=life, asked=())


def after(worker: Worker, stage: str, message: str) -> Worker:
    return worker._replace(stage=stage, outbox=(*worker.outbox, message))


def giving_up(worker: Worker, report: str) -> Worker:
    return worker._replace(stage=GAVE_UP, inbox=(), outbox=(*worker.outbox, report))


def has_ended(engine: Engine) -> bool:
    """Whether the workers let the call return."""
    living = {worker.stage for worker in engine.workers if worker.life == ALIVE}
    return {UPDATE: living <= HAS_LEFT_RUN, CLOSE: living <= HAS_LEFT_CLOSE}.get(engine.call, True)


def trainers_answer(token: str) -> str:
    return {"Check": "Checked", "Enter": "Enter"}.get(token) or token.replace("Fill", "Filled")


def bucket_met(token: str) -> int | None:
    """The bucket that a trainer is asked to fill, if that is on a lane that meets."""
    bucket, slash, lane = token.removeprefix("Fill").partition("/")
    return int(bucket) if slash and LANES[int(lane)].meets else None


def has_sent(trainer: Trainer, bucket: int) -> bool:
    """Whether it sends this bucket, or has sent it."""
    return trainer.num_met > bucket or any(bucket_met(token) == bucket for token in trainer.asked[:1])


# --- the search -------------------------------------------------------------------------------------------------------


class Searched(NamedTuple):
    num_states: int
    ends: set[tuple[Phase, tuple[EngineState, ...]]]
    retries: dict[tuple[Instance, tuple[Engine, ...]], int]  # attempts that may follow, each with a state before it


def search(model: Model) -> Searched:
    """Visit every state once. Raises PropertyError with the shortest way to one that violates a property."""
    was_enabled = gc.isenabled()
    gc.disable()  # many small tuples, no cycles: collecting would take most of the time
    try:
        return _search(model)
    finally:
        if was_enabled:
            gc.enable()


def _search(model: Model) -> Searched:
    numbers = {model.start: 0}
    worlds = [model.start]
    came_from: list[tuple[int, Label]] = [(0, ())]
    following: list[list[int]] = []
    ends = set()
    retries: dict[tuple[Instance, tuple[Engine, ...]], int] = {}
    for number, world in enumerate(worlds):  # which grow
        machine = model.machine.known[world.machine]
        try:
            model.check(world)
            steps = list(model.steps(world))
            if machine.is_finished:
                ends.add((machine.phase, machine.states))
                retry = model.retried(world)
                if retry is not None:
                    retries.setdefault(retry, number)
            elif not steps:
                raise PropertyError("c", "nothing can happen and the attempt is not over")
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
    for retry, number in retries.items():
        check_retry(*retry, type(model.machine.known[0].refit), trace(came_from, number))
    return Searched(len(worlds), ends, retries)


def check_retry(instance: Instance, engines: tuple[Engine, ...], kind: type[Refit], before: str) -> None:
    """The attempt after the one that `before` tells of must succeed if nothing else goes wrong."""
    try:
        searched = search(Model(instance, kind, engines))
    except PropertyError as error:
        raise PropertyError("l", "the next attempt goes wrong", *error.args, before) from None
    if searched.ends != {(Phase.DONE, (EngineState.SERVING,) * len(engines))}:
        raise PropertyError("l", f"the next attempt ends in {searched.ends}", before)


def is_acyclic(following: list[list[int]]) -> bool:
    """Whether all states can be put in an order that every step keeps to: then no run is infinite."""
    num_ways_in = [0] * len(following)
    for news in following:
        for new in news:
            num_ways_in[new] += 1
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
