"""An engine worker's model, as the code that refits it sees it: the seam between path and engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

from mbridge.pieces import TensorSpec

from .placement import Placement
from .recorder import DryRun


class Examined(NamedTuple):
    """What a loader would do with a list of HF tensors, and where it would put them."""

    found: DryRun
    placement: Placement


class Target(ABC):
    """All calls come from one thread and block until done."""

    device: torch.device = torch.device("cpu")
    kept_bytes: int = 0  # that the last refit held beside the model and the buckets

    @abstractmethod
    def examine(self, tensors: tuple[TensorSpec, ...]) -> Examined:
        """Find out, without changing anything, what the loader does with `tensors`. Raises EngineMismatchError."""

    @abstractmethod
    def rehearse(self, tensors: tuple[TensorSpec, ...]) -> DryRun:
        """What the loader would do with `tensors`, which need not be all. Changes nothing."""

    @abstractmethod
    def begin(self, modules: frozenset[str] | None = None) -> None:
        """A refit starts: from here until `finish` or `abandon` the model may be torn.

        `modules` (names as in `Placement.module_of`) are those that `load` will fill; None means all. The others are
        written from outside, in place.
        """

    @abstractmethod
    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Write HF tensors into the model; return the engine's names that were written.

        The tensors are views that are overwritten after the call: whatever is kept must be copied, and a device
        must have read them.
        """

    @abstractmethod
    def finish(self) -> None:
        """All tensors came: post-process what the engine post-processes. After it the model can serve.

        A device may still be at it, in a stream that the engine's steps go through too: see `pending`.
        """

    @abstractmethod
    def abandon(self) -> None:
        """The refit failed: bring the model back into a state in which `begin` works. Its values may be anything."""

    @abstractmethod
    def live(self) -> Mapping[str, torch.Tensor]:
        """The engine's parameters and buffers by engine name, each read afresh at each access."""

    def pending(self) -> Callable[[], None] | None:
        """Waits, from any thread, until the device has done all that it was asked for; None if there is no device."""
        return None

    def processed_modules(self) -> set[str]:
        """Modules whose tensors the engine may change after they are loaded."""
        return set()

    def remade(self) -> dict[str, str]:
        """Modules of which post-processing in the last refit replaced more than the values of tensors, and what.

        What they compute with may then lie outside of their parameters.
        """
        return {}


def device_event(device: torch.device) -> Callable[[], None] | None:
    """Waits for what has been put into the current stream of a CUDA `device` so far; None for other devices."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        event = torch.cuda.Event()
        event.record()
    return event.synchronize
