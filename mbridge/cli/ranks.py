"""Starts the ranks of one job on this machine and follows them to their end.

Each rank is `python -m mbridge.cli.rank FD`; FD is a socket on which it gets the job and sends messages, both JSON. A
rank that dies, an error, or a deadline ends them all, and a rank ends itself when its socket closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

from ..errors import PeerError

GRACE_S: Final = 5.0  # for the other ranks to say what they know, once one has failed


@dataclass(slots=True)
class _Rank:
    process: subprocess.Popen[bytes]
    pipe: Connection
    stderr: Path
    result: dict[str, Any] | None = None
    error: str | None = None
    is_peer_error: bool = False

    @property
    def over(self) -> bool:
        return self.result is not None or self.error is not None


def run_ranks(
    job: Mapping[str, Any],
    world_size: int,
    *,
    device: str,
    timeout_s: float,
    on_progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """Run `job` on each rank of a new world; their results by rank. Raises PeerError, with every rank's error."""
    with tempfile.TemporaryDirectory(prefix="mbridge-ranks-") as scratch:
        common = {**job, "store": str(Path(scratch) / "store"), "world_size": world_size, "device": device}
        ranks: list[_Rank] = []
        try:
            for number in range(world_size):
                ranks.append(_start(Path(scratch) / f"stderr{number}", world_size, device))
                with contextlib.suppress(ConnectionError):  # it died at once; _follow says of what
                    ranks[-1].pipe.send_bytes(json.dumps({**common, "rank": number}).encode())
            _follow(ranks, timeout_s, on_progress)
            return [_result(ranks, rank) for rank in ranks]
        finally:
            for rank in ranks:
                rank.pipe.close()
                rank.process.kill()
                rank.process.wait()


def _start(stderr: Path, world_size: int, device: str) -> _Rank:
    ours, theirs = Pipe()
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here, whatever the host's name resolves to
    with stderr.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mbridge.cli.rank", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    theirs.close()
    return _Rank(process, ours, stderr)


def _follow(ranks: list[_Rank], timeout_s: float, on_progress: Callable[[str, int, int], None]) -> None:
    deadline = time.monotonic() + timeout_s
    while not all(rank.over for rank in ranks):
        open_pipes = {rank.pipe: rank for rank in ranks if not rank.over}
        ready = wait(list(open_pipes), max(0.0, deadline - time.monotonic()))
        if not ready:
            for rank in open_pipes.values():
                rank.error, rank.is_peer_error = (
                    "did not end in time",
                    any(r.error for r in ranks) or rank.is_peer_error,
                )
            return
        for pipe in ready:
            assert isinstance(pipe, Connection)
            _receive(open_pipes[pipe], on_progress)
        if any(rank.error is not None for rank in ranks):
            deadline = min(deadline, time.monotonic() + GRACE_S)


def _receive(rank: _Rank, on_progress: Callable[[str, int, int], None]) -> None:
    try:
        message = json.loads(rank.pipe.recv_bytes())
    except (EOFError, ConnectionError):
        status = rank.process.wait(timeout=GRACE_S)
        tail = rank.stderr.read_text(errors="replace").strip().splitlines()[-20:]
        rank.error = "\n    ".join([f"ended with status {status}; its last lines:", *tail])
        return
    match message["kind"]:
        case "progress":
            on_progress(message["phase"], message["done"], message["total"])
        case "result":
            rank.result = message
        case "error":
            rank.error, rank.is_peer_error = message["text"], message["is_peer_error"]


def _result(ranks: list[_Rank], rank: _Rank) -> dict[str, Any]:
    """Raises PeerError if any rank failed: with the errors that were not only the echo of another's."""
    failed = [(number, r) for number, r in enumerate(ranks) if r.error is not None]
    if failed:
        own = [(number, r) for number, r in failed if not r.is_peer_error] or failed
        by_text: dict[str, list[int]] = {}
        for number, r in own:
            by_text.setdefault(str(r.error), []).append(number)
        lines = [f"rank {', '.join(map(str, numbers))}: {text}" for text, numbers in by_text.items()]
        raise PeerError("\n".join(lines))
    assert rank.result is not None
    return rank.result
