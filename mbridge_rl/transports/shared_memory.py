"""Slots in a shared-memory file of one host: all processes map the same pages, so no bucket is copied to travel."""

from __future__ import annotations

import mmap
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Self

import torch

from ..errors import TransportError
from .base import NUM_SLOTS, Transport

DEFAULT_DIRECTORY = Path("/dev/shm")


class SharedMemory(Transport):
    """A file of `NUM_SLOTS * slot_bytes` bytes, mapped shared. Its name is gone once everyone has attached."""

    name: ClassVar[str] = "shared_memory"

    def __init__(self, file: int, path: Path, slot_bytes: int, is_creator: bool) -> None:
        self._path, self._slot_bytes, self._is_creator = path, slot_bytes, is_creator
        # MAP_POPULATE: the pages enter this process's table now, so that no refit pays for page faults.
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._memory: torch.Tensor | None = torch.frombuffer(
            mmap.mmap(file, NUM_SLOTS * slot_bytes, flags=flags), dtype=torch.uint8
        )

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
    def open(cls, address: dict[str, str | int]) -> Self:
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
    def address(self) -> dict[str, str | int]:
        return {"path": str(self._path), "slot_bytes": self._slot_bytes}

    def slot(self, index: int) -> torch.Tensor:
        if self._memory is None:
            raise TransportError("this transport is closed")
        return self._memory[index * self._slot_bytes : (index + 1) * self._slot_bytes]

    def everyone_attached(self) -> None:
        with suppress(FileNotFoundError):
            self._path.unlink()

    def close(self) -> None:
        self._memory = None  # the mapping goes with the last view of it
        if self._is_creator:
            self.everyone_attached()


TRANSPORT = SharedMemory
