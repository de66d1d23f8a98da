"""Hundreds of refits of a fleet with faults at random, on all lanes in turn: versions, tensors, what processes hold.

Minutes long, so it runs only when it is asked for: MBRIDGE_SOAK_LOG names the file for its log, one line for twenty
refits (benchmarks/results/soak-cpu.log is one).
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count, cycle
from pathlib import Path
from typing import Any

import pytest

from tests.mbridge_rl.faults import (
    FAULTS,
    LANES,
    MODES,
    Fault,
    Inventory,
    Named,
    Player,
    Seen,
    judge,
    leftovers,
    use_directory,
)
from tests.mbridge_rl.ranks import run_ranks
from tests.mbridge_rl.worker_engine import Usage

NUM_REFITS = 300
REFITS_A_LINE = 20
SEED = 5
FAULT_RATE = 0.4
SLOW_RATE = 0.1  # of the faults that take two deadlines
MAX_GROWTH_BYTES = 48 << 20  # of a process, after each lane had its turn


class Absent(Named):
    """An engine as trainer ranks other than 0 have it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def stop(self) -> None:
        """It is rank 0's."""


def engines(rank: int) -> Iterator[Named]:
    """New ones, without end."""
    for number in count():
        yield Named(f"spare-{number}", has_front_end=True) if rank == 0 else Absent(f"spare-{number}")


def chosen(rng: random.Random, lane: str, mode: str) -> Fault | None:
    if rng.random() >= FAULT_RATE:
        return None
    slow = rng.random() < SLOW_RATE
    return rng.choice(
        [f for f in FAULTS if lane in f.lanes and mode in f.modes and slow == (f.name == "worker stopped")]
    )


def soak(rank: int, num_ranks: int, directory: Path, log: Path) -> tuple[list[tuple[str, Seen]], int, list[int], str]:
    """What this rank saw in which mode, its process, those of all engines, and what it holds too much at the end."""
    use_directory(directory)
    rng, spares = random.Random(SEED), engines(rank)
    fleet = [next(spares) for _ in range(3)]
    pids, seen, num_faults = set[int](), list[tuple[str, Seen]](), Counter[str]()
    num_refits = step = version = 0
    warm: tuple[Inventory, Usage, list[int]] | None = None
    started = time.monotonic()
    for block, (lane, mode) in enumerate(zip(cycle(LANES), cycle(MODES[1:]), strict=False)):
        player = Player(rank, num_ranks, lane, mode, fleet, spares, step=step)
        player.refit("full")
        while player.num_refits < REFITS_A_LINE:
            rng.shuffle(player.fleet)
            fault = chosen(rng, lane, mode)
            if fault is None:
                player.refit(rng.choice([None, None, "full", "sampled"]))
                continue
            pids |= {pid for engine in player.fleet for pid in engine.pids} if rank == 0 else set()
            num_faults[fault.name] += 1
            seen.append((mode, player.play(fault)))
            player.recover(fault)
        assert player.syncer.version > version, "versions grow"
        fleet, step, version = player.fleet, player.step, player.syncer.version
        num_refits += player.num_refits
        player.syncer.close()
        usage = Usage.of_this_process()
        workers = [max(u.resident_bytes for u in engine.usage()) for engine in fleet] if rank == 0 else []
        if rank == 0:
            pids |= {pid for engine in fleet for pid in engine.pids}
            with log.open("a") as file:
                file.write(
                    f"{time.monotonic() - started:6.1f} s  refits {num_refits:3d}  {lane:10s} {mode:10s}  "
                    f"faults {num_faults.total():3d}  version {version:3d}  rank 0: {usage.num_files} files, "
                    f"{usage.num_threads} threads, {usage.resident_bytes >> 20} MiB  "
                    f"largest worker {max(workers) >> 20} MiB\n"
                )
        if block == len(LANES) - 1:
            warm = (Inventory(), usage, workers)
        if num_refits >= NUM_REFITS:
            break
    assert warm is not None
    inventory, before, workers_before = warm
    problems = [inventory.growth()]
    grown = {"this rank": Usage.of_this_process().resident_bytes - before.resident_bytes}
    if workers:
        grown["its workers"] = max(workers) - max(workers_before)
    problems += [f"{who} grew by {size >> 20} MiB" for who, size in grown.items() if size > MAX_GROWTH_BYTES]
    if rank == 0:
        with log.open("a") as file:
            file.write(f"{num_refits} refits, {num_faults.total()} faults, version {version}; seed {SEED}\n")
            file.write("".join(f"{number:4d} x {name}\n" for name, number in sorted(num_faults.items())))
            file.write(
                "".join(
                    f"{who} grew by {size / 2**20:.1f} MiB since all lanes were used\n" for who, size in grown.items()
                )
            )
    for engine in fleet:
        engine.stop()
    return seen, os.getpid(), sorted(pids), "; ".join(problem for problem in problems if problem)


@pytest.mark.slow
@pytest.mark.skipif("MBRIDGE_SOAK_LOG" not in os.environ, reason="set MBRIDGE_SOAK_LOG=FILE to run the soak")
@pytest.mark.timeout(1800)
def test_hundreds_of_refits_with_faults(tmp_path: Path) -> None:
    log = Path(os.environ["MBRIDGE_SOAK_LOG"]).absolute()
    log.unlink(missing_ok=True)
    outcomes = run_ranks(2, tmp_path, soak, tmp_path, log, timeout_s=1700)
    errors: list[Any] = [outcome.error for outcome in outcomes]
    assert errors == [None, None], "\n".join(str(error) for error in errors)
    by_name = {fault.name: fault for fault in FAULTS}
    problems = [outcome.value[3] for outcome in outcomes if outcome.value[3]]
    first, second = (outcome.value[0] for outcome in outcomes)
    assert len(first) == len(second) > NUM_REFITS * FAULT_RATE / 5
    for (mode, seen), (_, others) in zip(first, second, strict=True):
        problems += [f"{mode}: {seen.fault}: {problem}" for problem in judge(by_name[seen.fault], mode, [seen, others])]
    pids = [pid for outcome in outcomes for pid in (outcome.value[1], *outcome.value[2])]
    left = leftovers(pids, tmp_path)
    with log.open("a") as file:
        file.write(f"left behind by {len(pids)} processes: {left or 'nothing'}; problems: {problems or 'none'}\n")
    assert not problems + left, "\n".join(problems + left)
