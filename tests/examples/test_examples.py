"""The examples, run as their first lines say (less the set-up, which tests/run.sh has done)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]


def run(arguments: list[str], folder: Path, timeout_s: float = 280) -> str:
    """Run Python with `arguments` in `folder`; fail with its output unless it ends with status 0."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.mark.slow
def test_load_and_generate(tmp_path: Path) -> None:
    out = run([str(ROOT / "examples/0.load_model_and_generate_single_gpu.py"), "--prompt", "hello"], tmp_path)
    assert out.strip().startswith("'hello")


@pytest.mark.slow
def test_load_and_export(tmp_path: Path) -> None:
    script = str(ROOT / "examples/1.load_model_and_export_single_gpu.py")
    out = run([script, "--save_path", str(tmp_path / "saved")], tmp_path)
    assert "0 tensors differ, 0 were not exported" in out
    again = run([script, "--model_path", str(tmp_path / "saved")], tmp_path)
    assert "0 tensors differ, 0 were not exported" in again


@pytest.mark.slow
def test_export_notices_a_difference(tmp_path: Path) -> None:
    """The comparison of the example can fail: a checkpoint whose second file shadows a tensor with other values."""
    script = str(ROOT / "examples/1.load_model_and_export_single_gpu.py")
    run([script, "--save_path", str(tmp_path / "saved")], tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"] + 1}, tmp_path / "saved" / "other.safetensors")
    done = subprocess.run(
        [sys.executable, script, "--model_path", str(tmp_path / "saved")],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "1 tensors differ" in done.stdout
    assert "model.norm.weight" in done.stdout


def quickstart(folder: Path, *arguments: str) -> list[dict[str, float]]:
    run([*TWO_RANKS, str(ROOT / "examples/quickstart.py"), "--out", str(folder), *arguments], folder, timeout_s=420)
    (picture,) = folder.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    return json.loads(picture.with_suffix(".json").read_text())


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(450)
def test_quickstart_learns(tmp_path: Path) -> None:
    history = quickstart(tmp_path)
    assert history[0]["reward"] < 0.1
    assert history[-1]["reward"] > 0.8
    assert sum(step["kl"] for step in history) / len(history) < 0.01
    assert all(step["refit_ms"] > 0 for step in history)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(450)
def test_quickstart_without_sync_does_not(tmp_path: Path) -> None:
    history = quickstart(tmp_path, "--no-sync", "--iterations", "8")  # with refits, it has risen tenfold by then
    assert history[-1]["reward"] < 2 * history[0]["reward"]
    assert history[-1]["kl"] > 10 * max(history[0]["kl"], 1e-3)
