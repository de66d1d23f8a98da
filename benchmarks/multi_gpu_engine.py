"""An engine of one worker process that holds plain tensors on a GPU of its own, and can be made to fail at a tensor."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from multi_gpu_places import children_see, settle

from mbridge.pieces import TensorSpec
from mbridge_rl.engines.base import Engine, InFlight
from mbridge_rl.engines.module import ModuleTarget
from mbridge_rl.errors import EngineGoneError
from mbridge_rl.messages import Invitation
from mbridge_rl.receiver import Receiver


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Name -> hash of the tensor's bytes."""
    return {name: hashlib.blake2b(_bytes(tensor), digest_size=16).hexdigest() for name, tensor in tensors.items()}


class Holder(torch.nn.Module):
    """One buffer for each HF tensor. Gets `signal_at[1]` from itself when `signal_at[0]` is loaded, once."""

    def __init__(self, specs: Sequence[TensorSpec], device: torch.device) -> None:
        super().__init__()
        self.signal_at: tuple[str, int] | None = None
        for spec in specs:
            self.register_buffer(_buffer_name(spec.name), torch.zeros(spec.shape, dtype=spec.dtype, device=device))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            if self.signal_at is not None and name == self.signal_at[0] and tensor.device.type != "meta":
                (_, number), self.signal_at = self.signal_at, None
                os.kill(os.getpid(), number)
            self.get_buffer(_buffer_name(name)).copy_(tensor)
            loaded.add(_buffer_name(name))
        return loaded

    def digests(self) -> dict[str, str]:
        return digests({name.replace("/", "."): tensor for name, tensor in self.named_buffers()})


class Worker:
    """What runs in the worker process: a receiver, and a few calls of the benchmark's own."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.holder = Holder(specs, self.device)
        self.receiver = Receiver(ModuleTarget(self.holder), 0)

    def signal_at(self, tensor: str, number: int) -> None:
        self.holder.signal_at = tensor, number

    def digests(self) -> dict[str, str]:
        return self.holder.digests()


class WorkerEngine(Engine):
    """Its calls go to the worker over a pipe, one at a time."""

    def __init__(self, specs: Sequence[TensorSpec], gpu: str, *, simulate: bool, kind: type[Worker] = Worker) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        with children_see(gpu, simulate=simulate):
            self.process = context.Process(target=_serve, args=(theirs, kind, tuple(specs), gpu, simulate), daemon=True)
            self.process.start()
        theirs.close()

    @property
    def name(self) -> str:
        return f"worker process {self.process.pid}"

    def num_workers(self) -> int:
        return 1

    def attach(self, invitation: Invitation) -> None:
        self.call("attach", invitation)

    def pause(self, in_flight: InFlight) -> None:
        """Nothing runs."""

    def update(self, attempt: int, version: int, moves: bool) -> None:
        self.call("open_session")
        self.call("run", attempt, version, moves)

    def close_session(self) -> None:
        self.call("close_session")

    def reset_cache(self) -> None:
        """Nothing is cached."""

    def publish(self, version: int) -> None:
        """Nobody asks."""

    def resume(self) -> None:
        """Nothing was paused."""

    def detach(self) -> None:
        self.call("detach")

    def signal_at(self, tensor: str, number: signal.Signals) -> None:
        """Have the worker send itself a signal when it loads `tensor`."""
        self.call("signal_at", tensor, int(number))

    def holds(self, wanted: Mapping[str, str]) -> bool:
        """Whether the worker holds tensors of these digests."""
        found = self.call("digests")
        return all(found.get(name) == digest for name, digest in wanted.items())

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)

    def call(self, method: str, *args: Any) -> Any:
        try:
            self._pipe.send((method, args))
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise EngineGoneError(f"{self.name} is gone: {error}", origin=self.name) from error


def _serve(pipe: Connection, kind: type[Worker], specs: Sequence[TensorSpec], gpu: str, simulate: bool) -> None:
    settle(gpu, simulate=simulate)
    worker = kind(specs)
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            return
        owner = worker if hasattr(worker, method) else worker.receiver
        pipe.send(getattr(owner, method)(*args))


def _buffer_name(name: str) -> str:
    return name.replace(".", "/")


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
