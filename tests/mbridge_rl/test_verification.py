"""Verification: what trainers hold is compared with the engine's own memory, and every bit that differs is found."""

from __future__ import annotations

import dataclasses
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mbridge.pieces import Box, TensorSpec
from mbridge_rl import WeightSyncer
from mbridge_rl.checker import NO_RECORD, NOT_KNOWN, NOT_SENT
from mbridge_rl.engines.module import ModuleEngine
from mbridge_rl.errors import EngineError, EngineStaleError, SyncError, VerifyError
from mbridge_rl.messages import Checked
from mbridge_rl.protocol import EngineState, Peer
from mbridge_rl.report import VerifyReport
from mbridge_rl.syncer import NUM_SHARES, PathChoice
from mbridge_rl.testing import WholeBridge
from mbridge_rl.verification import compare
from tests.mbridge_rl import processing
from tests.mbridge_rl.fakes import FakeBridge
from tests.mbridge_rl.processing import ProcessingEngine, flip
from tests.mbridge_rl.ranks import run_ranks
from tests.mbridge_rl.test_direct_path import Halved, Spy, halves, overwrite
from tests.mbridge_rl.test_sync import DEADLINE_S, GROUPS, Module, assert_holds, errors, shapes, weights
from tests.mbridge_rl.worker_engine import ProcessEngine

PATHS: list[PathChoice] = ["direct", "bucket"]

# --- compare, without processes and tensors ---------------------------------------------------------------------------

BOTTOM, TOP = -(1 << 63), (1 << 63) - 1
SHAPE = (6, 5)


@dataclasses.dataclass
class Answers:
    """What peers answer about tensors whose every element has a checksum of its own, drawn at random."""

    random: random.Random
    tensors: list[TensorSpec]
    totals: list[dict[int, int]]  # of each trainer
    boxes: list[list[tuple[int, tuple[int, ...], tuple[int, ...], str, int]]]  # of each worker

    def checked(self) -> dict[Peer, Checked]:
        trainers = {Peer("trainer", i): Checked(1, totals=t) for i, t in enumerate(self.totals)}
        return {**trainers, **{Peer("worker", i): Checked(1, boxes=b) for i, b in enumerate(self.boxes)}}


def signed(total: int) -> int:
    return (total - BOTTOM) % (1 << 64) + BOTTOM


def cut(drawn: random.Random, box: Box) -> list[Box]:
    """`box` in parts, by random cuts."""
    dim = drawn.randrange(2)
    if drawn.random() < 0.4 or box.shape[dim] < 2:
        return [box]
    at = drawn.randrange(box.start[dim] + 1, box.stop[dim])
    stop, start = list(box.stop), list(box.start)
    stop[dim] = start[dim] = at
    return [*cut(drawn, Box(box.start, tuple(stop))), *cut(drawn, Box(tuple(start), box.stop))]


def answers(seed: int) -> Answers:
    """Correct ones. Some boxes are held by several workers, or twice by one."""
    drawn = random.Random(seed)
    tensors = [TensorSpec(f"t{i}", SHAPE, torch.float32) for i in range(drawn.randint(1, 4))]
    totals: list[dict[int, int]] = [{} for _ in range(drawn.randint(1, 3))]
    boxes: list[list[Any]] = [[] for _ in range(drawn.randint(1, 3))]
    for number in range(len(tensors)):
        elements = {(i, j): drawn.randint(BOTTOM, TOP) for i in range(SHAPE[0]) for j in range(SHAPE[1])}

        def total(box: Box, elements: dict[tuple[int, int], int] = elements) -> int:
            return sum(v for (i, j), v in elements.items() if all(map(_within, box.start, (i, j), box.stop)))

        for box in cut(drawn, Box.whole(SHAPE)):
            rank = drawn.randrange(len(totals))
            totals[rank][number] = signed(totals[rank].get(number, 0) + total(box))
        for box in cut(drawn, Box.whole(SHAPE)):
            for copy in range(drawn.randint(1, 3)):
                worker = drawn.randrange(len(boxes))
                boxes[worker].append((number, box.start, box.stop, f"engine.{number}.{copy}", signed(total(box))))
    return Answers(drawn, tensors, totals, boxes)


def _within(start: int, index: int, stop: int) -> bool:
    return start <= index < stop


@given(st.integers(0, 2**32))
def test_what_is_equal_compares_equal_however_it_is_sharded(seed: int) -> None:
    made = answers(seed)
    found = compare(made.tensors, made.checked())
    assert (found.wrong, found.unchecked) == ({}, {})
    assert (found.num_compared, found.num_tensors) == (len(made.tensors), len(made.tensors))


@given(st.integers(0, 2**32), st.integers(1, 2**64 - 1))
def test_one_other_checksum_is_found_wherever_it_is(seed: int, error: int) -> None:
    made = answers(seed)
    held = [(w, i) for w, worker in enumerate(made.boxes) for i in range(len(worker))]
    worker, index = made.random.choice(held)
    number, start, stop, engine_name, total = made.boxes[worker][index]
    made.boxes[worker][index] = (number, start, stop, engine_name, signed(total + error))
    found = compare(made.tensors, made.checked())
    assert list(found.wrong) == [f"t{number}"]
    assert found.num_compared == len(made.tensors)
    replicas = sum(box[:3] == (number, start, stop) for boxes in made.boxes for box in boxes)
    if replicas > 1:
        assert "copies differ" in found.wrong[f"t{number}"]
    if replicas > 1 or sum(box[0] == number for boxes in made.boxes for box in boxes) <= 4:
        assert f"{engine_name} of engine worker {worker}" in found.wrong[f"t{number}"]


@given(st.integers(0, 2**32), st.integers(1, 2**64 - 1))
def test_a_trainer_that_holds_something_else_is_found(seed: int, error: int) -> None:
    made = answers(seed)
    rank = made.random.choice([i for i, totals in enumerate(made.totals) if totals])
    number = made.random.choice(sorted(made.totals[rank]))
    made.totals[rank][number] = signed(made.totals[rank][number] + error)
    assert list(compare(made.tensors, made.checked()).wrong) == [f"t{number}"]


@given(st.integers(0, 2**32))
def test_what_the_engine_holds_in_part_is_not_compared(seed: int) -> None:
    made = answers(seed)
    number, start, stop = made.random.choice([box[:3] for boxes in made.boxes for box in boxes])
    made.boxes = [[box for box in boxes if box[:3] != (number, start, stop)] for boxes in made.boxes]
    found = compare(made.tensors, made.checked())
    assert (found.wrong, list(found.unchecked)) == ({}, [f"t{number}"])
    assert found.num_compared == len(made.tensors) - 1


def test_what_workers_say_themselves_is_passed_on() -> None:
    specs = [TensorSpec("a", (2,), torch.float32), TensorSpec("b", (2,), torch.float32)]
    checked = {
        Peer("trainer", 0): Checked(1, totals={0: 5, 1: 6}),
        Peer("worker", 0): Checked(1, boxes=[(0, (0,), (2,), "x", 5)], changed=["cache"], unchecked={"y": "repacked"}),
    }
    found = compare(specs, checked)
    assert found.wrong == {"cache": "changed in engine worker 0 since it was loaded"}
    assert found.unchecked == {"y": "repacked", "b": "the engine does not keep it as it is"}
    assert found.num_compared == 1


# --- one bit of anything ----------------------------------------------------------------------------------------------

# Whose values the trainer does not have, because they are cast or processed: only checksums of their own are compared.
UNCHECKED = {"turned.weight", "other.weight", "constant.weight", "added.weight", "cast.weight"}
# Engine tensor -> what verify() calls it. What is compared with the trainer goes by its HF name.
NAMES = {
    "turned.weight": {"turned.weight"},
    "derived.table": {"derived.table"},
    "replaced.weight": {"replaced.weight"},
    "other.weight": {"other.weight"},
    "constant.weight": {"constant.weight"},
    "norm.weight": {"norm.weight"},
    "added.weight": {"added.weight"},
    "kept.weight": {"kept.weight"},
    "cast.weight": {"cast.weight"},
    "fused.weight": {"fused.q"},
    "padded.weight": {"padded.weight"},
}


def connected(path: PathChoice) -> tuple[ProcessingEngine, WholeBridge, Spy]:
    engine, bridge = ProcessingEngine(), WholeBridge(processing.weights(1))
    return engine, bridge, Spy(bridge, engine, path=path)


def engine_tensors(engine: ProcessingEngine) -> dict[str, torch.Tensor]:
    return {**dict(engine.model.named_parameters()), **dict(engine.model.named_buffers())}


@pytest.mark.parametrize("path", PATHS)
def test_one_bit_of_any_engine_tensor_is_found_and_named(path: PathChoice) -> None:
    engine, bridge, sync = connected(path)
    with sync:
        sync.sync()
        for step in (2, 3):
            bridge.tensors = processing.weights(step)
            report = sync.sync(verify="full").verification
            assert report is not None
            assert report.ok and report.unchecked.keys() == UNCHECKED
        tensors = engine_tensors(engine)
        assert tensors.keys() == NAMES.keys()
        for name, tensor in tensors.items():
            for element in (0, tensor.numel() - 1):
                flip(tensor, bit=element % 16, element=element)
                found = sync.verify()
                flip(tensor, bit=element % 16, element=element)
                last = {"fused.weight": {"fused.k"}}.get(name, NAMES[name]) if element else NAMES[name]
                assert found.wrong.keys() == last, (name, element)
                assert not found.ok
        assert sync.verify().ok
        processing.assert_holds(engine.model, bridge.tensors)  # nothing was moved


@pytest.mark.parametrize("path", PATHS)
def test_what_was_not_recorded_is_reported_as_unchecked(path: PathChoice) -> None:
    engine, bridge, sync = connected(path)
    with sync:
        sync.sync(verify="full")
        bridge.tensors = processing.weights(2)
        sync.sync()
        report = sync.verify()
        assert report.ok
        assert report.unchecked.keys() == UNCHECKED | {"derived.table", "padded.weight"}
        assert report.unchecked["derived.table"] == report.unchecked["padded.weight"] == f"{NOT_SENT}; {NO_RECORD}"
        assert report.unchecked["cast.weight"] == "sent as torch.float32, kept as torch.bfloat16"
        assert report.unchecked["turned.weight"] == f"its values change after loading; {NO_RECORD}"
        flip(engine.model.norm.weight)
        assert sync.verify().wrong.keys() == {"norm.weight"}
        flip(engine.model.norm.weight)
        assert sync.sync(verify="full").verification.unchecked.keys() == UNCHECKED  # type: ignore[union-attr]


@pytest.mark.parametrize("path", PATHS)
def test_a_bit_that_flips_during_a_refit_is_found_before_the_commit(path: PathChoice) -> None:
    engine, bridge, sync = connected(path)
    with sync:
        sync.sync(verify="full")
        for name, tensor in (("norm.weight", engine.model.norm.weight), ("fused.k", engine.model.fused.weight)):
            engine.target.after_finish = lambda tensor=tensor: flip(tensor, 5, tensor.numel() - 1)  # type: ignore[misc]
            version = sync.version
            with pytest.raises(VerifyError, match=f"1 tensors of the engine are wrong .* such as {name}") as caught:
                sync.sync(verify="full")
            assert caught.value.failure.tensor == name
            assert caught.value.failure.phase == "check"
            assert engine.state is EngineState.STALE
            assert engine.receiver.version == sync.version == version
            with pytest.raises(EngineStaleError, match=name):
                engine()
            bridge.tensors = processing.weights(7)
            assert sync.sync(verify="full").verification.ok  # type: ignore[union-attr]
            processing.assert_holds(engine.model, bridge.tensors)


@pytest.mark.parametrize("path", PATHS)
def test_sampled_verifications_cover_every_tensor_in_turn(path: PathChoice) -> None:
    tensors = {f"t{i:02d}": torch.full((3, 2), float(i)) for i in range(2 * NUM_SHARES + 3)}
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, torch.zeros_like(tensor))
    module.register_buffer("own", torch.ones(3), persistent=False)
    with Spy(WholeBridge(tensors), ModuleEngine(module), path=path) as sync:
        sync.sync(verify="full")
        sync.sync(verify="sampled")
        for name in (*tensors, "own"):
            flip(module.get_buffer(name), 3)
        reports = [sync.verify("sampled") for _ in range(NUM_SHARES)]
    assert max(report.num_compared for report in reports) == 3
    assert sum(report.num_compared for report in reports) == len(tensors)
    found = [name for report in reports for name in report.wrong]
    assert sorted(found) == sorted((*tensors, "own"))


@pytest.mark.parametrize("path", PATHS)
def test_what_the_engine_casts_is_unchecked(path: PathChoice) -> None:
    module = Halved()
    with Spy(FakeBridge(halves(1)), ModuleEngine(module), path=path) as sync:
        report = sync.sync(verify="full").verification
    assert isinstance(report, VerifyReport)
    assert report.ok
    assert report.num_compared == 0
    assert report.unchecked == dict.fromkeys(("a", "b"), "sent as torch.float32, kept as torch.bfloat16")


@pytest.mark.parametrize("path", PATHS)
def test_an_engine_that_drops_a_tensor_after_loading(path: PathChoice) -> None:
    engine, _, sync = connected(path)

    def drop() -> None:
        engine.model.derived.table = None

    with sync:
        engine.target.after_finish = drop
        assert sync.sync(verify="full").verification.ok  # type: ignore[union-attr]
        assert sync.verify().ok


@pytest.mark.parametrize("path", PATHS)
def test_an_engine_tensor_with_gaps(path: PathChoice) -> None:
    """Its rows do not follow each other in memory."""
    module = torch.nn.Module()
    module.register_buffer("a", torch.zeros(4, 6).t())
    module.register_buffer("b", torch.zeros(4))
    bridge = WholeBridge({"a": torch.randn(6, 4), "b": torch.randn(4)})
    with Spy(bridge, ModuleEngine(module), path=path) as sync:
        for _ in range(3):
            bridge.tensors = {name: torch.randn_like(tensor) for name, tensor in bridge.tensors.items()}
            report = sync.sync(verify="full")
            assert torch.equal(module.a, bridge.tensors["a"])
            assert report.verification is not None
            assert "not contiguous" in report.verification.unchecked["a"]


@pytest.mark.parametrize("path", PATHS)
def test_tensors_of_any_kind_beside_those_that_are_loaded(path: PathChoice) -> None:
    module = torch.nn.Module()
    module.register_buffer("a", torch.zeros(3))
    own = {
        "flag": torch.tensor([True, False]),
        "count": torch.tensor(3),
        "waves": torch.ones(2, dtype=torch.complex64),
        "wide": torch.ones(2, dtype=torch.complex128),
        "gaps": torch.ones(3, 2).t(),
        "later": torch.ones(2, device="meta"),
        "empty": torch.ones(0),
    }
    for name, tensor in own.items():
        module.register_buffer(name, tensor, persistent=False)
    with Spy(WholeBridge({"a": torch.randn(3)}), ModuleEngine(module), path=path) as sync:
        report = sync.sync(verify="full").verification
        assert report is not None and report.ok
        assert report.unchecked == dict.fromkeys(("wide", "gaps", "later"), f"{NOT_SENT}; {NO_RECORD}")
        for name in ("flag", "count", "waves"):
            flip(module.get_buffer(name))
            assert sync.verify().wrong.keys() == {name}
            flip(module.get_buffer(name))
        assert sync.verify().ok


# --- several processes ------------------------------------------------------------------------------------------------


def outcome_of(call: Any) -> tuple[str, str]:
    started = time.monotonic()
    try:
        call()
    except SyncError as error:
        assert time.monotonic() - started < DEADLINE_S / 4, "it took a deadline"
        return type(error).__name__, str(error)
    return "", ""


def several(rank: int, num_ranks: int) -> list[dict[str, Any]]:
    engine = ProcessEngine(shapes(), 2) if rank == 0 else None
    return [along(path, rank, num_ranks, engine) for path in PATHS]


def along(path: PathChoice, rank: int, num_ranks: int, engine: ProcessEngine | None) -> dict[str, Any]:
    bridge = FakeBridge(weights(1), rank, num_ranks, groups=GROUPS)
    told: dict[str, Any] = {}
    with Spy(bridge, engine, path=path) as sync:
        told["never synced"] = outcome_of(sync.verify)
        first = sync.version + 1
        overwrite(bridge, weights(first))
        sync.sync()
        told["never checked"] = outcome_of(sync.verify)
        if engine is not None:
            engine.check_serving()
            assert_holds(engine, first)
        overwrite(bridge, weights(first + 1))
        told["good"] = sync.sync(verify="full").verification
        if engine is not None:
            assert_holds(engine, first + 1)
            bias = engine.tensors()[1]["layers.0.bias"]  # 7 rows: both workers hold it whole
            flip(bias, 3)
            engine.set(1, **{"layers/0/bias": bias})
            head = engine.tensors()[1]["head"]  # rows 25 to 50
            flip(head, 3)
            engine.set(1, head=head)
        told["flipped"] = sync.verify()
        overwrite(bridge, weights(first + 2))
        sync.sync(verify="full")
        if rank == 1:
            flip(bridge.local["local.embed"])
        told["trainer"] = sync.verify()
        if rank == 1:
            flip(bridge.local["local.embed"])

            def fail() -> None:
                raise SyncError("on purpose")

            sync.before_totals = fail
        told["failed"] = outcome_of(sync.verify)
        if engine is not None:
            engine.check_serving()
            assert_holds(engine, first + 2)
        told["failed sync"] = outcome_of(lambda: sync.sync(verify="full"))
        told["stale"] = outcome_of(sync.verify)
        if engine is not None:
            assert engine.state is EngineState.STALE
        sync.before_totals = lambda: None
        told["repaired"] = sync.sync(verify="full").verification
        if engine is not None:
            engine.check_serving()
            assert torch.equal(engine.tensors()[1]["head"], weights(first + 2)["head"][25:])
        told["last"] = sync.verify()
    return told


def test_two_ranks_and_two_workers(tmp_path: Path) -> None:
    outcomes = run_ranks(2, tmp_path, several)
    assert errors(outcomes) == [None, None]
    for path, told, elsewhere in zip(PATHS, *(outcome.value for outcome in outcomes), strict=True):
        assert elsewhere == told  # every rank hears the same
        assert_told(path, told)


def assert_told(path: PathChoice, told: dict[str, Any]) -> None:
    assert told["never synced"] == (EngineError.__name__, told["never synced"][1])
    assert NOT_KNOWN in told["never synced"][1]
    assert (told["never checked"][0] == "EngineError") == (path == "bucket")
    num_tensors = len(weights(0))
    for key in ("good", "repaired", "last"):
        assert (told[key].wrong, told[key].num_compared, told[key].unchecked) == ({}, num_tensors, {})
    assert told["flipped"].wrong.keys() == {"layers.0.bias", "head"}
    replicas = "copies differ: layers/0/bias of engine worker 0; layers/0/bias of engine worker 1"
    assert told["flipped"].wrong["layers.0.bias"] == replicas
    assert "head of engine worker 1" in told["flipped"].wrong["head"]
    assert told["trainer"].wrong.keys() == {"embed"}
    assert told["failed"][0] == "SyncError"
    assert "on purpose [trainer rank 1" in told["failed"][1]
    assert told["failed sync"][0] == "SyncError"
    assert told["stale"][0] == "EngineStaleError"
    assert "on purpose" in told["stale"][1]


def test_a_verification_of_a_closed_syncer_or_of_no_kind() -> None:
    with WeightSyncer(FakeBridge(weights(1)), Module(), deadline_s=DEADLINE_S) as sync:
        for how in ("some", ""):
            with pytest.raises(ValueError, match="verify"):
                sync.verify(how)  # type: ignore[arg-type]
    with pytest.raises(SyncError, match="closed"):
        sync.verify()
