"""The seam between a refit and the memory its buckets travel through.

A transport owns two *slots* of equal size; bucket k uses slot k % 2. Rank 0 of the trainer creates them once per syncer
(`create`), sends `address` to every peer, and each peer opens them (`open`). Nothing is allocated during a refit.
Who creates destroys: `close` on the creator frees the memory; on a peer it only lets go of its mapping.

A transport may also *lend*, for the direct path: a trainer gives out the addresses of the memory that its parameters
lie in, and workers map it (`map_segment`). A *segment* is one contiguous allocation, however many tensors it holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import ClassVar, Self

import torch

from ..errors import TransportError

NUM_SLOTS = 2
COLLECTIVE = "collective"  # the transport that shares no memory

Address = dict[str, str | int]  # plain values, that any message can carry


@dataclass(frozen=True)
class Lent:
    """Where lent tensors lie.

    `segments` are addresses for `map_segment`. Two are equal exactly if they are the same memory, so that a worker
    recognises what it has mapped; memory that was freed and allocated anew at one place gets another address.
    `places` says for each tensor that has elements: segment index, and byte offset of its first element.
    """

    segments: list[Address]
    places: dict[str, tuple[int, int]]


class Mapped:
    """A segment of another process, mapped into this one. To be read, never written."""

    def __init__(self, memory: torch.Tensor, release: Callable[[], object] | None = None) -> None:
        self._memory: torch.Tensor | None = memory
        self._release = release

    @property
    def bytes(self) -> torch.Tensor:
        """The whole segment as a flat uint8 tensor. It and its views are valid until `close`."""
        if self._memory is None:
            raise TransportError("this segment is closed")
        return self._memory

    def close(self) -> None:
        """Unmap. Work that reads the segment must be done. Calling it again does nothing."""
        if self._memory is None:
            return
        self._memory = None
        if self._release is not None:
            self._release()


class Transport(ABC):
    """Two slots of shared memory, and memory of others.

    Every call returns at once or raises TransportError; nothing here waits for a peer.
    """

    name: ClassVar[str]
    is_shared: ClassVar[bool] = True
    """Whether a slot is one memory for all processes. If not, members have slots of their own, and `slot` raises."""

    @classmethod
    @abstractmethod
    def create(cls, slot_bytes: int) -> Self:
        """Make the slots, with all their memory, before any refit. Raises TransportError if there is no room."""

    @classmethod
    @abstractmethod
    def open(cls, address: Address) -> Self:
        """Map the slots that another process created."""

    @property
    @abstractmethod
    def address(self) -> Address:
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

    @classmethod
    def lend(cls, tensors: Mapping[str, torch.Tensor]) -> Lent:
        """Make the memory of `tensors` (local name -> tensor) something that other processes can map.

        Called again when tensors have moved. The caller sees to it that writes are complete before others read.
        Raises TransportError, with the reason, if it cannot be shared.
        """
        raise TransportError(f"transport {cls.name} lends no memory")

    @classmethod
    def stamp(cls) -> object:
        """Equal to an earlier stamp only if no memory that this process lent was freed since. Found in microseconds.

        An equal pointer does not tell: what was freed may have been allocated anew at the same place.
        """
        return object()  # as if it were freed all the time

    @classmethod
    def is_current(cls, segments: Sequence[Address]) -> bool:
        """Whether segments that this process lent are surely the same memory still. If not, it is lent again."""
        return False

    @classmethod
    def map_segment(cls, address: Address) -> Mapped:
        """Map a segment that another process lends. Raises TransportError.

        Map each once and keep it; close what is lent no more before mapping what came in its place.
        """
        raise TransportError(f"transport {cls.name} lends no memory")


def transport_for(tensors: Iterable[torch.Tensor]) -> str:
    """The transport that "auto" stands for when a trainer's tensors are these: it depends on their devices alone."""
    return "cuda_ipc" if {tensor.device.type for tensor in tensors} == {"cuda"} else "shared_memory"


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
