"""An engine whose workers are processes of their own, each with a plain module: as vLLM's are, without vLLM's 30
seconds.

Worker i of n loads the columns-or-rows share of every matrix that `Sharded.load_weights` takes, as a tensor-parallel
engine would. Faults are planted with `set`: see `Sharded.plan`.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import stat
import threading
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mbridge_rl.engines.base import Engine, InFlight
from mbridge_rl.engines.module import ModuleTarget
from mbridge_rl.errors import EngineGoneError
from mbridge_rl.messages import Invitation
from mbridge_rl.receiver import Receiver
from tests.mbridge_rl.ranks import process_context

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Usage(NamedTuple):
    """What a process holds."""

    num_files: int
    num_threads: int
    resident_bytes: int

    @classmethod
    def of_this_process(cls) -> Usage:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        return cls(len(os.listdir("/proc/self/fd")) - 1, len(os.listdir("/proc/self/task")), resident)


def drop_connections(endpoint: str) -> int:
    """Cut this process's connections to a hub, as a network does: nobody is told. Returns how many there were."""
    wanted: object = endpoint.removeprefix("ipc://")
    if endpoint.startswith("tcp://"):
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        wanted = (host, int(port))
    num_cut = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # not connected, or closed meanwhile
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.getpeername() == wanted:
                    connection.shutdown(socket.SHUT_RDWR)
                    num_cut += 1
    return num_cut


class Sharded(torch.nn.Module):
    """Worker `index` of `num_workers`: holds its rows of each tensor whose rows divide, and the others whole."""

    def __init__(self, shapes: Shapes, index: int, num_workers: int) -> None:
        super().__init__()
        self.index, self.num_workers = index, num_workers
        self.poison: str | None = None  # name at which the loader raises, once
        self.die_at: str | None = None
        self.plan: dict[str, str] = {}  # moment ("begin", "load NAME", "finish") -> the fault that happens then, once
        self.endpoint = ""  # of the trainer
        for name, (shape, dtype) in shapes.items():
            self.register_buffer(name.replace(".", "/"), torch.zeros(self.share(torch.empty(shape)).shape, dtype=dtype))

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor.shape[0] if tensor.dim() else 0
        if rows % self.num_workers or rows == 0:
            return tensor
        return tensor.narrow(0, self.index * rows // self.num_workers, rows // self.num_workers)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            if tensor.device.type != "meta":
                if name == self.die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if name == self.poison:
                    self.poison = None
                    raise ValueError("poisoned")
                tensor = self.happens(f"load {name}", tensor)
            own = name.replace(".", "/")
            target = self.get_buffer(own)
            part = self.share(tensor)
            assert target.shape == part.shape, f"{target.shape} != {part.shape}"
            target.copy_(part)
            loaded.add(own)
        return loaded

    def happens(self, moment: str, tensor: torch.Tensor) -> torch.Tensor:
        """The fault that was planned for this moment, if any; `tensor` as it is after it."""
        match self.plan.pop(moment, None):
            case "raise":
                raise ValueError("poisoned")
            case "run out of memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "drop":
                assert drop_connections(self.endpoint), f"no connection to {self.endpoint}"
            case "flip":  # a bit, on its way
                tensor = tensor.clone()
                flip(tensor)
            case "flip here":
                flip(tensor)
        return tensor


def flip(tensor: torch.Tensor) -> None:
    """The lowest bit of the last byte."""
    tensor.reshape(-1).view(torch.uint8)[-1] ^= 1


class FaultyTarget(ModuleTarget):
    """A `Sharded` to which planned faults happen."""

    def __init__(self, module: Sharded) -> None:
        super().__init__(module)
        self._sharded = module

    def begin(self, modules: frozenset[str] | None = None) -> None:
        self._sharded.happens("begin", next(self._sharded.buffers(), torch.empty(0)))
        super().begin(modules)

    def finish(self) -> None:
        self._sharded.happens("finish", next(self._sharded.buffers(), torch.empty(0)))
        super().finish()


class ProcessEngine(Engine):
    """Calls go to all workers, and come back when all have answered. Pickle is fine here: the test trusts itself.

    With a front end, they go through a process of its own, as those of `vllm serve` do. It may be given to other
    processes, which can then drive it, one at a time; only who made it can `stop` it.
    """

    def __init__(self, shapes: Shapes, num_workers: int = 1, *, has_front_end: bool = False) -> None:
        context = process_context()
        self._num_workers = num_workers
        self._num_calls = 0
        self._pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []  # of the workers
        self.calls: list[str] = []
        for index in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, shapes, index, num_workers), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)
        self.front_end: BaseProcess | None = None
        if has_front_end:
            ours, theirs = context.Pipe()
            self.front_end = context.Process(target=_pass_on, args=(theirs, self._pipes), daemon=True)
            self.front_end.start()
            for pipe in (theirs, *self._pipes):
                pipe.close()
            self._pipes = [ours]
        self.worker_pids = [process.pid or 0 for process in self.processes]
        self.front_end_pid = self.front_end.pid if self.front_end is not None else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "processes": [], "front_end": None}

    @property
    def name(self) -> str:
        return "worker processes"

    @property
    def pids(self) -> list[int]:
        """Of all its processes."""
        return [*self.worker_pids, *([] if self.front_end_pid is None else [self.front_end_pid])]

    def num_workers(self) -> int:
        return self._num_workers

    def attach(self, invitation: Invitation) -> None:
        self._call("attach", invitation)

    def pause(self, in_flight: InFlight) -> None:
        self.calls.append(f"pause {in_flight}")

    def update(self, attempt: int, version: int, moves: bool) -> None:
        self.calls.append("update")
        self._call("open_session")
        self._call("run", attempt, version, moves)

    def close_session(self) -> None:
        self.calls.append("close_session")
        self._call("close_session")

    def reset_cache(self) -> None:
        self.calls.append("reset_cache")

    def publish(self, version: int) -> None:
        self.calls.append(f"publish {version}")

    def resume(self) -> None:
        self.calls.append("resume")

    def detach(self) -> None:
        self._call("detach")

    def tensors(self) -> list[dict[str, torch.Tensor]]:
        """Every worker's tensors by HF name."""
        return self._call("tensors")

    def set(self, index: int, **attributes: Any) -> None:
        """Set attributes of worker `index`'s module."""
        self._call("set", index, attributes)

    def status(self) -> list[tuple[int, bool]]:
        """(version, is_stale) of every worker."""
        return self._call("status")

    def planned(self) -> list[dict[str, str]]:
        """Faults that have not happened yet, of every worker."""
        return self._call("planned")

    def usage(self) -> list[Usage]:
        return self._call("usage")

    def stop(self) -> None:
        for process in (*self.processes, *([] if self.front_end is None else [self.front_end])):
            process.kill()
            process.join()
        self.let_go()

    def let_go(self) -> None:
        """Close this process's connections to it."""
        for pipe in self._pipes:
            pipe.close()

    def _call(self, method: str, *args: Any) -> list[Any]:
        # A caller that was killed leaves answers behind: each call knows its own.
        self._num_calls += 1
        ticket = (os.getpid(), threading.get_ident(), self._num_calls)
        try:
            for pipe in self._pipes:
                pipe.send((ticket, method, args))
            answers = [_answer(pipe, ticket) for pipe in self._pipes]
        except (EOFError, OSError) as error:
            raise EngineGoneError(f"a worker is gone: {error}") from error
        if self.front_end_pid is None:
            return answers
        if answers[0] is None:
            raise EngineGoneError("a worker is gone")
        return answers[0]  # type: ignore[no-any-return]


def _answer(pipe: Connection, ticket: object) -> Any:
    while True:
        found, value = pipe.recv()
        if found == ticket:
            return value


def _pass_on(pipe: Connection, workers: list[Connection]) -> None:
    """A front end."""
    while True:
        try:
            ticket, method, args = pipe.recv()
        except EOFError:
            return
        try:
            for worker in workers:
                worker.send((ticket, method, args))
            answer: list[Any] | None = [_answer(worker, ticket) for worker in workers]
        except (EOFError, OSError):
            answer = None
        pipe.send((ticket, answer))


def _serve(pipe: Connection, shapes: Shapes, index: int, num_workers: int) -> None:
    module = Sharded(shapes, index, num_workers)
    receiver = Receiver(FaultyTarget(module), index)
    while True:
        try:
            ticket, method, args = pipe.recv()
        except EOFError:
            return
        result: Any = None
        if method == "tensors":
            result = {name.replace("/", "."): tensor.clone() for name, tensor in module.named_buffers()}
        elif method == "set":
            if args[0] == index:
                for name, value in args[1].items():
                    setattr(module, name, value)
        elif method == "status":
            result = (receiver.version, receiver.is_stale)
        elif method == "planned":
            result = module.plan
        elif method == "usage":
            result = Usage.of_this_process()
        else:
            if method == "attach":
                module.endpoint = args[0].endpoint
            result = getattr(receiver, method)(*args)
        try:
            pipe.send((ticket, result))
        except OSError:
            return  # nobody is left to hear it
