"""The multi-process example, run as its first lines say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "examples/2.load_export_multi_gpu.py")


def run(folder: Path, num_ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    return subprocess.run(
        [sys.executable, *launcher, "--nproc-per-node", str(num_ranks), SCRIPT, *arguments],
        cwd=folder, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_load_export_and_save_on_four_ranks(tmp_path: Path) -> None:
    done = run(tmp_path, 4, "--tp", "2", "--pp", "2", "--vpp", "2", "--save_path", str(tmp_path / "saved"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 tensors differ, 0 were not exported" in done.stdout
    assert done.stdout.count("2 chunks") == 4

    # What was saved is a checkpoint of its own, in which a planted difference is found.
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    original = load_file(tmp_path / "runs" / "tiny-bf16" / "model.safetensors")
    assert tensors.keys() == original.keys()
    assert all(tensors[name].equal(original[name]) for name in original)
    save_file({"model.norm.weight": tensors["model.norm.weight"] + 1}, tmp_path / "saved" / "other.safetensors")
    done = run(tmp_path, 2, "--pp", "2", "--model_path", str(tmp_path / "saved"))
    assert done.returncode == 1
    assert "1 tensors differ" in done.stdout
    assert "model.norm.weight" in done.stdout
