"""A checkpoint as its files have it, read with safetensors alone, so that `verify` compares with something independent.

Nothing here uses checkpoint.py; fp8 with block scales is undone a second, plain way.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError

_SCALE = "_scale_inv"
_FP8_BLOCK = 128


@dataclass(frozen=True, slots=True)
class DiskTensors:
    """HF name -> every file that has a tensor of that name, the one that readers take first."""

    files: dict[str, list[Path]]
    scales: dict[str, Path]  # of an fp8 weight -> file of its scales
    notes: list[str]

    @classmethod
    def open(cls, folder: Path) -> DiskTensors:
        """Raises CheckpointError if there is nothing to read."""
        index = folder / "model.safetensors.index.json"
        present = sorted(folder.glob("*.safetensors"))
        if (folder / "model.safetensors").is_file():
            counted = [folder / "model.safetensors"]
            claimed = {}
        elif index.is_file():
            claimed = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
            counted = sorted(set(claimed.values()))
        else:
            raise CheckpointError(f"{folder} has neither model.safetensors nor {index.name}: nothing to compare with")
        files: dict[str, list[Path]] = {}
        for file in counted:
            for name in _names(file):
                if claimed.get(name, file) == file:
                    files[name] = [file]
        notes = []
        for file in present:
            shadowing = [name for name in _names(file) if name in files and file not in files[name]]
            for name in shadowing:
                files[name].append(file)
            if file not in counted:
                notes.append(f"{file.name} is no part of the checkpoint; {len(shadowing)} of its names are")
        scales = {name.removesuffix(_SCALE): where[0] for name, where in files.items() if name.endswith(_SCALE)}
        for name in scales:
            del files[name + _SCALE]
        return cls(files, scales, notes)

    def read(self, name: str, file: Path) -> torch.Tensor:
        """The tensor as that file has it; fp8 with block scales as bfloat16."""
        values = _read(file, name)
        if name not in self.scales:
            return values
        scales = _read(self.scales[name], name + _SCALE).float()
        blocks = scales.repeat_interleave(_FP8_BLOCK, 0).repeat_interleave(_FP8_BLOCK, 1)
        return (values.float() * blocks[: values.shape[0], : values.shape[1]]).bfloat16()


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as handle:
            return list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _read(file: Path, name: str) -> torch.Tensor:
    try:
        with safe_open(file, framework="pt") as handle:
            tensor: torch.Tensor = handle.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{name} in {file} cannot be read: {error}") from error
    return tensor


def difference(found: torch.Tensor, expected: torch.Tensor, *, rounded: bool) -> str | None:
    """How `found` differs from `expected`, in words; None if every bit agrees.

    A tensor of another dtype counts as equal if casting it back gives the same bits. With `rounded`, `expected` is
    first cast to the dtype of `found`, as somebody asked for.
    """
    if found.shape != expected.shape:
        return f"shape {list(found.shape)}, expected {list(expected.shape)}"
    dtype = expected.dtype
    if rounded:
        expected = expected.to(found.dtype)
    elif found.dtype is not dtype:
        found = found.to(dtype)
    # As bytes: -0.0 is not 0.0, and a NaN equals itself.
    ours, theirs = (t.contiguous().view(-1).view(torch.uint8).view(t.numel(), -1) for t in (found, expected))
    unequal = (ours != theirs).any(dim=1)
    count = int(unequal.sum())
    if not count:
        return None
    at = int(unequal.nonzero()[0])
    where = [int(i) for i in torch.unravel_index(torch.tensor(at), found.shape)] if found.ndim else []
    values = f"{found.reshape(-1)[at].item()!r}, expected {expected.reshape(-1)[at].item()!r}"
    return f"{count} of {found.numel()} elements differ; the first, {where}, is {values}"
