"""One Triton kernel for all copies of a refit. Imports triton, so import it when used.

A program copies one chunk of one patch, tile by tile. It finds the patch in a table in device memory, so a launch
covers any number of tensors. Copies that differ in what must be known when the kernel is compiled (types, tile,
alignment) are launches of their own: one for the contiguous copies of a whole model, few for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from .patches import CHUNK_FIELDS, Chunks, Records, Tunings, chunked, is_rows, power_of_two_in, take, tile_cols, upload

STRIDED_TILE = 64  # rows and cols
VECTOR_BYTES = 16  # the widest access of a thread
VECTOR_ELEMENTS = 8  # alignment that typed accesses look for: 16 bytes of a 2-byte type

UNITS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
CASTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Key(NamedTuple):
    """What a launch is compiled for."""

    source: Any  # types of triton
    destination: Any
    source_dim: int  # along which elements are contiguous: 1 cols, 0 rows, -1 neither
    destination_dim: int
    multiple: int  # elements by which addresses, strides and cols can be divided
    row_multiple: int  # and rows
    rows: int  # of a tile
    cols: int


class Planned(NamedTuple):
    """A launch without its memory."""

    key: Key
    chunks: Chunks
    num_warps: int


class Launch(NamedTuple):
    key: Key
    table: torch.Tensor  # int64 [patches, len(CHUNK_FIELDS)]
    patch_of: torch.Tensor  # int32 [programs]
    num_warps: int

    def run(self) -> Any:
        """Enqueue it on the current stream. Returns the compiled kernel."""
        key = self.key
        return copy_kernel[(len(self.patch_of),)](
            self.table,
            self.patch_of,
            SOURCE=key.source,
            DESTINATION=key.destination,
            SOURCE_DIM=key.source_dim,
            DESTINATION_DIM=key.destination_dim,
            MULTIPLE=key.multiple,
            ROW_MULTIPLE=key.row_multiple,
            SOURCE_ALIGNMENT=key.multiple * key.source.primitive_bitwidth // 8,
            DESTINATION_ALIGNMENT=key.multiple * key.destination.primitive_bitwidth // 8,
            ROWS=key.rows,
            COLS=key.cols,
            num_warps=self.num_warps,
        )


class Launches:
    """All copies of a table: `groups` are (source dtype, destination dtype, patches with addresses for offsets)."""

    def __init__(
        self,
        groups: Iterable[tuple[torch.dtype, torch.dtype, Records]],
        device: torch.device,
        tuning: Tunings,
    ) -> None:
        planned = [launch for group in groups for launch in plan_launches(*group, tuning)]
        self._buffer = upload([array for plan in planned for array in plan.chunks], device)
        self.launches: list[Launch] = []
        start = 0
        for key, chunks, num_warps in planned:
            table, start = take(self._buffer, start, chunks.table)
            patch_of, start = take(self._buffer, start, chunks.patch_of)
            self.launches.append(Launch(key, table, patch_of, num_warps))

    @property
    def num_bytes(self) -> int:
        return self._buffer.nbytes

    def run(self) -> None:
        with torch.cuda.device_of(self._buffer):
            for launch in self.launches:
                launch.run()


def is_known(source: torch.dtype, destination: torch.dtype, strided: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which copies between these dtypes the kernel can make, of which some are strided."""
    if source != destination:
        return np.full(len(strided), source in CASTS and destination in CASTS)
    return ~strided | (source.itemsize in UNITS)


def plan_launches(
    source: torch.dtype, destination: torch.dtype, patches: Records, tuning: Tunings
) -> Iterator[Planned]:
    """The launches of one pair of dtypes. Addresses must be aligned as the dtypes are."""
    straight = is_rows(patches)
    if source == destination:
        yield from _raw_rows(patches[straight], source.itemsize, tuning)
    else:
        yield from _typed_rows(patches[straight], CASTS[source], CASTS[destination], tuning)
    strided = patches[~straight]
    if len(strided):
        types = (UNITS[source.itemsize],) * 2 if source == destination else (CASTS[source], CASTS[destination])
        yield from _strided(strided, *types, tuning)


def _raw_rows(patches: Records, itemsize: int, tuning: Tunings) -> Iterator[Planned]:
    """Bytes moved in the widest unit that divides addresses, row bytes and pitches."""
    if not len(patches):
        return
    in_bytes = patches.copy()
    for name in ("cols", "source_row", "destination_row"):
        in_bytes[name] *= itemsize
    numbers = [in_bytes[name] for name in ("source", "destination", "cols", "source_row", "destination_row")]
    widths = power_of_two_in(*numbers, most=VECTOR_BYTES)
    for width in np.unique(widths).tolist():
        unit = min(width, max(UNITS))
        members = in_bytes[widths == width]
        for name in ("cols", "source_row", "destination_row"):
            members[name] //= unit
        yield from _rows(members, UNITS[unit], UNITS[unit], width // unit, tuning)


def _typed_rows(patches: Records, source: Any, destination: Any, tuning: Tunings) -> Iterator[Planned]:
    multiples = _multiples(patches, source, destination, ("cols",))
    for multiple in np.unique(multiples).tolist():
        yield from _rows(patches[multiples == multiple], source, destination, multiple, tuning)


def _rows(patches: Records, source: Any, destination: Any, multiple: int, tuning: Tunings) -> Iterator[Planned]:
    is_run = patches["rows"] == 1
    for own, members in ((tuning.runs, patches[is_run]), (tuning.rows, patches[~is_run])):
        widths = tile_cols(members, own.tile_cols)
        for cols in np.unique(widths).tolist():
            rows = own.tile_elements // cols
            key = Key(source, destination, 1, 1, multiple, 1, rows, cols)
            yield Planned(key, chunked(members[widths == cols], rows, cols, own.chunk_elements), own.num_warps)


def _strided(patches: Records, source: Any, destination: Any, tuning: Tunings) -> Iterator[Planned]:
    multiples = _multiples(patches, source, destination, ("rows", "cols"))
    kinds = np.stack([_dims(patches, "source"), _dims(patches, "destination"), multiples], axis=1)
    found, kind_of = np.unique(kinds, axis=0, return_inverse=True)
    for number, (source_dim, destination_dim, multiple) in enumerate(found.tolist()):
        key = Key(source, destination, source_dim, destination_dim, multiple, multiple, STRIDED_TILE, STRIDED_TILE)
        members = patches[kind_of.reshape(-1) == number]
        chunks = chunked(members, STRIDED_TILE, STRIDED_TILE, tuning.rows.chunk_elements)
        yield Planned(key, chunks, tuning.rows.num_warps)


def _dims(patches: Records, side: str) -> npt.NDArray[np.int64]:
    """The dim along which this side is contiguous."""
    return np.where(patches[side + "_col"] == 1, 1, np.where(patches[side + "_row"] == 1, 0, -1))


def _multiples(patches: Records, source: Any, destination: Any, sizes: tuple[str, ...]) -> npt.NDArray[np.int64]:
    """VECTOR_ELEMENTS where it divides addresses (in elements), `sizes` and all strides but one, elsewhere 1."""
    numbers = [patches[name] for name in sizes]
    for side, kind in (("source", source), ("destination", destination)):
        numbers.append(patches[side] // (kind.primitive_bitwidth // 8))
        numbers += [np.where(patches[side + dim] == 1, 0, patches[side + dim]) for dim in ("_row", "_col")]
    whole = power_of_two_in(*numbers, most=VECTOR_ELEMENTS) == VECTOR_ELEMENTS
    return np.where(whole, VECTOR_ELEMENTS, 1)


def _copy(
    table: tl.tensor,
    patch_of: tl.tensor,
    SOURCE: tl.constexpr,  # noqa: N803
    DESTINATION: tl.constexpr,  # noqa: N803
    SOURCE_DIM: tl.constexpr,  # noqa: N803
    DESTINATION_DIM: tl.constexpr,  # noqa: N803
    MULTIPLE: tl.constexpr,  # noqa: N803
    ROW_MULTIPLE: tl.constexpr,  # noqa: N803
    SOURCE_ALIGNMENT: tl.constexpr,  # noqa: N803
    DESTINATION_ALIGNMENT: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLS: tl.constexpr,  # noqa: N803
) -> None:
    # `patch` points at CHUNK_FIELDS. Everything that an address is made of is int64; within a chunk, indices are int32.
    program = tl.program_id(0)
    patch = table + tl.load(patch_of + program).to(tl.int64) * NUM_FIELDS
    source = tl.load(patch).to(tl.pointer_type(SOURCE))
    destination = tl.load(patch + 1).to(tl.pointer_type(DESTINATION))
    num_rows = tl.load(patch + 2)
    num_cols = tl.load(patch + 3)
    source_row = tl.load(patch + 4)
    source_col = tl.load(patch + 5)
    destination_row = tl.load(patch + 6)
    destination_col = tl.load(patch + 7)
    chunk_rows = tl.load(patch + 8)
    chunk_cols = tl.load(patch + 9)
    across = tl.load(patch + 10)
    part = program - tl.load(patch + 11)

    # What is known of strides is said, so that accesses are wide.
    if SOURCE_DIM == 1:
        source_row = tl.multiple_of(source_row, MULTIPLE)
        source_col = 1
    elif SOURCE_DIM == 0:
        source_row = 1
        source_col = tl.multiple_of(source_col, MULTIPLE)
    if DESTINATION_DIM == 1:
        destination_row = tl.multiple_of(destination_row, MULTIPLE)
        destination_col = 1
    elif DESTINATION_DIM == 0:
        destination_row = 1
        destination_col = tl.multiple_of(destination_col, MULTIPLE)

    first_row = (part // across) * chunk_rows
    first_col = (part % across) * chunk_cols
    rows = tl.multiple_of(tl.minimum(num_rows - first_row, chunk_rows).to(tl.int32), ROW_MULTIPLE)
    cols = tl.multiple_of(tl.minimum(num_cols - first_col, chunk_cols).to(tl.int32), MULTIPLE)
    source = tl.multiple_of(source + (first_row * source_row + first_col * source_col), SOURCE_ALIGNMENT)
    destination = tl.multiple_of(
        destination + (first_row * destination_row + first_col * destination_col), DESTINATION_ALIGNMENT
    )
    for r in range(0, rows, ROWS):
        row = r + tl.arange(0, ROWS)
        row_inside = (row < rows)[:, None]
        row = row.to(tl.int64)[:, None]
        source_rows = source + row * source_row
        destination_rows = destination + row * destination_row
        for c in range(0, cols, COLS):
            col = c + tl.arange(0, COLS)
            inside = row_inside & (col < cols)[None, :]
            col = col.to(tl.int64)[None, :]
            values = tl.load(source_rows + col * source_col, mask=inside)
            tl.store(destination_rows + col * destination_col, values.to(DESTINATION), mask=inside)


NUM_FIELDS = tl.constexpr(len(CHUNK_FIELDS))
copy_kernel = triton.jit(_copy)
