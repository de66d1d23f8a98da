"""Refits of a real vLLM. Each test is one of the scenarios of vllm_scenarios.py, in processes of its own.

The reference is a vLLM started on the checkpoint: after a refit its greedy tokens, log-probs and vLLM's own checksums
of the weights must be equal, bit for bit. (On CPU vLLM packs linear weights and drops the originals: those the log-
probs cover.)
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.mbridge_rl.small_qwen import make_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(400)]
pytest.importorskip("vllm")
SCENARIOS = "tests.mbridge_rl.vllm_scenarios"
TIMEOUT_S = 360


def run(*command: str, **environment: str) -> str:
    """Run a scenario; none of its processes outlives this call. Returns what it printed."""
    variables = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"} | environment
    process = subprocess.Popen(
        [sys.executable, *command], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.communicate()
    print(output)
    assert process.returncode == 0, f"{command} ended with status {process.returncode}"
    assert output.rstrip().splitlines()[-1] == "done" or "done\n" in output
    return output


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints a and b, tied; c and d, untied; and what vLLM makes of b."""
    path = tmp_path_factory.mktemp("vllm")
    for name, seed in (("a", 1), ("b", 2)):
        make_checkpoint(path / name, seed, tied=True)
    for name, seed in (("c", 3), ("d", 4)):
        make_checkpoint(path / name, seed, tied=False)
    run("-m", SCENARIOS, "reference", str(path), "b")
    return path


def test_torchrun_of_two_refits_the_llm_of_rank_0(directory: Path) -> None:
    run("-m", "torch.distributed.run", "--nproc-per-node=2", "-m", SCENARIOS, "torchrun", str(directory))


def test_a_fleet_by_broadcast_loses_an_engine(directory: Path) -> None:
    run("-m", "torch.distributed.run", "--nproc-per-node=2", "-m", SCENARIOS, "fleet", str(directory))


def test_untied_model_into_two_workers(directory: Path) -> None:
    run("-m", SCENARIOS, "refit", str(directory), "2", "c", "d", VLLM_CPU_OMP_THREADS_BIND="0|0")


def test_llm_in_the_same_process(directory: Path) -> None:
    run("-m", SCENARIOS, "refit", str(directory), "1", "a", "b", VLLM_ENABLE_V1_MULTIPROCESSING="0")


def test_conformance(directory: Path) -> None:
    run("-m", SCENARIOS, "conformance", str(directory), VLLM_ENABLE_V1_MULTIPROCESSING="0")


def test_requests_in_flight_and_the_prefix_cache(directory: Path) -> None:
    run("-m", SCENARIOS, "in_flight", str(directory))


def test_failures(directory: Path) -> None:
    output = run("-m", SCENARIOS, "failures", str(directory))
    assert "Failed to load weights" not in output


def test_server(directory: Path) -> None:
    run("-m", SCENARIOS, "serve", str(directory))
