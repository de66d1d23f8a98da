"""Timing and output that the benchmarks share."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


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


def print_table(rows: list[dict[str, Any]]) -> None:
    columns = list(rows[0])
    cells = [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    for line in [columns, *cells]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def write_json(result: dict[str, Any], path: Path | None) -> None:
    """The result as one line of JSON on stdout, and into `path`."""
    print(json.dumps(result))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
