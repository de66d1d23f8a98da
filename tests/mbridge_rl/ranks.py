"""Real trainer ranks: `run_ranks` starts processes with a gloo group, runs a function in each, and brings back its
outcome.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mbridge_rl.errors import SyncError

Body = Callable[..., Any]


@dataclass(frozen=True)
class Outcome:
    """How a rank ended: with a value, with an error, or (neither) without a word."""

    value: Any = None
    error: BaseException | None = None
    exit_code: int | None = None
    seconds: float = 0.0


def process_context() -> ForkServerContext:
    """Processes forked from a server that has imported torch once: as clean as spawned ones, and started in no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "mbridge_rl.engines.module", "tests.mbridge_rl.test_sync"])
    return context


def run_ranks(num_ranks: int, directory: Path, body: Body, *args: Any, timeout_s: float = 60.0) -> list[Outcome]:
    """Run `body(rank, num_ranks, *args)` in `num_ranks` processes that share a gloo group.

    None of them outlives this call.
    """
    context = process_context()
    store = directory / f"store-{time.monotonic_ns()}"
    pipes, processes = [], []
    for rank in range(num_ranks):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_main, args=(sending, rank, num_ranks, str(store), body, args))
        process.start()
        sending.close()
        pipes.append(receiving)
        processes.append(process)
    try:
        outcomes = _collect(pipes, time.monotonic() + timeout_s)
        for process in processes:
            process.join(10)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [
        Outcome(o.value, o.error, process.exitcode, o.seconds) for o, process in zip(outcomes, processes, strict=True)
    ]


def _collect(pipes: list[Connection], end: float) -> list[Outcome]:
    outcomes = [Outcome() for _ in pipes]
    open_pipes = list(pipes)
    while open_pipes and time.monotonic() < end:
        for pipe in wait(open_pipes, timeout=1.0):
            assert isinstance(pipe, Connection)
            open_pipes.remove(pipe)
            try:
                value, failure, seconds = pipe.recv()
            except EOFError:
                continue  # killed
            outcomes[pipes.index(pipe)] = Outcome(value, failure, None, seconds)
    if open_pipes:
        raise TimeoutError(f"ranks {[pipes.index(pipe) for pipe in open_pipes]} did not end; so far {outcomes}")
    return outcomes


def _main(pipe: Connection, rank: int, num_ranks: int, store: str, body: Body, args: tuple[Any, ...]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    dist.init_process_group("gloo", store=dist.FileStore(store, num_ranks), rank=rank, world_size=num_ranks)
    started = time.monotonic()
    value, failure = None, None
    try:
        value = body(rank, num_ranks, *args)
    except SyncError as error:
        failure = error
    except Exception as error:  # noqa: BLE001  whatever it is, the test wants to see it
        failure = RuntimeError(f"rank {rank}: {type(error).__name__}: {error}\n{traceback.format_exc()}")
    pipe.send((value, failure, time.monotonic() - started))
    pipe.close()
    # No orderly end of the process group: it would wait for ranks that a test has killed.
    os._exit(0)
