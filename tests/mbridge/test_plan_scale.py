"""Planning one rank of the largest models stays within the limits of benchmarks/plan.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# HF tensors by arithmetic. Qwen3-235B: 94 layers of 2 norms, q, k, v, o, 2 head norms, router, 128 experts of 3; and 3.
# DeepSeek-V3: 61 + 1 MTP layers of 2 norms, 5 projections, 2 latent norms; 3 dense of 3; 59 with router, bias, 257
# experts of 3; 4 more for the MTP layer; and 3.
NUM_TENSORS = {
    "qwen3-235b-a22b": 94 * (2 + 4 + 2 + 1 + 128 * 3) + 3,
    "deepseek-v3": 62 * (2 + 5 + 2) + 3 * 3 + 59 * (2 + 257 * 3) + 4 + 3,
}


def planned(repo_root: Path, shape: str, stage: int, fraction: float = 1.0) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(repo_root / "benchmarks/plan.py"), "--one", shape, "--stage", str(stage),
         "--fraction", str(fraction)],
        check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 15])
@pytest.mark.parametrize("shape", NUM_TENSORS)
def test_one_rank_of_tp8_pp16_ep32(repo_root: Path, shape: str, stage: int) -> None:
    result = planned(repo_root, shape, stage)
    assert result["tensors"] == NUM_TENSORS[shape]
    assert result["plan_s"] + result["export_plan_s"] < 5
    assert result["with_export_mb"] < 500


@pytest.mark.slow
def test_the_time_is_linear_in_tensors(repo_root: Path) -> None:
    quarter, whole = (
        min(planned(repo_root, "deepseek-v3", 8, fraction)["cpu_us_a_tensor"] for _ in range(2))
        for fraction in (0.25, 1)
    )
    assert whole < 3 * quarter  # a square would make it four times
