"""Dry runs of the benchmarks for several GPUs: the same commands with gloo on a CPU, so that the first run works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LIMIT_S = 240


def dry_run(root: Path, target: Path, *command: str) -> dict[str, Any]:
    """Run a benchmark in a process of its own, with its children. Returns its JSON."""
    environment = os.environ | {"PYTHONPATH": str(root), "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, *command, "--json", str(target)],
        check=False,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    print(done.stdout)
    assert done.returncode == 0
    result: dict[str, Any] = json.loads(target.read_text())
    return result


def test_a_killed_worker_and_what_comes_after(repo_root: Path, tmp_path: Path) -> None:
    options = ["--simulate", "--shape", "qwen3-moe-tiny", "--bucket-mib", "1", "--only", "killed in its loader"]
    result = dry_run(repo_root, tmp_path / "f.json", *TORCHRUN, "benchmarks/multi_gpu_faults.py", *options)
    found = result["scenarios"]["killed in its loader"]
    assert [kind for _, kind, _ in found["errors"]] == ["EngineGoneError"] * 2  # on both ranks
    assert found["good_exact"]
    assert found["added_exact"]
    assert found["after_exact"]


def test_broadcasts_beside_raw_ones_and_their_timeline(repo_root: Path, tmp_path: Path) -> None:
    picture = tmp_path / "t.png"
    options = ["--shape", "tiny", "--repeat", "2", "--warm-up", "1", "--timeline", str(picture)]
    result = dry_run(repo_root, tmp_path / "c.json", *TORCHRUN, "benchmarks/collective.py", *options)
    assert result["fleets"].keys() == {"1", "2"}
    for found in result["fleets"].values():
        assert found["is_exact"]
        assert found["overlap"].keys() == {"gather", "fill", "broadcast", "load", "all"}
    spans = result["timeline"]
    assert spans.keys() == {"trainer rank 0", "trainer rank 1", "engine 0"}
    loads = [span for span in spans["engine 0"] if span[0] == "load"]
    assert len(loads) == result["fleets"]["1"]["num_buckets"]
    assert picture.stat().st_size > 0


def test_the_page_of_the_model(repo_root: Path, tmp_path: Path) -> None:
    for folder in ("h200", "h200-x2"):
        shutil.copytree(repo_root / "benchmarks/results" / folder, tmp_path / folder)
    target = tmp_path / "scaling.md"
    subprocess.run(
        [sys.executable, "benchmarks/scaling.py", str(target)],
        check=True,
        cwd=repo_root,
        env=os.environ | {"PYTHONPATH": str(repo_root)},
        timeout=LIMIT_S,
    )
    seconds = json.loads(target.with_suffix(".json").read_text())["seconds"]
    for by_way in seconds.values():
        for size, broadcast in by_way["broadcast"].items():
            sharded = by_way["sharded, loads as copies"][size]
            assert not broadcast or sharded["total"] <= broadcast["total"]
            # The slowest of what overlaps is the least that a refit can take.
            assert not broadcast or broadcast["total"] >= max(broadcast["wire"], broadcast["load"])
    assert "1024" in target.read_text()


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(LIMIT_S)
def test_a_live_engine_by_broadcast(repo_root: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    options = ["broadcast", "--simulate", "--shape", "tiny", "--repeat", "2", "--warm-up", "1"]
    result = dry_run(repo_root, tmp_path / "b.json", "benchmarks/multi_gpu.py", *options)
    found = result["paths"]["collective"]
    assert not result["errors"]
    assert result["tokens_changed"]
    assert found["verify"]["wrong"] == {}
    assert found["verify"]["found"]  # the element that was changed
    assert result["raw"]["best_s"] > 0
