"""The reference engine: any torch module in rank 0's own process. Its receiver runs in the thread of the engine calls.

A module that has `load_weights(iterable of (HF name, tensor)) -> set of its names` is loaded through it, as vLLM's
models are. Any other is loaded by name: HF names are those of its parameters and persistent buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from mbridge.live import LiveTensors
from mbridge.pieces import TensorSpec

from ..errors import EngineMismatchError
from ..messages import Invitation
from ..placement import place
from ..receiver import Receiver
from ..recorder import DryRun, dry_run
from ..target import Examined, Target, device_event
from .base import Engine, InFlight


class ModuleEngine(Engine):
    """`engine(*args)` runs the module, and raises EngineStaleError while its weights are torn."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.receiver = Receiver(ModuleTarget(module), 0)

    @property
    def name(self) -> str:
        return f"module {type(self.module).__name__}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.check_serving()
        return self.module(*args, **kwargs)

    def num_workers(self) -> int:
        return 1

    def attach(self, invitation: Invitation) -> None:
        self.receiver.attach(invitation)

    def pause(self, in_flight: InFlight) -> None:
        """Nothing to pause: the module runs only when called."""

    def update(self, attempt: int, version: int, moves: bool) -> None:
        self.receiver.open_session()
        self.receiver.run(attempt, version, moves)

    def close_session(self) -> None:
        self.receiver.close_session()

    def reset_cache(self) -> None:
        """Nothing is cached."""

    def publish(self, version: int) -> None:
        """Nobody to tell."""

    def resume(self) -> None:
        """Nothing was paused."""

    def detach(self) -> None:
        self.receiver.detach()


class ModuleTarget(Target):
    """Loads HF tensors into a plain module, in place."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._load = getattr(module, "load_weights", None) or self._load_by_name
        self._live = LiveTensors.of(module)
        self.device = next((t.device for t in self._live.values()), torch.device("cpu"))

    def examine(self, tensors: tuple[TensorSpec, ...]) -> Examined:
        found = dry_run(self._load, tensors)
        modules = {name: name.rpartition(".")[0] for name in self._live}
        placement = place(found, self._live, modules)
        if found.loaded is not None:
            loaded = {_address(self._module_tensors()[name]) for name in found.loaded}
            # Tensors that share memory (tied embeddings) need to come once only.
            missing = sorted(n for n, t in self._module_tensors().items() if _address(t) not in loaded)
            if missing:
                raise EngineMismatchError(
                    f"the trainer has no tensor for {len(missing)} of the module's: {', '.join(missing[:5])}",
                    tensor=missing[0],
                )
        return Examined(found, placement)

    def rehearse(self, tensors: tuple[TensorSpec, ...]) -> DryRun:
        return dry_run(self._load, tensors)

    def begin(self, modules: frozenset[str] | None = None) -> None:
        """Writes go straight into the module."""

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        with torch.no_grad():
            loaded = self._load(tensors) or set()
        wait = self.pending()
        if wait is not None:
            wait()  # the tensors are overwritten next
        return loaded

    def finish(self) -> None:
        """A plain module post-processes nothing."""

    def abandon(self) -> None:
        """Nothing was begun."""
        wait = self.pending()
        if wait is not None:
            wait()  # what was lent may be let go of next

    def pending(self) -> Callable[[], None] | None:
        return device_event(self.device)

    def live(self) -> Mapping[str, torch.Tensor]:
        return self._live

    def _module_tensors(self) -> dict[str, torch.Tensor]:
        return self._module.state_dict(keep_vars=True)

    def _load_by_name(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        own, loaded = self._module_tensors(), set()
        for name, tensor in tensors:
            if name not in own:
                raise EngineMismatchError(f"the module has no tensor {name!r}", tensor=name)
            if own[name].shape != tensor.shape or own[name].dtype != tensor.dtype:
                raise EngineMismatchError(
                    f"{name}: the module has {list(own[name].shape)} {own[name].dtype}, "
                    f"the trainer {list(tensor.shape)} {tensor.dtype}",
                    tensor=name,
                )
            own[name].data.copy_(tensor)
            loaded.add(name)
        return loaded


def wrap(thing: object) -> Engine | None:
    """A ModuleEngine, if `thing` is a torch module."""
    return ModuleEngine(thing) if isinstance(thing, torch.nn.Module) else None


def _address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() if tensor.numel() else id(tensor)
