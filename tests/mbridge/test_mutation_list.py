"""Every error of the mutation list is caught, and the package as it is passes (mutations.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_planted_error_is_caught(repo_root: Path, tmp_path: Path) -> None:
    report = tmp_path / "mutations.json"
    done = subprocess.run(
        [sys.executable, str(repo_root / "tests/mbridge/mutations.py"), "--json", str(report)],
        cwd=repo_root,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert report.is_file(), done.stdout + done.stderr
    summary = json.loads(report.read_text())
    assert not summary["control"]["caught"], summary["control"]["by"]
    assert [result["mutation"] for result in summary["mutations"] if not result["caught"]] == []
    assert summary["caught"] == summary["total"] >= 12
    assert done.returncode == 0
