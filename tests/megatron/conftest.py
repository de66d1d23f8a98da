"""Real ranks for the tests of mbridge.megatron: a pool of processes that form gloo worlds of any size on request."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

# Shared files of these tests. This folder is named like Megatron-Core's namespace, so nothing is imported through it.
sys.path.append(str(Path(__file__).parent))

WORKER = Path(__file__).with_name("rank_worker.py")
ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60.0


class RankPool:
    """`run(function, world_size, **kwargs)` calls a top-level function of a test file on each rank of a new gloo world.

    Its results come back in rank order. A rank that raises, dies or is late fails the test with every rank's traceback,
    and all processes are replaced before the next call.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._workers: list[tuple[subprocess.Popen[bytes], Connection]] = []
        self._num_runs = 0

    def run(
        self, function: Callable[..., Any], world_size: int, *, timeout_s: float = TIMEOUT_S, **kwargs: Any
    ) -> list[Any]:
        while len(self._workers) < world_size:
            self._workers.append(self._start())
        self._num_runs += 1
        request = {
            "path": function.__code__.co_filename,
            "function": function.__name__,
            "kwargs": kwargs,
            "store": str(self._scratch / f"store{self._num_runs}"),
            "world_size": world_size,
            "timeout_s": timeout_s,
        }
        members = self._workers[:world_size]
        for rank, (_, pipe) in enumerate(members):
            pipe.send_bytes(pickle.dumps({**request, "rank": rank}))
        deadline = time.monotonic() + timeout_s
        results: list[Any] = []
        failures: list[str] = []
        for rank, (process, pipe) in enumerate(members):
            # Once one rank has failed, the others get a moment to tell their part.
            wait_s = 3.0 if failures else max(0.0, deadline - time.monotonic())
            try:
                done, value = False, f"no answer in {wait_s:.0f} s"
                if pipe.poll(wait_s):
                    done, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                done, value = False, f"died with status {process.wait(timeout=10)}"
            if done:
                results.append(value)
            else:
                failures.append(f"--- rank {rank}: {value}")
        if failures:
            self.close()
            pytest.fail("\n".join(failures), pytrace=False)
        return results

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = Pipe()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [sys.executable, str(WORKER), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        )
        theirs.close()
        return process, ours

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.wait(timeout=10)
        self._workers.clear()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    pool = RankPool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()
