"""The set-up script: what it says when something is missing, when it works and when it has nothing to do.

A copy of the scripts runs in a folder of its own with a PATH of its own: the real shell tools, and a stand-in `python3`
that records what it is asked and "installs" nothing. The real installation is what tests/run.sh begins with.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

TOOLS = "bash sh awk cat df dirname du env flock grep mkdir mv rm sha256sum sleep tail touch uname".split()

# Plays the interpreter and, copied to .venv/bin/python, the environment's one.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
  *sys.version_info*) echo "${FAKE_VERSION:-3.11.7}" ;;
  *ensurepip*) exit "${FAKE_NO_VENV:-0}" ;;
  "-m venv "*)
    mkdir -p "$3/bin"
    { echo "#!/usr/bin/env bash"; echo "FAKE_VERSION=${FAKE_VERSION:-3.11.7}"; cat "$0"; } >"$3/bin/python"
    echo "VIRTUAL_ENV='$3'" >"$3/bin/activate"
    chmod +x "$3/bin/python" ;;
  *torch.version.cuda*) exit "${FAKE_CPU_TORCH:-1}" ;;
  "-m pip"*"${FAKE_PIP_FAILS:-nothing fails}"*) echo "ERROR: No matching distribution found"; exit 1 ;;
  "-m pip"*"${FAKE_PIP_HANGS:-nothing hangs}"*) echo "Collecting things"; exec sleep 60 ;;
esac
"""


@dataclass
class Sandbox:
    """A repository with nothing but the set-up in it, and the machine that the script sees."""

    root: Path
    bin: Path
    calls: Path

    def command(self, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", self.root / "examples/setup/setup.sh"],
            env={"PATH": str(self.bin), "CALLS": str(self.calls), "MBRIDGE_DEVICE": "cpu", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, **env: str) -> tuple[int, str]:
        """Exit status and all that was printed."""
        process = self.command(**env)
        printed, _ = process.communicate(timeout=60)
        return process.returncode, printed

    def tool(self, name: str, source: str) -> None:
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(source)
        (self.bin / name).chmod(0o755)

    def asked(self) -> list[str]:
        """What the stand-in interpreters were called with so far."""
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    def pip_calls(self) -> list[str]:
        return [call for call in self.asked() if call.startswith("-m pip")]


@pytest.fixture
def sandbox(tmp_path: Path, repo_root: Path) -> Sandbox:
    box = Sandbox(tmp_path / "a repository", tmp_path / "bin", tmp_path / "calls")
    shutil.copytree(
        repo_root / "examples/setup", box.root / "examples/setup", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(repo_root / "pyproject.toml", box.root)
    box.bin.mkdir()
    for tool in [*TOOLS, "chmod"]:
        real = shutil.which(tool)
        assert real is not None, tool
        (box.bin / tool).symlink_to(real)
    box.tool("python3", PYTHON)
    box.tool("df", "#!/bin/sh\necho Filesystem\necho disk 99999999 0 99999999 0% /\n")
    return box


def test_an_activated_environment_is_not_built_on_itself(sandbox: Sandbox) -> None:
    assert sandbox.run()[0] == 0
    own = sandbox.root / ".venv/bin"
    shutil.copy(own / "python", own / "python3")
    (own / "activate").write_text("VIRTUAL_ENV=elsewhere\n")
    (sandbox.root / ".venv/mbridge-stamp").unlink()
    status, printed = sandbox.run(PATH=f"{own}:{sandbox.bin}")
    assert (status, "starting it anew" in printed) == (0, True), printed


def fails_with_one_line(result: tuple[int, str], *words: str) -> None:
    status, printed = result
    assert status == 1
    assert len(printed.splitlines()) == 1, printed
    for word in words:
        assert word in printed


def test_no_python(sandbox: Sandbox) -> None:
    (sandbox.bin / "python3").unlink()
    fails_with_one_line(sandbox.run(), "Python 3.11 or newer", "no python3 found", "install")


def test_old_python(sandbox: Sandbox) -> None:
    fails_with_one_line(sandbox.run(FAKE_VERSION="3.9.2"), "Python 3.11 or newer", "python3 is 3.9.2")
    fails_with_one_line(sandbox.run(FAKE_VERSION="2.7.18"), "python3 is 2.7.18")


def test_a_newer_python_beside_an_old_one_is_taken(sandbox: Sandbox) -> None:
    sandbox.tool("python3.12", PYTHON.replace("3.11.7", "3.12.4"))
    sandbox.tool("python3", "#!/bin/sh\necho 3.9.2\n")
    status, printed = sandbox.run()
    assert (status, "Python 3.12.4 (cpu)" in printed) == (0, True), printed


def test_the_interpreter_that_was_named_is_the_only_one_tried(sandbox: Sandbox) -> None:
    fails_with_one_line(sandbox.run(MBRIDGE_PYTHON="/no/such python"), "no /no/such python found")


def test_no_venv_module(sandbox: Sandbox) -> None:
    fails_with_one_line(sandbox.run(FAKE_NO_VENV="1"), "no venv module", "apt install python3.11-venv")


def test_no_disk(sandbox: Sandbox) -> None:
    sandbox.tool("df", "#!/bin/sh\necho Filesystem\necho disk 99999999 96999999 3000000 97% /\n")
    fails_with_one_line(sandbox.run(), "8 GB of disk", "2 GB free")
    assert not (sandbox.root / ".venv").exists()


def test_not_linux(sandbox: Sandbox) -> None:
    sandbox.tool("uname", "#!/bin/sh\necho Darwin\n")
    fails_with_one_line(sandbox.run(), "needs Linux", "Darwin")


def test_unknown_device(sandbox: Sandbox) -> None:
    fails_with_one_line(sandbox.run(MBRIDGE_DEVICE="tpu"), "MBRIDGE_DEVICE", "tpu")


def test_a_second_start_does_nothing_and_is_fast(sandbox: Sandbox) -> None:
    status, printed = sandbox.run()
    assert status == 0, printed
    assert [line.split("]")[0] for line in printed.splitlines()[:-1]] == [f"setup: [{i}/5" for i in range(1, 6)]
    installs = sandbox.pip_calls()
    assert [call.split(" install ")[1].split()[0] for call in installs] == [
        "torch==2.13.0",
        "--no-deps",
        "--no-deps",
        "--no-deps",
    ]
    begin = time.perf_counter()
    assert sandbox.run() == (0, "")
    assert time.perf_counter() - begin < 5
    assert sandbox.pip_calls() == installs


@pytest.mark.parametrize(
    "file", ["pyproject.toml", "examples/setup/cpu.txt", "examples/setup/dev.txt", "examples/setup/setup.sh"]
)
def test_a_changed_pin_makes_it_stale(sandbox: Sandbox, file: str) -> None:
    assert sandbox.run()[0] == 0
    before = len(sandbox.pip_calls())
    with (sandbox.root / file).open("a") as out:
        out.write("# changed\n")
    assert sandbox.run()[0] == 0
    assert len(sandbox.pip_calls()) == 2 * before
    assert sandbox.run() == (0, "")


def test_a_new_interpreter_or_place_makes_it_anew(sandbox: Sandbox) -> None:
    assert sandbox.run()[0] == 0
    keepsake = sandbox.root / ".venv/keepsake"
    keepsake.touch()
    moved = Sandbox(sandbox.root.parent / "moved", sandbox.bin, sandbox.calls)
    shutil.copytree(sandbox.root, moved.root)
    python = sandbox.root / ".venv/bin/python"
    python.write_text(python.read_text().replace("3.11.7", "3.11.2"))  # the system was upgraded under the environment
    for box in (moved, sandbox):
        status, printed = box.run()
        assert (status, "starting it anew" in printed) == (0, True), printed
        assert not (box.root / ".venv/keepsake").exists()


def test_pip_that_fails_is_run_again_next_time(sandbox: Sandbox) -> None:
    status, printed = sandbox.run(FAKE_PIP_FAILS="dev.txt")
    assert status == 1
    assert "No matching distribution" in printed
    assert "pip failed with status 1" in printed.splitlines()[-1]
    status, printed = sandbox.run()
    assert (status, "anew" in printed) == (0, False), printed
    assert sandbox.run() == (0, "")


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_set_up_can_be_run_again(sandbox: Sandbox, by: signal.Signals) -> None:
    assert sandbox.run()[0] == 0
    with (sandbox.root / "pyproject.toml").open("a") as out:
        out.write("# changed\n")
    process = sandbox.command(FAKE_PIP_HANGS="dev.txt")
    wait_for(lambda: "Collecting things" in (sandbox.root / ".venv/setup.log").read_text())
    hanging = children(process.pid)
    process.send_signal(by)
    process.wait(timeout=20)
    assert process.returncode in (130, -signal.SIGKILL)
    if by is signal.SIGTERM:
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in hanging))
    for pid in hanging:  # after SIGKILL nobody else ends pip; until it has ended, it holds the lock
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
    assert process.stdout is not None
    process.stdout.close()
    status, printed = sandbox.run()
    assert (status, "[5/5]" in printed) == (0, True), printed
    assert sandbox.run() == (0, "")


def test_two_at_once_do_the_work_once(sandbox: Sandbox) -> None:
    sandbox.tool("python3", PYTHON.replace("exec sleep 60", "sleep 2"))
    first = sandbox.command(FAKE_PIP_HANGS="dev.txt")
    wait_for((sandbox.root / ".venv/setup.log").exists)
    status, printed = sandbox.run()
    first_printed, _ = first.communicate(timeout=60)
    assert first.returncode == 0, first_printed
    assert (status, printed.splitlines()) == (0, ["setup: another set-up of this folder is running; waiting for it"])
    assert len(sandbox.pip_calls()) == 4


def test_a_cuda_torch_without_a_gpu_gets_a_hint(sandbox: Sandbox) -> None:
    status, printed = sandbox.run(FAKE_CPU_TORCH="0")
    assert (status, "PIP_EXTRA_INDEX_URL" in printed) == (0, True), printed


def test_with_a_gpu_the_gpu_pins_are_taken(sandbox: Sandbox) -> None:
    sandbox.tool("nvidia-smi", "#!/bin/sh\nexit 0\n")
    assert sandbox.run(MBRIDGE_DEVICE="")[0] == 0
    assert any("gpu.txt" in call for call in sandbox.pip_calls())
    assert not any("cpu.txt" in call for call in sandbox.pip_calls())


def test_repair_drops_what_is_half_installed(tmp_path: Path, repo_root: Path) -> None:
    def package(name: str, *files: str, content: str = "x = 1\n", record: bool = True, by_pip: bool = True) -> None:
        (tmp_path / f"{name}.py").write_text(content)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\n")
        (info / "INSTALLER").write_text("pip\n")
        rows = [f"{name}.py,sha256=a,6", *files, *([f"{info.name}/INSTALLER,sha256=a,4"] if by_pip else [])]
        if record:
            (info / "RECORD").write_text("\n".join(rows) + "\n")

    package("whole", "__pycache__/whole.cpython-311.pyc,,", "whole-1.0.dist-info/RECORD,,")
    package("recordless", record=False)
    package("commandless", by_pip=False)
    package("cut", content="x =")
    package("absent", "absent/more.py,sha256=a,6")
    (tmp_path / "~ld").mkdir()
    program = "import pathlib, sys, repair; print(*repair.repair(pathlib.Path(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        cwd=repo_root / "examples/setup",
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == [
        *(f"{name}-1.0.dist-info" for name in ("absent", "commandless", "cut", "recordless")),
        "~ld",
    ]
    assert (tmp_path / "whole-1.0.dist-info").exists()


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Until `condition()` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Direct children of a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found
