"""Lending: other processes read the very memory of a trainer's parameters, and nothing of the trainer's is parted."""

from __future__ import annotations

import gc
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
import torch
from torch import nn

from mbridge_rl.errors import TransportError
from mbridge_rl.transports.base import Lent, transport_for
from mbridge_rl.transports.cuda_ipc import CudaIpc
from mbridge_rl.transports.shared_memory import SharedMemory

SHM = Path("/dev/shm")
PATIENCE_S = 30.0

# A worker: maps what is lent once, then answers each line with the bytes of every tensor as they are now.
WORKER = """
import json, sys
from mbridge_rl.transports.shared_memory import SharedMemory
asked = json.loads(sys.stdin.readline())
mapped = [SharedMemory.map_segment(address) for address in asked["segments"]]
paths = {address["path"] for address in asked["segments"]}
rights = {line.split()[1] for line in open("/proc/self/maps") if line.split()[-1] in paths}
print(json.dumps(sorted(rights)), flush=True)
for _ in sys.stdin:
    print(json.dumps({
        name: bytes(mapped[index].bytes[offset:offset + size].tolist()).hex()
        for name, (index, offset, size) in asked["places"].items()
    }), flush=True)
"""

# A trainer: lends 20 tensors and waits to be killed.
TRAINER = """
import json, sys, torch
from mbridge_rl.transports.shared_memory import SharedMemory
tensors = {str(i): torch.full((100,), i, dtype=torch.int64) for i in range(20)}
lent = SharedMemory.lend(tensors)
print(json.dumps([lent.segments, lent.places]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def start(code: str, processes: list[subprocess.Popen[str]]) -> tuple[TextIO, TextIO]:
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    processes.append(process)
    assert process.stdin
    assert process.stdout
    return process.stdin, process.stdout


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Element by element, in order."""
    return b"".join(bytes(element.contiguous().view(1).view(torch.uint8).tolist()) for element in tensor.flatten())


def place(lent: Lent, name: str) -> tuple[Any, int]:
    index, offset = lent.places[name]
    return lent.segments[index], offset


def model() -> dict[str, torch.Tensor]:
    """What trainers have: one buffer with parameters that are views of it, tied weights, small things, a shared one."""
    flat = torch.arange(600, dtype=torch.float32)
    tied = nn.Parameter(torch.randn(7, 5).to(torch.bfloat16))
    module = nn.Linear(3, 2).share_memory()  # as torch.multiprocessing does it: a file without a name
    return {
        "ddp.first": nn.Parameter(flat[:200].view(10, 20)),
        "ddp.second": nn.Parameter(flat[200:].view(20, 20)),
        "embedding": tied,
        "output": tied,
        "bias": torch.randn(3, dtype=torch.float64)[1:],
        "count": torch.tensor(41),
        "shared.weight": module.weight,
        "shared.bias": module.bias,
    }


def test_another_process_reads_what_the_trainer_has_now(processes: list[subprocess.Popen[str]]) -> None:
    tensors = model()
    lent = SharedMemory.lend({**tensors, "nothing": torch.zeros(0, 5)})
    assert set(lent.places) == set(tensors)
    assert len(lent.segments) == 6  # one for each storage
    assert lent.places["ddp.first"][0] == lent.places["ddp.second"][0]
    assert lent.places["embedding"] == lent.places["output"]
    stdin, stdout = start(WORKER, processes)
    places = {name: (*lent.places[name], tensor.nbytes) for name, tensor in tensors.items()}
    stdin.write(json.dumps({"segments": lent.segments, "places": places}) + "\n")
    assert json.loads(stdout.readline()) == ["r--s"]  # a worker cannot write
    for step in range(2):
        with torch.no_grad():
            for tensor in tensors.values():
                tensor += step
        stdin.write("\n")
        found = json.loads(stdout.readline())
        assert {name: bytes.fromhex(text) for name, text in found.items()} == {
            name: bytes_of(tensor.detach()) for name, tensor in tensors.items()
        }


def test_lending_keeps_every_alias_and_every_value() -> None:
    flat = torch.arange(100, dtype=torch.float32)
    before = flat.clone()
    weight, view, data = nn.Parameter(flat[10:50].view(5, 8)), flat[20:30], flat.data
    weight.grad = torch.ones(5, 8)
    grad_address, old_address = weight.grad.data_ptr(), flat.data_ptr()
    optimizer = torch.optim.SGD([weight], lr=0.5)
    SharedMemory.lend({"weight": weight})
    assert flat.data_ptr() != old_address
    assert [t.data_ptr() - flat.data_ptr() for t in (weight, view, data)] == [40, 80, 0]
    assert weight.grad.data_ptr() == grad_address
    assert torch.equal(flat, before)
    optimizer.step()
    before[10:50] -= 0.5
    assert torch.equal(data, before)
    assert torch.equal(view, before[20:30])


def test_memory_lent_again() -> None:
    tensors = {name: nn.Parameter(torch.randn(50)) for name in "abc"}
    lent = SharedMemory.lend(tensors)
    addresses = [tensor.data_ptr() for tensor in tensors.values()]
    assert SharedMemory.lend(tensors) == lent
    assert [tensor.data_ptr() for tensor in tensors.values()] == addresses  # moved once
    tensors["b"].data = tensors["b"].data.clone()
    moved = SharedMemory.lend(tensors)
    assert place(moved, "a") == place(lent, "a")
    assert place(moved, "c") == place(lent, "c")
    assert place(moved, "b") != place(lent, "b")
    seen = [place(moved, "b")]
    for _ in range(20):  # freed and allocated anew, at one address again and again
        tensors["b"].data = torch.randn(50)
        seen.append(place(SharedMemory.lend(tensors), "b"))
    assert all(seen[i] != seen[j] for i in range(len(seen)) for j in range(i))
    tensors["b"].data = tensors["a"].data[:25]
    assert place(SharedMemory.lend(tensors), "b") == place(lent, "a")


def test_files_are_private_and_go_with_the_storage() -> None:
    tensor = torch.arange(1000)
    (address,) = SharedMemory.lend({"a": tensor}).segments
    path = Path(str(address["path"]))
    assert path.parent == SHM
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    mapped = SharedMemory.map_segment(address)
    del tensor
    gc.collect()
    assert not path.exists()
    assert torch.equal(mapped.bytes.view(torch.int64), torch.arange(1000))  # who has it mapped keeps it
    with pytest.raises(TransportError, match=r"cannot open the trainer's memory .*one host"):
        SharedMemory.map_segment(address)
    mapped.close()
    mapped.close()
    with pytest.raises(TransportError, match="closed"):
        _ = mapped.bytes


def test_a_killed_trainer_leaves_no_file(processes: list[subprocess.Popen[str]]) -> None:
    _, stdout = start(TRAINER, processes)
    segments, places = json.loads(stdout.readline())
    paths = [Path(address["path"]) for address in segments]
    assert all(path.exists() for path in paths)
    mapped = [SharedMemory.map_segment(address) for address in segments]
    processes[0].send_signal(signal.SIGKILL)
    processes[0].wait(PATIENCE_S)
    end = time.monotonic() + PATIENCE_S
    while left := [path for path in paths if path.exists()]:
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.01)
    for name, (index, offset) in places.items():  # a worker in the middle of a refit does not crash
        assert mapped[index].bytes[offset:].view(torch.int64).tolist() == [int(name)] * 100


@pytest.mark.skipif(not SHM.is_dir(), reason="no /dev/shm")
def test_no_room_is_an_error_and_moves_nothing() -> None:
    stats = os.statvfs(SHM)
    free = stats.f_bavail * stats.f_frsize
    small = torch.ones(5)
    large = [torch.empty(free // 2 + 8192, dtype=torch.uint8) for _ in range(2)]  # never touched: no memory yet
    with pytest.raises(TransportError, match=r"needs [\d,]+ bytes in /dev/shm, which has [\d,]+ free"):
        SharedMemory.lend({"small": small, "a": large[0], "b": large[1]})
    assert not any(tensor.is_shared() for tensor in (small, *large))


def test_memory_that_cannot_be_lent(tmp_path: Path) -> None:
    good = torch.ones(5)
    with_array, file = torch.ones(5), tmp_path / "weights"
    array = with_array.numpy()
    file.write_bytes(bytes(20))
    bad = {
        "is also held by a numpy array": with_array,
        "is on meta": torch.ones(5, device="meta"),
        "has no storage of its own": torch.ones(5).to_sparse(),
        "private view of a file": torch.from_file(str(file), shared=False, size=5),
    }
    for words, tensor in bad.items():
        with pytest.raises(TransportError, match=f"'bad'.*{words}") as raised:
            SharedMemory.lend({"good": good, "bad": tensor})
        assert raised.value.failure.tensor == "bad"
    array[2] = 7
    assert with_array[2] == 7
    file.unlink()
    shared = torch.from_file(str(file), shared=True, size=5)
    (address,) = SharedMemory.lend({"good": shared}).segments  # any file will do
    shared.fill_(3)
    assert SharedMemory.map_segment(address).bytes.view(torch.float32).tolist() == [3.0] * 5


def test_a_file_that_is_no_longer_the_lent_one(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    tensor = torch.from_file(str(file), shared=True, size=1000)
    (address,) = SharedMemory.lend({"a": tensor}).segments
    with pytest.raises(TransportError, match=r"not the 8,000 bytes that the trainer lent"):
        SharedMemory.map_segment({**address, "num_bytes": 8000})
    file.rename(tmp_path / "old")
    file.write_bytes(bytes(4000))
    with pytest.raises(TransportError, match=r"not the 4,000 bytes that the trainer lent"):
        SharedMemory.map_segment(address)


def test_the_transport_of_auto_depends_on_devices() -> None:
    def on(*types: str) -> list[Any]:
        return [SimpleNamespace(device=torch.device(kind)) for kind in types]

    assert transport_for(on("cuda:0", "cuda:1")) == "cuda_ipc"
    assert transport_for(on("cuda", "cpu")) == "shared_memory"
    assert transport_for(on("cpu")) == "shared_memory"
    assert transport_for([]) == "shared_memory"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_cuda_ipc_says_what_it_needs() -> None:
    for call in (lambda: CudaIpc.create(4096), lambda: CudaIpc.open({}), lambda: CudaIpc.map_segment({})):
        with pytest.raises(TransportError, match="needs a CUDA GPU"):
            call()
    with pytest.raises(TransportError, match="'a' is on cpu"):
        CudaIpc.lend({"a": torch.zeros(3)})
