"""The bar chart of the GPU benchmark: time of one refit by shape and way, against one plain copy of the same bytes.

    python benchmarks/chart.py benchmarks/results/h200 benchmarks/results/h200.png

Reads every JSON file that refit_gpu.py and refit_gpu_peers.py left in the folder: eager bf16 engines; the same bar in
several files: the first file counts. Each bar is a median; the axis is logarithmic.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

LIMIT = "one copy of the bytes (the limit)"
BARS = {  # row of the results -> label, colour
    LIMIT: ("one device copy (limit)", "#b8b8b8"),
    "mbridge direct": ("mbridge, direct path", "#1b7837"),
    "mbridge direct, tp2": ("mbridge, direct path, TP2 trainer", "#41974f"),
    "mbridge direct, tp2xep2": ("mbridge, direct path, TP2 x EP2 trainer", "#41974f"),
    "mbridge bucket": ("mbridge, bucket path", "#7fbf7b"),
    "load_weights, mapped": ("vLLM load_weights alone, tensors mapped", "#c6a5d6"),
    "flattened buckets": ("flattened buckets of 512 MB", "#9970ab"),
    "vLLM ipc packed": ("vLLM ipc, packed", "#e08214"),
    "vLLM ipc unpacked": ("vLLM ipc, unpacked", "#b35806"),
}
SHAPES = {
    "qwen2.5-7b": "Qwen2.5-7B",
    "llama-3.1-8b": "Llama-3.1-8B",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "deepseek-v3-slice": "DeepSeek-V3, 4 layers",
}


def main() -> None:
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    results = [r for r in results if r.get("rows") and _is_plain(r)]
    if not results:
        raise SystemExit(f"no results of plain cases in {folder}")
    draw(results, target)
    print(target)


def draw(results: list[dict[str, Any]], target: Path) -> None:
    """One panel for each shape, the way with the limit on top."""
    times = gather(results)
    shapes = [shape for shape in [*SHAPES, *times] if shape in times]
    shapes = list(dict.fromkeys(shapes))
    num_bars = [len(times[shape][0]) for shape in shapes]
    figure, panels = plt.subplots(
        len(shapes), 1, sharex=True, squeeze=False, layout="constrained",
        figsize=(9, 0.9 + sum(0.32 * n + 0.45 for n in num_bars)), height_ratios=[n + 0.6 for n in num_bars],
    )  # fmt: skip
    values = [ms for shape in shapes for ms in times[shape][0].values()]
    for axis, shape in zip(panels[:, 0], shapes, strict=True):
        _panel(axis, shape, *times[shape])
        axis.set_xlim(min(values) / 1.6, max(values) * 4)
    panels[-1, 0].set_xlabel("time of one refit (logarithmic; median)")
    devices = ", ".join(sorted({r["device"] for r in results}))
    vllm = results[0]["versions"].get("vllm", "")
    figure.suptitle(f"New weights into a live vLLM {vllm} on the same GPU ({devices}), bf16", fontsize=11)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
    plt.close(figure)


def gather(results: list[dict[str, Any]]) -> dict[str, tuple[dict[str, float], int]]:
    """Shape -> (row -> ms, bytes); the limit is the median of what the runs measured."""
    times: dict[str, tuple[dict[str, float], int]] = {}
    limits: dict[str, list[float]] = {}
    for result in results:
        limits.setdefault(result["shape"], []).append(result["memcpy_gb_s"])
        for line in result["rows"]:
            bars, _ = times.setdefault(result["shape"], ({}, line["bytes"]))
            bars.setdefault(line["what"] + _layout(result), line["seconds"] * 1e3)
    for shape, (bars, num_bytes) in times.items():
        bars[LIMIT] = num_bytes / 1e6 / median(limits[shape])
    return times


def _panel(axis: Axes, shape: str, bars: dict[str, float], num_bytes: int) -> None:
    names = [name for name in BARS if name in bars]
    limit = bars[LIMIT]
    for place, name in enumerate(names):
        axis.barh(place, bars[name], color=BARS[name][1], height=0.72)
        ratio = "" if name == LIMIT else f"  ({bars[name] / limit:.{1 if bars[name] < 100 * limit else 0}f}x)"
        axis.text(bars[name] * 1.06, place, _ms(bars[name]) + ratio, va="center", fontsize=9)
    axis.set_yticks(range(len(names)), [BARS[name][0] for name in names], fontsize=9)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms / 1e3:g} s" if ms >= 1e3 else f"{ms:g} ms"))
    axis.axvline(limit, color="#888888", linewidth=0.8, linestyle=":")
    axis.set_title(f"{SHAPES.get(shape, shape)}, {num_bytes / 1e9:.1f} GB", loc="left", fontsize=10, fontweight="bold")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)


def _is_plain(result: dict[str, Any]) -> bool:
    return result["engine"] == "eager" and not result.get("quantization")


def _layout(result: dict[str, Any]) -> str:
    """What the row's name says of a trainer of two ranks; larger ones have no bar."""
    trainer = result.get("trainer", {"ranks": 1})
    if trainer["ranks"] == 1:
        return ""
    if trainer["ranks"] > 2:
        return f", {trainer['ranks']} ranks"
    return ", " + "x".join(f"{name}{trainer[name]}" for name in ("tp", "ep") if trainer[name] > 1)


def _ms(value: float) -> str:
    return f"{value / 1e3:.2f} s" if value >= 1000 else f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"


if __name__ == "__main__":
    main()
