"""Views as boxes, against torch's own views of tensors of unique integers."""

from __future__ import annotations

import math
import random

import pytest
import torch

from mbridge.pieces import Box, Region
from mbridge_rl.views import NotABox, boxes_of_view


def boxes_between(shape: tuple[int, ...], source: torch.Tensor, target: torch.Tensor) -> list[tuple[Box, Region]]:
    other = (target.storage_offset(), target.shape, target.stride())
    return boxes_of_view(shape, source.storage_offset(), source.shape, source.stride(), other)


def check_copy(whole: torch.Tensor, source: torch.Tensor, flat: torch.Tensor, target: torch.Tensor) -> int:
    """Copy box by box what `target.copy_(source)` copies; `flat` is the target's storage. The number of boxes."""
    expected = flat.clone()
    expected.as_strided(target.shape, target.stride(), target.storage_offset()).copy_(source)
    found = boxes_between(tuple(whole.shape), source, target)
    boxes = [box for box, _ in found]
    assert sum(box.numel for box in boxes) == source.numel()
    result = flat.clone()
    for box, region in found:
        assert region.shape == box.shape
        region.of(result).copy_(box.of(whole))
    assert torch.equal(result, expected)
    return len(found)


def unique(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(1, math.prod(shape) + 1).view(shape)


def merged(tensor: torch.Tensor, first: tuple[int, ...]) -> torch.Tensor:
    """All dims after `first` made one, if that is a view."""
    try:
        return tensor.view(*first, -1)
    except RuntimeError:
        return tensor


def random_view(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """One more view of `tensor`, of a kind that loaders use."""
    if tensor.dim() == 0:
        return tensor.unsqueeze(0)
    dim = rng.randrange(tensor.dim())
    size = tensor.shape[dim]
    start = rng.randrange(size)
    match rng.randrange(9):
        case 0 | 1:
            return tensor.narrow(dim, start, rng.randint(1, size - start))
        case 2:
            return tensor.transpose(dim, rng.randrange(tensor.dim()))
        case 3:
            divisors = [n for n in range(1, size + 1) if size % n == 0]
            return tensor.unflatten(dim, (rng.choice(divisors), -1))
        case 4:
            return tensor.select(dim, start)
        case 5:
            return tensor[(slice(None),) * dim + (slice(start, None, rng.randint(1, 3)),)]
        case 6:
            return rng.choice(tensor.chunk(rng.randint(1, 3), dim))
        case 7:
            return merged(tensor, tensor.shape[:dim])
        case _:
            return merged(tensor, ()).unsqueeze(-1)


def random_target(shape: torch.Size, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor's storage, flat, and a view of it with `shape`: part of a larger tensor, its dims in any order."""
    order = rng.sample(range(len(shape)), len(shape))
    margins = [(rng.choice((0, 0, 1, 3)), rng.choice((0, 0, 2))) for _ in order]
    larger = [shape[d] + a + b for d, (a, b) in zip(order, margins, strict=True)]
    flat = -torch.arange(1, math.prod(larger) + 4)
    view = flat[3:].view(larger)
    for position, (d, (a, _)) in enumerate(zip(order, margins, strict=True)):
        view = view.narrow(position, a, shape[d])
    return flat, view.permute([order.index(d) for d in range(len(shape))])


SHAPES = [(6, 8), (4, 6, 10), (12,), (2, 3, 4, 6), (1, 8, 1, 6), (5, 7), (16, 2), (), (1, 1), (3, 1, 12)]


@pytest.mark.parametrize("seed", range(8))
def test_random_views_copy_box_by_box_as_torch_copies_them(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(80):
        whole = unique(rng.choice(SHAPES))
        source = whole
        for _ in range(rng.randrange(6)):
            source = random_view(source, rng)
        check_copy(whole, source, *random_target(source.shape, rng))


def contiguous_target(source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    flat = torch.zeros(source.numel(), dtype=torch.long)
    return flat, flat.view(source.shape)


W = unique((24, 10))
ONE_BOX = {
    "whole": W,
    "rows": W.narrow(0, 6, 12),
    "columns": W[:, 2:7],
    "transposed": W.t()[2:7],
    "flat": W.view(-1),
    "flat rows": W.view(-1)[20:60],
    "heads": W.view(4, 6, 10),
    "heads of three": W.unflatten(0, (4, 2, 3))[1:3],
    "one head": W.view(4, 6, 10)[2],
    "one row": W[3],
    "one column": W[:, 3],
    "one element": W[3, 4],
    "even": W[..., ::2],
    "odd": W[..., 1::2],
    "some odd": W[3:9, 3:8:2],
    "odd, transposed": W[..., 1::2].t(),
}


@pytest.mark.parametrize("name", ONE_BOX)
def test_what_is_one_box(name: str) -> None:
    assert check_copy(W, ONE_BOX[name], *contiguous_target(ONE_BOX[name])) == 1


@pytest.mark.parametrize(
    ("source", "count"),
    [
        (W.view(-1)[5:57], 3),  # the end of a row, whole rows, the beginning of one
        (W.view(-1)[15:30], 2),
        (W[::3], 8),
        (W[:, ::5], 2),  # columns, although all of its elements are equally far apart
        (W.view(4, 6, 10)[:, :3], 4),
    ],
)
def test_what_is_several_boxes(source: torch.Tensor, count: int) -> None:
    assert check_copy(W, source, *contiguous_target(source)) == count


def test_every_second_element_is_a_box_of_the_unfolded_tensor() -> None:
    source = W[:, 1::2]
    assert boxes_of_view((24, 10), source.storage_offset(), source.shape, source.stride()) == [
        (Box((0, 0, 1), (24, 5, 2)), Region(0, (24, 5, 1), (5, 1, 1)))
    ]


def test_split_dims_whose_halves_lie_apart_in_the_target() -> None:
    """Heads, each padded in the engine's parameter: a box for each."""
    flat = torch.zeros(4 * 8 * 10, dtype=torch.long)
    assert check_copy(W, W.view(4, 6, 10), flat, flat.view(4, 8, 10)[:, 1:7]) == 4


def test_a_copy_to_a_whole_tensor_is_a_plain_region() -> None:
    [(box, region)] = boxes_of_view((1, 24, 1, 10), 0, (240,), (1,))
    assert box == Box.whole((1, 24, 1, 10))
    assert region == Region.contiguous((1, 24, 1, 10))


def test_empty_and_scalar() -> None:
    assert boxes_of_view((3, 4), 0, (3, 0), (4, 1)) == []
    assert boxes_of_view((0,), 0, (0,), (1,)) == []
    assert boxes_of_view((), 0, (), ()) == [(Box((), ()), Region(0, (), ()))]
    assert boxes_of_view((), 0, (1, 1), (0, 5), (7, (1, 1), (9, 9))) == [(Box((), ()), Region(7, (), ()))]


@pytest.mark.parametrize(
    ("offset", "size", "stride", "reason"),
    [
        (0, (2, 240), (0, 1), "broadcast"),
        (0, (240,), (2,), "elements 0 to 478"),
        (-1, (3,), (1,), "elements -1 to 1"),
        (240, (), (), "elements 240 to 240"),
    ],
)
def test_what_is_no_box(offset: int, size: tuple[int, ...], stride: tuple[int, ...], reason: str) -> None:
    with pytest.raises(NotABox, match=reason):
        boxes_of_view((24, 10), offset, size, stride)


def test_too_many_boxes() -> None:
    with pytest.raises(NotABox, match="more than 4096 boxes"):
        boxes_of_view((9000, 3), 0, (4500, 3), (6, 1))


def test_overlapping_windows_are_boxes_too() -> None:
    whole = unique((12,))
    source = whole.unfold(0, 4, 2)
    assert check_copy(whole, source, *contiguous_target(source)) in range(1, 6)


def test_sizes_that_differ_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="not parallel"):
        boxes_of_view((4,), 0, (4,), (1,), (0, (5,), (1,)))
