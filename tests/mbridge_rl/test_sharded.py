"""mode="sharded": each worker gets what it needs. Ranks and workers are processes, with sockets between them."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from mbridge.pieces import Box, TensorSpec
from mbridge_rl import SyncReport, WeightSyncer
from mbridge_rl.broadcast_plan import wire_bytes
from mbridge_rl.broadcaster import Broadcaster
from mbridge_rl.buckets import Layout, part_box, part_view, plan_buckets
from mbridge_rl.conductor import Conductor
from mbridge_rl.errors import EngineGoneError, EngineLoadError, ProtocolError, VerifyError, VersionError
from mbridge_rl.lanes import REMOTE
from mbridge_rl.messages import Fill, Needs
from mbridge_rl.needs import plan_packing, read_needs, write_needs
from mbridge_rl.shard_path import ShardPath
from mbridge_rl.shard_sender import Packer
from tests.mbridge_rl import processing
from tests.mbridge_rl.fakes import FakeBridge, Tensors
from tests.mbridge_rl.ranks import run_ranks
from tests.mbridge_rl.test_fleet import Named, holds
from tests.mbridge_rl.test_sync import BUCKET_BYTES, DEADLINE_S, GROUPS, errors, weights

# --- the plan ---------------------------------------------------------------------------------------------------------

SPECS = (
    TensorSpec("rows", (24, 10), torch.bfloat16),
    TensorSpec("scale", (), torch.float32),
    TensorSpec("none", (0, 4), torch.bfloat16),
    TensorSpec("experts", (6, 8, 12), torch.float8_e4m3fn),
    TensorSpec("double", (64, 6), torch.float64),  # larger than a bucket
    TensorSpec("bias", (37,), torch.float32),
    TensorSpec("gates", (600,), torch.float32),  # gate and up, alternating
    TensorSpec("unused", (8, 8), torch.float32),
)
LAYOUT = plan_buckets(SPECS, [(spec.name,) for spec in SPECS], 1024)


def slots_of(layout: Layout, bucket: int, tensors: Tensors) -> list[torch.Tensor]:
    """Two slots, of which one holds `bucket`."""
    slots = [torch.full((layout.bucket_bytes,), 0xAB, dtype=torch.uint8) for _ in range(2)]
    for part in layout.by_bucket()[bucket]:
        spec = layout.tensors[part.tensor]
        part_view(slots[bucket % 2], spec, part).copy_(part_box(spec, part).of(tensors[spec.name]))
    return slots


def travel(layout: Layout, boxes: list[tuple[str, Box]], tensors: Tensors) -> tuple[Tensors, list[int]]:
    """HF tensors as far as they come out of the messages (0 elsewhere), and the messages' bytes."""
    packing = plan_packing(layout, boxes)
    found = {spec.name: torch.zeros(spec.shape, dtype=spec.dtype) for spec in layout.tensors}
    sizes = []
    for bucket in range(layout.num_buckets):
        message = Packer(layout, packing, [bucket], slots_of(layout, bucket, tensors)).pack(bucket)
        sizes.append(message.numel())
        for piece in packing.pieces(bucket):
            dtype = found[piece.hf_name].dtype
            typed = message[: message.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
            piece.box.of(found[piece.hf_name]).copy_(piece.region.of(typed))
    assert sizes == packing.sizes
    return found, sizes


def random_tensors(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {s.name: (torch.rand(s.shape, generator=generator) * 200 + 1).to(s.dtype) for s in SPECS}


def random_boxes(seed: int) -> list[tuple[str, Box]]:
    """Some of them overlap, some are there twice, or are empty, or of the unfolded view."""
    rng = random.Random(seed)
    boxes = []
    for _ in range(rng.randrange(1, 12)):
        spec = rng.choice(SPECS[:-1])
        if spec.shape and spec.shape[-1] % 2 == 0 and rng.random() < 0.3:
            shape = (*spec.shape[:-1], spec.shape[-1] // 2, 2)
        else:
            shape = spec.shape
        ends = [sorted(rng.choices(range(n + 1), k=2)) for n in shape]
        boxes.append((spec.name, Box(tuple(a for a, _ in ends), tuple(b for _, b in ends))))
    return boxes + boxes[: rng.randrange(2)]


@pytest.mark.parametrize("seed", range(40))
def test_all_that_is_needed_arrives(seed: int) -> None:
    tensors, boxes = random_tensors(seed), random_boxes(seed)
    found, sizes = travel(LAYOUT, boxes, tensors)
    for name, box in boxes:
        assert torch.equal(box.of(found[name]).double(), box.of(tensors[name]).double()), (name, box)
    needed = {name for name, _ in boxes}
    assert all(not t.double().any() for name, t in found.items() if name not in needed)
    assert all(size <= limit for size, limit in zip(sizes, wire_bytes(LAYOUT), strict=True))


def test_only_what_is_needed_travels() -> None:
    half = [("double", Box((0, 0), (32, 6))), ("experts", Box((0, 0, 0), (6, 8, 6)))]
    assert sum(plan_packing(LAYOUT, half).sizes) == 32 * 6 * 8 + 6 * 8 * 6
    assert sum(plan_packing(LAYOUT, [*half, *half]).sizes) == 32 * 6 * 8 + 6 * 8 * 6
    assert sum(plan_packing(LAYOUT, []).sizes) == 0
    overlapping = [("double", Box((0, 0), (30, 6))), ("double", Box((20, 0), (40, 6)))]
    assert sum(plan_packing(LAYOUT, overlapping).sizes) == 64 * 6 * 8  # all of it, and nothing twice


def test_a_message_stays_while_the_next_is_packed() -> None:
    tensors = random_tensors(1)
    packing = plan_packing(LAYOUT, [("double", Box((0, 0), (60, 6)))])
    used = [bucket for bucket, size in enumerate(packing.sizes) if size]
    first = next(a for a, b in pairwise(used) if b == a + 1)
    slots = [
        slots_of(LAYOUT, bucket, tensors)[bucket % 2] for bucket in sorted((first, first + 1), key=lambda k: k % 2)
    ]
    packer = Packer(LAYOUT, packing, [first, first + 1], slots)
    message = packer.pack(first)
    before = message.clone()
    packer.pack(first + 1)
    assert before.any()
    assert torch.equal(message, before)


def test_boxes_that_would_not_be_smaller_travel_as_their_bucket_has_them() -> None:
    specks = [("rows", Box((row, 0), (row + 1, 1))) for row in range(24)]  # each would be padded to 16 bytes
    assert sum(plan_packing(LAYOUT, specks[:20]).sizes) == 20 * 16
    assert sum(plan_packing(LAYOUT, specks * 1 + [("rows", Box((r, 2), (r + 1, 3))) for r in range(24)]).sizes) == 480


def test_both_sides_come_to_the_same_plan() -> None:
    boxes = [(spec.name, Box.whole(spec.shape)) for spec in SPECS[:2]] + [("double", Box((3, 0), (40, 6)))]
    packing = plan_packing(LAYOUT, boxes)
    needs = msgspec.msgpack.decode(msgspec.msgpack.encode(write_needs(LAYOUT, boxes, packing)), type=Needs)
    again = plan_packing(LAYOUT, read_needs(LAYOUT, needs))
    assert again == packing
    assert needs.digest == packing.digest == plan_packing(LAYOUT, boxes[::-1] * 2).digest
    other = plan_buckets(SPECS, [(spec.name,) for spec in SPECS], 2048)
    wider = [*boxes[:2], ("double", Box((3, 0), (41, 6)))]
    assert len({packing.digest, plan_packing(other, boxes).digest, plan_packing(LAYOUT, wider).digest}) == 3


@pytest.mark.parametrize(
    "box",
    [
        ((0, 0), (25, 10), [0]),
        ((0, -1), (24, 10), [0]),
        ((5, 0), (4, 10), [0]),
        ((0,), (24,), [0]),
        ((0, 0), (24,), [0]),
        ((), (), [0]),
        ((0, 0), (24, 10), [8]),
        ((0, 0), (24, 10), [-1]),
        ((0, 0), (18, 2), [5]),  # an odd last dim has no unfolded view
        ((0, 0, 0), (24, 5, 3), [0]),
    ],
)
def test_needs_that_cannot_be(box: tuple[Any, Any, list[int]]) -> None:
    with pytest.raises(ProtocolError, match="a worker needs"):
        read_needs(LAYOUT, Needs("digest", [box]))


def test_needs_of_a_large_model_are_a_short_message() -> None:
    """As of one of 8 workers for a mixture of experts: 20,000 tensors, each a box."""
    shapes = [(1024, 512), (1024, 512), (512, 1024)]
    specs = [TensorSpec(f"{i}", shapes[i % 3], torch.bfloat16) for i in range(20_000)]
    layout = plan_buckets(specs, [(spec.name,) for spec in specs])
    boxes = [(s.name, Box((128, 0), (256, 512)) if s.shape[0] == 1024 else Box((0, 128), (512, 256))) for s in specs]
    packing = plan_packing(layout, boxes)
    needs = write_needs(layout, boxes, packing)
    assert len(msgspec.msgpack.encode(needs)) < 100_000
    assert sum(packing.sizes) * 8 == layout.num_bytes
    assert plan_packing(layout, read_needs(layout, needs)).digest == needs.digest


# --- whole refits -----------------------------------------------------------------------------------------------------


class Staged(FakeBridge):
    """Rank r of n has the tensors of pipeline stage r."""

    def __init__(self, tensors: Tensors, rank: int, num_ranks: int, *, groups: Any) -> None:
        super().__init__(tensors, groups=groups)
        order = {spec.name: i for i, spec in enumerate(self.specs)}
        first = {name: group[0] for group in self.groups for name in group}  # a group is in one stage
        self.pieces = tuple(p for p in self.pieces if order[first[p.hf_name]] * num_ranks // len(order) == rank)
        self.set(tensors)


class Saboteur(WeightSyncer):
    """Kills a process at a bucket."""

    victim: int | None = None

    def _fill(self, message: Fill, breathe: Callable[[], None]) -> Any:
        loan = super()._fill(message, breathe)
        if message.bucket == 1 and self.victim:
            os.kill(self.victim, signal.SIGKILL)
            self.victim = None
        return loan


def connect(
    engines: Any, rank: int = 0, num_ranks: int = 1, kind: type[FakeBridge] = FakeBridge, **options: Any
) -> tuple[FakeBridge, Saboteur]:
    bridge = kind(weights(1), rank, num_ranks, groups=GROUPS)
    options = {"deadline_s": DEADLINE_S, "bucket_bytes": BUCKET_BYTES, **options}
    return bridge, Saboteur(bridge, engines, transport="collective", mode="sharded", **options)


def share_bytes(num_workers: int) -> int:
    """What worker 0 of so many needs, each tensor's share in whole 16 bytes, which all rows are."""
    total = 0
    for tensor in weights(0).values():
        divides = tensor.dim() > 0 and tensor.shape[0] % num_workers == 0
        num_bytes = tensor.numel() * tensor.element_size() // (num_workers if divides else 1)
        total += (num_bytes + 15) // 16 * 16
    return total


def broadcaster(syncer: WeightSyncer) -> Broadcaster:
    mover = syncer._lanes._movers[REMOTE]
    assert isinstance(mover, Broadcaster)
    return mover


def classes(syncer: WeightSyncer) -> list[set[str]]:
    """The workers of each group that this trainer rank sends to."""
    return [set(outlet.group.names[1:]) for outlet in broadcaster(syncer)._outlets]


@pytest.fixture
def make() -> Iterator[Callable[..., Named]]:
    made: list[Named] = []

    def one(name: str, num_workers: int = 1) -> Named:
        made.append(Named(name, num_workers))
        return made[-1]

    yield one
    for engine in made:
        engine.stop()


def refit(bridge: FakeBridge, syncer: WeightSyncer, version: int, *engines: Named) -> SyncReport:
    """To `version`, checked bit by bit."""
    bridge.set(weights(version))
    report = syncer.sync(version, verify="full")
    assert all(holds(engine, version) for engine in engines)
    assert report.verification is not None
    assert report.verification.num_compared == len(weights(0))
    assert report.mode in str(report)
    return report


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_workers_get_their_share_and_replicas_the_same(make: Callable[..., Named], num_workers: int) -> None:
    engines = [make("alpha", num_workers), make("beta", num_workers)]
    bridge, syncer = connect(engines)
    with syncer:
        first = refit(bridge, syncer, 1, *engines)
        assert (first.mode, first.wire_bytes) == ("broadcast", sum(wire_bytes(syncer.layout)))
        for version in (2, 3, 4):
            report = refit(bridge, syncer, version, *engines)
            assert (report.mode, report.wire_bytes) == ("sharded", share_bytes(num_workers))
        replicas = [{f"worker {i} of engine {e}" for e in (0, 1)} for i in range(num_workers)]
        assert sorted(classes(syncer), key=sorted) == replicas
        assert syncer.verify().ok
        bridge.set(weights(5))
        assert len(syncer.verify().wrong) == 2 * len(weights(0))


def test_what_divides_is_divided() -> None:
    """The numbers that the test above compares with, by another way."""
    whole = {name: t.numel() * t.element_size() for name, t in weights(0).items()}
    odd = whole["layers.0.bias"] + whole["scale"]  # 28 and 4 bytes, which take 48
    assert share_bytes(1) == sum(whole.values()) - odd + 48
    assert share_bytes(2) == (sum(whole.values()) - odd) // 2 + 48
    by_two_only = whole["embed"] + whole["head"]
    assert share_bytes(4) == (sum(whole.values()) - odd - by_two_only) // 4 + by_two_only + 48


def engines_of_all_sizes(rank: int, num_ranks: int, kind: type[FakeBridge], rolling: bool) -> Any:
    engines = [Named("one"), Named("two", 2), Named("four", 4), Named("two more", 2)] if rank == 0 else []
    bridge, syncer = connect(engines, rank, num_ranks, kind, rolling=rolling)
    seen = []
    with syncer:
        for version in (1, 2, 3):
            bridge.set(weights(version))
            report = syncer.sync(verify="full")
            seen.append((report.version, report.mode, report.wire_bytes))
            if rank == 0:
                assert all(holds(engine, version) for engine in engines)
        num_classes = len(classes(syncer))
        senders = sorted(broadcaster(syncer).plan.circles)
    for engine in engines:
        engine.stop()
    return seen, num_classes, senders


@pytest.mark.parametrize(
    ("kind", "senders", "rolling"), [(FakeBridge, [0], False), (Staged, [0, 1], False), (Staged, [0, 1], True)]
)
def test_trainer_ranks_and_engines_of_all_sizes(
    tmp_path: Path, kind: type[FakeBridge], senders: list[int], rolling: bool
) -> None:
    outcomes = run_ranks(2, tmp_path, engines_of_all_sizes, kind, rolling)
    assert errors(outcomes) == [None, None]
    most = share_bytes(2 if rolling else 1)  # rolling: of the last engine
    for rank, outcome in enumerate(outcomes):
        seen, num_classes, found = outcome.value
        assert seen[0][:2] == (1, "broadcast")
        assert seen[1:] == [(2, "sharded", most), (3, "sharded", most)]
        assert found == senders
        assert num_classes == ((2 if rolling else 7) if rank in senders else 0)


def test_what_the_engines_loader_has_to_see_comes_whole() -> None:
    engine = processing.ProcessingEngine()
    bridge = FakeBridge(processing.weights(1))
    options: dict[str, Any] = {"deadline_s": DEADLINE_S, "bucket_bytes": 512}
    with WeightSyncer(bridge, engine, transport="collective", mode="sharded", **options) as syncer:
        for version in (1, 2, 3, 4):
            bridge.set(processing.weights(version))
            report = syncer.sync(verify="full" if version == 3 else None)
            processing.assert_holds(engine.model, processing.weights(version))
            opaque = set(report.reasons)
            reloaded = {name for name in processing.SHAPES if name.partition(".")[0] in opaque}
            assert set(engine.target.loaded) == (set(processing.SHAPES) if version == 1 else reloaded)
        assert set(processing.OPAQUE) <= opaque
        assert {"norm", "fused", "cast"}.isdisjoint(opaque)


def written_directly(engine: processing.ProcessingEngine) -> set[str]:
    session = engine.receiver._session
    assert session is not None and isinstance(session.path, ShardPath) and session.path._sharded is not None
    return {endpoint.name for executor in session.path._sharded.executors for endpoint in executor.table.destinations}


def test_fusion_groups_go_through_the_loader_whole() -> None:
    """Also if they lie in several buckets, and only one of their tensors has to."""
    engine = processing.ProcessingEngine()
    group = ("norm.weight", "turned.weight", "fused.q", "fused.k")
    bridge = FakeBridge(processing.weights(1), groups=[group])
    options: dict[str, Any] = {"deadline_s": DEADLINE_S, "bucket_bytes": 256}
    with WeightSyncer(bridge, engine, transport="collective", mode="sharded", **options) as syncer:
        assert syncer.layout.split_groups
        for version in (1, 2, 3):
            bridge.set(processing.weights(version))
            report = syncer.sync()
            processing.assert_holds(engine.model, processing.weights(version))
        assert report.mode == "sharded"
        assert [name for name in engine.target.loaded if name in group] == list(group)
        assert "cast.weight" not in engine.target.loaded
        assert written_directly(engine) == {"cast.weight", "kept.weight", "padded.weight"}


ALTERNATING = {"bias": (600,), "matrix": (6, 80)}


class Alternating(torch.nn.Module):
    """Takes every second element or column, and the first half of them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gate_bias", torch.zeros(150))
        self.register_buffer("up_matrix", torch.zeros(6, 20))

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in named:
            if name == "bias":
                self.get_buffer("gate_bias").copy_(tensor[::2][:150])
                loaded.add("gate_bias")
            else:
                self.get_buffer("up_matrix").copy_(tensor[:, 1::2][:, :20])
                loaded.add("up_matrix")
        return loaded


def test_what_alternates_in_a_tensor_is_taken_apart() -> None:
    def tensors(version: int) -> Tensors:
        generator = torch.Generator().manual_seed(version)
        return {name: torch.rand(shape, generator=generator) for name, shape in ALTERNATING.items()}

    module, bridge = Alternating(), FakeBridge(tensors(0))
    options: dict[str, Any] = {"deadline_s": DEADLINE_S, "bucket_bytes": 1024}
    with WeightSyncer(bridge, module, transport="collective", mode="sharded", **options) as syncer:
        assert len([part for part in syncer.layout.parts if part.tensor == 0]) > 2
        for version in (1, 2, 3):
            bridge.set(tensors(version))
            report = syncer.sync()
            assert module.get_buffer("gate_bias").tolist() == tensors(version)["bias"].tolist()[:300:2]
            assert module.get_buffer("up_matrix").tolist() == [r[1:40:2] for r in tensors(version)["matrix"].tolist()]
        assert report.mode == "sharded"
        payload = 4 * (150 + 120)
        assert payload <= report.wire_bytes <= payload + 16 * len(syncer.layout.parts)


class Half(torch.nn.Module):
    """Has a place for some of the tensors only, as a worker of a pipeline stage has."""

    NAMES = ("layers.1.q", "layers.1.k", "layers.1.experts")

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            self.register_buffer(name.replace(".", "_"), torch.zeros_like(weights(0)[name]))

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in named:
            if name in self.NAMES:
                self.get_buffer(name.replace(".", "_")).copy_(tensor)
                loaded.add(name.replace(".", "_"))
        return loaded


def test_of_a_bucket_of_which_nothing_is_needed_nothing_travels() -> None:
    module, bridge = Half(), FakeBridge(weights(1), groups=GROUPS)
    bridge.optional = frozenset(weights(0)) - set(Half.NAMES)
    options: dict[str, Any] = {"deadline_s": DEADLINE_S, "bucket_bytes": BUCKET_BYTES}
    with WeightSyncer(bridge, module, transport="collective", mode="sharded", **options) as syncer:
        needed = {p.bucket for p in syncer.layout.parts if syncer.layout.tensors[p.tensor].name in Half.NAMES}
        assert {0, syncer.layout.num_buckets - 1} - needed, "each bucket is needed"
        for version in (1, 2, 3):
            bridge.set(weights(version))
            report = syncer.sync()
            assert all(torch.equal(module.get_buffer(n.replace(".", "_")), weights(version)[n]) for n in Half.NAMES)
        found = [weights(0)[name] for name in Half.NAMES]
        assert (report.mode, report.wire_bytes) == ("sharded", sum(t.numel() * t.element_size() for t in found))


# --- engines come, go and fail ----------------------------------------------------------------------------------------


def test_a_new_engine_joins_its_class(make: Callable[..., Named]) -> None:
    old, new = make("old", 2), make("new", 2)
    bridge, syncer = connect([old])
    with syncer:
        refit(bridge, syncer, 1, old)
        assert refit(bridge, syncer, 2, old).mode == "sharded"
        added = syncer.add_engine(new)
        assert added is not None
        assert (added.mode, added.version) == ("broadcast", 2)
        assert holds(new, 2)
        assert refit(bridge, syncer, 3, old, new).mode == "sharded"
        assert sorted(map(len, classes(syncer))) == [2, 2]
        third = make("third", 2)
        syncer.add_engine(third, refit=False)
        assert refit(bridge, syncer, 4, old, new, third).mode == "broadcast+sharded"
        assert refit(bridge, syncer, 5, old, new, third).mode == "sharded"
        syncer.remove_engine(old)
        report = refit(bridge, syncer, 6, new, third)
        assert (report.mode, report.wire_bytes) == ("sharded", share_bytes(2))
        assert holds(old, 5)
        whole = make("whole")
        syncer.add_engine(whole)
        assert refit(bridge, syncer, 7, new, third, whole).wire_bytes == share_bytes(1)
        num_bytes = broadcaster(syncer).num_bytes
        syncer.remove_engine(whole)
        refit(bridge, syncer, 8, new, third)
        assert broadcaster(syncer).num_bytes < num_bytes  # nothing is kept for who has left


@pytest.mark.parametrize("moment", ["begin", "finish"])
def test_after_a_failure_everything_comes_again(make: Callable[..., Named], moment: str) -> None:
    engines = [make("alpha", 2), make("beta", 2)]
    bridge, syncer = connect(engines)
    with syncer:
        for version in (1, 2):
            refit(bridge, syncer, version, *engines)
        engines[1].set(1, plan={moment: "raise"})
        with pytest.raises(EngineLoadError, match=r"beta: .*poisoned"):
            syncer.sync(3)
        assert refit(bridge, syncer, 4, *engines).mode == "broadcast"
        report = refit(bridge, syncer, 5, *engines)
        assert (report.mode, report.wire_bytes) == ("sharded", share_bytes(2))


def test_a_loader_that_fails_in_the_first_refit(make: Callable[..., Named]) -> None:
    engine = make("alpha", 2)
    bridge, syncer = connect([engine])
    with syncer:
        engine.set(0, poison="layers.1.q")
        with pytest.raises(EngineLoadError, match="poisoned"):
            syncer.sync(1)
        assert refit(bridge, syncer, 2, engine).mode == "broadcast"
        assert refit(bridge, syncer, 3, engine).mode == "sharded"


def test_quarantine_goes_on_with_the_others(make: Callable[..., Named]) -> None:
    engines = [make("alpha", 2), make("beta", 2), make("gamma")]
    bridge, syncer = connect(engines, on_error="quarantine")
    with syncer:
        for version in (1, 2):
            refit(bridge, syncer, version, *engines)
        engines[1].set(0, plan={"finish": "raise"})
        report = refit(bridge, syncer, 3, engines[0], engines[2])
        assert (list(report.quarantined), report.mode) == (["beta"], "broadcast")
        assert refit(bridge, syncer, 4, engines[0], engines[2]).mode == "sharded"
        syncer.add_engine(engines[1])
        assert refit(bridge, syncer, 5, *engines).mode == "sharded"


@pytest.mark.parametrize("on_error", ["raise", "quarantine"])
def test_a_killed_worker(make: Callable[..., Named], on_error: str) -> None:
    engines = [make("alpha", 2), make("beta", 2)]
    bridge, syncer = connect(engines, on_error=on_error)
    with syncer:
        for version in (1, 2):
            refit(bridge, syncer, version, *engines)
        syncer.victim = engines[1].worker_pids[0]
        if on_error == "raise":
            with pytest.raises(EngineGoneError, match="beta"):
                syncer.sync(3)
            syncer.remove_engine(engines[1])
        assert refit(bridge, syncer, 4, engines[0]).mode == "broadcast"
        assert refit(bridge, syncer, 5, engines[0]).mode == "sharded"


def test_a_refit_that_fails_before_anything_moves_forgets_nothing(make: Callable[..., Named]) -> None:
    engine = make("alpha", 2)
    bridge, syncer = connect([engine])
    with syncer:
        for version in (1, 2):
            refit(bridge, syncer, version, engine)
        with pytest.raises(VersionError):
            syncer.sync(1)
        assert refit(bridge, syncer, 3, engine).mode == "sharded"


def test_workers_follow_when_rank_0_knows_nothing_of_them(make: Callable[..., Named]) -> None:
    engine = make("alpha", 2)
    bridge, syncer = connect([engine])
    with syncer:
        for version in (1, 2):
            refit(bridge, syncer, version, engine)
        known_needs(syncer).clear()
        assert refit(bridge, syncer, 3, engine).mode == "broadcast"
        assert refit(bridge, syncer, 4, engine).mode == "sharded"


def test_a_bit_that_flips_in_a_parameter_is_found(make: Callable[..., Named]) -> None:
    engine = make("alpha", 2)
    bridge, syncer = connect([engine])
    with syncer:
        for version in (1, 2):
            refit(bridge, syncer, version, engine)
        engine.set(0, plan={"finish": "flip here"})
        with pytest.raises(VerifyError, match="embed"):
            syncer.sync(verify="full")
        assert refit(bridge, syncer, 4, engine).mode == "broadcast"


# --- plans that differ ------------------------------------------------------------------------------------------------


def known_needs(syncer: WeightSyncer) -> dict[tuple[int, int], Needs]:
    assert isinstance(syncer._side, Conductor)
    return syncer._side._needs


def test_a_worker_that_unpacks_otherwise_than_it_is_told(make: Callable[..., Named]) -> None:
    engine = make("alpha", 2)
    bridge, syncer = connect([engine])
    with syncer:
        refit(bridge, syncer, 1, engine)
        known = known_needs(syncer)
        mine, other = known[0, 0], known[0, 1]
        known[0, 0] = other
        with pytest.raises(ProtocolError, match=f"worker 0 of engine 0 .*{other.digest}.*{mine.digest}"):
            syncer.sync(2)
        assert refit(bridge, syncer, 3, engine).mode == "broadcast"
        assert refit(bridge, syncer, 4, engine).mode == "sharded"


def test_a_worker_that_has_forgotten_what_rank_0_remembers(make: Callable[..., Named]) -> None:
    engine = make("alpha", 2)
    bridge, syncer = connect([engine])
    with syncer:
        for version in (1, 2):
            refit(bridge, syncer, version, engine)
        remembered = dict(known_needs(syncer))
        engine.set(1, plan={"finish": "raise"})
        with pytest.raises(EngineLoadError):
            syncer.sync(3)
        known_needs(syncer).update(remembered)
        with pytest.raises(ProtocolError, match="it unpacks whole buckets only"):
            syncer.sync(4)
        assert refit(bridge, syncer, 5, engine).mode == "broadcast"


def test_a_sender_that_packs_otherwise_than_the_workers_unpack(make: Callable[..., Named]) -> None:
    engine = make("alpha", 2)
    bridge, syncer = connect([engine])
    with syncer:
        refit(bridge, syncer, 1, engine)
        known = known_needs(syncer)
        digest = known[0, 1].digest
        known[0, 1] = Needs(digest, known[0, 1].boxes[1:])
        with pytest.raises(ProtocolError, match=rf"packs for worker 1 .*\(\d+ boxes in .*plan {digest}"):
            syncer.sync(2)
        assert refit(bridge, syncer, 3, engine).mode == "broadcast"


def test_the_mode_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="mode must be one of broadcast, sharded"):
        WeightSyncer(FakeBridge(weights(1)), None, mode="p2p")  # type: ignore[arg-type]
