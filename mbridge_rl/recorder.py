"""Runs an engine model's own `load_weights` on probes: tensors without data that remember where they were copied.

`dry_run` finds out, before any weight is touched, which HF names the loader uses, which of them it writes to one place,
and what it refuses. A probe lives on the meta device; `destination.copy_(probe)` is recorded and not carried out. Knows
no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mbridge.pieces import TensorSpec

from .errors import EngineMismatchError

MAX_ERROR_CHARS = 300  # of an engine's own message; some list every parameter
Place = tuple[int, int, tuple[int, ...], tuple[int, ...]]  # storage, offset, shape, stride
Loader = Callable[[Iterable[tuple[str, torch.Tensor]]], "set[str] | None"]


@dataclass(slots=True)
class DryRun:
    """What a loader does with a list of HF tensors."""

    consumed: set[str] = field(default_factory=set)  # HF names
    loaded: set[str] | None = None  # engine names, if the loader returns them
    twice: list[tuple[str, str]] = field(default_factory=list)  # HF names written to one place
    _places: dict[Place, str] = field(default_factory=dict)

    def record(self, names: frozenset[str], destination: torch.Tensor) -> None:
        self.consumed |= names
        storage = destination.untyped_storage()._cdata
        place = (int(storage), int(destination.storage_offset()), tuple(destination.shape), tuple(destination.stride()))
        for name in names:
            earlier = self._places.setdefault(place, name)
            if earlier != name:
                self.twice.append((earlier, name))


class Probe(torch.Tensor):
    """A meta tensor that carries the names of the HF tensors it came from through every view and operation."""

    hf_names: frozenset[str]
    ledger: DryRun

    @classmethod
    def of(cls, plain: torch.Tensor, names: frozenset[str], ledger: DryRun) -> Probe:
        probe = plain.as_subclass(cls)
        probe.hf_names, probe.ledger = names, ledger
        return probe

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        probes = list(_probes((*args, *kwargs.values())))
        if not probes:
            raise TypeError(f"{func} met a probe in an argument that is not searched")
        names, ledger = frozenset().union(*(p.hf_names for p in probes)), probes[0].ledger
        if func is torch.Tensor.copy_ and not isinstance(args[0], Probe):
            destination, source = args[0], _plain(args[1])
            torch.broadcast_shapes(destination.shape, source.shape)
            if destination.numel() < source.numel():
                raise RuntimeError(f"copy of {list(source.shape)} into {list(destination.shape)}")
            ledger.record(names, destination)
            return destination
        if func is torch.Tensor.item:
            ledger.consumed |= names
            return 0
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*_plain(args), **{key: _plain(value) for key, value in kwargs.items()})
        return _marked(result, names, ledger)


def dry_run(load: Loader, tensors: Iterable[TensorSpec]) -> DryRun:
    """Run `load` on probes of `tensors`. Raises EngineMismatchError that names the tensor which `load` refuses."""
    ledger = DryRun()
    last: list[TensorSpec] = []

    def probes() -> Iterator[tuple[str, torch.Tensor]]:
        for spec in tensors:
            last[:] = [spec]
            plain = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            yield spec.name, Probe.of(plain, frozenset((spec.name,)), ledger)

    try:
        ledger.loaded = load(probes())
    except Exception as error:
        where = f"{last[0].name} {list(last[0].shape)} {last[0].dtype}" if last else "nothing yet"
        raise EngineMismatchError(
            f"the engine's loader refuses the trainer's tensors at {where}: {type(error).__name__}: "
            f"{str(error)[:MAX_ERROR_CHARS]}. Is it the same model?",
            phase="connect",
            tensor=last[0].name if last else None,
        ) from error
    return ledger


def _probes(values: Iterable[Any]) -> Iterator[Probe]:
    for value in values:
        if isinstance(value, Probe):
            yield value
        elif isinstance(value, list | tuple):
            yield from _probes(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Probe):
        return value.as_subclass(torch.Tensor)
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value) if not hasattr(value, "_fields") else value
    return value


def _marked(value: Any, names: frozenset[str], ledger: DryRun) -> Any:
    if isinstance(value, torch.Tensor):
        return Probe.of(value, names, ledger)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields") and not isinstance(value, torch.Size):
        return type(value)(_marked(item, names, ledger) for item in value)
    return value
