"""Transports and engines that each do one thing wrong: what the conformance suites must catch."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import msgspec
import torch

from mbridge_rl.engines.module import ModuleEngine, ModuleTarget
from mbridge_rl.errors import EngineError, TransportError
from mbridge_rl.messages import Invitation
from mbridge_rl.protocol import EngineState
from mbridge_rl.receiver import Receiver
from mbridge_rl.testing import ReferenceModule
from mbridge_rl.testing.models import bits
from mbridge_rl.transports.base import Address, Lent
from mbridge_rl.transports.shared_memory import SharedMemory

# --- transports -------------------------------------------------------------------------------------------------------


class KeepingItsMemory(SharedMemory):
    """Not broken: has slots only."""

    name = "keeping"

    @classmethod
    def lend(cls, tensors: Mapping[str, torch.Tensor]) -> Lent:
        return super(SharedMemory, cls).lend(tensors)


class Overlapping(SharedMemory):
    name = "overlapping"

    def slot(self, index: int) -> torch.Tensor:
        return super().slot(0)


class Copying(SharedMemory):
    name = "copying"

    def slot(self, index: int) -> torch.Tensor:
        return super().slot(index).clone()


class Lasting(SharedMemory):
    """Leaves its memory behind."""

    name = "lasting"
    left: ClassVar[list[SharedMemory]] = []

    def close(self) -> None:
        self.left.append(self)


class Narrow(SharedMemory):
    """Has no room for small buckets."""

    name = "narrow"

    @classmethod
    def create(cls, slot_bytes: int, *args: Any) -> Any:
        if slot_bytes < 1024:
            raise TransportError("too small")
        return super().create(slot_bytes, *args)


class LendingACopy(SharedMemory):
    name = "lending_a_copy"
    kept: ClassVar[list[Mapping[str, torch.Tensor]]] = []

    @classmethod
    def lend(cls, tensors: Mapping[str, torch.Tensor]) -> Lent:
        cls.kept.append(copy.deepcopy(tensors))  # in which views of one storage are so too
        return super().lend(cls.kept[-1])


class LendingTheWrongPlace(SharedMemory):
    name = "lending_the_wrong_place"

    @classmethod
    def lend(cls, tensors: Mapping[str, torch.Tensor]) -> Lent:
        lent = super().lend(tensors)
        return Lent(lent.segments, {name: (index, 0) for name, (index, _) in lent.places.items()})


class LendingByNumber(SharedMemory):
    """Other memory with the same number has the same address."""

    name = "lending_by_number"
    kept: ClassVar[dict[int, Address]] = {}

    @classmethod
    def lend(cls, tensors: Mapping[str, torch.Tensor]) -> Lent:
        lent = super().lend(tensors)
        return Lent([cls.kept.setdefault(i, address) for i, address in enumerate(lent.segments)], lent.places)


class LendingOnce(SharedMemory):
    """What has moved since is not lent again."""

    name = "lending_once"
    lent: ClassVar[dict[frozenset[str], Lent]] = {}

    @classmethod
    def lend(cls, tensors: Mapping[str, torch.Tensor]) -> Lent:
        return cls.lent.setdefault(frozenset(tensors), super().lend(tensors))


TRANSPORTS = (
    KeepingItsMemory,
    Overlapping,
    Copying,
    Lasting,
    Narrow,
    LendingACopy,
    LendingTheWrongPlace,
    LendingByNumber,
    LendingOnce,
)

# --- modules that load wrongly: all of them look right in the dry run, unless it says otherwise -----------------------


class FlippingABit(ReferenceModule):
    def write(self, name: str, target: torch.Tensor, tensor: torch.Tensor) -> None:
        super().write(name, target, tensor)
        if not tensor.is_meta:
            bits(target)[-1:].bitwise_xor_(1)


class ByPosition(ReferenceModule):
    """Takes the n-th tensor for its own n-th."""

    num_taken = 0

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
        return super().load_weights((self._next(), tensor) for _, tensor in weights)

    def _next(self) -> str:
        names = list(self.tensors())
        self.num_taken += 1
        return names[(self.num_taken - 1) % len(names)]


class Halving(ReferenceModule):
    """All of it goes through fp16."""

    def write(self, name: str, target: torch.Tensor, tensor: torch.Tensor) -> None:
        target.copy_(tensor.to(torch.float16))


class Rounding(ReferenceModule):
    """One fp32 tensor goes through bf16."""

    def write(self, name: str, target: torch.Tensor, tensor: torch.Tensor) -> None:
        target.copy_(tensor.to(torch.bfloat16) if name == "expert_bias" else tensor)


class SkippingNumbers(ReferenceModule):
    def write(self, name: str, target: torch.Tensor, tensor: torch.Tensor) -> None:
        if tensor.dim() or tensor.is_meta:
            super().write(name, target, tensor)


class NeedingElements(ReferenceModule):
    def write(self, name: str, target: torch.Tensor, tensor: torch.Tensor) -> None:
        if not tensor.numel():
            raise ValueError(f"{name} is empty")
        super().write(name, target, tensor)


class OneBucketful(ReferenceModule):
    """Writes the first kilobyte of a tensor."""

    def write(self, name: str, target: torch.Tensor, tensor: torch.Tensor) -> None:
        if tensor.is_meta:
            target.copy_(tensor)
        elif tensor.numel():
            size = min(1024, tensor.nbytes) // tensor.dtype.itemsize
            bits(target)[:size] = bits(tensor)[:size]


class LastOfEachCall(ReferenceModule):
    """Of tensors that come in one call, the last one overwrites what the others did."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
        taken = [(name, tensor) for name, tensor in weights]
        written = super().load_weights(taken)
        for name, tensor in taken[:-1]:
            if not tensor.is_meta:
                self.get_buffer(name.replace(".", "/")).zero_()
        return written


class Untied(ReferenceModule):
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__({name: tensor.clone() for name, tensor in tensors.items()})


class TakingAnything(ReferenceModule):
    """Names that it does not have are read and dropped; it does not say what it wrote."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
        super().load_weights((name, tensor) for name, tensor in weights if self._has(name, tensor))
        return None

    def _has(self, name: str, tensor: torch.Tensor) -> bool:
        return name in self.tensors() or float(tensor.sum()) is None


class Cropping(ReferenceModule):
    """Writes a smaller tensor into a corner."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
        loaded = set()
        for name, tensor in weights:
            self.get_buffer(name.replace(".", "/"))[tuple(slice(0, n) for n in tensor.shape)].copy_(tensor)
            loaded.add(name.replace(".", "/"))
        return loaded


class Swallowing(ReferenceModule):
    """Goes on after an error of its own, as if the tensor had been written."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
        loaded: set[str] = set()
        for pair in weights:
            loaded.add(pair[0].replace(".", "/"))
            try:
                super().load_weights([pair])
            except RuntimeError:
                continue
        return loaded


# --- engines ----------------------------------------------------------------------------------------------------------


class Forgetful(ModuleEngine):
    """Serves on, whatever happened."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, EngineState.SERVING if name == "state" else value)


class NeedingTensors(ModuleEngine):
    def attach(self, invitation: Invitation) -> None:
        if not list(self.module.buffers()):
            raise EngineError("there is nothing to refit")
        super().attach(invitation)


class Faithless(ModuleEngine):
    """Leaves its trainer for the next one."""

    def attach(self, invitation: Invitation) -> None:
        self.receiver.detach()
        super().attach(invitation)


class Amnesiac(ModuleEngine):
    """Forgets its version when its trainer leaves."""

    def detach(self) -> None:
        super().detach()
        self.receiver.version = 0


class Wiping(ModuleEngine):
    """Clears its weights when its trainer leaves."""

    def detach(self) -> None:
        super().detach()
        for tensor in self.module.buffers():
            tensor.zero_()


class Patient(ModuleEngine):
    """Waits for its trainer as long as it takes."""

    def attach(self, invitation: Invitation) -> None:
        super().attach(msgspec.structs.replace(invitation, deadline_s=1000.0))


class Remembering(ModuleEngine):
    """Is verified by what it remembers of the last refit, not by what it has."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self.receiver = Receiver(RememberingTarget(module), 0)


class RememberingTarget(ModuleTarget):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self.remembered = dict(super().live())

    def finish(self) -> None:
        self.remembered = {name: tensor.clone() for name, tensor in super().live().items()}

    def live(self) -> Mapping[str, torch.Tensor]:
        return self.remembered
