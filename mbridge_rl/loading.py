"""Calls into an engine's own loading code, which may raise anything: that becomes one typed error with the tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from .errors import EngineLoadError, SyncError
from .target import Target

T = TypeVar("T")


def guarded(call: Callable[[], T], what: str, current: Sequence[str | None] = (None,)) -> T:
    """`call()`. Raises EngineLoadError for whatever it raises; `current[0]` is the tensor that it has in hand."""
    try:
        return call()
    except SyncError:
        raise
    except Exception as error:
        message = f"the engine failed to {what}: {type(error).__name__}: {error}"
        raise EngineLoadError(message, tensor=current[0]) from error


def load(target: Target, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Have the engine's loader write `tensors`; return the engine's names that it wrote."""
    current: list[str | None] = [None]
    exhausted = False

    def named() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal exhausted
        for name, tensor in tensors:
            current[0] = name
            yield name, tensor
        current[0], exhausted = None, True

    loaded = guarded(lambda: target.load(named()), "load", current)
    if not exhausted:
        raise EngineLoadError("the engine's loader stopped before the last tensor", tensor=current[0])
    return loaded


def check_loaded(loaded: set[str], expected: set[str] | None) -> None:
    """Raise EngineLoadError unless the loader wrote the parameters that it wrote when it was examined."""
    if expected is not None and loaded != expected:
        missing, extra = sorted(expected - loaded), sorted(loaded - expected)
        raise EngineLoadError(
            f"the engine's loader wrote other parameters than planned: missing {missing[:5]}, extra {extra[:5]}"
        )
