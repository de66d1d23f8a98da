"""Every transport and every engine that runs here passes its conformance suite; a broken one does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mbridge_rl.engines.module import ModuleEngine
from mbridge_rl.protocol import EngineState
from mbridge_rl.testing import check_engine, check_transport
from mbridge_rl.transports.base import builtin_transports, transport_class
from mbridge_rl.transports.shared_memory import SharedMemory
from tests.mbridge_rl.worker_engine import ProcessEngine

TENSORS = {
    "a": torch.randn(10, 6, dtype=torch.float32),
    "b": torch.randn(64, 8).to(torch.bfloat16),
    "c": torch.randn(5).double(),
    "d": torch.randn(12, 4, dtype=torch.float32),
}


@pytest.mark.parametrize("name", builtin_transports())
def test_transports(name: str) -> None:
    check_transport(transport_class(name))


def module() -> torch.nn.Module:
    made = torch.nn.Module()
    for name, tensor in TENSORS.items():
        made.register_buffer(name, torch.zeros_like(tensor))
    return made


def test_module_engine() -> None:
    check_engine(lambda: ModuleEngine(module()), lambda engine: engine.module.state_dict(), TENSORS)  # type: ignore[attr-defined]


def test_process_engine() -> None:
    engine = ProcessEngine({name: (tuple(t.shape), t.dtype) for name, t in TENSORS.items()})
    check_engine(lambda: engine, lambda _: engine.tensors()[0], TENSORS)
    engine.stop()


class Overlapping(SharedMemory):
    def slot(self, index: int) -> torch.Tensor:
        return super().slot(0)


class Copying(SharedMemory):
    def slot(self, index: int) -> torch.Tensor:
        return super().slot(index).clone()


@pytest.mark.parametrize("broken", [Overlapping, Copying])
def test_a_broken_transport_is_caught(broken: type[SharedMemory]) -> None:
    with pytest.raises(AssertionError):
        check_transport(broken)


class Forgetful(ModuleEngine):
    """Serves on, whatever happened."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, EngineState.SERVING if name == "state" else value)


def test_a_broken_engine_is_caught() -> None:
    with pytest.raises(AssertionError, match="stale"):
        check_engine(lambda: Forgetful(module()), lambda engine: engine.module.state_dict(), TENSORS)  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="other values"):
        check_engine(lambda: ModuleEngine(module()), lambda _: TENSORS, TENSORS)
