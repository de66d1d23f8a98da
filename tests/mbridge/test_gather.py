"""How tensors are divided into buckets, and how long a bucket stays valid; one rank, so no process group."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mbridge.errors import MBridgeError, PlanError
from mbridge.gather import ALIGNMENT, Bucket, BucketPlan, gather_buckets, on_all, plan_buckets, raise_on_all
from mbridge.pieces import Box, Piece, Region, TensorSpec, whole_pieces

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
shape = st.lists(st.integers(1, 12), min_size=0, max_size=3).map(tuple)


@st.composite
def tensor_groups(draw: st.DrawFn) -> list[list[TensorSpec]]:
    dtype = draw(dtypes)
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=8))
    return [
        [TensorSpec(f"g{i}.t{j}", draw(shape), dtype) for j in range(count)] for i, count in enumerate(counts)
    ]  # fmt: skip


def values_of(specs: list[TensorSpec]) -> dict[str, torch.Tensor]:
    return {
        spec.name: (torch.arange(math.prod(spec.shape)) % 200 + i).to(spec.dtype).view(spec.shape)
        for i, spec in enumerate(specs)
    }


def flat(groups: list[list[TensorSpec]]) -> list[TensorSpec]:
    return [spec for group in groups for spec in group]


@given(groups=tensor_groups(), bucket_bytes=st.integers(1, 4000))
def test_buckets_hold_every_tensor_once_in_order_and_groups_whole(
    groups: list[list[TensorSpec]], bucket_bytes: int
) -> None:
    plans = plan_buckets(groups, [whole_pieces(flat(groups))], bucket_bytes)
    placed = [p for plan in plans for p in plan.placed]
    assert [p.spec for p in placed] == flat(groups)
    for plan in plans:
        end = 0
        for spec, offset in plan.placed:
            assert offset % ALIGNMENT == 0
            assert offset >= end
            end = offset + spec.num_bytes
        assert end <= plan.num_bytes
        in_plan = {spec.name.split(".")[0] for spec, _ in plan.placed}
        assert plan.num_bytes <= bucket_bytes or len(in_plan) == 1  # only a group of its own may be larger
        for other in plans:
            assert other is plan or not in_plan & {spec.name.split(".")[0] for spec, _ in other.placed}
    tensors = values_of(flat(groups))
    gathered = {
        name: tensor
        for bucket in gather_buckets(plans, tensors, None, to_all=False, reuse=False)
        for name, tensor in bucket.tensors
    }
    assert gathered.keys() == tensors.keys()
    assert all(torch.equal(gathered[name], tensors[name]) for name in tensors)


def four_buckets() -> tuple[list[BucketPlan], dict[str, torch.Tensor]]:
    specs = [TensorSpec(name, (8, 8), torch.float32) for name in "abcd"]
    plans = plan_buckets([[spec] for spec in specs], [whole_pieces(specs)], 256)
    assert len(plans) == 4
    return plans, values_of(specs)


def test_a_reused_bucket_is_valid_until_the_second_next() -> None:
    plans, tensors = four_buckets()
    previous: Bucket | None = None
    storages = set()
    for bucket in gather_buckets(plans, tensors, None, to_all=False, reuse=True):
        assert bucket is not None
        for held in filter(None, (previous, bucket)):
            assert all(torch.equal(tensor, tensors[name]) for name, tensor in held.tensors)
        storages.add(bucket.flat.untyped_storage().data_ptr())
        previous = bucket
    assert len(storages) == 2


def test_unless_reused_buckets_stay_valid() -> None:
    plans, tensors = four_buckets()
    for bucket in list(gather_buckets(plans, tensors, None, to_all=False, reuse=False)):
        assert bucket is not None
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in bucket.tensors)


def test_pieces_that_do_not_make_the_tensors_are_refused() -> None:
    spec = TensorSpec("a", (4, 2), torch.float32)
    half = Piece("a", Box((0, 0), (2, 2)), "x", Region.contiguous((2, 2)))
    other_half = replace(half, box=Box((2, 0), (4, 2)))
    assert len(plan_buckets([[spec]], [[half], [other_half]])[0].packed) == 2
    for owned in ([[half], []], [[half], [half]], [[half, half], [other_half]]):
        with pytest.raises(PlanError, match="'a'"):
            plan_buckets([[spec]], owned)
    with pytest.raises(PlanError, match="answers for 'b'"):
        plan_buckets([[spec]], [[half], [other_half], [replace(half, hf_name="b")]])
    assert plan_buckets([], [[], []]) == []


def test_alone_an_error_is_raised_as_it_is() -> None:
    error = PlanError("x")

    def fail() -> None:
        raise error

    with pytest.raises(PlanError) as caught:
        on_all(fail, None)
    assert caught.value is error
    assert on_all(lambda: 3, None) == 3
    raise_on_all(None, None)
    with pytest.raises(MBridgeError):
        raise_on_all(error, None)
