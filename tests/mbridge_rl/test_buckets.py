"""Layouts of buckets: every byte has one place, groups stay whole, and what is filled is what comes out."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbridge.pieces import TensorSpec, check_cover
from mbridge_rl.bucket_path import Assembly
from mbridge_rl.buckets import (
    ALIGNMENT,
    DEFAULT_LIMIT_BYTES,
    Layout,
    destination_pieces,
    part_box,
    part_view,
    plan_buckets,
    read_set_up,
    write_set_up,
)
from mbridge_rl.errors import PlanMismatchError, SyncError
from mbridge_rl.filler import Filler
from tests.mbridge_rl.fakes import FakeBridge

DTYPES = [torch.bfloat16, torch.float32, torch.uint8, torch.float64]


@st.composite
def models(draw: st.DrawFn) -> tuple[list[TensorSpec], list[tuple[str, ...]]]:
    num_tensors = draw(st.integers(1, 12))
    specs = []
    for i in range(num_tensors):
        shape = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
        specs.append(TensorSpec(f"t{i}", shape, draw(st.sampled_from(DTYPES))))
    groups, rest = [], [s.name for s in specs]
    while rest:
        size = draw(st.integers(1, 3))
        groups.append(tuple(rest[:size]))
        rest = rest[size:]
    return specs, groups


@settings(max_examples=150, deadline=None)
@given(models(), st.integers(1, 4000), st.integers(1, 3))
def test_what_is_filled_comes_out(model: tuple[list[TensorSpec], list[tuple[str, ...]]], size: int, ranks: int) -> None:
    specs, groups = model
    layout = plan_buckets(specs, groups, size)
    check(layout)
    generator = torch.Generator().manual_seed(size)
    tensors = {s.name: (torch.rand(s.shape, generator=generator) * 200).to(s.dtype) for s in specs}
    slots = [torch.zeros(max(layout.bucket_bytes, 1), dtype=torch.uint8) for _ in range(2)]
    bridges = [FakeBridge(tensors, rank, ranks) for rank in range(ranks)]
    fillers = [Filler(layout, bridge.pieces, slots) for bridge in bridges]
    for filler, bridge in zip(fillers, bridges, strict=True):
        filler.begin(bridge.live_tensors([]))
    assembly = Assembly(layout)
    found: list[str] = []
    for number, parts in enumerate(layout.by_bucket()):
        slot = slots[number % 2]
        slot.fill_(77)
        for filler in random.Random(number).sample(fillers, ranks):
            filler.fill(number)
        loaded = list(assembly.ready([(p, part_view(slot, layout.tensors[p.tensor], p)) for p in parts]))
        for name, tensor in loaded:
            assert tensor.dtype == tensors[name].dtype
            assert torch.equal(tensor, tensors[name])
            found.append(name)
        names = {name for name, _ in loaded}
        for group in groups:  # loaded together or not at all
            assert names.isdisjoint(group) or names.issuperset(group)
    assert found == [s.name for s in specs]  # each once, in the plan's order


def check(layout: Layout) -> None:
    assert len(layout.by_bucket()) == layout.num_buckets
    for parts in layout.by_bucket():
        assert parts, "an empty bucket"
        end = 0
        for part in parts:
            assert part.offset % ALIGNMENT == 0
            assert part.offset >= end, "parts overlap"
            end = (
                part.offset
                + part_box(layout.tensors[part.tensor], part).numel * layout.tensors[part.tensor].dtype.itemsize
            )
        assert end <= layout.bucket_bytes
    for piece in destination_pieces(layout):
        assert piece.box.shape == piece.region.shape
    for number, spec in enumerate(layout.tensors):
        check_cover(spec.name, spec.shape, [part_box(spec, p) for p in layout.parts if p.tensor == number])


def qwen_0_5b() -> tuple[list[TensorSpec], list[tuple[str, ...]]]:
    bf16 = torch.bfloat16
    specs, groups = [TensorSpec("embed", (151936, 896), bf16)], [("embed",)]
    for i in range(24):
        for group in (
            [("q", 896), ("k", 128), ("v", 128)],
            [("o", 896)],
            [("gate", 4864), ("up", 4864)],
            [("down", 4864)],
        ):
            specs += [TensorSpec(f"{i}.{name}", (rows, 896), bf16) for name, rows in group]
            groups.append(tuple(f"{i}.{name}" for name, _ in group))
    return specs, groups


def test_default_size_splits_nothing_and_overlaps() -> None:
    layout = plan_buckets(*qwen_0_5b())
    check(layout)
    assert layout.split_groups == ()
    assert layout.bucket_bytes == 151936 * 896 * 2  # the embedding decides; two of these are all the extra memory
    assert 6 <= layout.num_buckets <= 12


def test_default_limit_splits_what_is_larger() -> None:
    spec = TensorSpec("experts", (128, 4096, 2048), torch.bfloat16)  # 2 GiB
    layout = plan_buckets([spec], [("experts",)])
    check(layout)
    assert layout.bucket_bytes <= DEFAULT_LIMIT_BYTES
    assert layout.split_groups == ((0,),)


def test_a_bucket_is_never_smaller_than_a_row() -> None:
    spec = TensorSpec("t", (3, 1000), torch.float32)
    layout = plan_buckets([spec], [("t",)], 256)
    check(layout)
    assert layout.num_buckets == 3


def test_no_tensors() -> None:
    layout = plan_buckets([], [])
    assert (layout.num_buckets, layout.num_bytes) == (0, 0)


@pytest.mark.parametrize("groups", [[("a",)], [("a", "b"), ("b",)], [("a", "b", "c")], []])
def test_groups_must_name_each_tensor_once(groups: list[tuple[str, ...]]) -> None:
    specs = [TensorSpec(name, (2,), torch.float32) for name in "ab"]
    with pytest.raises(SyncError, match="each must be in one group"):
        plan_buckets(specs, groups)


def test_bucket_bytes_must_be_positive() -> None:
    with pytest.raises(SyncError, match="positive"):
        plan_buckets([TensorSpec("a", (2,), torch.float32)], [("a",)], 0)


def test_layout_survives_the_wire() -> None:
    layout = plan_buckets(*qwen_0_5b(), bucket_bytes=100 << 20, optional_names=frozenset({"0.q"}))
    message = write_set_up(layout, "shared_memory", {"path": "x", "slot_bytes": 3})
    assert read_set_up(message) == layout


def test_an_unknown_dtype_is_refused() -> None:
    message = write_set_up(plan_buckets([TensorSpec("a", (2,), torch.float32)], [("a",)]), "t", {})
    message.tensors[0] = ("a", (2,), "no_such_dtype")
    with pytest.raises(SyncError, match="no_such_dtype"):
        read_set_up(message)
    message.tensors[0] = ("a", (2,), "nn")
    with pytest.raises(SyncError, match="nn"):
        read_set_up(message)


def test_a_filler_holds_no_tensor_between_refits() -> None:
    tensors = {"a": torch.ones(4, 4)}
    bridge = FakeBridge(tensors)
    layout = plan_buckets(bridge.specs, bridge.groups)
    filler = Filler(layout, bridge.pieces, [torch.zeros(layout.bucket_bytes, dtype=torch.uint8)] * 2)
    filler.begin(bridge.local)
    filler.end(succeeded=True)
    with pytest.raises(KeyError):
        filler.fill(0)
    with pytest.raises(PlanMismatchError, match="contiguous"):
        filler.begin({"local.a": torch.ones(5, 4).t()})
