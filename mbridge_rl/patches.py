"""Patches: strided boxes cut to two dims, and patches cut to the tiles and chunks that one launch works through.

A box that lies in two places at once (an HF tensor and a local tensor, or two local tensors) becomes a few *patches*,
each a matrix with a row and a column stride on either side. Arithmetic on integers, vectorised over the patches
of a whole model; the tables that they become are uploaded in one piece.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mbridge.pieces import Shape

Integers = npt.NDArray[np.int64]
Records = npt.NDArray[np.void]  # structured arrays: one named int64 field for each number

# A row that a tile does not divide leaves lanes idle: more than this is worse than more, narrower tiles.
MAX_PADDING = 1.34


class Patch(NamedTuple):
    """`rows` x `cols` elements of a source and of a destination. Offsets and strides are in elements.

    Columns have the smallest destination stride. A single row has row strides of 0.
    """

    source: int
    destination: int
    rows: int
    cols: int
    source_row: int
    source_col: int
    destination_row: int
    destination_col: int


PATCH = np.dtype([(name, np.int64) for name in Patch._fields])


class Tuning(NamedTuple):
    """How a kernel goes over patches. Elements, so that narrow types get small tiles too."""

    tile_elements: int = 2048  # of a program at a time; a power of two
    chunk_elements: int = 16 * 1024  # of a program in all
    num_warps: int = 8

    @property
    def tile_cols(self) -> list[int]:
        """Widths of tiles to choose from, ascending; a tile that is not as wide is higher."""
        return [cols for shift in (8, 6, 4, 2, 0) if (cols := self.tile_elements >> shift)]


class Tunings(NamedTuple):
    """Of patches that are one contiguous run, and of patches of several rows."""

    runs: Tuning
    rows: Tuning


class Dim(NamedTuple):
    size: int
    source: int  # stride
    destination: int


class Chunks(NamedTuple):
    """What a launch works through: program p does one chunk of patch `patch_of[p]`.

    `table` has one row of `len(CHUNK_FIELDS)` numbers for each patch.
    """

    table: Integers
    patch_of: npt.NDArray[np.int32]


# After the patch itself: the size of its chunks, how many lie side by side, and the number of its first program.
CHUNK_FIELDS = (*Patch._fields, "chunk_rows", "chunk_cols", "chunks_across", "first_program")


def patches_of(shape: Shape, source_stride: Shape, destination_stride: Shape) -> list[Patch]:
    """The patches of a box of `shape` that lies at these strides in its source and in its destination.

    Offsets count from the box's first element. An empty box has none.
    """
    if 0 in shape:
        return []
    dims = _merged(Dim(*dim) for dim in zip(shape, source_stride, destination_stride, strict=True) if dim[0] > 1)
    cols = dims.pop() if dims else Dim(1, 1, 1)
    rows = Dim(1, 0, 0)
    if dims:
        # Contiguous columns: the fewest patches. A transpose: rows along which the source is read in one go.
        best = max(dims, key=lambda d: d.size) if _is_run(cols) else min(dims, key=lambda d: d.source)
        dims.remove(best)
        rows = best
    strides = (rows.size, cols.size, rows.source, cols.source, rows.destination, cols.destination)
    return [
        Patch(
            sum(i * d.source for i, d in zip(index, dims, strict=True)),
            sum(i * d.destination for i, d in zip(index, dims, strict=True)),
            *strides,
        )
        for index in itertools.product(*(range(d.size) for d in dims))
    ]


def is_rows(patches: Records) -> npt.NDArray[np.bool_]:
    """Which patches have columns that are contiguous on both sides."""
    result: npt.NDArray[np.bool_] = (patches["source_col"] == 1) & (patches["destination_col"] == 1)
    return result


def tile_cols(patches: Records, choices: Sequence[int]) -> Integers:
    """For each patch, the widest of `choices` (ascending) that fits its rows well."""
    cols = patches["cols"]
    result: Integers = np.full(len(patches), choices[0], np.int64)
    for choice in choices:
        result[_ceil(cols, choice) * choice <= cols * MAX_PADDING] = choice
    result[patches["rows"] == 1] = choices[-1]
    return result


def power_of_two_in(*numbers: npt.NDArray[Any], most: int) -> Integers:
    """For each position, the largest power of two, at most `most` (one too), that divides all the numbers there."""
    bits = np.bitwise_or.reduce(numbers) | most
    result: Integers = bits & -bits
    return result


def chunked(patches: Records, tile_rows: int, tile_cols: int, chunk_elements: int) -> Chunks:
    """Cut `patches` into chunks of about `chunk_elements`: whole tiles, so that only a patch's edge is ragged."""
    rows, cols = patches["rows"], patches["cols"]
    chunk_cols = np.minimum(_ceil(cols, tile_cols) * tile_cols, max(chunk_elements // tile_rows, tile_cols))
    chunk_rows = np.maximum(np.rint(chunk_elements / (tile_rows * chunk_cols)).astype(np.int64), 1) * tile_rows
    across = _ceil(cols, chunk_cols)
    counts = across * _ceil(rows, chunk_rows)
    first = np.cumsum(counts) - counts
    numbers = [patches[name] for name in Patch._fields]
    table = np.stack([*numbers, chunk_rows, chunk_cols, across, first], axis=1)
    return Chunks(table, np.repeat(np.arange(len(patches), dtype=np.int32), counts))


def upload(arrays: Iterable[npt.NDArray[Any]], device: torch.device) -> torch.Tensor:
    """`arrays` one after the other in one uint8 tensor on `device`, each at a multiple of 16 bytes; see `take`."""
    parts = []
    for array in arrays:
        parts.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        parts.append(np.zeros(-array.nbytes % 16, np.uint8))
    return torch.from_numpy(np.concatenate([*parts, np.zeros(0, np.uint8)])).to(device)


def take(buffer: torch.Tensor, start: int, array: npt.NDArray[Any]) -> tuple[torch.Tensor, int]:
    """(`array` as a view of what `upload` made, where the next one starts)."""
    stop = start + array.nbytes
    dtype = torch.from_numpy(array[:0]).dtype
    return buffer[start:stop].view(dtype).view(array.shape), stop + -array.nbytes % 16


def _merged(dims: Iterable[Dim]) -> list[Dim]:
    """Outer to inner by destination stride; dims that continue each other on both sides are one."""
    merged: list[Dim] = []
    for dim in sorted(dims, key=lambda d: (-d.destination, -d.source)):
        outer = merged[-1] if merged else None
        if outer and outer.source == dim.size * dim.source and outer.destination == dim.size * dim.destination:
            merged[-1] = Dim(outer.size * dim.size, dim.source, dim.destination)
        else:
            merged.append(dim)
    return merged


def _is_run(dim: Dim) -> bool:
    return dim.source == dim.destination == 1


def _ceil(numbers: Any, divisor: Any) -> Any:
    return -(-numbers // divisor)
