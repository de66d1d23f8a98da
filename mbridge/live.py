"""Tensors of live modules by name, read afresh at each access: without walking the modules again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

Holder = Mapping[str, "torch.Tensor | None"]


class LiveTensors(Mapping[str, torch.Tensor]):
    """Name -> the parameter or buffer that its module holds now, whose storage and `.data` may have been swapped.

    `holders`: name -> (a module's `_parameters` or `_buffers`, the key in it). A parameter that its module has dropped
    is a KeyError.
    """

    def __init__(self, holders: Mapping[str, tuple[Holder, str]]) -> None:
        self._holders = dict(holders)

    @classmethod
    def of(cls, module: torch.nn.Module) -> LiveTensors:
        """Every parameter and buffer below `module`, tied ones under each of their names."""
        holders: dict[str, tuple[Holder, str]] = {}
        for path, child in module.named_modules():
            for held in (child._parameters, child._buffers):
                holders |= {f"{path}.{key}" if path else key: (held, key) for key, t in held.items() if t is not None}
        return cls(holders)

    def __getitem__(self, name: str) -> torch.Tensor:
        holder, key = self._holders[name]
        tensor = holder.get(key)
        if tensor is None:
            raise KeyError(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)
