"""Tensors of live modules by name, read afresh at each access: without walking the modules again."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence

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

    def reader(self, names: Sequence[str]) -> Callable[[], list[torch.Tensor]]:
        """Reads the tensors of `names`, at each call. Raises KeyError for one that is gone.

        For thousands of names at each refit: no Python code runs for a single one.
        """
        holders = [self._holders[name][0] for name in names]
        keys = [self._holders[name][1] for name in names]
        get: Callable[[Holder, str], torch.Tensor] = operator.getitem  # type: ignore[assignment]  # it is overloaded

        def read() -> list[torch.Tensor]:
            try:
                found = list(map(get, holders, keys))
            except KeyError:
                found = [self[name] for name in names]  # raises with the name
            if type(None) in map(type, found):
                found = [self[name] for name in names]
            return found

        return read

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)


def reader(tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> Callable[[], list[torch.Tensor]]:
    """Reads the tensors of `names`, at each call. Raises KeyError for one that is gone."""
    if isinstance(tensors, LiveTensors):
        return tensors.reader(names)
    return lambda: [tensors[name] for name in names]
