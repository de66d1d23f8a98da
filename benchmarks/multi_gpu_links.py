"""What the link between two GPUs can do: the limits that multi_gpu.py compares refits with, measured in the same run.

    python benchmarks/multi_gpu_links.py broadcast --gpus 0,1 --bytes 15200000000 --bucket-bytes 536870912
    python benchmarks/multi_gpu_links.py copy --gpus 0,1

`broadcast`: two processes, one for each GPU, broadcast buffers until --bytes have gone: by torch's own process group
and by mbridge's, in pieces of 4 GiB and of --bucket-bytes. `copy`: one process copies 4 GiB from GPU to GPU, one way
and both ways at once. Prints JSON. With `--gpus ""` over gloo, as a dry run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from multi_gpu_places import settle

from mbridge_rl.transports._process_group import Group, Meeting, backend_for, serve

PIECE_BYTES = 4 << 30
DRY_BYTES = 64 << 20  # of a piece without GPUs
NUM_IN_FLIGHT = 2
LIMIT_S = 240


def measure_broadcast(gpus: Sequence[str], num_bytes: int, bucket_bytes: int, repeat: int = 5) -> dict[str, Any]:
    """Seconds and GB/s of raw broadcasts of `num_bytes` from one GPU to another, in fresh processes. "": over gloo."""
    store = serve("127.0.0.1", LIMIT_S)
    command = [sys.executable, str(Path(__file__).resolve()), "member", "--bytes", str(num_bytes)]
    command += ["--bucket-bytes", str(bucket_bytes), "--repeat", str(repeat), "--port", str(store.port)]
    members = [
        subprocess.Popen(
            [*command, "--rank", str(rank), "--gpus", gpu],
            env=_plain_environment(),
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank, gpu in enumerate(gpus)
    ]
    try:
        output, _ = members[0].communicate(timeout=LIMIT_S)
    finally:
        for member in members:
            if member.poll() is None and (members[0].returncode != 0 or not _ends(member)):
                member.kill()
            member.wait()
    if members[0].returncode != 0:
        raise RuntimeError(f"the raw broadcast ended with status {members[0].returncode}")
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return result


def _ends(member: subprocess.Popen[str]) -> bool:
    try:
        member.wait(20)
    except subprocess.TimeoutExpired:
        return False
    return True


def _plain_environment() -> dict[str, str]:
    """Ours without torchrun's variables: they describe the trainer's job."""
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in hidden and not k.startswith("TORCHELASTIC_")}


def measure_copies(gpus: Sequence[str], repeat: int = 5) -> dict[str, Any]:
    """GB/s of one plain copy on a GPU, from GPU to GPU, and in both directions at once (of each direction)."""
    command = [sys.executable, str(Path(__file__).resolve()), "copy", "--gpus", ",".join(gpus)]
    command += ["--repeat", str(repeat)]
    done = subprocess.run(
        command, check=True, env=_plain_environment(), stdout=subprocess.PIPE, text=True, timeout=LIMIT_S
    )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


# --- inside the processes ---------------------------------------------------------------------------------------------


def member(args: argparse.Namespace) -> dict[str, Any]:
    """One of two processes that broadcast."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    store = dist.TCPStore("127.0.0.1", args.port, None, False, wait_for_workers=False)
    names, piece = ["sender", "receiver"], PIECE_BYTES if device.type == "cuda" else DRY_BYTES
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend_for(device), store=dist.PrefixStore("torch", store), rank=args.rank, world_size=len(names)
    )
    ours = Group(Meeting("127.0.0.1", args.port, "ours"), args.rank, names, device, 60.0)
    memory = torch.ones(max(piece, NUM_IN_FLIGHT * args.bucket_bytes), dtype=torch.uint8, device=device)
    result: dict[str, Any] = {"bytes": args.bytes, "backend": backend_for(device), "pieces": {}}
    ways: dict[str, Callable[[torch.Tensor], Any]] = {
        "torch": lambda part: dist.broadcast(part, 0, async_op=True),
        "mbridge": lambda part: ours.broadcast(part, 0, "a raw piece"),
    }
    for way, begin in ways.items():
        for name, size in (("large", piece), ("bucket", args.bucket_bytes)):
            times = [_broadcast_all(begin, memory, args.bytes, size, device) for _ in range(1 + args.repeat)][1:]
            median = statistics.median(times)
            result["pieces"][f"{way} {name}"] = {
                "piece_bytes": size, "seconds": median, "min": min(times), "max": max(times),
                "GB/s": args.bytes / 1e9 / median,
            }  # fmt: skip
    result["best_s"] = min(found["seconds"] for found in result["pieces"].values())
    result["best GB/s"] = args.bytes / 1e9 / result["best_s"]
    dist.barrier()
    ours.close()
    return result


def _broadcast_all(
    begin: Callable[[torch.Tensor], Any], memory: torch.Tensor, num_bytes: int, piece: int, device: torch.device
) -> float:
    """Seconds until `num_bytes` have gone, two pieces at a time, each from its own place if there is room."""
    dist.barrier()
    _synchronize(device)
    start = time.perf_counter()
    pending: list[Any] = []
    for number, sent in enumerate(range(0, num_bytes, piece)):
        offset = (number % NUM_IN_FLIGHT) * piece
        offset = offset if offset + piece <= memory.numel() else 0
        if len(pending) == NUM_IN_FLIGHT:
            pending.pop(0).wait()
        pending.append(begin(memory[offset : offset + min(piece, num_bytes - sent)]))
    for work in pending:
        work.wait()
    _synchronize(device)
    return time.perf_counter() - start


def copies(args: argparse.Namespace) -> dict[str, Any]:
    """Plain copies between the GPUs that this process sees."""
    if not torch.cuda.is_available():
        source = torch.ones(DRY_BYTES, dtype=torch.uint8)
        target = torch.zeros_like(source)
        return {"local": DRY_BYTES / 1e9 / _median(lambda: target.copy_(source), args.repeat)}
    first, second = (torch.ones(PIECE_BYTES, dtype=torch.uint8, device=f"cuda:{i}") for i in range(2))
    third, fourth = (torch.zeros(PIECE_BYTES, dtype=torch.uint8, device=f"cuda:{i}") for i in range(2))
    streams = [torch.cuda.Stream(i) for i in range(2)]

    def both() -> None:
        with torch.cuda.stream(streams[0]):
            fourth.copy_(first, non_blocking=True)
        with torch.cuda.stream(streams[1]):
            third.copy_(second, non_blocking=True)

    ways: dict[str, Callable[[], object]] = {
        "local": lambda: third.copy_(first, non_blocking=True),
        "0 to 1": lambda: fourth.copy_(first, non_blocking=True),
        "1 to 0": lambda: third.copy_(second, non_blocking=True),
        "both at once, each": both,
    }
    result: dict[str, Any] = {name: PIECE_BYTES / 1e9 / _median(way, args.repeat) for name, way in ways.items()}
    return result | {"peer_access": torch.cuda.can_device_access_peer(0, 1)}


def _median(action: Callable[[], object], repeat: int) -> float:
    times = []
    for _ in range(2 + repeat):
        start = time.perf_counter()
        action()
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("broadcast", "copy", "member"))
    parser.add_argument("--gpus", default="0,1")
    parser.add_argument("--bytes", type=int, default=16 << 30)
    parser.add_argument("--bucket-bytes", type=int, default=512 << 20)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--rank", type=int, default=0, help="of a member; for the script itself")
    parser.add_argument("--port", type=int, default=0, help="of the members' store; for the script itself")
    args = parser.parse_args()
    if args.what == "broadcast":
        gpus = args.gpus.split(",") if args.gpus else ["", ""]
        print(json.dumps(measure_broadcast(gpus, args.bytes, args.bucket_bytes, args.repeat)))
        return
    settle(args.gpus, simulate=not args.gpus)
    print(json.dumps(member(args) if args.what == "member" else copies(args)), flush=True)
    os._exit(0)  # no orderly end of NCCL, which may wait for the other process


if __name__ == "__main__":
    main()
