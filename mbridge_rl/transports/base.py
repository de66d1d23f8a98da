"""The seam between a refit and the memory its buckets travel through.

A transport owns two *slots* of equal size; bucket k uses slot k % 2. Rank 0 of the trainer creates them once per syncer
(`create`), sends `address` to every peer, and each peer opens them (`open`). Nothing is allocated during a refit.
Who creates destroys: `close` on the creator frees the memory; on a peer it only lets go of its mapping.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import ClassVar, Self

import torch

from ..errors import TransportError

NUM_SLOTS = 2


class Transport(ABC):
    """Two slots of shared memory.

    Every call returns at once or raises TransportError; nothing here waits for a peer.
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def create(cls, slot_bytes: int) -> Self:
        """Make the slots, with all their memory, before any refit. Raises TransportError if there is no room."""

    @classmethod
    @abstractmethod
    def open(cls, address: dict[str, str | int]) -> Self:
        """Map the slots that another process created."""

    @property
    @abstractmethod
    def address(self) -> dict[str, str | int]:
        """What `open` needs, in plain strings and integers."""

    @abstractmethod
    def slot(self, index: int) -> torch.Tensor:
        """Slot `index` as a flat uint8 tensor over the shared memory. Valid until `close`."""

    @abstractmethod
    def everyone_attached(self) -> None:
        """Called by the creator once all peers have opened the slots: remove names that a crash would leave behind."""

    @abstractmethod
    def close(self) -> None:
        """Let go. Views of the slots must not be used any more. Calling it again does nothing."""


def builtin_transports() -> list[str]:
    """Names of the transports beside this file."""
    names = [module.name for module in iter_modules(import_module(__package__).__path__)]
    return [name for name in names if not name.startswith(("_", "base"))]


def transport_class(name: str) -> type[Transport]:
    """The transport called `name`: a file beside this one, or an entry point of `mbridge_rl.transports`."""
    if name in builtin_transports():
        found: type[Transport] = import_module(f"{__package__}.{name}").TRANSPORT
        return found
    external = {point.name: point for point in entry_points(group="mbridge_rl.transports")}
    if name in external:
        loaded: type[Transport] = external[name].load()
        return loaded
    known = ", ".join(sorted({*builtin_transports(), *external}))
    raise TransportError(f"no transport is called {name!r}; there are {known}")
