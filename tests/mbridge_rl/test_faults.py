"""Whatever fails in a refit, on every lane: all trainer ranks soon know and say the same, no engine serves torn
weights, nothing leaks, and a later refit is exact.

The faults are in faults.py. The fleets of a lane go through them side by side: most of the time they wait for
deadlines.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.mbridge_rl.faults import (
    DEADLINE_S,
    FAULTS,
    GRACE_S,
    LANES,
    MODES,
    NUM_REPLACED,
    Named,
    Stage,
    die,
    drop,
    judge,
    leftovers,
    outlive,
    play_all,
)
from tests.mbridge_rl.ranks import Outcome, run_ranks

TIMEOUT_S = 200.0


@contextmanager
def fleet_of(mode: str, num_spares: int = 0) -> Iterator[tuple[list[Named], list[Named]]]:
    """The engines of a fleet, faults happen to the last; and engines to take its place. None outlives this."""
    fleet = [] if mode == "one engine" else [Named("alpha", 1)]
    fleet.append(Named("beta", has_front_end=num_spares > 0))
    spares = [Named(f"spare-{i}") for i in range(num_spares)]
    try:
        yield fleet, spares
    finally:
        for engine in (*fleet, *spares):
            engine.stop()


@pytest.fixture
def root() -> Iterator[Path]:
    """Not tmp_path: torch's own sockets lie below, and a Unix socket's path has 107 bytes at most."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def directory_of(root: Path, lane: str, mode: str) -> Path:
    directory = root / f"{lane}-{mode.replace(' ', '-')}"
    directory.mkdir()
    return directory


def side_by_side(play: Callable[[str, str], list[str]], lanes: Iterable[str] = LANES) -> list[str]:
    """What went wrong on each of `lanes` in each mode. `play` gets a lane and a mode."""
    stages = [(lane, mode) for lane in lanes for mode in MODES]
    with ThreadPoolExecutor(len(stages)) as pool:
        found = list(pool.map(lambda stage: play(*stage), stages))
    return [f"{lane}, {mode}: {text}" for (lane, mode), texts in zip(stages, found, strict=True) for text in texts]


# --- engines that fail, and trainers that stay ------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [("bucket", "direct"), ("collective",)])
def test_every_fault_is_an_error_on_all_ranks_and_the_next_refit_is_exact(root: Path, lanes: tuple[str, ...]) -> None:
    def play(lane: str, mode: str) -> list[str]:
        directory = directory_of(root, lane, mode)
        with fleet_of(mode, NUM_REPLACED) as (fleet, spares):
            outcomes = run_ranks(2, directory, play_all, lane, mode, fleet, spares, directory, (), timeout_s=TIMEOUT_S)
            pids = [pid for engine in (*fleet, *spares) for pid in engine.pids]
        problems = [str(outcome.error) for outcome in outcomes if outcome.error is not None]
        if problems:
            return problems
        pids += [pid for _, pid in (outcome.value for outcome in outcomes)]
        seen = [found for found, _ in (outcome.value for outcome in outcomes)]
        expected = [fault for fault in FAULTS if lane in fault.lanes and mode in fault.modes]
        for fault, *ranks in zip(expected, *seen, strict=False):
            problems += [f"{fault.name}: {problem}" for problem in judge(fault, mode, ranks)]
        if len(seen[0]) != len(expected):
            problems.append(f"played {len(seen[0])} of {len(expected)} faults")
        return problems + leftovers(pids, directory)

    problems = side_by_side(play, lanes)
    assert not problems, "\n".join(problems)


# --- trainers that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_trainer_rank(root: Path, victim: int) -> None:
    """In each mode at another bucket."""

    def play(lane: str, mode: str) -> list[str]:
        where = dict(zip(MODES, ("first", "middle", "last"), strict=True))[mode]
        survivors = [rank for rank in range(3) if rank != victim]
        outcomes, problems = lose(directory_of(root, lane, mode), lane, mode, victim, where, die, survivors)
        for rank in survivors:
            seen = outcomes[rank].value[0]
            if seen.error is None and (lane, where) == ("collective", "last"):
                continue  # its pieces were on their way already: all that is left of it is to say so
            if seen.error != "TrainerLostError" or f"trainer rank {victim} died" not in seen.message:
                problems.append(f"rank {rank} raised {seen.error}: {seen.message}")
            if seen.seconds > DEADLINE_S:
                problems.append(f"rank {rank} knew after {seen.seconds:.1f} s")
        return problems

    problems = side_by_side(play)
    assert not problems, "\n".join(problems)


def test_a_trainer_rank_whose_connection_drops(root: Path) -> None:
    def play(lane: str, mode: str) -> list[str]:
        outcomes, problems = lose(directory_of(root, lane, mode), lane, mode, 1, "middle", drop, [0, 1])
        for rank, errors in ((0, ("TrainerLostError",)), (1, ("TrainerLostError", "DeadlineError"))):
            seen = outcomes[rank].value[0]
            if seen.error not in errors or f"trainer rank {1 - rank}" not in seen.message:
                problems.append(f"rank {rank} raised {seen.error}: {seen.message}")
            if seen.seconds > DEADLINE_S + GRACE_S:
                problems.append(f"rank {rank} knew after {seen.seconds:.1f} s")
        return problems

    problems = side_by_side(play)
    assert not problems, "\n".join(problems)


def lose(
    directory: Path,
    lane: str,
    mode: str,
    victim: int,
    where: str,
    act: Callable[[Stage], None],
    survivors: list[int],
) -> tuple[list[Outcome], list[str]]:
    num_ranks = 3 if victim not in survivors else 2
    with fleet_of(mode) as (fleet, _):
        arguments: tuple[Any, ...] = (lane, mode, fleet, directory, victim, where, act, survivors)
        outcomes = run_ranks(num_ranks, directory, outlive, *arguments, timeout_s=TIMEOUT_S)
        pids = [pid for engine in fleet for pid in engine.pids]
    problems = [str(outcomes[rank].error) for rank in survivors if outcomes[rank].error is not None]
    assert not problems, problems
    problems += [problem for rank in survivors for problem in outcomes[rank].value[0].problems]
    pids += [int(file.read_text()) for file in directory.glob("pid-*")]
    return outcomes, problems + leftovers(pids, directory)


# --- no room ----------------------------------------------------------------------------------------------------------

FULL = """
import pathlib, torch
from mbridge_rl import WeightSyncer
from mbridge_rl.errors import TransportError
from tests.mbridge_rl.fakes import FakeBridge
from tests.mbridge_rl.test_sync import Module, weights

def attempt(**options):
    module = Module()
    try:
        with WeightSyncer(FakeBridge(weights(1)), module, **options) as syncer:
            syncer.sync(verify="full")
            return "exact" if module.holds(1) else "wrong"
    except TransportError as error:
        return str(error)

for options in (
    {"bucket_bytes": 1 << 20},
    {"path": "direct"},
    {"transport": "collective", "bucket_bytes": 1 << 20},
    {"bucket_bytes": 4096},
):
    print(attempt(**options))
print(sorted(path.name for path in pathlib.Path("/dev/shm").iterdir()))
"""


def test_a_full_shared_memory_filesystem(repo_root: Path) -> None:
    """The buckets do not fit: an error before anything happens. What needs less, or none, works all the same."""
    mount = "mount -t tmpfs -o size=16k tmpfs /dev/shm"
    if subprocess.run(["unshare", "--mount", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    run = f"{mount} && exec {sys.executable} -c '{FULL}'"
    found = subprocess.run(
        ["unshare", "--mount", "sh", "-c", run],
        capture_output=True,
        text=True,
        check=False,
        cwd=repo_root,
        env={**os.environ, "PYTHONPATH": str(repo_root)},
        timeout=120,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    buckets, direct, collective, small, left = found.stdout.splitlines()
    assert re.search(r"two buckets need [\d,]+ bytes in /dev/shm, which has [\d,]+ free: No space left", buckets)
    assert "Pass a smaller bucket_bytes" in buckets
    assert re.search(r"needs [\d,]+ bytes in /dev/shm, which has [\d,]+ free", direct), direct
    assert (collective, small) == ("exact", "exact")
    assert left == "[]"
