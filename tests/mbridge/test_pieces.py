"""Boxes, regions, joins and coverage against brute force over every element."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mbridge.errors import PlanError
from mbridge.pieces import Box, Piece, Region, TensorSpec, check_cover, first_overlap, join, row_major, whole_pieces

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple)


@st.composite
def box_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    starts = tuple(draw(st.integers(0, size - 1)) for size in shape)
    stops = tuple(draw(st.integers(start + 1, size)) for start, size in zip(starts, shape, strict=True))
    return Box(starts, stops)


@st.composite
def partition(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """The whole cut by random guillotine cuts, in random order."""
    done, todo = [], [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = todo.pop(draw(st.integers(0, len(todo) - 1)))
        cuttable = [dim for dim, size in enumerate(box.shape) if size > 1]
        if not cuttable:
            done.append(box)
            if not todo:
                break
            continue
        dim = draw(st.sampled_from(cuttable))
        at = draw(st.integers(box.start[dim] + 1, box.stop[dim] - 1))
        todo.append(Box(box.start, (*box.stop[:dim], at, *box.stop[dim + 1 :])))
        todo.append(Box((*box.start[:dim], at, *box.start[dim + 1 :]), box.stop))
    return draw(st.permutations(done + todo))


def elements(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(a, b) for a, b in zip(box.start, box.stop, strict=True))))


@given(shapes.flatmap(lambda shape: st.tuples(box_in(shape), box_in(shape))))
def test_intersection_is_that_of_the_elements(boxes: tuple[Box, Box]) -> None:
    one, other = boxes
    common = one.intersect(other)
    assert (elements(common) if common is not None else set()) == elements(one) & elements(other)
    assert one.numel == len(elements(one))


@given(shapes.flatmap(lambda shape: st.tuples(st.just(shape), box_in(shape))), st.integers(0, 7))
def test_a_region_views_the_block_of_a_tensor_that_does_not_start_its_storage(
    case: tuple[tuple[int, ...], Box], lead: int
) -> None:
    shape, box = case
    numel = math.prod(shape)
    tensor = torch.arange(lead + numel)[lead:].view(shape)
    region = Region.contiguous(shape).part(box.start, box.shape)
    assert torch.equal(region.of(tensor), tensor[box.slices])
    assert row_major(shape) == tensor.stride()


@given(shapes.flatmap(lambda shape: st.tuples(st.just(shape), partition(shape))))
def test_a_partition_covers(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    check_cover("t", shape, boxes)
    assert first_overlap(boxes) is None


@given(shapes.flatmap(lambda shape: st.tuples(st.just(shape), st.lists(box_in(shape), max_size=6))))
def test_cover_and_overlap_agree_with_counting_elements(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    counts: dict[tuple[int, ...], int] = dict.fromkeys(elements(Box.whole(shape)), 0)
    for box in boxes:
        for element in elements(box):
            counts[element] += 1
    pair = first_overlap(boxes)
    assert (pair is not None) == any(n > 1 for n in counts.values())
    if pair is not None:
        assert elements(pair[0]) & elements(pair[1])
    if all(n == 1 for n in counts.values()):
        check_cover("t", shape, boxes)
    else:
        with pytest.raises(PlanError, match="'t'"):
            check_cover("t", shape, boxes)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([], "cover 0 of 12"),
        ([Box((0, 0), (2, 4))], "cover 8 of 12"),
        ([Box((0, 0), (2, 4)), Box((1, 0), (3, 4))], "two pieces claim the same elements"),
        ([Box((0, 0), (4, 4))], "a piece claims"),
        ([Box((0,), (12,))], "a piece claims"),
        ([Box((0, 2), (3, 2)), Box((0, 0), (3, 4))], "a piece claims"),
    ],
    ids=["nothing", "hole", "overlap", "outside", "other rank", "empty box"],
)
def test_what_does_not_cover_is_named(boxes: list[Box], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_cover("t", (3, 4), boxes)


@given(shapes.flatmap(lambda shape: st.tuples(st.just(shape), partition(shape), partition(shape))))
def test_join_moves_every_element_once(case: tuple[tuple[int, ...], list[Box], list[Box]]) -> None:
    """From one division of a tensor to any other, through the copies that the join lists."""
    shape, source_boxes, destination_boxes = case
    whole = torch.arange(1, math.prod(shape) + 1).view(shape)

    def stored(boxes: list[Box], side: str) -> list[Piece]:
        return [Piece("t", box, f"{side}{i}", Region.contiguous(box.shape)) for i, box in enumerate(boxes)]

    sources = {f"from{i}": whole[box.slices].contiguous() for i, box in enumerate(source_boxes)}
    arrived = {f"to{i}": torch.zeros(box.shape, dtype=torch.int64) for i, box in enumerate(destination_boxes)}
    moved = 0
    for copy in join(stored(source_boxes, "from"), stored(destination_boxes, "to")):
        values = copy.source.of(sources[copy.source_name])
        assert torch.equal(values, whole[copy.box.slices])
        copy.destination.of(arrived[copy.destination_name]).add_(values)
        moved += copy.box.numel
    assert moved == whole.numel()
    for i, box in enumerate(destination_boxes):
        assert torch.equal(arrived[f"to{i}"], whole[box.slices])


def test_join_passes_over_names_that_only_one_side_has() -> None:
    a, b, c = (TensorSpec(name, (2, 3), torch.float32) for name in "abc")
    copies = list(join(whole_pieces([a, b]), whole_pieces([c, b])))
    assert [(copy.hf_name, copy.source_name, copy.destination_name) for copy in copies] == [("b", "b", "b")]
    assert copies[0].box == Box((0, 0), (2, 3))


def test_bytes_of_a_spec() -> None:
    assert TensorSpec("t", (3, 5), torch.bfloat16).num_bytes == 30
    assert TensorSpec("scalar", (), torch.float32).num_bytes == 4


def test_a_tensor_of_one_dim_that_is_unfolded_on_one_side_only() -> None:
    """Its rows are others in the unfolded view: the second half was not found."""
    whole = Piece("b", Box((0,), (400,)), "s", Region.contiguous((400,)))
    half = Piece("b", Box((200,), (400,)), "d", Region.contiguous((200,)))
    assert [c.box.numel for c in join([whole.unfolded()], [half])] == [200]
    assert [c.box.numel for c in join([whole], [half.unfolded()])] == [200]
