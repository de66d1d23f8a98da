"""An engine whose workers are processes of their own, each with a plain module: as vLLM's are, without vLLM's 30
seconds.

Worker i of n loads the columns-or-rows share of every matrix that `Sharded.load_weights` takes, as a tensor-parallel
engine would.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any

import torch

from mbridge_rl.engines.base import Engine, InFlight
from mbridge_rl.engines.module import ModuleTarget
from mbridge_rl.errors import EngineGoneError
from mbridge_rl.messages import Invitation
from mbridge_rl.receiver import Receiver
from tests.mbridge_rl.ranks import process_context

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Sharded(torch.nn.Module):
    """Worker `index` of `num_workers`: holds its rows of each tensor whose rows divide, and the others whole."""

    def __init__(self, shapes: Shapes, index: int, num_workers: int) -> None:
        super().__init__()
        self.index, self.num_workers = index, num_workers
        self.poison: str | None = None  # name at which the loader raises, once
        self.die_at: str | None = None
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
            if name == self.die_at and tensor.device.type != "meta":
                os.kill(os.getpid(), signal.SIGKILL)
            if name == self.poison and tensor.device.type != "meta":
                self.poison = None
                raise ValueError("poisoned")
            own = name.replace(".", "/")
            target = self.get_buffer(own)
            part = self.share(tensor)
            assert target.shape == part.shape, f"{target.shape} != {part.shape}"
            target.copy_(part)
            loaded.add(own)
        return loaded


class ProcessEngine(Engine):
    """Calls go to all workers, and come back when all have answered. Pickle is fine here: the test trusts itself."""

    def __init__(self, shapes: Shapes, num_workers: int = 1) -> None:
        context = process_context()
        self._pipes: list[Connection] = []
        self.processes = []
        self.calls: list[str] = []
        for index in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, shapes, index, num_workers), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    @property
    def name(self) -> str:
        return "worker processes"

    def num_workers(self) -> int:
        return len(self._pipes)

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
        self._pipes[index].send(("set", (attributes,)))
        self._pipes[index].recv()

    def status(self) -> list[tuple[int, bool]]:
        """(version, is_stale) of every worker."""
        return self._call("status")

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def _call(self, method: str, *args: Any) -> list[Any]:
        try:
            for pipe in self._pipes:
                pipe.send((method, args))
            return [pipe.recv() for pipe in self._pipes]
        except (EOFError, OSError) as error:
            raise EngineGoneError(f"a worker is gone: {error}") from error


def _serve(pipe: Connection, shapes: Shapes, index: int, num_workers: int) -> None:
    module = Sharded(shapes, index, num_workers)
    receiver = Receiver(ModuleTarget(module), index)
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            return
        if method == "tensors":
            pipe.send({name.replace("/", "."): tensor.clone() for name, tensor in module.named_buffers()})
        elif method == "set":
            for name, value in args[0].items():
                setattr(module, name, value)
            pipe.send(None)
        elif method == "status":
            pipe.send((receiver.version, receiver.is_stale))
        else:
            pipe.send(getattr(receiver, method)(*args))
