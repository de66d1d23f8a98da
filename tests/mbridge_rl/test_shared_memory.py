"""The transport shared_memory: private, allocated in full, gone when everyone has attached."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mbridge_rl.errors import TransportError
from mbridge_rl.transports.base import Transport, transport_class
from mbridge_rl.transports.shared_memory import SharedMemory


@pytest.fixture
def slots(tmp_path: Path) -> Iterator[SharedMemory]:
    made = SharedMemory.create(10_000, tmp_path)
    yield made
    made.close()


def test_two_processes_see_the_same_bytes(slots: SharedMemory) -> None:
    code = (
        "import json, sys\n"
        "from mbridge_rl.transports.base import transport_class\n"
        "t = transport_class('shared_memory').open(json.loads(sys.argv[1]))\n"
        "t.slot(1)[:] = t.slot(0) + 1\n"
        "t.close()\n"
    )
    slots.slot(0)[:] = 41
    address = str(slots.address).replace("'", '"')
    subprocess.run([sys.executable, "-c", code, address], check=True)
    assert slots.slot(1).eq(42).all()
    assert slots.slot(0).eq(41).all()
    assert slots.slot(0).numel() == 10_000


def test_the_file_is_private_and_unlinked(slots: SharedMemory, tmp_path: Path) -> None:
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_blocks * 512 >= 20_000  # allocated, not sparse
    address = slots.address
    other = SharedMemory.open(address)
    slots.everyone_attached()
    assert list(tmp_path.iterdir()) == []
    slots.slot(0).fill_(5)
    assert other.slot(0).eq(5).all()
    with pytest.raises(TransportError, match="one host"):
        SharedMemory.open(address)
    latecomer = SharedMemory.open(slots.address)
    assert latecomer.slot(0).eq(5).all()
    latecomer.close()
    other.close()
    other.close()
    with pytest.raises(TransportError, match="closed"):
        other.slot(0)
    slots.slot(0).fill_(6)


def test_close_of_the_creator_removes_the_file(tmp_path: Path) -> None:
    slots = SharedMemory.create(100, tmp_path)
    slots.close()
    assert list(tmp_path.iterdir()) == []


def test_alignment(slots: SharedMemory) -> None:
    big = SharedMemory.create(4096, Path("/dev/shm"))
    assert big.slot(0).view(torch.float64).numel() == 512
    assert big.slot(1).view(torch.bfloat16).numel() == 2048
    big.close()


@pytest.fixture
def tiny_filesystem(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 64 KiB; needs root."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root; test_sync covers a full filesystem through RLIMIT_FSIZE")
    libc = ctypes.CDLL(None, use_errno=True)
    mount_point = tmp_path / "tiny"
    mount_point.mkdir()
    if libc.mount(b"tmpfs", str(mount_point).encode(), b"tmpfs", 0, b"size=64k"):
        pytest.skip(f"mount is not allowed here: {os.strerror(ctypes.get_errno())}")
    yield mount_point
    libc.umount2(str(mount_point).encode(), 2)


def test_a_full_filesystem_is_an_error_and_leaves_nothing(tiny_filesystem: Path) -> None:
    with pytest.raises(TransportError, match=r"need 131,072 bytes in .*tiny, which has [\d,]+ free.*bucket_bytes"):
        SharedMemory.create(65536, tiny_filesystem)
    assert list(tiny_filesystem.iterdir()) == []
    SharedMemory.create(8192, tiny_filesystem).close()


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="cannot create"):
        SharedMemory.create(100, tmp_path / "absent")


def test_transports_are_found_by_file_name() -> None:
    assert transport_class("shared_memory") is SharedMemory
    assert issubclass(SharedMemory, Transport)
    for name in ("base", "nothing"):
        with pytest.raises(TransportError, match="shared_memory"):
            transport_class(name)
