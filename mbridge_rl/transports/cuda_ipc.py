"""Slots in, and lending of, the memory of GPUs of one host: the driver maps one process's allocation into another.

A handle stands for a whole allocation, as torch's caching allocator gets it from the driver: many tensors lie in one.
A GPU is named by its UUID, since processes may see different GPUs under one number.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar, Self

import torch

from ..errors import TransportError
from ..hosts import host_id
from ._cuda_driver import driver
from .base import NUM_SLOTS, Address, Lent, Mapped, Transport

_log = logging.getLogger(__name__)


class CudaIpc(Transport):
    """A device allocation of `NUM_SLOTS * slot_bytes` bytes, on the current device of the process that creates it."""

    name: ClassVar[str] = "cuda_ipc"

    def __init__(self, memory: torch.Tensor, address: Address, mapped: Mapped | None) -> None:
        self._memory: torch.Tensor | None = memory
        self._address, self._mapped = address, mapped

    @classmethod
    def create(cls, slot_bytes: int) -> Self:
        _require_cuda()
        need = NUM_SLOTS * slot_bytes
        try:
            memory = torch.empty(need, dtype=torch.uint8, device="cuda")
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise TransportError(
                f"two buckets need {need:,} bytes of GPU {torch.cuda.current_device()}: {error}. "
                "Pass a smaller bucket_bytes"
            ) from error
        lent = cls.lend({"slots": memory})
        _, offset = lent.places["slots"]
        return cls(memory, {**lent.segments[0], "offset": offset, "slot_bytes": slot_bytes}, None)

    @classmethod
    def open(cls, address: Address) -> Self:
        mapped, offset = cls.map_segment(address), int(address["offset"])
        return cls(mapped.bytes[offset : offset + NUM_SLOTS * int(address["slot_bytes"])], address, mapped)

    @property
    def address(self) -> Address:
        return self._address

    def slot(self, index: int) -> torch.Tensor:
        if self._memory is None:
            raise TransportError("this transport is closed")
        return self._memory[index * int(self._address["slot_bytes"]) :][: int(self._address["slot_bytes"])]

    def everyone_attached(self) -> None:
        """Nothing to do: an allocation has no name, and ends with the processes that hold it."""

    def close(self) -> None:
        self._memory = None
        if self._mapped is not None:
            self._mapped.close()

    @classmethod
    def lend(cls, tensors: Mapping[str, torch.Tensor]) -> Lent:
        """Lend CUDA tensors. Raises TransportError for others, and for memory that has no handle."""
        found: dict[int, list[tuple[int, str]]] = defaultdict(list)  # device -> (address, name) of its tensors
        for name, tensor in tensors.items():
            if not tensor.is_cuda:
                raise TransportError(f"cuda_ipc lends CUDA tensors; {name!r} is on {tensor.device}", tensor=name)
            if tensor.numel():
                found[tensor.get_device()].append((tensor.data_ptr(), name))
        lent = Lent([], {})
        for index in sorted(found):
            # One question to the driver for each allocation, not for each tensor.
            with driver().context_of(index):
                start = end = 0
                for address, name in sorted(found[index]):
                    if address >= end:
                        segment = _segment_at(address, index, name)
                        start, end = int(segment["base"]), int(segment["base"]) + int(segment["num_bytes"])
                        lent.segments.append(segment)
                    lent.places[name] = len(lent.segments) - 1, address - start
        return lent

    @classmethod
    def stamp(cls) -> object:
        # How many segments torch's allocator has freed, and allocated: `reset_accumulated_memory_stats` sets both to 0.
        try:
            segments = [
                torch.cuda.memory_stats_as_nested_dict(index)["segment"]["all"]
                for index in range(torch.cuda.device_count())
            ]
            return [(segment["freed"], segment["allocated"]) for segment in segments]
        except (RuntimeError, KeyError):  # an allocator that does not count
            return object()

    @classmethod
    def is_current(cls, segments: Sequence[Address]) -> bool:
        by_device: dict[str, list[Address]] = defaultdict(list)
        for segment in segments:
            by_device[str(segment["device"])].append(segment)
        try:
            for device, own in by_device.items():
                with driver().context_of(_index_of(device)):
                    for segment in own:
                        if driver().number_at(int(segment["base"])) != segment["allocation"]:
                            return False
        except TransportError:  # it was freed
            return False
        return True

    @classmethod
    def map_segment(cls, address: Address) -> Mapped:
        _require_cuda()
        index, num_bytes = _index_of(str(address["device"])), int(address["num_bytes"])
        torch.empty(1, device=f"cuda:{index}")  # torch makes its context there, and keeps it as long as the process
        if address["process"] == _this_process():  # the driver opens only what another process allocated
            return Mapped(_tensor_at(int(address["base"]), num_bytes, index))
        try:
            # In the context of the GPU that has the memory: one process may open a GPU's handles in one context only.
            with driver().context_of(index):
                pointer = driver().open(bytes.fromhex(str(address["handle"])))
        except TransportError as error:
            raise TransportError(
                f"cannot map {num_bytes:,} bytes that process {address['process']} lends on GPU {address['device']}: "
                f"{error}. Trainer and engine must run on one host, as one user"
            ) from error
        mapped = Mapped(_tensor_at(pointer, num_bytes, index), partial(_unmap, pointer, index))
        try:
            _enable_access(mapped.bytes)
        except TransportError:
            mapped.close()
            raise
        return mapped


def _segment_at(address: int, index: int, tensor: str) -> Address:
    """The address of the allocation on device `index` that holds device address `address`, of `tensor`."""
    try:
        allocation = driver().allocation_at(address)
        handle = driver().export(allocation.base)
    except TransportError as error:
        raise TransportError(
            f"the GPU memory of {tensor!r} has no handle for other processes: {error}. Memory from cudaMalloc has one; "
            "that of expandable segments and of cudaMallocAsync has none: run the trainer with "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False, without backend:cudaMallocAsync. "
            "Until then the bucket path is used instead",
            tensor=tensor,
        ) from error
    return {
        "process": _this_process(),
        "device": _uuid(index),
        "allocation": allocation.number,
        "base": allocation.base,
        "num_bytes": allocation.num_bytes,
        "handle": handle.hex(),
    }


def _this_process() -> str:
    return f"{host_id()}/{os.getpid()}"


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


def _index_of(uuid: str) -> int:
    """The number of that GPU in this process."""
    visible = [_uuid(index) for index in range(torch.cuda.device_count())]
    if uuid not in visible:
        raise TransportError(
            f"the trainer's memory lies on GPU {uuid}; this process sees {', '.join(visible)} "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): let it see that GPU too"
        )
    return visible.index(uuid)


class _DeviceMemory:
    """Device memory as torch.as_tensor takes it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (num_bytes,),
            "strides": None,
            "data": (address, False),
        }


def _tensor_at(address: int, num_bytes: int, index: int) -> torch.Tensor:
    tensor = torch.as_tensor(_DeviceMemory(address, num_bytes), device=f"cuda:{index}")
    assert tensor.data_ptr() == address, "torch copied what it should wrap"
    return tensor


def _enable_access(memory: torch.Tensor) -> None:
    """Let kernels of the current device read `memory`, which may lie on another one."""
    reader, owner = torch.cuda.current_device(), memory.get_device()
    if reader == owner:
        return
    if not torch.cuda.can_device_access_peer(reader, owner):
        raise TransportError(
            f"GPU {reader} ({_uuid(reader)}) cannot read the memory of GPU {owner} ({_uuid(owner)}): they are not peers"
        )
    # torch enables access from a device to another at the first copy between them, for all memory there.
    torch.empty(1, dtype=torch.uint8, device=f"cuda:{reader}").copy_(memory[:1])


def _unmap(pointer: int, index: int) -> None:
    try:
        with driver().context_of(index):
            driver().close(pointer)
    except TransportError as error:  # such as after a failed kernel: the mapping then ends with the process
        _log.warning("a lent segment was not unmapped: %s", error)


def _require_cuda() -> None:
    if not torch.cuda.is_available():
        raise TransportError("transport cuda_ipc needs a CUDA GPU, and this process sees none")


TRANSPORT = CudaIpc
