"""Every compulsory family: trained a step on two ranks, refitted into a real vLLM, compared with a fresh vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("refit_family.py")
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]


def run(*arguments: str | Path) -> dict[str, Any]:
    """What the script left in its folder, the second argument. None of its processes outlives this call."""
    with subprocess.Popen(
        [sys.executable, *LAUNCH, str(SCRIPT), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=280)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-8000:]
    result: dict[str, Any] = json.loads((Path(arguments[1]) / "result.json").read_text())
    return result


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "deepseek_v3"])
def test_refitted_engine_equals_one_started_on_the_saved_checkpoint(family: str, tmp_path: Path) -> None:
    result = run(family, tmp_path)
    assert result["direct"] == result["fresh"]
    assert result["other weights"] == []
    assert result["reload"] == result["bucket"]
    assert result["bucket"] != result["before"]
    assert result["direct"] != result["bucket"]
    bucket, reload, direct = result["reports"]
    assert set(bucket["paths"].values()) == {"bucket"}
    assert set(reload["paths"].values()) == {"reload"}
    # vLLM packs linear layers on a CPU; norms at least, and what MLA derives its matrices from, are written directly.
    assert set(direct["paths"].values()) == {"direct", "reload"}
    assert direct["verification"]["wrong"] == {}
    assert direct["verification"]["num_compared"] > 0


@pytest.mark.slow
@pytest.mark.vllm
def test_pipeline_stages_broadcast_to_an_engine_of_two_workers(tmp_path: Path) -> None:
    result = run("qwen3", tmp_path, "stages")
    assert result["refitted"] == result["fresh"]
    assert result["equal"]
    assert result["refitted"] != result["before"]
    first, second = result["reports"]
    assert (first["mode"], second["mode"]) == ("broadcast", "sharded")
    assert first["num_workers"] == 2
    for report in result["reports"]:
        assert report["verification"]["wrong"] == {}
        assert report["verification"]["num_compared"] > 0
