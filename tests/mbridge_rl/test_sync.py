"""Whole refits over real sockets and shared memory: trainer ranks are processes, engine workers too (or a module in
rank 0).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from mbridge.errors import MBridgeError, PlanError
from mbridge.pieces import Box
from mbridge_rl import SyncReport, WeightSyncer
from mbridge_rl.engines.base import Engine
from mbridge_rl.engines.module import ModuleEngine
from mbridge_rl.errors import (
    DeadlineError,
    EngineBusyError,
    EngineGoneError,
    EngineLoadError,
    EngineMismatchError,
    EngineStaleError,
    PlanMismatchError,
    SyncError,
    TrainerLostError,
    TransportError,
    VersionError,
)
from mbridge_rl.messages import Fill
from mbridge_rl.protocol import EngineState
from tests.mbridge_rl.fakes import FakeBridge, Tensors
from tests.mbridge_rl.ranks import Outcome, run_ranks
from tests.mbridge_rl.worker_engine import ProcessEngine, Shapes

DEADLINE_S = 20.0
BUCKET_BYTES = 4096
GROUPS = [("layers.0.q", "layers.0.k"), ("layers.1.q", "layers.1.k"), ("big.a", "big.b")]


def weights(version: int) -> Tensors:
    """Position-coded: every element of every tensor of every version has its own value (up to rounding in bf16)."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "embed": ((50, 24), torch.bfloat16),
        "layers.0.q": ((16, 24), torch.bfloat16),
        "layers.0.k": ((8, 24), torch.bfloat16),
        "layers.0.bias": ((7,), torch.float32),
        "layers.1.q": ((16, 24), torch.bfloat16),
        "layers.1.k": ((8, 24), torch.bfloat16),
        "layers.1.experts": ((4, 6, 10), torch.float32),
        "scale": ((), torch.float32),
        "big.a": ((120, 24), torch.bfloat16),  # 5760 bytes: larger than a bucket
        "big.b": ((40, 24), torch.float32),
        "head": ((50, 24), torch.bfloat16),
    }
    tensors, start = {}, 1000 * version
    for name, (shape, dtype) in shapes.items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + count, dtype=torch.float32).reshape(shape).to(dtype)
        start += count
    return tensors


def shapes() -> Shapes:
    return {name: (tuple(t.shape), t.dtype) for name, t in weights(0).items()}


class Module(torch.nn.Module):
    """Holds one buffer for each HF tensor; loaded by name."""

    def __init__(self) -> None:
        super().__init__()
        for name, tensor in weights(0).items():
            self.register_buffer(name.replace(".", "_"), torch.zeros_like(tensor))

    def load_weights(self, named: Any) -> set[str]:
        loaded = set()
        for name, tensor in named:
            self.get_buffer(name.replace(".", "_")).copy_(tensor)
            loaded.add(name.replace(".", "_"))
        return loaded

    def holds(self, version: int) -> bool:
        return all(torch.equal(self.get_buffer(n.replace(".", "_")), t) for n, t in weights(version).items())


class SabotagedSyncer(WeightSyncer):
    """Does something at a chosen bucket."""

    at_bucket = -1

    def sabotage(self) -> None:
        raise NotImplementedError

    def _fill(self, message: Fill, breathe: Callable[[], None]) -> None:
        if message.bucket == self.at_bucket:
            self.sabotage()
        super()._fill(message, breathe)


class Suicidal(SabotagedSyncer):
    def sabotage(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Sleeping(SabotagedSyncer):
    def sabotage(self) -> None:
        time.sleep(6)


def syncer(
    rank: int, num_ranks: int, engine: object, kind: type[WeightSyncer] = WeightSyncer, version: int = 1, **options: Any
) -> tuple[FakeBridge, WeightSyncer]:
    bridge = FakeBridge(weights(version), rank, num_ranks, groups=GROUPS)
    options = {"deadline_s": DEADLINE_S, "bucket_bytes": BUCKET_BYTES, **options}
    return bridge, kind(bridge, engine if rank == 0 else None, **options)


# --- success ----------------------------------------------------------------------------------------------------------


def refits(rank: int, num_ranks: int, num_workers: int) -> list[SyncReport]:
    engine = (Module() if num_workers == 0 else ProcessEngine(shapes(), num_workers)) if rank == 0 else None
    bridge, sync = syncer(rank, num_ranks, engine)
    reports = []
    with sync:
        for version in (1, 2, 5):
            bridge.set(weights(version))
            reports.append(sync.sync(version))
            if rank == 0:
                assert_holds(engine, version)
        bridge.set(weights(6))
        reports.append(sync.sync())
    if rank == 0:
        assert_holds(engine, 6)
    return reports


def assert_holds(engine: object, version: int) -> None:
    if isinstance(engine, Module):
        assert engine.holds(version)
        return
    assert isinstance(engine, ProcessEngine)
    workers = engine.tensors()
    for index, tensors in enumerate(workers):
        for name, whole in weights(version).items():
            rows = whole.shape[0] if whole.dim() else 0
            shared = rows > 0 and rows % len(workers) == 0
            own = whole[index * rows // len(workers) : (index + 1) * rows // len(workers)] if shared else whole
            assert torch.equal(tensors[name], own), (index, name)
            assert tensors[name].dtype == whole.dtype
    assert engine.status() == [(version, False)] * len(workers)


@pytest.mark.parametrize(("num_ranks", "num_workers"), [(1, 0), (2, 0), (2, 1), (3, 2)])
def test_refit_is_exact(tmp_path: Path, num_ranks: int, num_workers: int) -> None:
    outcomes = run_ranks(num_ranks, tmp_path, refits, num_workers)
    reports = [o.value for o in outcomes]
    assert [o.error for o in outcomes] == [None] * num_ranks
    assert all(r == reports[0] for r in reports)  # the same on every rank
    assert [r.version for r in reports[0]] == [1, 2, 5, 6]
    last = reports[0][-1]
    assert last.num_bytes == sum(t.nbytes for t in weights(0).values())
    assert last.num_trainers == num_ranks
    assert last.num_workers == max(num_workers, 1)
    assert set(last.paths.values()) == {"bucket"}
    assert last.engine_extra_bytes == 5888 + 3840  # aligned; big.a and big.b, put together again
    assert set(last.phases) == {"enter", "pause", "stream", "commit", "resume"}
    assert sum(last.phases.values()) == pytest.approx(last.total_s)
    assert "refit v6" in str(last)
    assert "\n" not in str(last)
    assert json.loads(last.to_json())["gb_per_s"] == pytest.approx(last.gb_per_s)


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = set(Path("/dev/shm").glob("mbridge-*"))
    _, sync = syncer(0, 1, Module())
    sync.sync()
    # Already while it is open: so a kill leaves nothing either.
    assert set(Path("/dev/shm").glob(f"mbridge-{os.getpid()}-*")) - before == set()
    assert list(tmp_path.glob("mbridge-*")) == []
    num_files = len(os.listdir("/proc/self/fd"))
    sync.close()
    sync.close()
    assert len(os.listdir("/proc/self/fd")) < num_files
    with pytest.raises(SyncError, match="closed"):
        sync.sync()


def test_no_growth_over_many_refits() -> None:
    module = Module()
    bridge, sync = syncer(0, 1, module)
    with sync:
        for version in range(1, 20):
            sync.sync(version)
        files, resident = len(os.listdir("/proc/self/fd")), rss()
        for version in range(20, 220):
            bridge.set(weights(version))
            sync.sync(version)
        assert module.holds(219)
        assert len(os.listdir("/proc/self/fd")) == files
        assert rss() - resident < 8 << 20


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_default_bucket_size_and_tcp() -> None:
    module = Module()
    bridge = FakeBridge(weights(3))
    with WeightSyncer(bridge, module, control_address="tcp://127.0.0.1:*") as sync:
        report = sync.sync()
    assert module.holds(3)
    assert report.engine_extra_bytes == 0  # nothing is split


# --- failures ---------------------------------------------------------------------------------------------------------


def errors(outcomes: list[Outcome]) -> list[BaseException | None]:
    return [o.error for o in outcomes]


def killed_trainer(rank: int, num_ranks: int, victim: int) -> Any:
    engine = ProcessEngine(shapes(), 2) if rank == 0 else None
    bridge, sync = syncer(rank, num_ranks, engine)
    sync.sync()
    bridge.set(weights(2))
    if rank == victim:
        sync.__class__ = Suicidal
        sync.at_bucket = 3  # type: ignore[attr-defined]
    started = time.monotonic()
    with pytest.raises(TrainerLostError) as caught:
        sync.sync()
    seconds = time.monotonic() - started
    if rank == 0:
        assert engine is not None
        assert engine.state is EngineState.STALE
        with pytest.raises(EngineStaleError, match=r"rank 1 (died|has no connection any more)"):
            engine.check_serving()
        assert engine.calls[-3:] == ["pause wait", "update", "close_session"]  # and no resume
        assert engine.status() == [(1, True)] * 2
    with pytest.raises(TrainerLostError):  # for good
        sync.sync()
    sync.close()
    if rank == 0:
        # The survivor goes on alone, on the same engine.
        dist.destroy_process_group()
        _, alone = syncer(0, 1, engine, version=3)
        with alone:
            assert alone.version == 1
            assert engine is not None
            assert engine.state is EngineState.STALE
            alone.sync()
            assert engine.state is EngineState.SERVING
            assert engine.calls[-1] == "resume"
            assert engine.status() == [(2, False)] * 2
    return seconds, str(caught.value)


def test_a_killed_trainer_is_an_error_on_the_others(tmp_path: Path) -> None:
    outcomes = run_ranks(3, tmp_path, killed_trainer, 1)
    assert outcomes[1].exit_code == -signal.SIGKILL
    assert [outcomes[0].error, outcomes[2].error] == [None, None]
    for seconds, text in (outcomes[0].value, outcomes[2].value):
        assert seconds < 5  # an event, not the deadline
        assert "trainer rank 1" in text


def killed_first_rank(rank: int, num_ranks: int) -> Any:
    _, sync = syncer(rank, num_ranks, Module() if rank == 0 else None, Suicidal if rank == 0 else WeightSyncer)
    if isinstance(sync, Suicidal):
        sync.at_bucket = 2
    started = time.monotonic()
    with pytest.raises(TrainerLostError, match="rank 0"):
        sync.sync()
    return time.monotonic() - started


def test_a_killed_rank_0_is_an_error_on_the_others(tmp_path: Path) -> None:
    outcomes = run_ranks(2, tmp_path, killed_first_rank)
    assert outcomes[0].exit_code == -signal.SIGKILL
    assert outcomes[1].error is None
    assert outcomes[1].value < 5


def sleeping_trainer(rank: int, num_ranks: int) -> Any:
    engine = ModuleEngine(Module()) if rank == 0 else None
    _, sync = syncer(rank, num_ranks, engine, Sleeping if rank == 1 else WeightSyncer, deadline_s=2.0)
    if isinstance(sync, Sleeping):
        sync.at_bucket = 2
    with pytest.raises(DeadlineError, match="trainer rank 1 to fill bucket 2") as caught:
        sync.sync()
    if engine is not None:
        with pytest.raises(EngineStaleError):
            engine()
    if isinstance(sync, Sleeping):
        sync.at_bucket = -1
    else:
        time.sleep(5)  # rank 1 is still asleep
    sync.sync()  # the same syncers recover
    if engine is not None:
        assert engine.state is EngineState.SERVING
        assert isinstance(engine.module, Module)
        assert engine.module.holds(1)
    sync.close()
    return str(caught.value)


def test_a_stalled_trainer_meets_the_deadline_and_a_later_sync_recovers(tmp_path: Path) -> None:
    outcomes = run_ranks(2, tmp_path, sleeping_trainer)
    assert errors(outcomes) == [None, None]
    assert outcomes[0].value == outcomes[1].value


def poisoned_loader(rank: int, num_ranks: int) -> str:
    engine = ProcessEngine(shapes(), 2) if rank == 0 else None
    bridge, sync = syncer(rank, num_ranks, engine)
    sync.sync()
    bridge.set(weights(2))
    if engine is not None:
        engine.set(1, poison="layers.1.experts")
    with pytest.raises(EngineLoadError) as caught:
        sync.sync()
    failure = caught.value.failure
    assert failure.tensor == "layers.1.experts"
    assert failure.phase == "stream"
    assert "engine worker 1" in failure.origin
    if engine is not None:
        assert engine.state is EngineState.STALE
        assert engine.status() == [(1, True)] * 2
    sync.sync()
    if engine is not None:
        assert engine.status() == [(2, False)] * 2
        assert_holds_version_2(engine)
    sync.close()
    return str(caught.value)


def assert_holds_version_2(engine: ProcessEngine) -> None:
    for index, tensors in enumerate(engine.tensors()):
        whole = weights(2)["layers.1.experts"]
        assert torch.equal(tensors["layers.1.experts"], whole[2 * index : 2 * index + 2])


def test_a_loader_that_raises_names_the_tensor_and_the_next_sync_recovers(tmp_path: Path) -> None:
    outcomes = run_ranks(2, tmp_path, poisoned_loader)
    assert errors(outcomes) == [None, None]
    assert outcomes[0].value == outcomes[1].value
    assert "poisoned" in outcomes[0].value


def killed_worker(rank: int, num_ranks: int) -> Any:
    engine = ProcessEngine(shapes(), 2) if rank == 0 else None
    _, sync = syncer(rank, num_ranks, engine)
    sync.sync()
    if engine is not None:
        engine.set(1, die_at="big.a")
    started = time.monotonic()
    with pytest.raises(EngineGoneError, match="engine worker 1"):
        sync.sync()
    seconds = time.monotonic() - started
    if engine is not None:
        assert engine.state is EngineState.GONE
        with pytest.raises(EngineStaleError, match="gone"):
            engine.check_serving()
    with pytest.raises(EngineGoneError):
        sync.sync()
    sync.close()
    return seconds


def test_an_engine_killed_during_a_bucket_is_gone(tmp_path: Path) -> None:
    outcomes = run_ranks(2, tmp_path, killed_worker)
    assert errors(outcomes) == [None, None]
    assert max(o.value for o in outcomes) < 5


def bad_versions(rank: int, num_ranks: int) -> None:
    engine = ModuleEngine(Module()) if rank == 0 else None
    _, sync = syncer(rank, num_ranks, engine)
    sync.sync(7)
    for version in (7, 3, 0, -1):
        with pytest.raises(VersionError, match="already had version 7"):
            sync.sync(version)
    with pytest.raises(VersionError, match=r"rank 0: 8, rank 1: 9"):
        sync.sync(8 + rank)
    if engine is not None:
        engine.check_serving()  # nothing was touched
    assert sync.sync().version == 8
    sync.close()


def test_versions_must_grow_and_agree(tmp_path: Path) -> None:
    assert errors(run_ranks(2, tmp_path, bad_versions)) == [None, None]


def test_a_second_syncer_on_a_busy_engine() -> None:
    engine = ModuleEngine(Module())
    _, first = syncer(0, 1, engine)
    first.sync()
    with pytest.raises(EngineBusyError, match=f"process {os.getpid()}"):
        syncer(0, 1, engine)
    assert first.sync().version == 2  # undisturbed
    first.close()
    _, second = syncer(0, 1, engine)
    with second:
        assert second.version == 2  # the engine remembers
        assert second.sync().version == 3


def test_a_dead_trainer_is_taken_over() -> None:
    """Forks a trainer that dies in the middle of a refit; the engine's workers survive it."""
    engine = ProcessEngine(shapes(), 2)
    child = os.fork()
    if child == 0:
        _, doomed = syncer(0, 1, engine, Suicidal)
        doomed.sync()
        doomed.at_bucket = 3  # type: ignore[attr-defined]
        doomed.sync()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    for pipe in engine._pipes:
        pipe.recv()  # the answer to `run`, which the dead trainer did not wait for
    assert engine.status() == [(1, True)] * 2
    _, sync = syncer(0, 1, engine, version=4)
    with sync:
        assert engine.state is EngineState.STALE
        assert engine.calls[-1] == "close_session"  # the session that the dead trainer left open
        sync.sync()
    engine_holds = engine.tensors()
    assert torch.equal(engine_holds[1]["scale"], weights(4)["scale"])
    assert engine.status() == [(2, False)] * 2
    engine.stop()


# --- bad plans and bad engines ----------------------------------------------------------------------------------------


def different_plans(rank: int, num_ranks: int, how: str) -> None:
    tensors = weights(1)
    if how == "shape" and rank == 1:
        tensors["layers.1.k"] = torch.zeros(10, 24, dtype=torch.bfloat16)
    if how == "absent" and rank == 1:
        del tensors["head"]
    bridge = FakeBridge(tensors, rank, num_ranks)
    if how == "digest" and rank == 1:
        bridge.digest = "other"
    if how == "hole" and rank == 1:
        bridge.pieces = tuple(p for p in bridge.pieces if p.hf_name != "embed")
    if how == "overlap" and rank == 1:
        bridge.pieces = tuple(
            type(p)(p.hf_name, Box((0, 0), (25, 24)), p.local_name, p.region) if p.hf_name == "embed" else p
            for p in bridge.pieces
        )
    WeightSyncer(bridge, Module() if rank == 0 else None, deadline_s=DEADLINE_S)


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("shape", PlanMismatchError, r"layers.1.k \[8, 24\].*rank 1 has layers.1.k \[10, 24\]"),
        ("absent", PlanMismatchError, "head"),
        ("digest", PlanMismatchError, "different digests"),
        ("hole", PlanError, "'embed'.*cover"),
        ("overlap", PlanError, "'embed'.*same elements"),
    ],
)
def test_ranks_with_different_plans_all_raise(tmp_path: Path, how: str, kind: type[MBridgeError], text: str) -> None:
    found = errors(run_ranks(2, tmp_path, different_plans, how))
    for error in found:
        assert error is not None
        assert kind.__name__ in f"{type(error).__name__} {error}"
    assert len({str(e).replace("rank 0:", "rank 1:").split("Traceback")[0] for e in found}) == 1
    with pytest.raises(Exception, match=text):
        raise found[0]  # type: ignore[misc]


class BadBridge(FakeBridge):
    def plan(self, models: Any) -> Any:
        if self.rank == 1:
            raise PlanError("this family is not known here")
        return super().plan(models)


def failing_plan(rank: int, num_ranks: int) -> None:
    WeightSyncer(BadBridge(weights(1), rank, num_ranks), Module() if rank == 0 else None, deadline_s=DEADLINE_S)


def test_a_rank_that_cannot_plan_is_an_error_on_all(tmp_path: Path) -> None:
    for error in errors(run_ranks(2, tmp_path, failing_plan)):
        assert isinstance(error, SyncError)
        assert "this family is not known here" in str(error)
        assert "rank 1" in str(error)


def full_filesystem(rank: int, num_ranks: int) -> None:
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    syncer(rank, num_ranks, Module() if rank == 0 else None)


def test_no_room_for_the_buckets_is_an_error_on_all(tmp_path: Path) -> None:
    for error in errors(run_ranks(2, tmp_path, full_filesystem)):
        assert isinstance(error, TransportError)
        assert "bytes in /dev/shm" in str(error)
    owners = [int(path.name.split("-")[1]) for path in Path("/dev/shm").glob("mbridge-*")]
    assert all(psutil.pid_exists(pid) for pid in owners), "a trainer left its buckets behind"  # others may be at it


class OtherModel(torch.nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        for name, tensor in weights(0).items():
            if how == "less" and name == "head":
                continue
            shape = (51, 24) if how == "shape" and name == "head" else tensor.shape
            self.register_buffer(name.replace(".", "_"), torch.full(shape, 3.0).to(tensor.dtype))
        if how == "more":
            self.register_buffer("extra", torch.zeros(3))

    def load_weights(self, named: Any) -> set[str]:
        loaded = set()
        for name, tensor in named:
            own = name.replace(".", "_")
            if own in dict(self.named_buffers()):
                self.get_buffer(own).copy_(tensor)
                loaded.add(own)
        return loaded


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("less", "no place for 1 of the trainer's 11 tensors, such as head"),
        ("more", "no tensor for 1 .*extra"),
        ("shape", "head"),
    ],
)
def test_an_engine_of_another_model_is_refused_before_anything_is_written(how: str, text: str) -> None:
    module = OtherModel(how)
    with pytest.raises(EngineMismatchError, match=text):
        syncer(0, 1, module)
    assert all(torch.equal(b, torch.full_like(b, 3.0)) for n, b in module.named_buffers() if n != "extra")


def twice_mapped(rank: int, num_ranks: int) -> None:
    class Tied(OtherModel):
        def load_weights(self, named: Any) -> set[str]:
            return super().load_weights(("head" if n == "embed" else n, t) for n, t in named) | {"embed"}

    syncer(rank, num_ranks, Tied("same") if rank == 0 else None)


def test_two_names_written_to_one_place_are_refused(tmp_path: Path) -> None:
    for error in errors(run_ranks(2, tmp_path, twice_mapped)):
        assert isinstance(error, EngineMismatchError)
        assert "embed and head" in str(error)


@pytest.mark.parametrize("engine", [None, 3, "ftp://x", object()])
def test_what_is_no_engine(engine: object) -> None:
    with pytest.raises(SyncError, match="not an engine"):
        syncer(0, 1, engine)


def test_an_unknown_transport() -> None:
    with pytest.raises(TransportError, match=r"'pigeon'.*shared_memory"):
        syncer(0, 1, Module(), transport="pigeon")


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="in_flight"):
        syncer(0, 1, Module(), in_flight="drop")
    with pytest.raises(ValueError, match="deadline_s"):
        syncer(0, 1, Module(), deadline_s=0.0)


class Moody(ModuleEngine):
    """Fails in a chosen call, once."""

    fails_in = ""

    def _maybe(self, call: str) -> None:
        if self.fails_in == call:
            self.fails_in = ""
            raise RuntimeError("moody")

    def pause(self, in_flight: Any) -> None:
        self._maybe("pause")

    def update(self, attempt: int, version: int, moves: bool) -> None:
        self._maybe("update")
        super().update(attempt, version, moves)

    def close_session(self) -> None:
        self._maybe("close_session")
        super().close_session()

    def reset_cache(self) -> None:
        self._maybe("reset_cache")

    def publish(self, version: int) -> None:
        self._maybe("publish")

    def resume(self) -> None:
        self._maybe("resume")


@pytest.mark.parametrize(
    ("call", "state"),
    [
        ("pause", EngineState.SERVING),
        ("update", EngineState.STALE),
        ("close_session", EngineState.STALE),
        ("reset_cache", EngineState.STALE),
        ("publish", EngineState.STALE),
        ("resume", EngineState.STALE),
    ],
)
def test_an_engine_call_that_fails(call: str, state: EngineState) -> None:
    module = Module()
    engine: Engine = Moody(module)
    bridge, sync = syncer(0, 1, engine)
    with sync:
        sync.sync()
        bridge.set(weights(2))
        engine.fails_in = call  # type: ignore[attr-defined]
        with pytest.raises(EngineLoadError, match="moody"):
            sync.sync()
        assert engine.state is state
        sync.sync()
        assert engine.state is EngineState.SERVING
        assert module.holds(2)


def test_a_source_that_changed_since_the_plan() -> None:
    module = Module()
    bridge, sync = syncer(0, 1, module)
    with sync:
        sync.sync()
        original = bridge.local["local.embed"]
        bridge.local["local.embed"] = original.float()
        with pytest.raises(PlanMismatchError, match=r"local\.embed.*float32"):
            sync.sync()
        del bridge.local["local.embed"]
        with pytest.raises(PlanMismatchError, match=r"no longer have local tensor .local\.embed"):
            sync.sync()
        bridge.local["local.embed"] = original[:10]
        with pytest.raises(SyncError, match=r"local\.embed.*1249 elements"):
            sync.sync()
        bridge.local["local.embed"] = original
        sync.sync()
        assert module.holds(1)
