"""Buckets by broadcast: trainer ranks and workers are processes, with sockets between them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mbridge.pieces import TensorSpec
from mbridge_rl.agreement import owned_boxes
from mbridge_rl.broadcast_plan import plan_broadcasts, wire_bytes
from mbridge_rl.broadcast_slots import BroadcastSlots
from mbridge_rl.broadcaster import Broadcaster
from mbridge_rl.buckets import Layout, part_box, part_view, plan_buckets
from mbridge_rl.errors import PlanMismatchError, ProtocolError, SyncError
from mbridge_rl.messages import Grouping
from mbridge_rl.transports.collective import Collective
from tests.mbridge_rl.fakes import FakeBridge, Tensors
from tests.mbridge_rl.ranks import Outcome, run_ranks

CPU = torch.device("cpu")
DEADLINE_S = 20.0
SHORT_S = 3.0
GENEROUS_S = 30.0  # more than any wait of a test may take, less than a hang
FP8 = torch.float8_e4m3fn


def stages(version: int) -> list[Tensors]:
    """The HF tensors of three pipeline stages: names, shapes and dtypes of all kinds."""
    generator = torch.Generator().manual_seed(version)

    def make(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) * 200).to(dtype)

    return [
        {
            "embed": make(torch.bfloat16, 50, 24),
            "0.q": make(torch.bfloat16, 7, 24),  # uneven rows
            "0.k": make(torch.bfloat16, 3, 24),
            "0.scale": make(torch.float32),
            "0.none": make(torch.bfloat16, 0, 24),
            "0.experts": make(FP8, 13, 8, 16),
        },
        {"1.q": make(torch.bfloat16, 7, 24), "1.k": make(torch.bfloat16, 3, 24), "1.bias": make(torch.float32, 41)},
        {"norm": make(torch.float32, 24), "step": make(torch.float64), "head": make(torch.bfloat16, 300, 24)},
    ]


GROUPS = [("0.q", "0.k"), ("1.q", "1.k")]
BUCKET_BYTES = 2048  # "head" and "embed" are cut, stages meet inside buckets


@dataclass
class Model:
    """What rank `rank` of trainers whose stages have `sizes` ranks holds."""

    bridge: FakeBridge
    layout: Layout
    owned_by_rank: list[list[Any]]

    @staticmethod
    def of(rank: int, sizes: tuple[int, ...], version: int = 1) -> Model:
        parts = stages(version)
        if len(sizes) == 1:
            parts = [{name: t for part in parts for name, t in part.items()}]
        bridges = [FakeBridge(part, r, n) for part, n in zip(parts, sizes, strict=True) for r in range(n)]
        tensors = {name: t for part in parts for name, t in part.items()}
        whole = FakeBridge(tensors, groups=GROUPS)
        order = {name: i for i, name in enumerate(tensors)}
        groups = sorted(whole.groups, key=lambda group: order[group[0]])
        layout = plan_buckets(whole.specs, groups, BUCKET_BYTES)
        return Model(bridges[rank], layout, [owned_boxes(bridge.pieces) for bridge in bridges])


def test_model_is_worth_testing() -> None:
    """Several buckets and senders; a bucket in which stages meet; a tensor in several buckets."""
    model = Model.of(0, (2, 2, 2))
    plan = plan_broadcasts(model.layout, model.owned_by_rank)
    assert sorted(set(plan.senders)) == [0, 2, 4]
    assert len(plan.senders) > 8
    assert any(len(ranks) > 2 for ranks in plan.circles.values()), "no bucket is shared by two stages"
    assert model.layout.split_groups


# --- the plan ---------------------------------------------------------------------------------------------------------


def layout_of(*rows: int) -> Layout:
    specs = [TensorSpec(f"t{i}", (n, 64), torch.float32) for i, n in enumerate(rows)]
    return plan_buckets(specs, [(s.name,) for s in specs], 1024)


def test_a_sender_is_the_lowest_rank_of_those_that_share_tensors() -> None:
    layout = layout_of(4, 4, 4)
    owned = [
        [],
        [("t0", (0, 0), (2, 64))],
        [("t1", (0, 0), (4, 64))],
        [("t0", (2, 0), (4, 64)), ("t2", (0, 0), (4, 64))],
    ]
    plan = plan_broadcasts(layout, owned)
    assert plan.senders == [1, 2, 1]
    assert plan.circles == {1: [1, 3], 2: [2]}
    assert [plan.next_bucket(k) for k in range(3)] == [2, None, None]


def test_ranks_that_share_a_fusion_group_have_one_sender() -> None:
    specs = [TensorSpec(name, (4, 64), torch.float32) for name in "ab"]
    layout = plan_buckets(specs, [("a", "b")], 1024)
    plan = plan_broadcasts(layout, [[("b", (0, 0), (4, 64))], [("a", (0, 0), (4, 64))]])
    assert plan.senders == [0] * layout.num_buckets


def test_empty_tensors_have_a_sender_too() -> None:
    layout = plan_buckets([TensorSpec("none", (0, 4), torch.float32)], [("none",)])
    assert plan_broadcasts(layout, [[], []]).senders == [0]
    assert wire_bytes(layout) == [256]


def test_only_what_is_used_of_a_bucket_travels() -> None:
    layout = layout_of(4, 3)
    assert (layout.bucket_bytes, wire_bytes(layout)) == (1024, [1024, 768])


# --- whole refits -----------------------------------------------------------------------------------------------------


def grouping_of(
    address: dict[str, Any], generation: int, workers: list[tuple[int, int]], deadline_s: float
) -> Grouping:
    return Grouping(generation, str(address["host"]), int(address["port"]), "gloo", deadline_s, workers)


class Trainer:
    def __init__(self, rank: int, sizes: tuple[int, ...], address: dict[str, Any]) -> None:
        self.model = Model.of(rank, sizes)
        self.mover = Broadcaster(
            self.model.layout, self.model.owned_by_rank, self.model.bridge.pieces, rank, CPU, str(address["token"])
        )
        self.rank, self.sizes = rank, sizes

    def refit(self, version: int, grouping: Grouping, at: Callable[[int], None] = lambda bucket: None) -> None:
        new = Model.of(self.rank, self.sizes, version).bridge
        self.mover.begin(new.live_tensors([]))
        succeeded = False
        try:
            for bucket in range(self.model.layout.num_buckets):
                at(bucket)
                self.mover.fill(bucket, grouping if bucket == 0 else None)
            succeeded = True
        finally:
            self.mover.end(succeeded=succeeded)


class Worker:
    def __init__(self, me: tuple[int, int], sizes: tuple[int, ...], address: dict[str, Any]) -> None:
        model = Model.of(0, sizes)
        self.layout = model.layout
        senders = plan_broadcasts(model.layout, model.owned_by_rank).senders
        self.slots = BroadcastSlots(self.layout, senders, me, CPU, str(address["token"]))

    def refit(self, version: int, grouping: Grouping, at: Callable[[int], None] = lambda bucket: None) -> int:
        """Returns how many tensor parts were compared, byte by byte."""
        expected = {name: t for part in stages(version) for name, t in part.items()}
        compared = 0
        try:
            for bucket, parts in enumerate(self.layout.by_bucket()):
                at(bucket)
                if bucket == 0:
                    self.slots.join(grouping)
                self.slots.receive(bucket)
                for part in parts:
                    spec = self.layout.tensors[part.tensor]
                    found = part_view(self.slots.slot(bucket % 2), spec, part)
                    reference = expected[spec.name][part_box(spec, part).slices] if spec.shape else expected[spec.name]
                    assert (
                        found.contiguous()
                        .view(-1)
                        .view(torch.uint8)
                        .equal(reference.contiguous().view(-1).view(torch.uint8))
                    ), f"{spec.name} in bucket {bucket}"
                    compared += 1
        except SyncError:
            self.slots.abandon()
            raise
        return compared


def shared(rank: int) -> tuple[Collective | None, dict[str, Any]]:
    """Rank 0's store, and its address on all ranks: over the application's own group."""
    place = Collective.create(0) if rank == 0 else None
    said: list[Any] = [place.address if place else None]
    dist.broadcast_object_list(said, 0)
    return place, said[0]


def member(rank: int, sizes: tuple[int, ...], address: dict[str, Any]) -> Trainer | Worker:
    num_trainers = sum(sizes)
    return Trainer(rank, sizes, address) if rank < num_trainers else Worker((7, rank - num_trainers), sizes, address)


def barrier() -> None:
    dist.barrier()


def several_refits(rank: int, num_ranks: int, sizes: tuple[int, ...]) -> Any:
    _place, address = shared(rank)
    me = member(rank, sizes, address)
    workers = [(7, i) for i in range(num_ranks - sum(sizes))]
    results = []
    for version in (1, 2, 3):
        results.append(me.refit(version, grouping_of(address, 4, workers, DEADLINE_S)))
        total = torch.ones(3)
        dist.all_reduce(total)  # the application's own group works on
        assert total.tolist() == [num_ranks] * 3
    barrier()
    return results


@pytest.mark.parametrize(("sizes", "num_workers"), [((1,), 1), ((1,), 3), ((3,), 2), ((1, 1, 1), 2), ((2, 2, 1), 2)])
def test_every_byte_arrives(tmp_path: Path, sizes: tuple[int, ...], num_workers: int) -> None:
    outcomes = run_ranks(sum(sizes) + num_workers, tmp_path, several_refits, sizes)
    raise_errors(outcomes)
    num_parts = len(Model.of(0, sizes).layout.parts)
    assert [o.value for o in outcomes[sum(sizes) :]] == [[num_parts] * 3] * num_workers


def raise_errors(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error


MEMBERS = {1: [0, 1, 2], 2: [0, 2], 3: [2, 1, 0], 9: [1]}  # generation -> workers, in rank order


def changing_members(rank: int, num_ranks: int, sizes: tuple[int, ...]) -> Any:
    _place, address = shared(rank)
    me = member(rank, sizes, address)
    results = []
    for version, (generation, workers) in enumerate(MEMBERS.items(), 1):
        if rank < sum(sizes) or rank - sum(sizes) in workers:
            grouping = grouping_of(address, generation, [(7, i) for i in workers], DEADLINE_S)
            results.append(me.refit(version, grouping))
        barrier()
    return results


def test_members_come_and_go(tmp_path: Path) -> None:
    outcomes = run_ranks(6, tmp_path, changing_members, (1, 1, 1))
    raise_errors(outcomes)
    num_parts = len(Model.of(0, (1, 1, 1)).layout.parts)
    assert [o.value for o in outcomes[3:]] == [[num_parts] * n for n in (3, 3, 3)]


def leaks(rank: int, num_ranks: int) -> list[tuple[int, int]]:
    """(open files, threads) after few and after many generations."""
    _place, address = shared(rank)
    me = member(rank, (2,), address)
    counts = []
    for generation in range(1, 13):
        me.refit(generation, grouping_of(address, generation, [(7, 0)], DEADLINE_S))
        barrier()
        if generation in (2, 12):
            counts.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
        barrier()
    return counts


def test_old_generations_leave_nothing(tmp_path: Path) -> None:
    outcomes = run_ranks(3, tmp_path, leaks)
    raise_errors(outcomes)
    for early, late in (o.value for o in outcomes):
        assert late[0] <= early[0] + 2, "sockets of old groups are still open"
        assert late[1] <= early[1] + 2, "threads of old groups still run"


# --- failures ---------------------------------------------------------------------------------------------------------


class MoodyError(SyncError):
    """What a rank of a test raises by itself."""


def failing(rank: int, num_ranks: int, how: str, culprit: int, deadline_s: float) -> Any:
    """A good refit, one in which `culprit` fails in bucket 3, and one of the others. Two trainers, then workers."""
    sizes = (2,)
    _place, address = shared(rank)
    pids = [torch.zeros(1, dtype=torch.int64) for _ in range(num_ranks)]
    dist.all_gather(pids, torch.tensor([os.getpid()]))
    me = member(rank, sizes, address)
    workers = [(7, i) for i in range(num_ranks - 2)]
    me.refit(1, grouping_of(address, 1, workers, DEADLINE_S))

    def fail(bucket: int) -> None:
        if rank == culprit and bucket == 3:
            if how == "raise":
                raise MoodyError("moody", phase="stream")
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)

    grouping = grouping_of(address, 2, workers, deadline_s)
    barrier()
    started, text = time.monotonic(), ""
    try:
        me.refit(2, grouping, fail)
    except SyncError as error:
        text = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - started
    if how == "stop" and rank == 0:
        os.kill(int(pids[culprit]), signal.SIGCONT)
    with pytest.raises(SyncError, match="given up"):
        me.refit(2, grouping)
    if how != "raise":
        if rank == culprit:
            return text, seconds, None
        workers.remove((7, culprit - 2))
    return text, seconds, me.refit(3, grouping_of(address, 3, workers, DEADLINE_S))


@pytest.mark.parametrize(
    ("how", "culprit", "deadline_s"),
    [
        ("kill", 3, DEADLINE_S),
        ("stop", 3, SHORT_S),
        ("raise", 3, DEADLINE_S),
        ("raise", 0, DEADLINE_S),
        ("raise", 1, DEADLINE_S),
    ],
)
def test_a_failure_in_a_bucket_reaches_all(tmp_path: Path, how: str, culprit: int, deadline_s: float) -> None:
    outcomes = run_ranks(5, tmp_path, failing, how, culprit, deadline_s)
    raise_errors(outcomes)
    num_parts = len(Model.of(0, (2,)).layout.parts)
    print([o.value for o in outcomes])
    for rank, outcome in enumerate(outcomes):
        if rank == culprit and how == "kill":
            assert outcome.exit_code == -signal.SIGKILL
            continue
        text, seconds, compared = outcome.value
        assert "phase stream" in text, f"rank {rank} did not notice"
        assert seconds < (SHORT_S + GENEROUS_S / 2 if how == "stop" else DEADLINE_S / 2)
        if rank >= 2 and not (rank == culprit and how == "stop"):
            assert compared == num_parts, "the survivors' refit was not exact"
    if how == "stop":
        assert any("DeadlineError: waited 3 s for bucket" in o.value[0] for o in outcomes)


def killed_sender(rank: int, num_ranks: int) -> tuple[str, float]:
    _place, address = shared(rank)
    me = member(rank, (1, 2, 1), address)

    def fail(bucket: int) -> None:
        if rank == 1 and bucket == me.mover.senders.index(1):  # type: ignore[union-attr]
            os.kill(os.getpid(), signal.SIGKILL)

    started = time.monotonic()
    try:
        me.refit(1, grouping_of(address, 1, [(7, 0), (7, 1)], DEADLINE_S), fail)
    except SyncError as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - started
    return "", time.monotonic() - started


def test_a_killed_sender(tmp_path: Path) -> None:
    outcomes = run_ranks(6, tmp_path, killed_sender)
    raise_errors(outcomes)
    for rank in (4, 5):
        assert outcomes[rank].value[0].startswith("TransportError: bucket"), f"rank {rank}: {outcomes[rank].value}"
        assert "trainer rank 1" in outcomes[rank].value[0]
    # A trainer rank whose pieces have all arrived learns of it over the control channel only.
    assert all(outcomes[rank].value[1] < DEADLINE_S / 2 for rank in (0, 2, 3, 4, 5))


# --- misuse -----------------------------------------------------------------------------------------------------------


def one_trainer() -> tuple[Broadcaster, Model]:
    model = Model.of(0, (1,))
    return Broadcaster(model.layout, model.owned_by_rank, model.bridge.pieces, 0, CPU, "token"), model


def test_a_source_that_changed_since_the_plan() -> None:
    mover, model = one_trainer()
    with pytest.raises(PlanMismatchError, match=r"no longer have local tensor"):
        mover.begin({})
    sources = dict(model.bridge.local)
    sources["local.embed"] = sources["local.embed"].float()
    with pytest.raises(PlanMismatchError, match=r"local\.embed.*bfloat16.*found torch\.float32"):
        mover.begin(sources)


def test_no_tensor_is_held_between_refits() -> None:
    mover, model = one_trainer()
    mover.begin(model.bridge.local)
    mover.end(succeeded=True)
    mover.begin(model.bridge.local)
    mover.end(succeeded=False)
    assert not mover._local._sources


def test_bucket_0_needs_members() -> None:
    mover, model = one_trainer()
    mover.begin(model.bridge.local)
    with pytest.raises(SyncError, match="without the members"):
        mover.fill(0)
    mover.end(succeeded=False)


def worker_slots(me: tuple[int, int] = (7, 0)) -> BroadcastSlots:
    model = Model.of(0, (1,))
    senders = plan_broadcasts(model.layout, model.owned_by_rank).senders
    return BroadcastSlots(model.layout, senders, me, CPU, "token")


def test_a_worker_that_is_not_a_member() -> None:
    place = Collective.create(0)
    with pytest.raises(ProtocolError, match="worker 0 of engine 7 is not in the group"):
        worker_slots().join(grouping_of(place.address, 1, [(7, 1)], DEADLINE_S))


def test_a_bucket_before_its_group() -> None:
    with pytest.raises(ProtocolError, match="before the members"):
        worker_slots().receive(0)


def test_senders_for_another_layout() -> None:
    with pytest.raises(ProtocolError, match="2 senders came for 1 buckets"):
        BroadcastSlots(plan_buckets([TensorSpec("a", (2,), torch.float32)], [("a",)]), [0, 0], (0, 0), CPU, "token")


def test_a_model_without_tensors() -> None:
    layout = plan_buckets([], [])
    mover = Broadcaster(layout, [[]], [], 0, CPU, "token")
    mover.begin({})
    mover.end(succeeded=True)
    mover.close()
    slots = BroadcastSlots(layout, mover.senders, (0, 0), CPU, "token")
    slots.join(Grouping(1, "127.0.0.1", 1, "gloo", DEADLINE_S, [(0, 0)]))
    slots.close()
    slots.close()
