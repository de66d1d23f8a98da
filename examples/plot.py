"""The picture of a quickstart run: reward, KL and refit time over the steps, as a PNG and as JSON beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_run(history: list[dict[str, Any]], path: Path) -> Path:
    """Draw `history`, one dict a step with reward, kl and refit_ms (None without a refit). Returns `path`."""
    refits = [entry["refit_ms"] for entry in history if entry["refit_ms"] is not None]
    panels = [("reward (share of vowels)", [entry["reward"] for entry in history], "tab:green", (0, 1))]
    panels.append(("KL(vLLM || policy)", [entry["kl"] for entry in history], "tab:red", None))
    if refits:
        panels.append(("refit, ms", refits, "tab:blue", None))
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), layout="constrained")
    for axis, (title, values, colour, limits) in zip(axes, panels, strict=True):
        axis.plot(values, color=colour)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylim(limits or (0, max(1e-6, *values) * 1.15))
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    path.with_suffix(".json").write_text(json.dumps(history, indent=1))
    return path
