"""Checksums of pieces, compared with loops over Python integers, and what they must see."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from mbridge.pieces import Box, Piece, Region, row_major
from mbridge_rl.checksum import checksums
from mbridge_rl.errors import PlanMismatchError
from tests.mbridge_rl.random_copies import random_case, random_cuts, random_region

WORD = 1 << 64


def weight(index: int) -> int:
    x = (index + 1) * 0x9E3779B97F4A7C15 % WORD
    x ^= x >> 32
    x = x * 0xBF58476D1CE4E5B9 % WORD
    return (x ^ (x >> 32)) | 1


def by_loops(piece: Piece, shape: tuple[int, ...], tensor: torch.Tensor) -> int:
    """Elements are addressed in the whole HF tensor, in the tensor's own dims (a gate or up is folded back)."""
    size = tensor.dtype.itemsize
    data = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    total = 0
    for index in itertools.product(*map(range, piece.box.shape)):
        at = piece.region.offset + sum(i * s for i, s in zip(index, piece.region.stride, strict=True))
        where = [i + first for i, first in zip(index, piece.box.start, strict=True)]
        if len(where) > len(shape):
            pair, side = where[-2:]
            where = [*where[:-2], 2 * pair + side]
        flat = sum(i * s for i, s in zip(where, row_major(shape), strict=True))
        total += int.from_bytes(data[at * size : (at + 1) * size], "little") * weight(flat)
    total %= WORD
    return total - WORD if total >= WORD // 2 else total


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn]
)
def test_random_pieces(dtype: torch.dtype) -> None:
    for seed in range(50):
        if dtype == torch.bool:
            case = random_case(random.Random(seed), torch.uint8, torch.uint8, [1, 2, 5, 6, 8])
            sources = {name: tensor.gt(99) for name, tensor in case.sources.items()}
        else:
            case = random_case(random.Random(seed), dtype, dtype, [1, 2, 5, 6, 8])
            sources = case.sources
        found = checksums(case.pieces, case.shapes, sources)
        assert found == [by_loops(p, case.shapes[p.hf_name], sources[p.local_name]) for p in case.pieces]


def whole_sum(tensor: torch.Tensor) -> int:
    box = Box.whole(tuple(tensor.shape))
    (found,) = checksums([Piece("w", box, "a", Region.contiguous(box.shape))], {"w": box.shape}, {"a": tensor})
    return found


def test_sharding_does_not_matter() -> None:
    rng = random.Random(3)
    tensor = torch.randn(6, 7, 8).to(torch.bfloat16)
    expected = whole_sum(tensor)
    for _ in range(20):
        whole = Box.whole((6, 7, 8))
        pieces, tensors = [], {}
        for number, box in enumerate(random_cuts(rng, whole.unfolded() if rng.random() < 0.5 else whole)):
            region, numel = random_region(rng, box.shape)
            tensors[str(number)] = torch.full((numel,), 7.0, dtype=torch.bfloat16)
            region.of(tensors[str(number)]).copy_(box.of(tensor))
            pieces.append(Piece("w", box, str(number), region))
        assert (sum(checksums(pieces, {"w": (6, 7, 8)}, tensors)) - expected) % WORD == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_every_flipped_bit_is_seen(dtype: torch.dtype) -> None:
    tensor = torch.randn(2, 5).mul(50).to(dtype)
    data = tensor.view(torch.uint8).view(-1)
    before = whole_sum(tensor)
    for byte, bit in itertools.product(range(data.numel()), range(8)):
        data[byte] ^= 1 << bit
        assert whole_sum(tensor) != before
        data[byte] ^= 1 << bit
    assert whole_sum(tensor) == before


def test_what_moved_is_seen() -> None:
    tensor = torch.randn(8, 4).to(torch.bfloat16)
    sums = {whole_sum(tensor), whole_sum(tensor.roll(1, 0)), whole_sum(tensor.roll(1, 1)), whole_sum(tensor.flip(0))}
    for a, b in itertools.combinations(range(8), 2):
        order = list(range(8))
        order[a], order[b] = b, a
        sums.add(whole_sum(tensor[order]))
    assert len(sums) == 4 + 28


def test_weights_are_odd_and_differ() -> None:
    found = [whole_sum(torch.eye(64, dtype=torch.uint8)[i]) for i in range(64)]
    assert len(set(found)) == 64
    assert all(value % 2 == 1 for value in found)
    assert [value % WORD for value in found] == [weight(i) for i in range(64)]


def test_large_pieces_are_summed_in_parts() -> None:
    """More elements than the torch path takes at a time, in both dims."""
    tensor = torch.arange(3 * (1 << 20) + 5, dtype=torch.int32).view(1, -1)
    halves = [Box((0, 0), (1, 1 << 19)), Box((0, 1 << 19), (1, tensor.shape[1]))]
    pieces = [Piece("w", b, "a", Region(b.start[1], b.shape, (tensor.shape[1], 1))) for b in halves]
    parts = sum(checksums(pieces, {"w": tuple(tensor.shape)}, {"a": tensor}))
    assert (parts - whole_sum(tensor)) % WORD == 0
    padded = torch.arange(1100 * 1025, dtype=torch.int32)  # rows that do not continue each other
    tall = Piece("w", Box.whole((1100, 1024)), "a", Region(0, (1100, 1024), (1025, 1)))
    (found,) = checksums([tall], {"w": (1100, 1024)}, {"a": padded})
    assert found == whole_sum(padded.view(1100, 1025)[:, :1024].contiguous())


def test_no_pieces_and_empty_pieces() -> None:
    assert checksums([], {}, {}) == []
    empty = Piece("w", Box((0, 0), (0, 3)), "a", Region.contiguous((0, 3)))
    assert checksums([empty], {"w": (0, 3)}, {"a": torch.zeros(0, 3)}) == [0]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "no local tensor 'a'"),
        ({"a": torch.zeros(5)}, r"with 6 elements.*shape \[5\]"),
        ({"a": torch.zeros(3, 2).t()}, "contiguous"),
        ({"a": torch.zeros(6, dtype=torch.complex128)}, "no checksum for elements of torch.complex128"),
    ],
)
def test_what_cannot_be_read_is_named(tensors: dict[str, torch.Tensor], words: str) -> None:
    piece = Piece("w", Box.whole((2, 3)), "a", Region.contiguous((2, 3)))
    with pytest.raises(PlanMismatchError, match=words):
        checksums([piece], {"w": (2, 3)}, tensors)
