"""The sums of checksum.py on CUDA: every byte is read once. Imports triton, so import it when used.

Patches go from HF tensors ("source": flat indices) to local memory ("destination": addresses), so their columns follow
the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from .patches import CHUNK_FIELDS, Chunks, Integers, Records, Tuning, chunked, power_of_two_in, take, tile_cols, upload

VECTOR_BYTES = 16

TYPES = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.int64}


class Key(NamedTuple):
    """What a launch is compiled for."""

    itemsize: int
    contiguous: bool  # along columns
    multiple: int  # elements by which addresses, row strides and columns can be divided
    rows: int  # of a tile
    cols: int


def sums(
    groups: Sequence[tuple[int, Records, Integers]],
    num_owners: int,
    device: torch.device,
    step: int,
    mix: int,
    tuning: Tuning,
) -> list[int]:
    """The sum of each owner, over groups of (bytes of an element, patches, the owner of each patch)."""
    planned = [launch for group in groups for launch in _plan(*group, tuning)]
    buffer = upload([a for _, chunks, owners in planned for a in (*chunks, owners)], device)
    totals = torch.zeros(num_owners, dtype=torch.int64, device=device)
    start = 0
    with torch.cuda.device_of(buffer):
        for key, chunks, owners in planned:
            table, start = take(buffer, start, chunks.table)
            patch_of, start = take(buffer, start, chunks.patch_of)
            owner_of, start = take(buffer, start, owners)
            sum_kernel[(len(patch_of),)](
                table,
                patch_of,
                owner_of,
                totals,
                TYPE=TYPES[key.itemsize],
                CONTIGUOUS=key.contiguous,
                MULTIPLE=key.multiple,
                ALIGNMENT=key.multiple * key.itemsize,
                STEP=step,
                MIX=mix,
                ROWS=key.rows,
                COLS=key.cols,
                num_warps=tuning.num_warps,
            )
    result: list[int] = totals.tolist()
    return result


def _plan(itemsize: int, patches: Records, owners: Integers, tuning: Tuning) -> Iterator[tuple[Key, Chunks, Integers]]:
    contiguous = patches["destination_col"] == 1
    elements = [patches["destination"] // itemsize, patches["cols"], patches["destination_row"]]
    multiple = VECTOR_BYTES // itemsize
    whole = contiguous & (power_of_two_in(*elements, most=multiple) == multiple)
    kinds = np.stack([contiguous, np.where(whole, multiple, 1), tile_cols(patches, tuning.tile_cols)], axis=1)
    found, kind_of = np.unique(kinds, axis=0, return_inverse=True)
    for number, (is_contiguous, divisor, cols) in enumerate(found.tolist()):
        members = kind_of.reshape(-1) == number
        key = Key(itemsize, bool(is_contiguous), divisor, tuning.tile_elements // cols, cols)
        yield key, chunked(patches[members], key.rows, key.cols, tuning.chunk_elements), owners[members]


def _sum(
    table: tl.tensor,
    patch_of: tl.tensor,
    owner_of: tl.tensor,
    totals: tl.tensor,
    TYPE: tl.constexpr,  # noqa: N803
    CONTIGUOUS: tl.constexpr,  # noqa: N803
    MULTIPLE: tl.constexpr,  # noqa: N803
    ALIGNMENT: tl.constexpr,  # noqa: N803
    STEP: tl.constexpr,  # noqa: N803
    MIX: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLS: tl.constexpr,  # noqa: N803
) -> None:
    # `patch` points at CHUNK_FIELDS. Everything that an address or a weight is made of is int64.
    program = tl.program_id(0)
    number = tl.load(patch_of + program).to(tl.int64)
    patch = table + number * NUM_FIELDS
    index = tl.load(patch)
    memory = tl.load(patch + 1).to(tl.pointer_type(TYPE))
    num_rows = tl.load(patch + 2)
    num_cols = tl.load(patch + 3)
    # The index times STEP is linear in row and col, so that an element costs additions only.
    row_step = tl.load(patch + 4) * STEP
    col_step = tl.load(patch + 5) * STEP
    memory_row = tl.multiple_of(tl.load(patch + 6), MULTIPLE)
    memory_col = tl.load(patch + 7)
    if CONTIGUOUS:
        memory_col = 1
    chunk_rows = tl.load(patch + 8)
    chunk_cols = tl.load(patch + 9)
    across = tl.load(patch + 10)
    part = program - tl.load(patch + 11)

    first_row = (part // across) * chunk_rows
    first_col = (part % across) * chunk_cols
    rows = tl.minimum(num_rows - first_row, chunk_rows).to(tl.int32)
    cols = tl.multiple_of(tl.minimum(num_cols - first_col, chunk_cols).to(tl.int32), MULTIPLE)
    first = (index + 1) * STEP + first_row * row_step + first_col * col_step
    memory = tl.multiple_of(memory + (first_row * memory_row + first_col * memory_col), ALIGNMENT)
    steps_across = tl.arange(0, COLS).to(tl.int64)[None, :] * col_step
    sums = tl.zeros([ROWS, COLS], dtype=tl.int64)
    for r in range(0, rows, ROWS):
        row = r + tl.arange(0, ROWS)
        row_inside = (row < rows)[:, None]
        row = row.to(tl.int64)[:, None]
        steps_down = first + row * row_step
        for c in range(0, cols, COLS):
            col = c + tl.arange(0, COLS)
            inside = row_inside & (col < cols)[None, :]
            at = memory + row * memory_row + col.to(tl.int64)[None, :] * memory_col
            bits = tl.load(at, mask=inside, other=0).to(tl.int64)
            x = steps_down + (c * col_step + steps_across)
            x = x ^ ((x >> 32) & 0xFFFFFFFF)
            x = x * MIX
            x = (x ^ ((x >> 32) & 0xFFFFFFFF)) | 1
            sums += bits * x
    total = tl.sum(tl.sum(sums, axis=1), axis=0)
    tl.atomic_add(totals + tl.load(owner_of + number), total, sem="relaxed")


NUM_FIELDS = tl.constexpr(len(CHUNK_FIELDS))
sum_kernel = triton.jit(_sum)
