"""Every transport and every engine that runs here passes its conformance suite; one that is broken does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mbridge_rl.engines.base import Engine
from mbridge_rl.engines.module import ModuleEngine
from mbridge_rl.errors import TransportError
from mbridge_rl.syncer import PathChoice
from mbridge_rl.testing import ENGINE_CASES, TRANSPORT_CASES, ReferenceModule, check_engine, check_transport
from mbridge_rl.testing.models import bits
from mbridge_rl.transports.base import builtin_transports, transport_class
from mbridge_rl.transports.shared_memory import SharedMemory
from tests.mbridge_rl import broken
from tests.mbridge_rl.worker_engine import ProcessEngine

Tensors = Mapping[str, torch.Tensor]
DEVICES = {"cuda_ipc": "cuda"}  # of transports that are not for the CPU
SLOW = {"slow_trainer", "silent_engine"}  # they wait for deadlines
TIED = {"tied_sent_once", "tied_sent_twice", "two_to_one_place"}  # memory that processes would have to tie
MISMATCHES = ("tied_sent_once", "two_to_one_place", "missing_name", "extra_name", "other_shape")


def marked(cases: tuple[str, ...]) -> list[Any]:
    return [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in cases]


# --- what must pass ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TRANSPORT_CASES)
@pytest.mark.parametrize("name", builtin_transports())
def test_transport(name: str, case: str) -> None:
    device = DEVICES.get(name, "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; tests/mbridge_rl/gpu_ipc.py is for machines that have one")
    if not check_transport(name, device=device, lends=transport_class(name).is_shared, cases=[case]):
        pytest.skip("it has no slots that two processes share")


class Plain(torch.nn.Module):
    """Has no load_weights: loaded by the names of its buffers."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        twins = {id(tensor): torch.zeros_like(tensor) for tensor in tensors.values()}
        for name, tensor in tensors.items():
            *parents, own = name.split(".")
            module: torch.nn.Module = self
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, torch.nn.Module())
                module = getattr(module, parent)
            module.register_buffer(own, twins[id(tensor)])


@pytest.mark.parametrize("case", marked(ENGINE_CASES))
def test_module_engine(case: str) -> None:
    check_module(ReferenceModule, ModuleEngine, case, "bucket")


@pytest.mark.parametrize("case", [case for case in ENGINE_CASES if case not in {*TRANSPORT_CASES, *SLOW}])
def test_module_engine_by_the_direct_path(case: str) -> None:
    """The other cases are those of test_transport, which refits a module too."""
    check_module(ReferenceModule, ModuleEngine, case, "direct")


def test_module_engine_without_a_loader() -> None:
    cases = ["exact", "order", "dtypes", "no_dims_and_no_elements", "no_tensors", *MISMATCHES, "verification"]
    check_engine(Plain, lambda engine: engine.module.state_dict(), cases=cases)  # type: ignore[attr-defined]


class Workers(ProcessEngine):
    """Two processes, each with its rows of every tensor whose rows divide."""

    def __init__(self, tensors: Tensors) -> None:
        self.rows = {name: t.shape[0] if t.dim() else 0 for name, t in tensors.items()}
        super().__init__({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}, num_workers=2)

    def read(self) -> dict[str, torch.Tensor]:
        first, second = self.tensors()
        halved = [name for name, rows in self.rows.items() if rows and rows % 2 == 0]
        for name in self.rows.keys() - set(halved):
            assert torch.equal(bits(first[name]), bits(second[name])), f"{name}: the workers differ"
        return first | {name: torch.cat([first[name], second[name]]) for name in halved}


@pytest.mark.parametrize("case", marked(tuple(case for case in ENGINE_CASES if case not in TIED)))
def test_process_engine(case: str) -> None:
    check_workers(case, "bucket")


@pytest.mark.parametrize("case", ["exact", "dtypes", "strided_sources", "loader_fails_in_each_bucket", "busy"])
def test_process_engine_by_the_direct_path(case: str) -> None:
    check_workers(case, "direct")


def check_workers(case: str, path: PathChoice) -> None:
    def fail_load(engine: Engine, name: str) -> None:
        assert isinstance(engine, Workers)
        engine.set(1, poison=name)

    ran = check_engine(Workers, Workers.read, stop=Workers.stop, fail_load=fail_load, path=path, cases=[case])  # type: ignore[arg-type]
    assert ran == (case,)


def check_module(module: type[ReferenceModule], engine: type[ModuleEngine], case: str, path: PathChoice) -> None:
    ran = check_engine(
        lambda tensors: engine(module(tensors)),
        lambda engine: engine.module.tensors(),  # type: ignore[attr-defined]
        fail_load=lambda engine, name: setattr(engine.module, "fail_at", name),  # type: ignore[attr-defined]
        path=path,
        cases=[case],
    )
    assert ran == (case,)


# --- what must be caught ----------------------------------------------------------------------------------------------


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transports of broken.py are installed as those of a third party: by entry points."""
    info = tmp_path / "planted-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1\n")
    lines = [f"{kind.name} = tests.mbridge_rl.broken:{kind.__name__}" for kind in broken.TRANSPORTS]
    (info / "entry_points.txt").write_text("\n".join(["[mbridge_rl.transports]", *lines]))
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("registered")
def test_a_transport_that_does_not_lend() -> None:
    assert check_transport("keeping", lends=False, cases=["lending", "exact"]) == ("lending", "exact, bucket")
    with pytest.raises(AssertionError, match=r"lending: failed where it must not: .*keeping lends no memory"):
        check_transport(broken.KeepingItsMemory, cases=["lending"])
    with pytest.raises(AssertionError, match="lending: lent what cannot"):
        check_transport(SharedMemory, lends=False, cases=["lending"])


MANY_BUCKETS = ["exact", "order", "strided_sources", "dtypes", "strided_sources_of_every_dtype", "oversize"]
REPAIRED = ["fusion_groups", "trainer_fails_in_each_bucket", "loader_fails_in_each_bucket"]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("kind", "case", "violation"),
    [
        (broken.Overlapping, "slots", "slots overlap"),
        (broken.Copying, "slots", "the peer does not see"),
        (broken.Lasting, "gone_when_closed", "can still be opened"),
        (broken.LendingACopy, "lending", "written after lending is not seen"),
        (broken.LendingTheWrongPlace, "lending", "other bytes than the tensor's"),
        (broken.LendingByNumber, "lending", "other memory has the same address"),
        (broken.LendingOnce, "lending", "other memory has the same address"),
        *((broken.Overlapping, case, "bucket: .*other values than the trainer's") for case in MANY_BUCKETS + REPAIRED),
        (broken.Overlapping, "arrival", "bucket: .*other values than the trainer's"),
        (broken.Copying, "fp32_buffer", "bucket: .*other values than the trainer's"),
        (broken.Copying, "no_dims_and_no_elements", "bucket: .*other values than the trainer's"),
        (broken.LendingTheWrongPlace, "strided_sources", "direct: .*other values than the trainer's"),
        (broken.LendingOnce, "exact", "direct: .*other values than the trainer's"),
        (broken.Narrow, "no_tensors", "failed where it must not: TransportError: too small"),
        (broken.Narrow, "no_elements", "failed where it must not: TransportError: too small"),
    ],
)
def test_a_broken_transport_is_caught(kind: type[SharedMemory], case: str, violation: str) -> None:
    with pytest.raises(AssertionError, match=rf"^{case}.*{violation}"):
        check_transport(kind.name, cases=[case])
    for left in broken.Lasting.left:
        SharedMemory.close(left)


@pytest.mark.parametrize(
    ("module", "engine", "case", "violation"),
    [
        (broken.FlippingABit, ModuleEngine, "exact", "embed: other values than the trainer's"),
        (broken.FlippingABit, ModuleEngine, "strided_sources", "embed: other values than the trainer's"),
        (broken.ByPosition, ModuleEngine, "order", "failed where it must not|other values"),
        (broken.Halving, ModuleEngine, "dtypes", "in_[a-z0-9]*: other values than the trainer's"),
        (broken.Halving, ModuleEngine, "strided_sources_of_every_dtype", "other values than the trainer's"),
        (broken.SkippingNumbers, ModuleEngine, "no_dims_and_no_elements", "t0: other values than the trainer's"),
        (broken.NeedingElements, ModuleEngine, "no_elements", "failed where it must not: .* is empty"),
        (ReferenceModule, broken.NeedingTensors, "no_tensors", "failed where it must not: .*nothing to refit"),
        (broken.OneBucketful, ModuleEngine, "oversize", "many_rows: other values than the trainer's"),
        (broken.LastOfEachCall, ModuleEngine, "fusion_groups", "other values than the trainer's"),
        (broken.Rounding, ModuleEngine, "fp32_buffer", "expert_bias: other values than the trainer's"),
        (ReferenceModule, broken.Forgetful, "trainer_fails_in_each_bucket", "other values .*in an engine that serves"),
        (
            broken.Swallowing,
            ModuleEngine,
            "loader_fails_in_each_bucket",
            "the loader's error at layers.0.q went unnoticed",
        ),
        (broken.Untied, ModuleEngine, "tied_sent_once", "failed where it must not: EngineMismatchError"),
        (broken.FlippingABit, ModuleEngine, "tied_sent_twice", "other values than the trainer's"),
        (broken.Untied, ModuleEngine, "two_to_one_place", "were accepted"),
        (broken.FlippingABit, ModuleEngine, "duplicate_name", "other values"),
        (broken.TakingAnything, ModuleEngine, "missing_name", "without one of the tensors was accepted"),
        (broken.TakingAnything, ModuleEngine, "extra_name", "a tensor more was accepted"),
        (broken.Cropping, ModuleEngine, "other_shape", "of another shape was accepted"),
        (broken.FlippingABit, ModuleEngine, "versions", "other values"),
        (ReferenceModule, broken.Faithless, "busy", "two trainers on one engine"),
        (ReferenceModule, broken.Amnesiac, "one_after_the_other", "the engine forgot its version: 0, it was 1"),
        (ReferenceModule, broken.Wiping, "closed", r"other values .* after close\(\)"),
        (broken.FlippingABit, ModuleEngine, "verification", "failed where it must not: VerifyError|were compared"),
        (ReferenceModule, broken.Remembering, "verification", "a bit was flipped in the engine's embed"),
        (ReferenceModule, broken.Forgetful, "failure_before_the_commit", "serving instead of stale"),
        pytest.param(
            *(ReferenceModule, broken.Patient, "slow_trainer", "wait for a bucket beyond the deadline"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(ReferenceModule, broken.Forgetful, "silent_engine", "serving instead of stale"), marks=pytest.mark.slow
        ),
    ],
)
def test_a_broken_engine_is_caught(
    module: type[ReferenceModule], engine: type[ModuleEngine], case: str, violation: str
) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)^{case}: .*({violation})"):
        check_module(module, engine, case, "bucket")


def test_every_case_has_something_that_it_catches() -> None:
    """In the two tables above."""
    caught = {True: test_a_broken_transport_is_caught, False: test_a_broken_engine_is_caught}
    for is_transport, test in caught.items():
        table = next(mark for mark in test.pytestmark if mark.name == "parametrize")  # type: ignore[attr-defined]
        column = table.args[0].index("case")
        found = {getattr(row, "values", row)[column] for row in table.args[1]}
        assert found == set(TRANSPORT_CASES if is_transport else ENGINE_CASES)


# --- how a third party calls it ---------------------------------------------------------------------------------------


def test_an_engine_with_one_model() -> None:
    """Its own model is used in every case that any model will do for; the others are left out."""
    tensors = {"layer.weight": torch.randn(40, 30), "layer.bias": torch.zeros(40)}
    engine = ModuleEngine(Plain(tensors))
    made: list[Tensors] = []

    def make(wanted: Tensors) -> Engine:
        made.append(wanted)
        return engine

    def read(engine: Engine) -> Tensors:
        return {"layer.weight": engine.module.state_dict()["layer.weight"]}  # type: ignore[attr-defined]

    wanted = {"tensors": tensors, "unreadable": {"layer.bias"}}
    ran = check_engine(make, read, **wanted, cases=["exact", "versions", "busy"])  # type: ignore[arg-type]
    assert ran == ("exact", "versions", "busy")
    assert all(asked is tensors for asked in made)
    with pytest.raises(ValueError, match="'dtypes' has a model of its own"):
        check_engine(make, read, **wanted, cases=["dtypes"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'loader_fails_in_each_bucket' needs fail_load"):
        check_engine(make, read, **wanted, cases=["loader_fails_in_each_bucket"])  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=r"exact: layer\.bias: cannot be read"):
        check_engine(make, read, tensors=tensors, cases=["exact"])


def test_cases_are_known_by_name() -> None:
    with pytest.raises(ValueError, match="no case is called 'exactly'; there are exact, order"):
        check_engine(ReferenceModule, lambda _: {}, cases=["exactly"])
    with pytest.raises(ValueError, match="no case is called 'slot'; there are slots"):
        check_transport("shared_memory", cases=["slot"])
    with pytest.raises(TransportError, match=r"no transport is called 'pigeon'"):
        check_transport("pigeon")


def test_a_class_must_be_registered_for_refits() -> None:
    check_transport(broken.KeepingItsMemory, lends=False, cases=["slots"])
    with pytest.raises(TransportError, match="'keeping'"):
        check_transport(broken.KeepingItsMemory, lends=False, cases=["exact"])

    class Impostor(SharedMemory):
        pass

    with pytest.raises(ValueError, match="'shared_memory' is another class"):
        check_transport(Impostor, cases=["exact"])
