"""Log lines, metrics, ranges and status, each seen through what users see them with."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from torch.profiler import ProfilerActivity, profile

from mbridge_rl.errors import Failure
from mbridge_rl.observe import EngineStatus, FleetStatus, Observer, phase_range
from mbridge_rl.protocol import EngineState
from mbridge_rl.report import SyncReport

SERVING, UPDATING, STALE, GONE = EngineState.SERVING, EngineState.UPDATING, EngineState.STALE, EngineState.GONE
FAILURE = Failure(
    "EngineLoadError", "the engine failed to load:\n 100% of it\r\n\tis gone", "engine worker 1", "stream", "a.weight"
)
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def report(version: int = 3, total_s: float = 0.25, num_bytes: int = 1000, **phases: float) -> SyncReport:
    return SyncReport(
        version=version,
        engine="vLLM a",
        total_s=total_s,
        phases=phases or {"pause": 0.05, "stream": 0.2},
        fill_s=0.1,
        load_s=0.1,
        num_bytes=num_bytes,
        num_tensors=7,
        num_buckets=2,
        num_trainers=2,
        num_workers=4,
        paths={"a.weight": "bucket"},
        trainer_extra_bytes=0,
        engine_extra_bytes=0,
    )


def observer() -> Observer:
    return Observer(CollectorRegistry())


def samples(registry: CollectorRegistry) -> Samples:
    """What a scrape of `registry` gets, without times of creation: (name, labels) -> value."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def value(found: Samples, name: str, **labels: str) -> float | None:
    return found.get((f"mbridge_{name}", tuple(sorted(labels.items()))))


# --- log lines -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "mbridge_rl.refit")
    return caplog


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What a JSON formatter writes beside the message; it must be able to."""
    fields = {name.removeprefix("refit_"): v for name, v in vars(record).items() if name.startswith("refit_")}
    loaded: dict[str, Any] = json.loads(json.dumps(fields))
    return loaded


def test_a_refit_is_one_line_with_fields(lines: pytest.LogCaptureFixture) -> None:
    observer().refit_done(report())
    (record,) = lines.records
    assert (record.name, record.levelno, record.getMessage()) == ("mbridge_rl.refit", logging.INFO, str(report()))
    assert fields_of(record) == {
        "outcome": "committed",
        "version": 3,
        "engine": "vLLM a",
        "seconds": 0.25,
        "phases": {"pause": 0.05, "stream": 0.2},
        "bytes": 1000,
        "num_tensors": 7,
        "num_trainers": 2,
        "num_workers": 4,
    }


def test_a_failed_refit_is_one_line_whatever_its_message(lines: pytest.LogCaptureFixture) -> None:
    observer().refit_failed(FAILURE, 1.5, attempt=9, version=4)
    (record,) = lines.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == (
        "refit v4 failed after 1.500 s (attempt 9): EngineLoadError: the engine failed to load: 100% of it is gone "
        "[engine worker 1, phase stream, tensor a.weight]"
    )
    assert fields_of(record) == {
        "outcome": "failed",
        "version": 4,
        "attempt": 9,
        "seconds": 1.5,
        "error": "EngineLoadError",
        "reason": FAILURE.message,
        "origin": "engine worker 1",
        "phase": "stream",
        "tensor": "a.weight",
    }


def test_a_failure_of_an_unknown_class_keeps_its_name(lines: pytest.LogCaptureFixture) -> None:
    observer().refit_failed(Failure("NewError", "of a later release"), 1.0, attempt=1, version=1)
    assert "NewError: of a later release" in lines.records[0].getMessage()


def test_changes_of_state_are_logged_and_nothing_else(lines: pytest.LogCaptureFixture) -> None:
    seen = observer()
    for state, version in [
        (SERVING, 1), (UPDATING, 1), (SERVING, 2), (SERVING, 2), (SERVING, 3), (UPDATING, 3), (STALE, 3), (STALE, 3),
        (SERVING, 4), (GONE, 4),
    ]:  # fmt: skip
        seen.engine("a", state, version)
    assert [(r.levelname, r.getMessage()) for r in lines.records] == [
        ("INFO", "engine a is serving, version 1"),
        ("DEBUG", "engine a is updating, version 1, was serving"),
        ("DEBUG", "engine a is serving, version 2, was updating"),
        ("DEBUG", "engine a is updating, version 3, was serving"),
        ("WARNING", "engine a is stale, version 3, was updating"),
        ("INFO", "engine a is serving, version 4, was stale"),
        ("ERROR", "engine a is gone, version 4, was serving"),
    ]
    assert fields_of(lines.records[4]) == {"engine": "a", "state": "stale", "state_before": "updating", "version": 3}


def test_a_forgotten_engine_is_new_when_it_comes_back(lines: pytest.LogCaptureFixture) -> None:
    seen = observer()
    seen.engine("a", SERVING, 1)
    seen.engine("b", SERVING, 1)
    seen.forget("a")
    seen.forget("never seen")
    seen.engine("a", SERVING, 5)
    seen.engine("b", SERVING, 5)
    assert [r.getMessage() for r in lines.records] == [
        "engine a is serving, version 1",
        "engine b is serving, version 1",
        "engine a is serving, version 5",
    ]


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_refits_are_counted_and_timed_by_phase() -> None:
    registry = CollectorRegistry()
    seen = Observer(registry)
    start = samples(registry)
    assert value(start, "refits_total", outcome="failed") == value(start, "refits_total", outcome="committed") == 0
    seen.refit_done(report(total_s=0.25, num_bytes=1000, pause=0.05, stream=0.2))
    seen.refit_done(report(total_s=400.0, num_bytes=24, pause=0.0005, stream=399.0))
    seen.refit_failed(FAILURE, 120.0, attempt=3, version=3)
    found = samples(registry)
    assert value(found, "refits_total", outcome="committed") == 2
    assert value(found, "refits_total", outcome="failed") == 1
    assert value(found, "refit_bytes_total") == 1024
    sums = {p: value(found, "refit_seconds_sum", phase=p) for p in ("total", "pause", "stream")}
    assert sums == pytest.approx({"total": 400.25, "pause": 0.0505, "stream": 399.2})
    assert {dict(labels)["phase"] for name, labels in found if name.endswith("seconds_count")} == set(sums)
    bounds = [
        float(dict(labels)["le"])
        for name, labels in found
        if name == "mbridge_refit_seconds_bucket" and dict(labels)["phase"] == "pause"
    ]
    assert bounds == sorted(bounds)
    assert (bounds[0], bounds[-2], bounds[-1]) == (0.001, 300.0, math.inf)
    pauses = [value(found, "refit_seconds_bucket", phase="pause", le=le) for le in ("0.001", "0.02", "0.05", "300.0")]
    assert pauses == [1, 1, 2, 2]
    assert value(found, "refit_seconds_bucket", phase="stream", le="300.0") == 1


def test_an_engine_is_in_exactly_one_state() -> None:
    registry = CollectorRegistry()
    seen = Observer(registry)
    for version, state in enumerate([SERVING, UPDATING, STALE, GONE, SERVING]):
        seen.engine("a", state, version)
        seen.engine("b", SERVING, 7)
        found = samples(registry)
        assert {s: value(found, "engine_state", engine="a", state=s) for s in EngineState} == {
            s: float(s is state) for s in EngineState
        }
        assert value(found, "engine_state", engine="b", state="serving") == 1
        assert value(found, "engine_version", engine="a") == version
        assert value(found, "engine_version", engine="b") == 7


def test_a_forgotten_engine_has_no_metrics() -> None:
    registry = CollectorRegistry()
    seen = Observer(registry)
    seen.engine("a", SERVING, 1)
    seen.engine("b", SERVING, 1)
    seen.forget("a")
    seen.forget("never seen")
    engines = [dict(labels)["engine"] for _, labels in samples(registry) if "engine" in dict(labels)]
    assert engines == ["b"] * (1 + len(EngineState))


def test_two_observers_add_to_the_metrics_of_one_registry() -> None:
    registry, other = CollectorRegistry(), CollectorRegistry()
    first, second, elsewhere = Observer(registry), Observer(registry), Observer(other)
    first.refit_done(report())
    second.refit_done(report())
    elsewhere.refit_done(report())
    first.engine("a", SERVING, 1)
    second.engine("b", SERVING, 2)
    found = samples(registry)
    assert value(found, "refits_total", outcome="committed") == 2
    assert value(found, "refit_bytes_total") == 2000
    assert value(found, "refit_seconds_count", phase="total") == 2
    assert [value(found, "engine_version", engine=e) for e in "ab"] == [1, 2]
    assert value(samples(other), "refits_total", outcome="committed") == 1
    assert value(samples(other), "engine_version", engine="a") is None


def test_a_registry_with_other_metrics_of_our_names_is_refused() -> None:
    registry = CollectorRegistry()
    Gauge("mbridge_refit_bytes", "of someone else", registry=registry)
    with pytest.raises(ValueError, match=r"clashes with mbridge_refit_bytes \(Gauge\); pass a registry"):
        Observer(registry)


def test_the_same_kind_with_other_labels_is_refused() -> None:
    registry = CollectorRegistry()
    Counter("mbridge_refits", "of someone else", ["other"], registry=registry)
    with pytest.raises(ValueError, match="mbridge_refits"):
        Observer(registry)


# --- ranges ----------------------------------------------------------------------------------------------------------


@contextmanager
def profiled() -> Iterator[dict[str, tuple[float, float]]]:
    """Profile what is inside; afterwards the dict has start and end of each of our ranges by name, in microseconds."""
    ranges: dict[str, tuple[float, float]] = {}
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        yield ranges
    for event in profiler.events():
        if event.name.startswith("mbridge."):
            assert event.name not in ranges, "a range shows up twice"
            ranges[event.name] = (event.time_range.start, event.time_range.end)


def work() -> None:
    torch.ones(100_000).sum()


def test_ranges_show_up_in_torch_profiler() -> None:
    with profiled() as ranges, phase_range("sync"):
        work()
        with phase_range("stream"):
            work()
    assert set(ranges) == {"mbridge.sync", "mbridge.stream"}
    outer, inner = ranges["mbridge.sync"], ranges["mbridge.stream"]
    assert outer[0] < inner[0] < inner[1] <= outer[1]


def test_ranges_begin_and_end_where_events_say_so() -> None:
    with profiled() as ranges:
        first = phase_range("pause").begin()
        work()
        first.end()
        work()
        second = phase_range("stream").begin()
        work()
        second.end()
        second.end()
    assert ranges["mbridge.pause"][1] < ranges["mbridge.stream"][0]


def test_ranges_may_overlap() -> None:
    with profiled() as ranges:
        a = phase_range("a").begin()
        work()
        b = phase_range("b").begin()
        work()
        a.end()
        work()
        b.end()
    assert ranges["mbridge.a"][0] < ranges["mbridge.b"][0] < ranges["mbridge.a"][1] < ranges["mbridge.b"][1]


def test_an_error_ends_the_range_and_passes() -> None:
    with profiled() as ranges:
        with pytest.raises(KeyError), phase_range("stream"):
            raise KeyError
        with phase_range("after"):
            work()
    assert ranges["mbridge.stream"][1] < ranges["mbridge.after"][0]


def test_a_profiler_may_start_and_stop_inside_a_range() -> None:
    before = phase_range("before").begin()
    with profiled() as ranges:
        before.end()
        after = phase_range("after").begin()
        with phase_range("inside"):
            work()
    after.end()
    assert "mbridge.inside" in ranges
    assert "mbridge.before" not in ranges


def test_a_thread_that_is_not_profiled_is_not_disturbed() -> None:
    done = []

    def other() -> None:
        with phase_range("elsewhere"):
            work()
        done.append(True)

    with profiled() as ranges, phase_range("here"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(30)
    assert done == [True]
    assert set(ranges) == {"mbridge.here"}


def test_nothing_is_recorded_while_nobody_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """record_function would cost ten times as much as the rest of a range."""
    made = []
    original = torch.profiler.record_function
    monkeypatch.setattr(torch.profiler, "record_function", lambda name: made.append(name) or original(name))
    with phase_range("quiet"):
        work()
    assert made == []
    with profiled(), phase_range("loud"):
        work()
    assert made == ["mbridge.loud"]


def test_every_nvtx_range_that_starts_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVTX itself needs a build of torch for CUDA; here a list stands for it."""
    calls: list[tuple[str, object]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_start", lambda name: calls.append(("start", name)) or len(calls) - 1)
    monkeypatch.setattr(torch.cuda.nvtx, "range_end", lambda number: calls.append(("end", number)))
    with phase_range("a"):
        overlapping = phase_range("b").begin()
    overlapping.end()
    overlapping.end()
    overlapping.begin()
    overlapping.begin()  # ends the last one
    overlapping.end()
    assert calls == [
        ("start", "mbridge.a"),  # the first range has number 0
        ("start", "mbridge.b"),
        ("end", 0),
        ("end", 1),
        ("start", "mbridge.b"),
        ("end", 4),
        ("start", "mbridge.b"),
        ("end", 6),
    ]


# --- status ----------------------------------------------------------------------------------------------------------

GOOD = EngineStatus("vLLM a", SERVING, 3, "direct", "cuda_ipc", 1, last_refit_s=0.0123)
BAD = EngineStatus("vLLM b", STALE, 2, "bucket", "collective", 4, failure=FAILURE)


def test_status_of_an_engine_reads_well() -> None:
    assert str(GOOD) == "vLLM a: serving, version 3; 1 worker by direct/cuda_ipc; last refit 12 ms"
    assert str(BAD) == (
        "vLLM b: stale, version 2; 4 workers by bucket/collective; EngineLoadError: the engine failed to load: 100% of "
        "it is gone [engine worker 1, phase stream, tensor a.weight]"
    )


def test_status_of_a_fleet_reads_well() -> None:
    status = FleetStatus(3, (GOOD, BAD))
    assert str(status).splitlines() == [
        "version 3, 1 of 2 engines serving",
        f"  {GOOD}",
        f"  {BAD}",
    ]
    broken = FleetStatus(3, (BAD,), Failure("TrainerLostError", "trainer rank 1 died", "trainer rank 1", "stream"))
    assert str(broken).splitlines()[0] == (
        "version 3, 0 of 1 engines serving; BROKEN, build a new WeightSyncer: TrainerLostError: trainer rank 1 died "
        "[trainer rank 1, phase stream]"
    )
    assert str(FleetStatus(0, ())) == "version 0, 0 of 0 engines serving"


# --- prometheus_client is optional -----------------------------------------------------------------------------------

WITHOUT = """
import logging, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "prometheus_client":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import mbridge_rl.observe as observe
from mbridge_rl.errors import Failure
from mbridge_rl.protocol import EngineState

logging.basicConfig(level=logging.DEBUG, format="%(message)s", stream=sys.stdout)
seen = observe.Observer()
seen.engine("a", EngineState.SERVING, 1)
seen.refit_failed(Failure("DeadlineError", "too long"), 1.0, attempt=1, version=2)
seen.forget("a")
with observe.phase_range("stream"):
    pass
assert "prometheus_client" not in sys.modules
"""

BY_DEFAULT = """
import sys
import mbridge_rl.observe as observe
assert "prometheus_client" not in sys.modules, "imported before it is used"
first, second = observe.Observer(), observe.Observer()
from mbridge_rl.protocol import EngineState
second.engine("a", EngineState.SERVING, 5)
from prometheus_client import REGISTRY
print(REGISTRY.get_sample_value("mbridge_engine_version", {"engine": "a"}))
"""


def run(code: str, root: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_prometheus_client_everything_else_works(repo_root: Path) -> None:
    assert run(WITHOUT, repo_root) == [
        "engine a is serving, version 1",
        "refit v2 failed after 1.000 s (attempt 1): DeadlineError: too long",
    ]


def test_the_default_registry_is_that_of_prometheus_client(repo_root: Path) -> None:
    assert run(BY_DEFAULT, repo_root) == ["5.0"]
