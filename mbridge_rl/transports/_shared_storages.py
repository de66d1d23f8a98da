"""CPU storages in shared memory: moving one there in place, and finding the file that holds one.

torch moves a storage by exchanging the memory of the storage object, so everything that looks at it through torch
(views, tied weights, buffers of a wrapper) goes along. Each gets a file of its own in /dev/shm, which torch's manager
process removes when the storage is freed or its process ends, however it ends. File names rather than descriptors: a
model has more storages than a process may have open files.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import TransportError

SHM = Path("/dev/shm")  # where shm_open has its files on Linux
HEADER_BYTES = 64  # torch's count of users, in front of the data


class FileRange(NamedTuple):
    """`num_bytes` bytes at `offset` of the file that `path` names now and whose inode is `inode`."""

    path: str
    offset: int
    num_bytes: int
    inode: int


class _FileMapping(NamedTuple):
    start: int
    stop: int
    is_shared: bool
    offset: int
    path: str


def move_to_shared_memory(storages: Mapping[str, torch.UntypedStorage]) -> None:
    """Move those storages that are not shared yet; the names are for errors.

    Raises TransportError, before anything is moved, if one cannot be moved or if there is no room for all.
    """
    moving = {name: storage for name, storage in storages.items() if not storage.is_shared()}
    for name, storage in moving.items():
        if storage.is_pinned():
            raise TransportError(
                f"the memory of {name!r} is pinned, and would no longer be in shared memory: lend a copy", tensor=name
            )
        # torch marks so what it does not own alone: after .numpy(), from_numpy(), a mapped checkpoint.
        if not storage.resizable():
            raise TransportError(
                f"the memory of {name!r} is also held by a numpy array or belongs to another library, which would lose "
                "sight of it in shared memory: replace it by a copy (parameter.data = parameter.data.clone())",
                tensor=name,
            )
    need = sum(-(-(storage.nbytes() + HEADER_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE for storage in moving.values())
    stat = os.statvfs(SHM)
    free = stat.f_bavail * stat.f_frsize
    if need > free:
        # torch would find out by SIGBUS.
        raise TransportError(
            f"lending the parameters needs {need:,} bytes in {SHM}, which has {free:,} free: make it larger"
        )
    for name, storage in moving.items():
        try:
            storage._share_filename_cpu_()
        except RuntimeError as error:
            raise TransportError(f"cannot move {name!r} to shared memory: {error}", tensor=name) from error


def locate(storages: Mapping[str, torch.UntypedStorage]) -> dict[str, FileRange]:
    """The files that hold these shared storages. Raises TransportError for one that no other process can open."""
    mappings = _file_mappings()
    starts = [mapping.start for mapping in mappings]
    found = {}
    for name, storage in storages.items():
        pointer, num_bytes = storage.data_ptr(), storage.nbytes()
        mapping = mappings[bisect_right(starts, pointer) - 1]
        if not mapping.start <= pointer <= pointer + num_bytes <= mapping.stop or not mapping.is_shared:
            raise TransportError(
                f"the memory of {name!r} is a private view of a file (such as a mapped checkpoint), which others do "
                "not see: replace it by a copy (parameter.data = parameter.data.clone())",
                tensor=name,
            )
        path = _path_of_descriptor(name, storage) if mapping.path.endswith(" (deleted)") else mapping.path
        try:
            inode = os.stat(path).st_ino
        except OSError as error:
            raise TransportError(
                f"the file {path} that holds {name!r} is gone: {error.strerror}", tensor=name
            ) from error
        found[name] = FileRange(path, mapping.offset + pointer - mapping.start, num_bytes, inode)
    return found


def _path_of_descriptor(name: str, storage: torch.UntypedStorage) -> str:
    """Where processes of this host find a storage whose file has no name (`tensor.share_memory_()` makes such)."""
    pointer = storage.data_ptr()
    descriptor, _ = storage._share_fd_cpu_()
    if descriptor < 0 or storage.data_ptr() != pointer:
        raise TransportError(
            f"the shared memory of {name!r} has lost its file, and cannot be opened by others: replace it by a copy",
            tensor=name,
        )
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _file_mappings() -> list[_FileMapping]:
    """What this process has mapped of files, by address."""
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        # 7f0c4e2da000-7f0c4e2db000 rw-s 00000000 00:1b 12008     /dev/shm/torch_1313_1776261034_1
        limits, permissions, offset, _, _, *path = line.split(None, 5)
        if path:
            start, stop = (int(text, 16) for text in limits.split("-"))
            found.append(_FileMapping(start, stop, permissions[3] == "s", int(offset, 16), path[0]))
    return found
