"""The faults that a refit must survive, as a table, and trainer ranks that go through it one fault after the other.

Trainer ranks and engine workers are real processes. Faults are planted in the worker (worker_engine.Sharded.plan) or in
a trainer's `_fill`, at a chosen tensor or bucket. Each rank writes down what it saw; test_faults.py judges it.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import zmq

from mbridge_rl import SyncReport, WeightSyncer
from mbridge_rl.control import Link
from mbridge_rl.errors import Failure, SyncError
from mbridge_rl.hosts import host_id
from mbridge_rl.lanes import LOCAL
from mbridge_rl.messages import Fill, Filled, Hello, Loan
from mbridge_rl.protocol import EngineState
from tests.mbridge_rl.fakes import FakeBridge
from tests.mbridge_rl.test_sync import BUCKET_BYTES, GROUPS, shapes, weights
from tests.mbridge_rl.worker_engine import ProcessEngine, drop_connections, flip

DEADLINE_S = 8.0  # more than the 5 s that a connection takes where no name server answers (TCPStore asks it)
# After a missed deadline, the engine's own calls are waited for (protocol.DRAIN_S), and ranks hear of it.
GRACE_S = 8.0
LANES: dict[str, dict[str, Any]] = {
    "bucket": {"path": "bucket", "transport": "shared_memory"},
    "direct": {"path": "direct", "transport": "shared_memory"},
    "collective": {"transport": "collective"},
}
MODES = ("one engine", "raise", "quarantine")
VICTIM = 1  # index of the worker to which faults happen, in an engine of two


class Named(ProcessEngine):
    """An engine with a name of its own."""

    def __init__(self, name: str, num_workers: int = 2, *, has_front_end: bool = False) -> None:
        self._name = name
        super().__init__(shapes(), num_workers, has_front_end=has_front_end)

    @property
    def name(self) -> str:
        return self._name

    def holds(self, version: int) -> bool:
        """Whether all workers hold exactly the weights of `version`, each its share."""
        wanted, found = weights(version), self.tensors()
        for index, tensors in enumerate(found):
            for name, whole in wanted.items():
                rows = whole.shape[0] if whole.dim() else 0
                if rows and rows % len(found) == 0:
                    whole = whole[index * rows // len(found) : (index + 1) * rows // len(found)]
                if not torch.equal(tensors[name], whole):
                    return False
        return True

    @property
    def serves(self) -> bool:
        """Whether it was resumed since it was last paused."""
        paused = [i for i, call in enumerate(self.calls) if call.startswith("pause")]
        return not paused or "resume" in self.calls[paused[-1] :]


class Staged(WeightSyncer):
    """Something may happen before or after a chosen bucket is filled, once."""

    cues: dict[tuple[str, int], Callable[[], None]]

    def _fill(self, message: Fill, breathe: Callable[[], None]) -> Loan | None:
        self.cues.pop(("before", message.bucket), _nothing)()
        loan = super()._fill(message, breathe)
        self.cues.pop(("after", message.bucket), _nothing)()
        return loan

    @property
    def hub_endpoint(self) -> tuple[str, str]:
        """Rank 0's: where it listens, and the token."""
        hub = self._side.hub  # type: ignore[union-attr]
        return hub.endpoint, hub.token

    @property
    def link_endpoint(self) -> str:
        """Another rank's: where it is connected to."""
        return self._side._link._socket.getsockopt_string(zmq.LAST_ENDPOINT)  # type: ignore[union-attr]

    def bucket_slot(self, bucket: int) -> torch.Tensor:
        return self._lanes._transports[LOCAL].slot(bucket % 2)


def _nothing() -> None:
    """No cue."""


@dataclass
class Stage:
    """One trainer rank and what it has at hand when a fault is planted."""

    rank: int
    lane: str
    syncer: Staged
    victim: Named  # of the fleet; only rank 0 may call it
    notes: list[str] = field(default_factory=list)  # what is wrong, seen on the way

    @property
    def num_buckets(self) -> int:
        return 2 if self.lane == "direct" else self.syncer.layout.num_buckets

    def bucket(self, where: str) -> int:
        last = self.num_buckets - 1
        return {"first": 0, "middle": last // 2, "last": last}[where]

    def at(self, when: str, where: str, act: Callable[[], None]) -> None:
        self.syncer.cues[when, self.bucket(where)] = act


Plant = Callable[[Stage], None]


@dataclass(frozen=True)
class Fault:
    """`plant` is called on every rank. `error` None: the refit succeeds all the same."""

    name: str
    plant: Plant
    error: str | None = None  # class
    says: str = ""  # pattern of the message
    origin: str = ""  # pattern
    tensor: str | None = None
    phases: tuple[str, ...] = ("stream",)
    is_engines: bool = True  # an engine is to blame
    is_everyones: bool = False  # so are all others
    left: EngineState = EngineState.STALE  # the culprit
    is_replaced: bool = False  # the engine is lost: another comes in its place
    is_settled: bool = False  # in a refit that is not the first after another fault, but the third
    verify: Any = None
    interrupted_rank: int | None = None
    seconds: float = DEADLINE_S  # in which all ranks must know
    lanes: tuple[str, ...] = tuple(LANES)
    modes: tuple[str, ...] = MODES


def in_worker(moment: str, fault: str) -> Plant:
    def plant(stage: Stage) -> None:
        if stage.rank == 0:
            stage.victim.set(VICTIM, plan={moment: fault})

    return plant


def in_trainer(rank: int, where: str, act: Callable[[Stage], None], when: str = "before") -> Plant:
    def plant(stage: Stage) -> None:
        if stage.rank == rank:
            stage.at(when, where, lambda: act(stage))

    return plant


def kill_front_end(stage: Stage) -> None:
    assert stage.victim.front_end_pid is not None
    os.kill(stage.victim.front_end_pid, signal.SIGKILL)


def interrupt(stage: Stage) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)  # never to the end: Python raises KeyboardInterrupt here
    stage.notes.append("Ctrl-C had no effect")


def drop(stage: Stage) -> None:
    endpoint = stage.syncer.link_endpoint
    if not drop_connections(endpoint):
        stage.notes.append(f"no connection to {endpoint}")


def flip_in_slot(stage: Stage) -> None:
    flip(stage.syncer.bucket_slot(stage.bucket("first"))[:1])


def intrude(stage: Stage) -> None:
    """Messages of someone who does not know the token."""
    endpoint, token = stage.syncer.hub_endpoint
    wrong = token[:-1] + ("0" if token[-1] != "0" else "1")
    link = Link(endpoint, wrong, hub_pid=os.getpid(), hub_host=host_id())
    link.send(Hello("worker", 0, os.getpid(), host_id()))
    link.send(Filled(1, 1, 0.0))
    link.close()


def sync_again(stage: Stage) -> None:
    """From another thread, in the middle of a refit."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            stage.syncer.sync()
        except SyncError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    if not raised or "another call of this WeightSyncer is under way" not in str(raised[0]):
        stage.notes.append(f"a second sync() in the middle of one: {raised}")


WORKER = rf"engine worker {VICTIM}"
FAULTS = (
    # Engines that stay alive.
    Fault(
        "loader raises at the first tensor",
        in_worker("load embed", "raise"),
        "EngineLoadError",
        "the engine failed to load: ValueError: poisoned",
        WORKER,
        "embed",
    ),
    Fault(
        "loader raises at the last tensor",
        in_worker("load head", "raise"),
        "EngineLoadError",
        "the engine failed to load: ValueError: poisoned",
        WORKER,
        "head",
    ),
    Fault(
        "engine raises before the first tensor",
        in_worker("begin", "raise"),
        "EngineLoadError",
        "poisoned",
        WORKER,
        is_settled=True,
    ),
    Fault(
        "finish raises",
        in_worker("finish", "raise"),
        "EngineLoadError",
        "the engine failed to finish a refit: ValueError: poisoned",
        WORKER,
        is_settled=True,
    ),
    Fault(
        "out of memory",
        in_worker("load layers.1.experts", "run out of memory"),
        "EngineLoadError",
        "OutOfMemoryError: CUDA out of memory",
        WORKER,
        "layers.1.experts",
    ),
    Fault(
        "corrupted on its way to one worker",
        in_worker("load layers.1.experts", "flip"),
        "VerifyError",
        "1 tensors of the engine are wrong",
        tensor="layers.1.experts",
        phases=("check",),
        verify="full",
        is_settled=True,
        lanes=("bucket", "collective"),
    ),
    Fault(
        "corrupted bucket",
        in_trainer(0, "first", flip_in_slot, when="after"),
        "VerifyError",
        r"\d tensors of the engine are wrong",
        phases=("check",),
        verify="full",
        is_everyones=True,
        lanes=("bucket",),
    ),
    Fault(
        "corrupted on the direct path",
        in_worker("finish", "flip here"),
        "VerifyError",
        "1 tensors of the engine are wrong",
        tensor="embed",
        phases=("check",),
        verify="full",
        is_settled=True,
        lanes=("direct",),
    ),
    Fault("wrong token", in_trainer(0, "middle", intrude), is_engines=False, modes=("raise",)),
    Fault("sync started twice", in_trainer(0, "middle", sync_again), is_engines=False),
    Fault("sync started twice on rank 1", in_trainer(1, "middle", sync_again), is_engines=False),
    Fault(
        "Ctrl-C in rank 0 at the first bucket",
        in_trainer(0, "first", interrupt),
        "SyncError",
        "trainer rank 0 left the refit: KeyboardInterrupt",
        "trainer rank 0",
        phases=("pause", "stream"),
        is_engines=False,
        interrupted_rank=0,
    ),
    Fault(
        "Ctrl-C in rank 0 at the last bucket",
        in_trainer(0, "last", interrupt),
        "SyncError",
        "trainer rank 0 left the refit: KeyboardInterrupt",
        "trainer rank 0",
        is_engines=False,
        interrupted_rank=0,
    ),
    Fault(
        "Ctrl-C in rank 1",
        in_trainer(1, "middle", interrupt),
        "SyncError",
        "KeyboardInterrupt",
        "trainer rank 1",
        phases=("pause", "stream"),
        is_engines=False,
        interrupted_rank=1,
    ),
    # Engines that are lost.
    Fault(
        "front end killed",
        in_trainer(0, "middle", kill_front_end),
        "EngineGoneError",
        "start a new engine|a worker is gone",
        left=EngineState.GONE,
        phases=("pause", "stream"),  # on the direct path the first step is filled while the engine pauses
        is_replaced=True,
    ),
    Fault(
        "worker killed at the first tensor",
        in_worker("load embed", "kill"),
        "EngineGoneError",
        "start a new engine|a worker is gone",
        left=EngineState.GONE,
        is_replaced=True,
    ),
    Fault(
        "worker killed at the end",
        in_worker("finish", "kill"),
        "EngineGoneError",
        "start a new engine|a worker is gone",
        left=EngineState.GONE,
        is_replaced=True,
        is_settled=True,
    ),
    Fault(
        "worker's connection dropped",
        in_worker("load layers.1.experts", "drop"),
        "EngineGoneError",
        "has no connection any more; start a new engine",
        WORKER,
        left=EngineState.GONE,
        is_replaced=True,
    ),
    Fault(
        "worker stopped",
        in_worker("load layers.1.experts", "stop"),
        "DeadlineError",
        # On the collective lane another worker's own deadline may come first.
        rf"nothing happened for {DEADLINE_S:g} s while waiting for .*{WORKER}|waited {DEADLINE_S:g} s for bucket",
        left=EngineState.GONE,
        is_replaced=True,
        seconds=DEADLINE_S + GRACE_S,
    ),
)
NUM_REPLACED = sum(fault.is_replaced for fault in FAULTS)


@dataclass
class Seen:
    """What one rank saw of one fault."""

    fault: str
    rank: int
    seconds: float
    error: str | None = None  # class; None if the refit succeeded
    message: str = ""
    failure: Failure | None = None
    quarantined: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def judge(fault: Fault, mode: str, ranks: list[Seen]) -> Iterator[str]:
    """What is wrong with what the ranks saw of one fault."""
    for seen in ranks:
        yield from (f"rank {seen.rank}: {problem}" for problem in seen.problems)
        if seen.fault != fault.name:
            yield f"rank {seen.rank} played {seen.fault}"
        if seen.seconds > fault.seconds:
            yield f"rank {seen.rank} knew after {seen.seconds:.1f} s, expected {fault.seconds:g} s"
    if fault.error is None or (mode == "quarantine" and fault.is_engines and not fault.is_everyones):
        yield from _judge_success(fault, ranks)
        return
    for seen in ranks:
        if seen.rank == fault.interrupted_rank:
            if seen.error != "KeyboardInterrupt":
                yield f"rank {seen.rank} was interrupted, but raised {seen.error}: {seen.message}"
            continue
        if seen.error != fault.error or not re.search(fault.says, seen.message):
            yield f"rank {seen.rank} raised {seen.error}: {seen.message}; expected {fault.error}: {fault.says}"
        failure = seen.failure
        if failure is not None:
            if not re.search(fault.origin, failure.origin):
                yield f"it began in {failure.origin!r}, expected {fault.origin!r}"
            tensor = (failure.tensor or "").partition(" of engine ")[0]
            if failure.phase not in fault.phases or fault.tensor not in (None, tensor):
                yield f"phase {failure.phase}, tensor {failure.tensor}; expected {fault.phases}, {fault.tensor}"
            if mode == "raise" and fault.is_engines and not re.search(r"beta|spare|of engine \d", str(failure)):
                yield f"the engine is not named: {failure}"
    if len({(seen.error, seen.message) for seen in ranks if seen.rank != fault.interrupted_rank}) > 1:
        yield f"the ranks differ: {[seen.message for seen in ranks]}"


def _judge_success(fault: Fault, ranks: list[Seen]) -> Iterator[str]:
    for seen in ranks:
        if seen.error is not None:
            yield f"rank {seen.rank} raised {seen.error}: {seen.message}"
        reasons = list(seen.quarantined.values())
        if len(reasons) != (fault.error is not None) or any(not re.search(fault.says, reason) for reason in reasons):
            yield f"rank {seen.rank}: left behind {seen.quarantined}, expected one: {fault.says}"


class Inventory:
    """What this process holds: open files by kind, and threads."""

    def __init__(self) -> None:
        self.files = Counter(open_files())
        self.num_threads = len(os.listdir("/proc/self/task"))

    def growth(self, num_sockets: int = 0, patience_s: float = 5.0) -> str:
        """What has come to it beside `num_sockets`, once threads have had time to end; "" if nothing."""
        end = time.monotonic() + patience_s
        while True:
            now = Inventory()
            more = now.files - self.files
            num_files = now.files.total() - self.files.total() - num_sockets
            num_threads = now.num_threads - self.num_threads
            if num_files <= 0 and num_threads <= 0:
                return ""
            if time.monotonic() >= end:
                threads = sorted(thread.name for thread in threading.enumerate())
                return f"{num_files} files, {num_threads} threads more; new files: {dict(more)}, threads: {threads}"
            time.sleep(0.02)


def open_files() -> Iterator[str]:
    """Of each open file, what it is."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile, as the listing's own
            yield os.readlink(f"/proc/self/fd/{name}").partition(":[")[0]


def leftovers(pids: Sequence[int], directory: Path) -> list[str]:
    """What processes that have ended left behind: files in shared memory, directories of sockets, processes."""
    found = [f"process {pid}" for pid in pids if psutil.pid_exists(pid) and is_running(pid)]
    for pid in pids:
        found += [str(path) for path in Path("/dev/shm").glob(f"*_{pid}_*")]
        found += [str(path) for path in Path("/dev/shm").glob(f"mbridge-{pid}-*")]
    return found + [str(path) for path in directory.glob("mbridge-*")]


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def use_directory(directory: Path) -> None:
    """For this process's sockets."""
    os.environ["TMPDIR"] = tempfile.tempdir = str(directory)


class Player:
    """One trainer rank that goes through faults."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        lane: str,
        mode: str,
        fleet: Sequence[Named],
        spares: Iterator[Named] = iter(()),  # noqa: B008  it is empty
        *,
        step: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.lane, self.mode = rank, lane, mode
        self.fleet, self.spares = list(fleet), spares
        self.bridge = FakeBridge(weights(1), rank, num_ranks, groups=GROUPS)
        self.num_refits = 0
        self.num_listeners = 0  # of Unix sockets, beside the first
        self.step = step  # of the weights; not always that of the version
        on_error: Any = "quarantine" if mode == "quarantine" else "raise"
        control = "tcp://127.0.0.1:*" if mode == "raise" else None
        engines = self.fleet if rank == 0 else None
        self.syncer = Staged(
            self.bridge,
            engines,
            deadline_s=DEADLINE_S,
            bucket_bytes=BUCKET_BYTES,
            on_error=on_error,
            control_address=control,
            group=group,
            **LANES[lane],
        )
        self.syncer.cues = {}

    @property
    def victim(self) -> Named:
        return self.fleet[-1]

    def change_weights(self) -> None:
        self.step += 1
        self.bridge.set(weights(self.step))

    def refit(self, verify: Any = None) -> SyncReport:
        """One that must succeed, and be exact."""
        self.change_weights()
        self.num_refits += 1
        report = self.syncer.sync(verify=verify)
        if self.rank == 0:
            for engine in self.fleet:
                assert engine.holds(self.step), f"{engine.name} does not hold the weights that it was sent"
                assert engine.serves and engine.state is EngineState.SERVING, (engine.name, engine.calls[-6:])
                assert engine.status() == [(self.syncer.version, False)] * engine.num_workers()
        return report

    def play(self, fault: Fault) -> Seen:
        if fault.is_settled:
            self.refit("full")
            self.refit("full")
        elif self.lane == "direct":  # its loader is asked only in the first refit
            self.syncer.remove_engine(self.victim)
            self.add(self.victim, refit=False)
        stage = Stage(self.rank, self.lane, self.syncer, self.victim)
        before = self.syncer.version
        fault.plant(stage)
        self.change_weights()
        seen = self.attempt(fault.name, fault.verify)
        self.syncer.cues.clear()
        seen.problems += stage.notes
        if self.rank == 0:
            seen.problems += self.judge_engines(fault, is_failed=seen.error is not None, before=before)
        return seen

    def add(self, engine: Named, *, refit: bool = True) -> None:
        self.syncer.add_engine(engine, refit=refit)
        # For each, rank 0 listens at another name; ZMQ cannot leave the last one without the connections made there.
        self.num_listeners += self.rank == 0 and self.mode != "raise"

    def attempt(self, name: str, verify: Any = None) -> Seen:
        """A refit, whatever comes of it."""
        self.num_refits += 1
        started, seen = time.monotonic(), Seen(name, self.rank, 0.0)
        try:
            seen.quarantined = self.syncer.sync(verify=verify).quarantined
        except SyncError as error:
            seen.error, seen.message, seen.failure = type(error).__name__, str(error), error.failure
        except KeyboardInterrupt as error:
            seen.error = type(error).__name__
        seen.seconds = time.monotonic() - started
        return seen

    def judge_engines(self, fault: Fault, *, is_failed: bool, before: int) -> list[str]:
        """Nobody serves torn weights; the culprit is as it should be."""
        problems = []
        for engine in self.fleet:
            is_culprit = fault.is_engines and (fault.is_everyones or engine is self.victim)
            wanted, version, step = EngineState.SERVING, self.syncer.version, self.step
            if is_culprit:
                wanted = fault.left
            elif is_failed and "pause" in fault.phases and engine.state is EngineState.SERVING:
                version, step = before, self.step - 1  # nothing was written yet: it goes on with what it had
            elif is_failed:
                wanted = EngineState.STALE
            if engine.state is not wanted or engine.serves is not (wanted is EngineState.SERVING):
                problems.append(f"{engine.name} is {engine.state}, expected {wanted}; calls: {engine.calls[-5:]}")
            if engine.state is EngineState.GONE:
                continue
            is_stale = engine.state is EngineState.STALE
            expected = (before if is_stale else version, is_stale)
            if engine.status() != [expected] * engine.num_workers():
                problems.append(f"workers of {engine.name}: {engine.status()}, expected {expected}")
            if not is_stale and not engine.holds(step):
                problems.append(f"{engine.name} serves other weights than it was sent")
            planned = [plan for plan in engine.planned() if plan]
            if planned:
                problems.append(f"{planned} did not happen to {engine.name}")
        return problems

    def recover(self, fault: Fault) -> None:
        if fault.is_replaced:
            lost = self.fleet.pop()
            if self.rank == 0:
                for pid in lost.pids:
                    end_process(pid)
            self.syncer.remove_engine(lost)
            lost.stop()
            self.fleet.append(next(self.spares))
            self.add(self.victim, refit=False)
        elif fault.is_engines and self.mode == "quarantine":
            for engine in self.fleet if fault.is_everyones else [self.victim]:
                self.add(engine)
        self.refit()


def end_process(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def play_all(
    rank: int,
    num_ranks: int,
    lane: str,
    mode: str,
    fleet: Sequence[Named],
    spares: Sequence[Named],
    directory: Path,
    names: Sequence[str],
) -> tuple[list[Seen], int]:
    """All faults one after the other, by one syncer. Each is followed by a refit that must succeed and be exact."""
    use_directory(directory)
    player = Player(rank, num_ranks, lane, mode, fleet, iter(spares))
    for _ in range(3):
        player.refit("full")
    inventory, found = Inventory(), []
    others = player.fleet[:-1] if rank == 0 else []
    before = [engine.usage() for engine in others]
    for fault in FAULTS:
        if lane not in fault.lanes or mode not in fault.modes or (names and fault.name not in names):
            continue
        seen = player.play(fault)
        found.append(seen)
        try:
            player.recover(fault)
        except (SyncError, AssertionError) as error:
            seen.problems.append(f"no recovery: {type(error).__name__}: {error}")
            break
        leak = inventory.growth(player.num_listeners)
        if leak:
            seen.problems.append(f"leak: {leak}")
            inventory, player.num_listeners = Inventory(), 0
        for engine, was in zip(others, before, strict=True):
            for index, (old, new) in enumerate(zip(was, engine.usage(), strict=True)):
                if new.num_files > old.num_files or new.num_threads > old.num_threads:
                    seen.problems.append(f"leak in worker {index} of {engine.name}: {old} became {new}")
        total = torch.ones(1)
        dist.all_reduce(total)  # the application's own group
        if total.item() != num_ranks:
            seen.problems.append(f"the application's group added up to {total.item()}")
    player.syncer.close()
    return found, os.getpid()


def outlive(
    rank: int,
    num_ranks: int,
    lane: str,
    mode: str,
    fleet: Sequence[Named],
    directory: Path,
    victim: int,
    where: str,
    act: Callable[[Stage], None],
    survivors: Sequence[int],
) -> tuple[Seen, int]:
    """Trainer rank `victim` meets its fate at a bucket; the survivors build a new syncer, which takes the engines over.

    Returns what this rank saw, and its process.
    """
    use_directory(directory)
    group: Any = dist.new_group(list(survivors))  # the application's
    (directory / f"pid-{rank}").write_text(str(os.getpid()))
    first = Player(rank, num_ranks, lane, mode, fleet)
    first.refit("full")
    first.syncer.close()
    if rank in survivors:
        dist.barrier(group)
    inventory = Inventory()  # what is made once for a process is there
    player = Player(rank, num_ranks, lane, mode, fleet, step=first.step)
    for _ in range(3):
        player.refit("full")
    before = player.syncer.version
    in_trainer(victim, where, act)(Stage(rank, lane, player.syncer, player.victim))
    player.change_weights()
    seen = player.attempt(f"{act.__name__}, trainer rank {victim}, {where} bucket")
    if rank != victim:  # one that is alive waits in vain once more
        again = player.attempt("again")
        if again.error != "TrainerLostError":
            seen.problems.append(f"the next sync() of a broken syncer: {again.error}: {again.message}")
    if rank == 0:
        for engine in fleet:
            is_torn = engine.state is EngineState.STALE and engine.status() == [(before, True)] * engine.num_workers()
            step = player.step - (seen.error is not None)
            is_whole = engine.state is EngineState.SERVING and engine.holds(step)
            if not (is_torn and not engine.serves) and not (is_whole and engine.serves):
                seen.problems.append(f"{engine.name}: {engine.state}, {engine.status()}, {engine.calls[-5:]}")
    player.syncer.close()
    dist.barrier(group)
    leak = inventory.growth()
    if leak:
        seen.problems.append(f"leak: {leak}")
    new_rank = list(survivors).index(rank)
    player = Player(new_rank, len(survivors), lane, mode, fleet, step=player.step, group=group)
    for verify in (None, "full"):
        player.refit(verify)
    if player.syncer.version != before + 2 + (seen.error is None):
        seen.problems.append(f"version {player.syncer.version} after {before}")
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    if total.item() != len(survivors):
        seen.problems.append(f"the application's group added up to {total.item()}")
    player.syncer.close()
    return seen, os.getpid()


def die(stage: Stage) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
