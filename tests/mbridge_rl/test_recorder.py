"""Dry runs of loaders: what they use, where they write, and that nothing is written."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from mbridge.pieces import TensorSpec
from mbridge_rl.errors import EngineMismatchError
from mbridge_rl.recorder import dry_run

Named = Iterable[tuple[str, torch.Tensor]]
SPECS = [TensorSpec(name, (4, 6), torch.float32) for name in ("q", "k", "v", "o")]


def test_views_and_arithmetic_keep_the_name_and_nothing_is_written() -> None:
    qkv, o = torch.full((12, 3), 7.0), torch.full((6, 4), 7.0)

    def load(named: Named) -> set[str]:
        for name, tensor in named:
            if name == "o":
                o.copy_(tensor.t().contiguous())
                continue
            shard = {"q": 0, "k": 1, "v": 2}[name]
            qkv.narrow(0, 4 * shard, 4).copy_(tensor.chunk(2, dim=1)[1].float() * 2)
        return {"qkv", "o"}

    found = dry_run(load, SPECS)
    assert found.consumed == {"q", "k", "v", "o"}
    assert found.loaded == {"qkv", "o"}
    assert found.twice == []
    assert qkv.eq(7).all()
    assert o.eq(7).all()


def test_what_is_skipped_is_not_consumed() -> None:
    target = torch.zeros(4, 6)

    def load(named: Named) -> None:
        for name, tensor in named:
            if name == "q":
                target.data.copy_(tensor)

    found = dry_run(load, SPECS)
    assert found.consumed == {"q"}
    assert found.loaded is None


def test_two_names_in_one_place() -> None:
    target = torch.zeros(4, 6)

    def load(named: Named) -> None:
        for _, tensor in named:
            target[:, :].copy_(tensor)

    assert dry_run(load, SPECS[:2]).twice == [("q", "k")]


def test_cat_and_stack_carry_all_names() -> None:
    target = torch.zeros(8, 6)

    def load(named: Named) -> None:
        target.copy_(torch.cat([tensor for _, tensor in named]))

    assert dry_run(load, SPECS[:2]).consumed == {"q", "k"}


def test_a_scalar_that_is_read() -> None:
    def load(named: Named) -> None:
        for _, tensor in named:
            assert tensor.item() == 0

    assert dry_run(load, [TensorSpec("scale", (), torch.float32)]).consumed == {"scale"}


@pytest.mark.parametrize("shape", [(4, 5), (2, 6), (3,)])
def test_a_copy_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    def load(named: Named) -> None:
        for _, tensor in named:
            torch.zeros(shape).copy_(tensor)

    with pytest.raises(EngineMismatchError, match=r"q \[4, 6\] torch.float32") as caught:
        dry_run(load, SPECS)
    assert caught.value.failure.tensor == "q"


def test_a_loader_that_raises_names_the_tensor() -> None:
    def load(named: Named) -> None:
        for name, _ in named:
            if name == "v":
                raise KeyError(name)

    with pytest.raises(EngineMismatchError, match=r"at v .*KeyError"):
        dry_run(load, SPECS)
