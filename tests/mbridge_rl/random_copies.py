"""Random plans of copies and of pieces, for tests on a CPU and for the script that checks the kernels."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch

from mbridge.pieces import Box, Copy, Piece, Region, row_major


class Case(NamedTuple):
    copies: list[Copy]
    sources: dict[str, torch.Tensor]
    destinations: dict[str, torch.Tensor]
    pieces: list[Piece]  # what the sources hold, whole: disjoint boxes of HF tensors
    shapes: dict[str, tuple[int, ...]]


def random_case(
    rng: random.Random, source: torch.dtype, destination: torch.dtype, sizes: list[int], device: str = "cpu"
) -> Case:
    """HF tensors of up to four dims, sharded over sources and stored in destinations, each in an order of its own."""
    case = Case([], {}, {}, [], {})
    for number in range(rng.randint(1, 3)):
        name = f"hf{number}"
        dims = rng.choice([0, 1, 2, 2, 2, 3, 3, 4])
        shape = tuple(rng.choice(sizes if d >= dims - 2 else [1, 2, 3]) for d in range(dims))
        case.shapes[name] = shape
        whole = Box.whole(shape)
        if dims and shape[-1] % 2 == 0 and rng.random() < 0.25:
            whole = whole.unfolded()
        region, numel = random_region(rng, whole.shape)
        case.destinations[name] = random_tensor(rng, numel, destination, device)
        target = Piece(name, whole, name, region)
        for box in random_cuts(rng, whole):
            local = f"local{len(case.sources)}"
            piece_region, numel = random_region(rng, box.shape)
            case.sources[local] = random_tensor(rng, numel, source, device)
            case.pieces.append(Piece(name, box, local, piece_region))
            case.copies.append(Copy(name, box, local, piece_region, name, target.part(box)))
    rng.shuffle(case.copies)
    return case


def random_cuts(rng: random.Random, whole: Box) -> list[Box]:
    """Disjoint boxes that cover `whole`; some may be empty."""
    boxes = [whole]
    for dim in range(len(whole.start)):
        if rng.random() < 0.4:
            low, high = whole.start[dim], whole.stop[dim]
            cut = rng.choice([low, (low + high) // 2, rng.randint(low, high)])
            boxes = [part for box in boxes for part in _cut(box, dim, cut)]
    return boxes


def random_region(rng: random.Random, shape: tuple[int, ...]) -> tuple[Region, int]:
    """A region of `shape` inside a contiguous tensor, in some order of dims, and the tensor's elements."""
    order = list(range(len(shape)))
    if rng.random() < 0.4:
        rng.shuffle(order)
    padded = rng.random() < 0.5
    before = [rng.choice([0, 0, 8, 3]) if padded else 0 for _ in order]
    outer = [shape[d] + b + (rng.choice([0, 8, 1]) if padded else 0) for d, b in zip(order, before, strict=True)]
    lead = rng.choice([0, 0, 16, 1])
    strides = row_major(outer)
    stride = [0] * len(shape)
    for position, dim in enumerate(order):
        stride[dim] = strides[position]
    offset = lead + sum(b * s for b, s in zip(before, strides, strict=True))
    numel = lead
    size = 1
    for n in outer:
        size *= n
    return Region(offset, shape, tuple(stride)), numel + size


def random_tensor(rng: random.Random, numel: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Floats are finite and of many magnitudes, ties of rounding among them; what is no float has random bytes."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    if dtype.is_floating_point and dtype.itemsize > 1:
        mantissa = torch.randint(-(1 << 12), 1 << 12, (numel,), generator=generator).double()
        scale = torch.randint(-14, 3, (numel,), generator=generator).double()
        return (mantissa * 2**scale).to(dtype).to(device)
    data = torch.randint(0, 256, (numel * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).to(device)


def _cut(box: Box, dim: int, at: int) -> list[Box]:
    stop, start = list(box.stop), list(box.start)
    stop[dim], start[dim] = at, at
    return [Box(box.start, tuple(stop)), Box(tuple(start), box.stop)]
