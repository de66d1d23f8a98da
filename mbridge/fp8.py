"""Block-scaled fp8 weights on disk (DeepSeek-V3, Kimi-K2): dequantised slice by slice while they are read.

A weight [rows, columns] in float8_e4m3fn comes with `<name>_scale_inv`, float32 of a 128th of that shape, rounded
up: each block of 128 x 128 elements is multiplied by its scale. Source: DeepSeek-V3's inference/kernel.py
`weight_dequant`.
"""

from __future__ import annotations

import torch

from .pieces import Box, Shape

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"


def scale_shape(shape: Shape) -> Shape:
    """Shape of the scales of a weight of `shape`."""
    return tuple(-(-size // BLOCK) for size in shape)


def scale_box(box: Box) -> Box:
    """The scales that a box of the weight needs."""
    return Box(tuple(a // BLOCK for a in box.start), tuple(-(-b // BLOCK) for b in box.stop))


def dequantise(values: torch.Tensor, scales: torch.Tensor, box: Box) -> torch.Tensor:
    """`values` (fp8, the elements of `box`) times `scales` (those of `scale_box(box)`), float32."""
    wanted = scale_box(box)
    full = scales.float()
    for dim in range(values.dim()):
        blocks = torch.arange(box.start[dim], box.stop[dim]) // BLOCK - wanted.start[dim]
        full = full.index_select(dim, blocks)
    return values.float() * full
