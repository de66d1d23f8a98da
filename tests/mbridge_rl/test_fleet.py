"""Several engines in one refit: all or nothing, or without those that fail; engines that come and go."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mbridge_rl import WeightSyncer
from mbridge_rl.errors import (
    EngineError,
    EngineGoneError,
    EngineLoadError,
    EngineStaleError,
    SyncError,
    VersionError,
)
from mbridge_rl.fleet import Member
from mbridge_rl.lanes import REMOTE, Way
from mbridge_rl.messages import Fill
from mbridge_rl.protocol import EngineState
from mbridge_rl.syncer import PathChoice
from tests.mbridge_rl.fakes import FakeBridge
from tests.mbridge_rl.ranks import run_ranks
from tests.mbridge_rl.test_sync import BUCKET_BYTES, DEADLINE_S, GROUPS, errors, shapes, weights
from tests.mbridge_rl.worker_engine import ProcessEngine

LANES: dict[str, dict[str, Any]] = {
    "bucket": {},
    "direct": {"path": "direct"},
    "collective": {"transport": "collective"},
}


class Named(ProcessEngine):
    def __init__(self, name: str, num_workers: int = 1) -> None:
        self._name = name
        super().__init__(shapes(), num_workers)

    @property
    def name(self) -> str:
        return self._name


def connect(rank: int, num_ranks: int, engines: Any, **options: Any) -> tuple[FakeBridge, WeightSyncer]:
    bridge = FakeBridge(weights(1), rank, num_ranks, groups=GROUPS)
    options = {"deadline_s": DEADLINE_S, "bucket_bytes": BUCKET_BYTES, **options}
    return bridge, WeightSyncer(bridge, engines, **options)


def holds(engine: ProcessEngine, version: int) -> bool:
    """Whether all workers hold exactly the weights of `version`, each its share."""
    wanted, found = weights(version), engine.tensors()
    for index, tensors in enumerate(found):
        assert tensors.keys() == wanted.keys()
        for name, tensor in wanted.items():
            rows = tensor.shape[0] if tensor.dim() else 0
            if rows and rows % len(found) == 0:
                tensor = tensor[index * rows // len(found) : (index + 1) * rows // len(found)]
            if not torch.equal(tensors[name], tensor):
                return False
    return True


@pytest.fixture
def engines() -> Iterator[list[Named]]:
    made = [Named("alpha"), Named("beta", 2), Named("gamma")]
    yield made
    for engine in made:
        engine.stop()


# --- all is well ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", LANES)
def test_all_engines_get_the_same_weights(engines: list[Named], lane: str) -> None:
    bridge, syncer = connect(0, 1, engines, **LANES[lane])
    with syncer:
        for version in (1, 2, 3):
            bridge.set(weights(version))
            report = syncer.sync(verify="full")
            assert report.version == version
            assert (report.num_workers, report.engine) == (4, "alpha, beta, gamma")
            assert report.verification is not None
            assert report.verification.num_compared == len(weights(0))
            assert all(holds(engine, version) for engine in engines)
        assert syncer.verify().ok
        bridge.set(weights(4))
        wrong = syncer.verify().wrong
        assert {name.partition(" of engine ")[2] for name in wrong} == {"0", "1", "2"}  # it says which engine
    assert [engine.status() for engine in engines] == [[(3, False)], [(3, False)] * 2, [(3, False)]]


def test_no_engine_serves_before_all_have_committed(engines: list[Named]) -> None:
    order: list[str] = []
    for engine in engines:
        for call in ("close_session", "publish", "resume"):
            setattr(engine, call, recorded(order, f"{engine.name} {call}", getattr(engine, call)))
    _, syncer = connect(0, 1, engines)
    with syncer:
        syncer.sync()
    last_close = max(order.index(f"{engine.name} close_session") for engine in engines)
    assert last_close < min(order.index(f"{engine.name} publish") for engine in engines)


def recorded(order: list[str], label: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any) -> Any:
        result = call(*args)
        order.append(label)
        return result

    return wrapped


def test_rolling_refits_one_engine_after_the_other(engines: list[Named]) -> None:
    order: list[str] = []
    for engine in engines:
        for call in ("pause", "resume"):
            setattr(engine, call, recorded(order, f"{engine.name} {call}", getattr(engine, call)))
    bridge, syncer = connect(0, 1, engines, rolling=True)
    with syncer:
        for version in (1, 2):
            bridge.set(weights(version))
            assert syncer.sync().version == version
            assert all(holds(engine, version) for engine in engines)
    once = [f"{engine.name} {call}" for engine in engines for call in ("pause", "resume")]
    assert order == once * 2


# --- an engine fails --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", LANES)
def test_a_failing_engine_fails_the_refit_for_all(engines: list[Named], lane: str) -> None:
    bridge, syncer = connect(0, 1, engines, **LANES[lane])
    with syncer:
        engines[1].set(1, poison="layers.1.q")
        with pytest.raises(EngineLoadError, match=r"beta: .*poisoned") as caught:
            syncer.sync()
        assert caught.value.failure.origin.startswith("engine worker 1 of engine 1 (process ")
        for engine in engines:
            assert engine.state is EngineState.STALE
            assert "resume" not in engine.calls
            with pytest.raises(EngineStaleError):
                engine.check_serving()
        bridge.set(weights(2))
        assert syncer.sync().version == 1
        assert all(holds(engine, 2) for engine in engines)


@pytest.mark.parametrize("lane", LANES)
def test_quarantine_leaves_the_failing_engine_behind(engines: list[Named], lane: str) -> None:
    bridge, syncer = connect(0, 1, engines, **LANES[lane], on_error="quarantine")
    with syncer:
        syncer.sync()
        bridge.set(weights(2))
        engines[1].set(1, poison="layers.1.q")
        if lane == "direct":  # its loader is asked again only after a failure
            syncer.remove_engine(engines[1])
            with pytest.raises(EngineLoadError, match="poisoned"):
                syncer.add_engine(engines[1])
            engines[1].set(1, poison="layers.1.q")
            syncer.add_engine(engines[1], refit=False)
        report = syncer.sync()
        assert report.version == 2
        assert list(report.quarantined) == ["beta"]
        assert "poisoned" in report.quarantined["beta"]
        assert "LEFT BEHIND: beta" in str(report)
        assert report.num_workers == 2
        assert holds(engines[0], 2) and holds(engines[2], 2)
        assert [engine.state for engine in engines] == [EngineState.SERVING, EngineState.STALE, EngineState.SERVING]
        assert engines[1].calls[-1] == "close_session"  # it stays paused
        bridge.set(weights(3))
        num_calls = len(engines[1].calls)
        assert syncer.sync().version == 3
        assert len(engines[1].calls) == num_calls  # nobody asks it again
        with pytest.raises(EngineStaleError):
            engines[1].check_serving()
        added = syncer.add_engine(engines[1])
        assert added is not None and added.version == 3
        assert holds(engines[1], 3)
        assert engines[1].state is EngineState.SERVING
        bridge.set(weights(4))
        assert not syncer.sync().quarantined
        assert all(holds(engine, 4) for engine in engines)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("on_error", ["raise", "quarantine"])
def test_a_killed_worker(engines: list[Named], lane: str, on_error: str) -> None:
    bridge, syncer = connect(0, 1, engines, **LANES[lane], on_error=on_error)
    syncer.__class__ = KillsAtBucket
    syncer.victim = 0  # type: ignore[attr-defined]
    with syncer:
        syncer.sync()
        bridge.set(weights(2))
        syncer.victim = engines[1].processes[0].pid  # type: ignore[attr-defined]
        if on_error == "raise":
            with pytest.raises(EngineGoneError, match="beta"):
                syncer.sync()
            with pytest.raises(EngineGoneError, match="beta"):
                syncer.sync()
            syncer.remove_engine(engines[1])
        assert syncer.sync().version == 2
        assert engines[1].state is EngineState.GONE
        assert holds(engines[0], 2) and holds(engines[2], 2)
        fresh = Named("delta", 2)
        syncer.add_engine(fresh)
        assert holds(fresh, 2)
        bridge.set(weights(3))
        assert syncer.sync().num_workers == 4
        assert holds(fresh, 3)
        fresh.stop()


class KillsAtBucket(WeightSyncer):
    victim: int

    def _fill(self, message: Fill, breathe: Callable[[], None]) -> Any:
        loan = super()._fill(message, breathe)
        if message.bucket == 1 and self.victim:
            os.kill(self.victim, signal.SIGKILL)
            self.victim = 0
        return loan


def test_a_worker_that_dies_between_refits(engines: list[Named]) -> None:
    _, syncer = connect(0, 1, engines, on_error="quarantine")
    with syncer:
        syncer.sync()
        engines[0].processes[0].kill()
        engines[0].processes[0].join()
        report = syncer.sync()
        assert list(report.quarantined) == ["alpha"]
        assert engines[0].state is EngineState.GONE


def test_a_stopped_worker_costs_one_deadline(engines: list[Named]) -> None:
    bridge, syncer = connect(0, 1, engines, on_error="quarantine", deadline_s=3.0)
    with syncer:
        pid = engines[2].processes[0].pid
        os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        report = syncer.sync()
        assert time.monotonic() - started < 15
        assert list(report.quarantined) == ["gamma"]
        assert "engine worker 0 of engine 2" in report.quarantined["gamma"]
        assert engines[2].state is EngineState.GONE
        os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:  # until its calls have come back
            try:
                syncer.add_engine(engines[2])
                break
            except SyncError:
                time.sleep(0.2)
        bridge.set(weights(2))
        assert not syncer.sync().quarantined
        assert holds(engines[2], 2)


def test_the_last_engine_is_not_left_behind_in_silence(engines: list[Named]) -> None:
    _, syncer = connect(0, 1, engines[:1], on_error="quarantine")
    with syncer:
        engines[0].set(0, poison="embed")
        with pytest.raises(EngineLoadError, match="poisoned"):
            syncer.sync()
        with pytest.raises(EngineStaleError, match="add_engine"):
            syncer.sync()
        assert syncer.add_engine(engines[0]) is not None
        assert holds(engines[0], 1)


def test_a_trainers_own_failure_blames_no_engine(engines: list[Named]) -> None:
    bridge, syncer = connect(0, 1, engines, on_error="quarantine")
    with syncer:
        syncer.sync()
        bridge.local["local.embed"] = bridge.local["local.embed"][:-1]
        with pytest.raises(SyncError, match=r"local.embed"):
            syncer.sync()
        bridge.set(weights(2))
        assert not syncer.sync().quarantined
        assert all(holds(engine, 2) for engine in engines)


class HalfRemote(WeightSyncer):
    """Takes every second engine for one on another host."""

    def _lanes_of(self, joining: Sequence[Member], way: Way) -> dict[int, tuple[str, str]]:
        lanes = super()._lanes_of(joining, way)
        for member in joining[1::2]:
            member.lane = REMOTE
            lanes[REMOTE] = ("bucket", "collective")
        return lanes


@pytest.mark.parametrize("path", ["bucket", "direct"])
def test_engines_on_two_lanes(engines: list[Named], path: PathChoice) -> None:
    bridge = FakeBridge(weights(1), groups=GROUPS)
    options: dict[str, Any] = {"path": path, "bucket_bytes": BUCKET_BYTES, "deadline_s": DEADLINE_S}
    with HalfRemote(bridge, engines, on_error="quarantine", **options) as syncer:
        for version in (1, 2, 3):
            bridge.set(weights(version))
            report = syncer.sync(verify="full")
            assert all(holds(engine, version) for engine in engines)
        assert set(report.paths.values()) == {f"{path}+bucket"}
        assert {status.transport for status in syncer.status().engines} == {"shared_memory", "collective"}
        bridge.set(weights(4))
        engines[1].set(0, poison="head")
        assert list(syncer.sync().quarantined) == ["beta"]
        assert holds(engines[0], 4) and holds(engines[2], 4)


# --- engines come and go ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", LANES)
def test_newcomers_get_the_current_version_before_they_serve(engines: list[Named], lane: str) -> None:
    bridge, syncer = connect(0, 1, engines[0], **LANES[lane])
    with syncer:
        for version in (1, 2, 3):
            bridge.set(weights(version))
            syncer.sync()
        calls = len(engines[0].calls)
        report = syncer.add_engine(engines[1])
        assert report is not None
        assert (report.version, report.engine) == (3, "beta")
        assert holds(engines[1], 3)
        assert "publish 3" in engines[1].calls
        assert len(engines[0].calls) == calls  # the others go on serving
        bridge.set(weights(4))
        assert syncer.sync().num_workers == 3
        assert holds(engines[0], 4) and holds(engines[1], 4)
        syncer.remove_engine(engines[0])
        bridge.set(weights(5))
        assert syncer.sync().num_workers == 2
        assert holds(engines[0], 4) and holds(engines[1], 5)
        with pytest.raises(EngineError, match="not in this fleet"):
            syncer.remove_engine(engines[0])
        with WeightSyncer(bridge, engines[0], bucket_bytes=BUCKET_BYTES) as other:  # it is free
            assert other.version == 4


def test_an_engine_that_cannot_join_leaves_the_fleet_as_it_was(engines: list[Named]) -> None:
    bridge, syncer = connect(0, 1, engines[0])
    with syncer, WeightSyncer(bridge, engines[1], bucket_bytes=BUCKET_BYTES):
        syncer.sync()
        with pytest.raises(EngineError, match="living trainer"):
            syncer.add_engine(engines[1])
        engines[2].stop()
        with pytest.raises(EngineError):
            syncer.add_engine(engines[2])
        bridge.set(weights(2))
        assert syncer.sync().num_workers == 1
        assert holds(engines[0], 2)


def trainers_with_a_fleet(rank: int, num_ranks: int) -> Any:
    """Two trainer ranks: quarantine inside a sync, add_engine, rolling off; every rank sees the same."""
    fleet = [Named("alpha"), Named("beta", 2)] if rank == 0 else []
    bridge, syncer = connect(rank, num_ranks, fleet, on_error="quarantine")
    seen = [syncer.sync().version]
    bridge.set(weights(2))
    if rank == 0:
        fleet[1].set(0, poison="head")
    report = syncer.sync()
    seen += [report.version, list(report.quarantined)]
    added = syncer.add_engine(fleet[1] if rank == 0 else None)
    assert added is not None
    seen.append(added.version)
    bridge.set(weights(3))
    report = syncer.sync(verify="full")
    seen += [report.version, list(report.quarantined)]
    if rank == 0:
        assert all(holds(engine, 3) for engine in fleet)
    with pytest.raises(VersionError):
        syncer.sync(3)
    syncer.close()
    for engine in fleet:
        engine.stop()
    return seen


def test_trainer_ranks_and_a_fleet(tmp_path: Path) -> None:
    outcomes = run_ranks(2, tmp_path, trainers_with_a_fleet)
    assert errors(outcomes) == [None, None]
    assert outcomes[0].value == outcomes[1].value == [1, 2, ["beta"], 2, 3, []]


def test_a_sync_started_twice(engines: list[Named]) -> None:
    _, syncer = connect(0, 1, engines[:1])
    with syncer:
        inside, go = threading.Event(), threading.Event()

        def slow(*_: Any) -> None:
            inside.set()
            go.wait(10)

        engines[0].pause = slow  # type: ignore[method-assign,assignment]
        thread = threading.Thread(target=syncer.sync)
        thread.start()
        assert inside.wait(10)
        with pytest.raises(SyncError, match="under way"):
            syncer.sync()
        go.set()
        thread.join()
        assert syncer.version == 1
        assert holds(engines[0], 1)
