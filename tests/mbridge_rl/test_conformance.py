"""Every transport and every engine that runs here passes its conformance suite; a broken one does not."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch

from mbridge_rl.engines.module import ModuleEngine
from mbridge_rl.errors import TransportError
from mbridge_rl.protocol import EngineState
from mbridge_rl.syncer import PathChoice
from mbridge_rl.testing import check_engine, check_transport
from mbridge_rl.transports.base import Address, Lent, builtin_transports, transport_class
from mbridge_rl.transports.shared_memory import SharedMemory
from tests.mbridge_rl.worker_engine import ProcessEngine

TENSORS = {
    "a": torch.randn(10, 6, dtype=torch.float32),
    "b": torch.randn(64, 8).to(torch.bfloat16),
    "c": torch.randn(5).double(),
    "d": torch.randn(12, 4, dtype=torch.float32),
}


DEVICES = {"cuda_ipc": "cuda"}  # of transports that are not for the CPU


@pytest.mark.parametrize("name", builtin_transports())
def test_transports(name: str) -> None:
    device = DEVICES.get(name, "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; tests/mbridge_rl/gpu_ipc.py is for machines that have one")
    check_transport(transport_class(name), device=device)


def module() -> torch.nn.Module:
    made = torch.nn.Module()
    for name, tensor in TENSORS.items():
        made.register_buffer(name, torch.zeros_like(tensor))
    return made


@pytest.mark.parametrize("path", ["bucket", "direct"])
def test_module_engine(path: PathChoice) -> None:
    check_engine(
        lambda: ModuleEngine(module()),
        lambda engine: engine.module.state_dict(),  # type: ignore[attr-defined]
        TENSORS,
        path=path,
    )


@pytest.mark.parametrize("path", ["bucket", "direct"])
def test_process_engine(path: PathChoice) -> None:
    engine = ProcessEngine({name: (tuple(t.shape), t.dtype) for name, t in TENSORS.items()})
    check_engine(lambda: engine, lambda _: engine.tensors()[0], TENSORS, path=path)
    engine.stop()


class KeepingItsMemory(SharedMemory):
    """Has slots only."""

    @classmethod
    def lend(cls, tensors: Mapping[str, torch.Tensor]) -> Lent:
        return super(SharedMemory, cls).lend(tensors)


def test_a_transport_that_does_not_lend() -> None:
    check_transport(KeepingItsMemory, lends=False)
    with pytest.raises(TransportError, match="shared_memory lends no memory"):
        check_transport(KeepingItsMemory)
    with pytest.raises(AssertionError, match="lent what cannot"):
        check_transport(SharedMemory, lends=False)


class Overlapping(SharedMemory):
    def slot(self, index: int) -> torch.Tensor:
        return super().slot(0)


class Copying(SharedMemory):
    def slot(self, index: int) -> torch.Tensor:
        return super().slot(index).clone()


class LendingACopy(SharedMemory):
    kept: ClassVar[list[Mapping[str, torch.Tensor]]] = []

    @classmethod
    def lend(cls, tensors: Mapping[str, torch.Tensor]) -> Lent:
        cls.kept.append(copy.deepcopy(tensors))  # in which views of one storage are so too
        return super().lend(cls.kept[-1])


class LendingTheWrongPlace(SharedMemory):
    @classmethod
    def lend(cls, tensors: Mapping[str, torch.Tensor]) -> Lent:
        lent = super().lend(tensors)
        return Lent(lent.segments, {name: (index, 0) for name, (index, _) in lent.places.items()})


class LendingByNumber(SharedMemory):
    """Other memory with the same number has the same address."""

    kept: ClassVar[dict[int, Address]] = {}

    @classmethod
    def lend(cls, tensors: Mapping[str, torch.Tensor]) -> Lent:
        lent = super().lend(tensors)
        return Lent([cls.kept.setdefault(i, address) for i, address in enumerate(lent.segments)], lent.places)


@pytest.mark.parametrize(
    ("broken", "violation"),
    [
        (Overlapping, "slots overlap"),
        (Copying, "the peer does not see"),
        (LendingACopy, "written after lending is not seen"),
        (LendingTheWrongPlace, "other bytes than the tensor's"),
        (LendingByNumber, "other memory has the same address"),
    ],
)
def test_a_broken_transport_is_caught(broken: type[SharedMemory], violation: str) -> None:
    with pytest.raises(AssertionError, match=violation):
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
