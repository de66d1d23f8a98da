"""What every test shares: the environment of the two scripts, and the order of the suite."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """The defaults of examples/setup/env.sh also hold where pytest is started without tests/run.sh.

    Here and not in a fixture: torch and vLLM read them when they are first imported.
    """
    shown = subprocess.run(
        ["bash", "-c", 'source "$0" && env -0', ROOT / "examples/setup/env.sh"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for line in shown.split("\0"):
        name, _, value = line.partition("=")
        if name not in ("", "_", "PWD", "SHLVL"):
            os.environ.setdefault(name, value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first, then the slow ones, then those that start a vLLM; the order within each group stays."""
    items.sort(
        key=lambda item: (item.get_closest_marker("vllm") is not None, item.get_closest_marker("slow") is not None)
    )


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The repository."""
    return ROOT
