"""The picture of a quickstart run: reward, KL and refit time over the steps, as a PNG and as JSON beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = [
    ("reward", "reward: share of vowels", "linear"),
    ("kl", "KL(vLLM || policy)", "log"),
    ("refit_ms", "refit, ms", "linear"),
]


def plot_run(history: list[dict[str, Any]], path: Path) -> Path:
    """Draw `history`, one dict a step with reward, kl and refit_ms (None without a refit). Returns `path`.

    Other runs whose JSON lies in the same folder are drawn with it, dashed: the control beside the real thing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(history, indent=1))
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.2), layout="constrained")
    for file in sorted(path.parent.glob("*.json"), key=lambda file: file.stem != path.stem):
        run, style = json.loads(file.read_text()), "-" if file.stem == path.stem else "--"
        for axis, (key, title, scale) in zip(axes, PANELS, strict=True):
            steps = [step for step, entry in enumerate(run) if entry[key] is not None]
            values = [max(run[step][key], 1e-16) for step in steps]
            if values:
                axis.plot(steps, values, style, label=file.stem)
            axis.set(title=title, xlabel="step", yscale=scale)
            axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1)
    axes[0].legend()
    axes[2].set_ylim(bottom=0)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
