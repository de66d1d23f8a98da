"""Checksums of pieces that do not depend on how a tensor is sharded.

The checksum of a box is the sum over its elements of bits(element) * weight(flat index in the whole HF tensor), modulo
2^64 and read as a signed integer. It is additive over disjoint boxes: the sum over a trainer's shards and that over an
engine's shards are equal if the tensors are, and each side reads only its own storage.

Weights are a hash of the index, of the shape of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", 2014): multiply by the golden ratio's odd constant, fold the high half into the low one, multiply,
fold. Shifts are by 32 bits because a GPU then folds with one instruction. The last bit is set, so that a weight is odd:
a flipped bit changes the sum by +-2^k times an odd number, k < 64, which is never 0 modulo 2^64. What moves (swapped
rows, shifted shards) meets other weights, and goes unseen with a probability of about 2^-48 for 2-byte elements.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mbridge.pieces import Box, Piece, Region, Shape

from .copy_plan import Endpoint
from .errors import PlanMismatchError
from .patches import PATCH, Patch, Tuning, patches_of

STEP = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 = 2^64 / golden ratio, as a signed integer
MIX = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9, the first multiplier of splitmix64
LOW_HALF = 0xFFFFFFFF
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK_ELEMENTS = 1 << 20  # of the torch path
TUNING = Tuning(chunk_elements=64 * 1024)  # tests/mbridge_rl/gpu_kernels.py measures others

Geometries = dict[tuple[Shape, Shape, Shape], list[Patch]]


def checksums(pieces: Sequence[Piece], shapes: Mapping[str, Shape], tensors: Mapping[str, torch.Tensor]) -> list[int]:
    """The checksum of each piece, in -2^63 .. 2^63 - 1. Waits for the device.

    `shapes` are those of the whole HF tensors; `tensors` are the local ones, contiguous, on any devices. Raises
    PlanMismatchError if a local tensor is missing or too small for its piece.
    """
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for number, piece in enumerate(pieces):
        by_device[_tensor_of(piece, tensors).device].append(number)
    result = [0] * len(pieces)
    for device, numbers in by_device.items():
        some = [pieces[i] for i in numbers]
        if device.type == "cuda":
            found = checksums_by_triton(some, shapes, tensors, device)
        else:
            found = checksums_by_torch(some, shapes, tensors)
        for i, value in zip(numbers, found, strict=True):
            result[i] = value
    return result


def whole_checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Name -> checksum of the whole tensor, of those that have one (`has_checksum`)."""
    some = {name: tensor for name, tensor in tensors.items() if has_checksum(tensor)}
    pieces = [Piece(n, Box.whole(t.shape), n, Region.contiguous(t.shape)) for n, t in some.items()]
    totals = checksums(pieces, {n: tuple(t.shape) for n, t in some.items()}, some)
    return dict(zip(some, totals, strict=True))


def has_checksum(tensor: torch.Tensor) -> bool:
    """Whether it has data, contiguous, of elements of 1, 2, 4 or 8 bytes."""
    return not tensor.is_meta and tensor.is_contiguous() and tensor.dtype.itemsize in BITS


def checksums_by_torch(
    pieces: Sequence[Piece], shapes: Mapping[str, Shape], tensors: Mapping[str, torch.Tensor]
) -> list[int]:
    """`checksums` on any device: the reference."""
    return [_with_torch(piece, shapes[piece.hf_name], tensors[piece.local_name]) for piece in pieces]


def checksums_by_triton(
    pieces: Sequence[Piece],
    shapes: Mapping[str, Shape],
    tensors: Mapping[str, torch.Tensor],
    device: torch.device,
    tuning: Tuning = TUNING,
) -> list[int]:
    """`checksums` of tensors that are all on `device`, in a launch or a few."""
    from . import checksum_triton  # triton is heavy

    # By size of the elements: (piece, patch with an address in place of the local offset).
    found: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    known: Geometries = {}
    for number, piece in enumerate(pieces):
        tensor = tensors[piece.local_name]
        itemsize, address = tensor.dtype.itemsize, tensor.data_ptr()
        for p in _patches(piece, shapes[piece.hf_name], known):
            found[itemsize].append((number, p.source, address + p.destination * itemsize, *p[2:]))
    groups = []
    for itemsize, rows in sorted(found.items()):
        owners = np.array([row[0] for row in rows], np.int64)
        groups.append((itemsize, np.array([row[1:] for row in rows], PATCH), owners))
    return checksum_triton.sums(groups, len(pieces), device, STEP, MIX, tuning)


def weights(index: torch.Tensor) -> torch.Tensor:
    """The weights of flat indices (int64, changed in place)."""
    index.add_(1).mul_(STEP)
    index.bitwise_xor_((index >> 32).bitwise_and_(LOW_HALF)).mul_(MIX)
    return index.bitwise_xor_((index >> 32).bitwise_and_(LOW_HALF)).bitwise_or_(1)


def hf_region(piece: Piece, shape: Shape) -> Region:
    """Where the piece's box lies in the whole, contiguous HF tensor of `shape`."""
    if len(piece.box.start) > len(shape):  # a box of the unfolded view, which has the same order in memory
        shape = (*shape[:-1], shape[-1] // 2, 2)
    return Region.contiguous(shape).part(piece.box.start, piece.box.shape)


def _tensor_of(piece: Piece, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    tensor = tensors.get(piece.local_name)
    if tensor is None:
        raise PlanMismatchError(f"there is no local tensor {piece.local_name!r}", tensor=piece.hf_name)
    if tensor.dtype.itemsize not in BITS:
        raise PlanMismatchError(f"no checksum for elements of {tensor.dtype}", tensor=piece.hf_name)
    region = piece.region
    if 0 not in region.shape:
        extent = region.offset + sum((n - 1) * stride for n, stride in zip(region.shape, region.stride, strict=True))
        Endpoint(piece.local_name, tensor.dtype, extent + 1).check(tensor)
    return tensor


@torch.no_grad()
def _with_torch(piece: Piece, shape: Shape, tensor: torch.Tensor) -> int:
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    itemsize = tensor.dtype.itemsize
    bits = tensor.reshape(-1).view(BITS[itemsize])
    mask = -1 if itemsize == 8 else (1 << 8 * itemsize) - 1
    for patch in _patches(piece, shape, {}):
        across = min(patch.cols, CHUNK_ELEMENTS)
        down = max(CHUNK_ELEMENTS // across, 1)
        for row in range(0, patch.rows, down):
            for col in range(0, patch.cols, across):
                size = (min(down, patch.rows - row), min(across, patch.cols - col))
                offset = patch.destination + row * patch.destination_row + col * patch.destination_col
                view = bits.as_strided(
                    size, (patch.destination_row, patch.destination_col), bits.storage_offset() + offset
                )
                rows = torch.arange(size[0], device=tensor.device).add_(row).mul_(patch.source_row)
                cols = torch.arange(size[1], device=tensor.device).add_(col).mul_(patch.source_col)
                index = (rows[:, None] + cols).add_(patch.source)
                total += weights(index).mul_(view.to(torch.int64).bitwise_and(mask)).sum()
    return int(total)


def _patches(piece: Piece, shape: Shape, known: Geometries) -> list[Patch]:
    """The piece as patches from its HF tensor ("source") to its local tensor ("destination"), offsets included.

    `known` remembers geometries: a model repeats few.
    """
    whole, region = hf_region(piece, shape), piece.region
    geometry = (region.shape, whole.stride, region.stride)
    patches = known.get(geometry)
    if patches is None:
        patches = known[geometry] = patches_of(*geometry)
    return [Patch(whole.offset + p.source, region.offset + p.destination, *p[2:]) for p in patches]
