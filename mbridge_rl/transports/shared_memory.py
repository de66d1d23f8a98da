"""Slots in a shared-memory file of one host: all processes map the same pages, so no bucket is copied to travel.

Lending moves a trainer's CPU storages to shared memory, once and in place (_shared_storages.py); workers map the files.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Self

import torch

from ..errors import TransportError
from ._cuda_driver import driver
from ._shared_storages import locate, move_to_shared_memory
from .base import NUM_SLOTS, Address, Lent, Mapped, Transport

_log = logging.getLogger(__name__)
DEFAULT_DIRECTORY = Path("/dev/shm")


class SharedMemory(Transport):
    """A file of `NUM_SLOTS * slot_bytes` bytes, mapped shared.

    Its name is gone once everyone has attached; whoever comes later opens the creator's file descriptor.
    """

    name: ClassVar[str] = "shared_memory"

    def __init__(self, file: int, path: Path, slot_bytes: int, is_creator: bool) -> None:
        self._path, self._slot_bytes, self._is_creator = path, slot_bytes, is_creator
        # MAP_POPULATE: the pages enter this process's table now, so that no refit pays for page faults.
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._memory: torch.Tensor | None = torch.frombuffer(
            mmap.mmap(file, NUM_SLOTS * slot_bytes, flags=flags), dtype=torch.uint8
        )
        self._is_pinned = _pin(self._memory)
        self._file = os.dup(file) if is_creator else -1  # not inherited by child processes
        self._has_name = True

    @classmethod
    def create(cls, slot_bytes: int, directory: Path | None = None) -> Self:
        directory = directory or (DEFAULT_DIRECTORY if DEFAULT_DIRECTORY.is_dir() else Path(tempfile.gettempdir()))
        path = directory / f"mbridge-{os.getpid()}-{secrets.token_hex(8)}"
        need = NUM_SLOTS * slot_bytes
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise TransportError(f"cannot create {path}: {error.strerror}") from error
        try:
            # Without this a full filesystem is a SIGBUS in the middle of a copy.
            os.posix_fallocate(file, 0, need)
            return cls(file, path, slot_bytes, is_creator=True)
        except OSError as error:
            path.unlink()
            stat = os.statvfs(directory)
            raise TransportError(
                f"two buckets need {need:,} bytes in {directory}, which has {stat.f_bavail * stat.f_frsize:,} free: "
                f"{error.strerror}. Pass a smaller bucket_bytes, or make that filesystem larger"
            ) from error
        finally:
            os.close(file)

    @classmethod
    def open(cls, address: Address) -> Self:
        path, slot_bytes = Path(str(address["path"])), int(address["slot_bytes"])
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TransportError(
                f"cannot open the trainer's shared memory {path}: {error.strerror}. Trainer and engine must run on one "
                "host, as one user, with one shared-memory filesystem (containers: share /dev/shm)"
            ) from error
        try:
            return cls(file, path, slot_bytes, is_creator=False)
        finally:
            os.close(file)

    @property
    def address(self) -> Address:
        path = self._path if self._has_name else Path(f"/proc/{os.getpid()}/fd/{self._file}")
        return {"path": str(path), "slot_bytes": self._slot_bytes}

    def slot(self, index: int) -> torch.Tensor:
        if self._memory is None:
            raise TransportError("this transport is closed")
        return self._memory[index * self._slot_bytes : (index + 1) * self._slot_bytes]

    def everyone_attached(self) -> None:
        self._has_name = False
        with suppress(FileNotFoundError):
            self._path.unlink()

    def close(self) -> None:
        if self._memory is not None and self._is_pinned:
            _unpin(self._memory)
        self._memory = None  # the mapping goes with the last view of it
        if self._is_creator:
            self.everyone_attached()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @classmethod
    def lend(cls, tensors: Mapping[str, torch.Tensor]) -> Lent:
        """Lend CPU tensors, whose storages move to shared memory in place: their addresses change the first time.

        Every view that torch knows of goes along. What another library sees through DLPack does not.
        """
        storages: dict[str, torch.UntypedStorage] = {}  # each once, under the name of its first tensor
        first: dict[int, str] = {}  # storage object -> that name
        lies_in: dict[str, str] = {}  # tensor -> that name
        for name, tensor in tensors.items():
            if tensor.numel():
                storage = _cpu_storage(name, tensor)
                lies_in[name] = first.setdefault(storage._cdata, name)
                storages.setdefault(lies_in[name], storage)
        move_to_shared_memory(storages)
        files = locate(storages)
        number = {name: i for i, name in enumerate(files)}
        places = {
            name: (number[home], int(tensors[name].storage_offset()) * tensors[name].element_size())
            for name, home in lies_in.items()
        }
        return Lent([dict(file._asdict()) for file in files.values()], places)

    @classmethod
    def map_segment(cls, address: Address) -> Mapped:
        path, offset, num_bytes = str(address["path"]), int(address["offset"]), int(address["num_bytes"])
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TransportError(
                f"cannot open the trainer's memory {path}: {error.strerror}. Trainer and engine must run on one host, "
                "as one user, with one shared-memory filesystem (containers: share /dev/shm)"
            ) from error
        try:
            stat = os.fstat(file)
            if stat.st_ino != address["inode"] or stat.st_size < offset + num_bytes:
                raise TransportError(
                    f"{path} is not the {num_bytes:,} bytes that the trainer lent: it has a new file there"
                )
            start = offset % mmap.ALLOCATIONGRANULARITY
            memory = mmap.mmap(
                file,
                start + num_bytes,
                flags=mmap.MAP_SHARED | mmap.MAP_POPULATE,
                prot=mmap.PROT_READ,
                offset=offset - start,
            )
        except OSError as error:
            raise TransportError(
                f"cannot map {num_bytes:,} bytes of {path}: {error.strerror}. A process has at most vm.max_map_count "
                "mappings, one for each storage of the trainers"
            ) from error
        finally:
            os.close(file)
        with warnings.catch_warnings():
            # torch has no read-only tensors and warns that this memory is; a write would be a SIGSEGV.
            warnings.simplefilter("ignore", UserWarning)
            return Mapped(torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=num_bytes))


def _cpu_storage(name: str, tensor: torch.Tensor) -> torch.UntypedStorage:
    if tensor.device.type != "cpu":
        raise TransportError(f"shared_memory lends CPU tensors; {name!r} is on {tensor.device}", tensor=name)
    try:
        storage = tensor.untyped_storage()
        if storage.data_ptr():
            return storage
    except RuntimeError:  # sparse tensors, and subclasses without memory of their own
        pass
    raise TransportError(
        f"{name!r} ({type(tensor).__name__}, {tensor.layout}) has no storage of its own to lend", tensor=name
    )


def _pin(memory: torch.Tensor) -> bool:
    """Page-lock the slots, so that a GPU copies from and to them at full speed; in processes that use CUDA."""
    if not torch.cuda.is_initialized():
        return False
    try:
        with driver().context_of(torch.cuda.current_device()):
            driver().pin(memory.data_ptr(), memory.numel())
    except TransportError as error:
        _log.warning("the buckets are not pinned, so copies from and to the GPU are slower: %s", error)
        return False
    return True


def _unpin(memory: torch.Tensor) -> None:
    try:
        with driver().context_of(torch.cuda.current_device()):
            driver().unpin(memory.data_ptr())
    except TransportError as error:  # such as after a failed kernel: the process is about to end
        _log.warning("the buckets were not unpinned: %s", error)


TRANSPORT = SharedMemory
