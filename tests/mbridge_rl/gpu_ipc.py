"""Checks the transport cuda_ipc between processes, on a machine with a GPU and without pytest. At most a minute.

    python tests/mbridge_rl/gpu_ipc.py

Needs torch and what `import mbridge_rl` needs. Prints a line for each check, and ends with status 1 if one failed.
Other roles of this file are its child processes: `worker` maps what is lent, `lender` lends.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mbridge_rl.errors import TransportError
from mbridge_rl.testing import check_transport
from mbridge_rl.transports.base import Address, Lent, Mapped
from mbridge_rl.transports.cuda_ipc import CudaIpc
from mbridge_rl.transports.shared_memory import SharedMemory

TOTAL_S = 60
NUM_TENSORS = 2000
NOISE_BYTES = 4 << 20  # of the driver's own memory, when mappings come and go
SLOT_BYTES = 8 << 20


class Child:
    """A fresh interpreter with this file in another role. One JSON line to it, one back."""

    def __init__(self, role: str, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, **environment},
        )

    def ask(self, **request: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin
        assert stdout
        stdin.write(json.dumps(request) + "\n")
        line = stdout.readline()
        assert line, f"the child ended with status {self._process.wait(10)}"
        answer = json.loads(line)
        assert "error" not in answer, f"in the child: {answer['error']}"
        return answer["result"]

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()).hexdigest()


# --- the child processes ----------------------------------------------------------------------------------------------


def serve(answer: Callable[[dict[str, Any]], Any]) -> None:
    for line in sys.stdin:
        try:
            reply = {"result": answer(json.loads(line))}
        except Exception as error:  # noqa: BLE001 - told to the parent, which fails the check
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


def worker() -> None:
    slots: list[CudaIpc] = []
    mapped: dict[str, Mapped] = {}

    def answer(request: dict[str, Any]) -> Any:
        match request:
            case {"do": "free"}:
                torch.cuda.synchronize()
                return torch.cuda.mem_get_info()[0]
            case {"do": "slots", "address": address}:
                slots.append(CudaIpc.open(address))
                slots[0].slot(1).copy_(slots[0].slot(0) + 1)
                torch.cuda.synchronize()
                return [digest(slots[0].slot(i)) for i in range(2)]
            case {"do": "close slots"}:
                slots.pop().close()
                return None
            case {"do": "map", "segments": segments}:
                for address in segments:
                    mapped[json.dumps(address)] = CudaIpc.map_segment(address)
                return len(mapped)
            case {"do": "read", "segments": segments, "places": places}:
                found = {}
                for name, (index, offset, num_bytes) in places.items():
                    segment = mapped[json.dumps(segments[index])]
                    found[name] = digest(segment.bytes[offset : offset + num_bytes])
                return found
            case {"do": "close", "segments": segments}:
                for address in segments:
                    mapped.pop(json.dumps(address)).close()
                return len(mapped)
            case {"do": "map twice", "address": address, "offset": offset, "num_bytes": num_bytes}:
                # As two sessions in one worker do.
                first, second = CudaIpc.map_segment(address), CudaIpc.map_segment(address)
                before = digest(first.bytes[offset : offset + num_bytes])
                first.close()
                after = digest(second.bytes[offset : offset + num_bytes])
                second.close()
                return [before, after]
        raise ValueError(f"unknown request {request}")

    serve(answer)


def lender() -> None:
    tensors: dict[str, torch.Tensor] = {}

    def answer(request: dict[str, Any]) -> Any:
        match request:
            case {"do": "lend", "seed": seed}:
                generator = torch.Generator("cuda").manual_seed(seed)
                for i in range(20):
                    tensors[str(i)] = torch.randn(100_000 + i, device="cuda", generator=generator)
                torch.cuda.synchronize()
                lent = CudaIpc.lend(tensors)
                return {"segments": lent.segments, "places": with_sizes(lent, tensors), "digests": digests(tensors)}
        raise ValueError(f"unknown request {request}")

    serve(answer)


# --- the checks -------------------------------------------------------------------------------------------------------


def with_sizes(lent: Lent, tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, int, int]]:
    return {name: (*place, tensors[name].nbytes) for name, place in lent.places.items()}


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in tensors.items()}


def model() -> dict[str, torch.Tensor]:
    """Tensors of many sizes and dtypes, half of them views into flat buffers, as Megatron-Core's DDP has them."""
    generator = torch.Generator("cuda").manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    for i in range(NUM_TENSORS // 2):
        numel = 1 + (i * 7919) % 50_000
        tensors[f"own.{i}"] = torch.randn(numel, device="cuda", generator=generator).to(dtypes[i % 3])
    for b in range(10):
        flat = torch.randn(3_000_000, device="cuda", generator=generator).to(torch.bfloat16)
        start = 1
        for i in range(NUM_TENSORS // 20):
            numel = 3 + (i * 104_729) % 29_000
            tensors[f"flat.{b}.{i}"] = flat[start : start + numel]
            start += numel
    torch.cuda.synchronize()
    return tensors


def read_equal(child: Child, lent: Lent, tensors: dict[str, torch.Tensor]) -> None:
    torch.cuda.synchronize()
    found = child.ask(do="read", segments=lent.segments, places=with_sizes(lent, tensors))
    wrong = [name for name, value in digests(tensors).items() if found[name] != value]
    assert not wrong, f"{len(wrong)} of {len(tensors)} tensors differ in the worker, such as {wrong[0]}"


def check_conformance(child: Child) -> str:
    check_transport(CudaIpc, device="cuda")
    return "in one process"


def check_slots(child: Child) -> str:
    slots = CudaIpc.create(SLOT_BYTES)
    slots.slot(0).copy_(torch.arange(SLOT_BYTES, device="cuda").remainder(251).to(torch.uint8))
    torch.cuda.synchronize()
    wanted = [digest(slots.slot(0)), digest(slots.slot(0) + 1)]
    assert child.ask(do="slots", address=slots.address) == wanted, "the worker read other bytes"
    assert [digest(slots.slot(i)) for i in range(2)] == wanted, "what the worker wrote is not here"
    child.ask(do="close slots")
    slots.slot(0).zero_()
    slots.close()
    return f"2 x {SLOT_BYTES:,} bytes"


def check_pinned(child: Child) -> str:
    torch.cuda.init()
    torch.empty(1, device="cuda")
    slots = SharedMemory.create(SLOT_BYTES)
    assert slots.slot(0).is_pinned(), "slots of shared_memory are not pinned"
    assert torch.equal(slots.slot(1).cuda().cpu(), slots.slot(1))
    slots.close()
    torch.zeros(5, device="cuda").sum().item()  # no error is left behind
    return "and unpinned"


def check_lending(child: Child) -> str:
    lend_once(child)  # loads the kernels, whose memory stays
    return lend_once(child)


def lend_once(child: Child) -> str:
    torch.cuda.empty_cache()
    free, free_there = torch.cuda.mem_get_info()[0], child.ask(do="free")
    tensors = model()
    used = free - torch.cuda.mem_get_info()[0]
    lent = CudaIpc.lend(tensors)
    assert len(lent.segments) < 300, f"{len(lent.segments)} segments for {len(tensors)} tensors"
    assert child.ask(do="map", segments=lent.segments) == len(lent.segments)
    read_equal(child, lent, tensors)
    for i, tensor in enumerate(tensors.values()):
        tensor.add_(i % 7)
    read_equal(child, lent, tensors)
    assert CudaIpc.lend(tensors) == lent, "lent again, the same memory has other addresses"
    assert child.ask(do="close", segments=lent.segments) == 0
    del tensors, tensor
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    lost, lost_there = free - torch.cuda.mem_get_info()[0], free_there - child.ask(do="free")
    assert max(lost, lost_there) <= NOISE_BYTES, f"{lost:,} bytes of {used:,} are not free again ({lost_there:,} there)"
    return f"{NUM_TENSORS} tensors, {len(lent.segments)} segments, {used:,} bytes; {lost:,} bytes not given back"


def check_reallocated(child: Child) -> str:
    shape, same_base = (16 << 20,), 0
    addresses = []
    for i in range(4):
        tensors = {"a": torch.full(shape, i, dtype=torch.int32, device="cuda")}
        lent = CudaIpc.lend(tensors)
        assert lent.segments[0] not in addresses, "freed and allocated anew, memory has the address it had"
        same_base += any(lent.segments[0]["base"] == address["base"] for address in addresses)
        addresses += lent.segments
        child.ask(do="map", segments=lent.segments)
        read_equal(child, lent, tensors)
        child.ask(do="close", segments=lent.segments)
        stamp = CudaIpc.stamp()
        assert CudaIpc.is_current(lent.segments)
        assert CudaIpc.stamp() == stamp, "nothing was freed, and the stamp has changed"
        del tensors
        torch.cuda.empty_cache()
        assert CudaIpc.stamp() != stamp, "memory was freed, and the stamp is the same"
        assert not CudaIpc.is_current(lent.segments), "memory that was freed passes for what was lent"
    handles = len({address["handle"] for address in addresses})
    return f"{same_base} of 3 at a base that was used before; {handles} handles for 4 allocations"


def check_two_sessions(child: Child) -> str:
    tensor = torch.arange(1 << 20, device="cuda")
    torch.cuda.synchronize()
    lent = CudaIpc.lend({"a": tensor})
    (index, offset), wanted = lent.places["a"], digest(tensor)
    found = child.ask(do="map twice", address=lent.segments[index], offset=offset, num_bytes=tensor.nbytes)
    assert found == [wanted, wanted], "a segment that was mapped twice is wrong, or gone after the first close"
    return "the driver counts"


def check_several_trainers(child: Child) -> str:
    lenders = [Child("lender") for _ in range(2)]
    try:
        loans = [lender.ask(do="lend", seed=seed) for seed, lender in enumerate(lenders)]
        for loan in loans:
            child.ask(do="map", segments=loan["segments"])
        for loan in loans:
            found = child.ask(do="read", segments=loan["segments"], places=loan["places"])
            assert found == loan["digests"], "the worker read other bytes"
        os.kill(lenders[0]._process.pid, signal.SIGKILL)  # a trainer dies while it is mapped
        lenders[0]._process.wait(10)
        for loan in loans:
            child.ask(do="close", segments=loan["segments"])
    finally:
        for lender in lenders:
            lender.stop()
    return "2 processes; one killed while mapped"


def check_no_handles(child: Child) -> str:
    for setting in ("expandable_segments:True", "backend:cudaMallocAsync"):
        other = Child("lender", PYTORCH_CUDA_ALLOC_CONF=setting)
        try:
            other.ask(do="lend", seed=0)
        except AssertionError as error:
            text = str(error)
        else:
            raise AssertionError(f"{setting}: lent memory that others cannot map")
        finally:
            other.stop()
        assert "TransportError" in text, text
        assert "expandable_segments" in text, text
        print(f"     {setting}: {text}")
    return "TransportError"


def check_bad_addresses(child: Child) -> str:
    (address,) = CudaIpc.lend({"a": torch.ones(5, device="cuda")}).segments
    elsewhere = {**address, "process": "elsewhere/1"}
    wrong = {
        "this process sees": {**address, "device": "00000000-0000-0000-0000-000000000000"},
        "cannot map": {**elsewhere, "handle": "00" * 64},
        "64 bytes": {**elsewhere, "handle": "00"},
    }
    for words, bad in wrong.items():
        assert words in refusal_of(bad)
    torch.zeros(5, device="cuda").sum().item()  # no error is left behind
    return "named"


def refusal_of(address: Address) -> str:
    try:
        CudaIpc.map_segment(address)
    except TransportError as error:
        return str(error)
    return "nothing: it was mapped"


def check_speed(child: Child) -> str:
    flat = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    tensors = {str(i): flat[i * 512 : i * 512 + 512] for i in range(12_000)}
    CudaIpc.lend(tensors)
    started = time.perf_counter()
    lent = CudaIpc.lend(tensors)
    took = (time.perf_counter() - started) * 1e3
    assert len(lent.segments) == 1
    assert took < 100, f"{took:.1f} ms"
    return f"12,000 tensors in {took:.1f} ms"


CHECKS = [
    check_conformance,
    check_slots,
    check_pinned,
    check_lending,
    check_reallocated,
    check_two_sessions,
    check_several_trainers,
    check_no_handles,
    check_bad_addresses,
    check_speed,
]


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"the checks take longer than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def main() -> int:
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    failed = 0
    child = Child("worker")
    try:
        with at_most(TOTAL_S):
            for check in CHECKS:
                name, started = check.__name__.removeprefix("check_"), time.perf_counter()
                try:
                    note = check(child)
                except TimeoutError:
                    raise
                except Exception as error:  # noqa: BLE001 - a script of checks: the others still run
                    failed += 1
                    print(f"FAIL {name}: {type(error).__name__}: {error}")
                    traceback.print_exc()
                else:
                    print(f"PASS {name} ({time.perf_counter() - started:.1f} s): {note}", flush=True)
    finally:
        child.stop()
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    roles = {"worker": worker, "lender": lender}
    if len(sys.argv) > 1:
        roles[sys.argv[1]]()
    else:
        sys.exit(main())
