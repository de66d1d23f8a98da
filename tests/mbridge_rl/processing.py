"""A small engine that post-processes what it loads, in each of the ways that vLLM's layers do, in rank 0's process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from mbridge.pieces import TensorSpec
from mbridge_rl.engines.module import ModuleEngine, ModuleTarget
from mbridge_rl.receiver import Receiver
from mbridge_rl.recorder import DryRun, dry_run

Tensors = dict[str, torch.Tensor]
CACHE_REPLACED = "its cache was replaced"

# HF name -> shape; all float32. Engine modules are named by the first part.
SHAPES = {
    "turned.weight": (6, 6),
    "replaced.weight": (5, 3),
    "other.weight": (4, 6),
    "constant.weight": (8,),
    "norm.weight": (7,),
    "added.weight": (3, 4),
    "kept.weight": (6, 2),
    "cast.weight": (9, 5),
    "fused.q": (6, 8),
    "fused.k": (2, 8),
    "padded.weight": (10, 4),
}
NUM_PADDED_ROWS = 12
OPAQUE = ("turned", "replaced", "other", "constant", "added")
OPAQUE_IF_KEPT = (*OPAQUE, "kept", "padded")  # what the loader keeps may end up in padding


def weights(step: int, *, constant: bool = False) -> Tensors:
    generator = torch.Generator().manual_seed(step)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors["cast.weight"][0, :4] = torch.tensor([float("inf"), -0.0, 1e-40, 1.00390625])  # the last lies between two
    if constant:
        tensors["constant.weight"].fill_(1.0)
    return tensors


class Model(nn.Module):
    """Takes the tensors of `weights`. See `Processing.finish` for what happens to them.

    If it `keeps`, one of them stays with the loader until then.
    """

    def __init__(self, keeps: bool = False) -> None:
        super().__init__()
        self.keeps = keeps
        for name, shape in SHAPES.items():
            module, key = name.split(".")
            if module not in ("fused", "padded"):
                self.add_module(module, nn.Module())
                dtype = torch.bfloat16 if module == "cast" else torch.float32
                self.get_submodule(module).register_parameter(key, nn.Parameter(torch.zeros(shape, dtype=dtype)))
        for module, rows, columns in (("fused", 8, 8), ("padded", NUM_PADDED_ROWS, 4)):
            self.add_module(module, nn.Module())
            self.get_submodule(module).register_parameter("weight", nn.Parameter(torch.zeros(rows, columns)))
        self.derived = nn.Module()
        self.derived.register_buffer("table", torch.zeros(6, 6), persistent=False)
        self.replaced.cache = torch.zeros(0)
        self.stash: Tensors = {}

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in named:
            module, key = name.split(".")
            weight = self.get_submodule(module).get_parameter("weight")
            match name:
                case "added.weight":
                    weight.copy_(tensor + 1)
                case "kept.weight" if self.keeps:
                    self.stash[name] = tensor.clone()
                case "fused.q" | "fused.k":
                    weight[slice(0, 6) if key == "q" else slice(6, 8)].copy_(tensor)
                case "padded.weight":
                    weight[: len(tensor)].copy_(tensor)
                case _:
                    weight.copy_(tensor)
            loaded.add(f"{module}.weight")
        return loaded


class Processing(ModuleTarget):
    """Post-processes the modules that were loaded, after every refit, as an engine's own reload does."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.model = model
        self.modules: frozenset[str] | None = None
        self.loaded: list[str] = []  # HF names of the last refit
        self.after_finish: Callable[[], None] | None = None  # called once

    def rehearse(self, tensors: tuple[TensorSpec, ...]) -> DryRun:
        return dry_run(Model(self.model.keeps).load_weights, tensors)  # one that nothing has been done to

    def begin(self, modules: frozenset[str] | None = None) -> None:
        self.modules, self.loaded = modules, []
        if self._loads("other"):
            self.model.other.weight = nn.Parameter(torch.zeros(SHAPES["other.weight"]))

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        def noted() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in tensors:
                self.loaded.append(name)
                yield name, tensor

        return super().load(noted())

    @torch.no_grad()
    def finish(self) -> None:
        model = self.model
        if self._loads("turned"):
            model.turned.weight.copy_(model.turned.weight.t().clone())
            model.derived.table.copy_(model.turned.weight * 2)
        if self._loads("replaced"):
            model.replaced.cache = model.replaced.weight.detach() * 3
        if self._loads("other"):
            model.other.weight = nn.Parameter(model.other.weight.half().reshape(-1))
        if self._loads("constant"):
            model.constant.weight.copy_(model.constant.weight.flip(0))
        if "kept.weight" in model.stash:
            model.kept.weight.copy_(model.stash.pop("kept.weight"))
        if self.after_finish is not None:
            self.after_finish, call = None, self.after_finish
            call()

    def processed_modules(self) -> set[str]:
        return {"turned", "other", "constant", "padded"}

    def remade(self) -> dict[str, str]:
        return {"replaced": CACHE_REPLACED}

    def _loads(self, module: str) -> bool:
        return self.modules is None or module in self.modules


class ProcessingEngine(ModuleEngine):
    def __init__(self, keeps: bool = False) -> None:
        self.model = Model(keeps)
        super().__init__(self.model)
        self.target = Processing(self.model)
        self.receiver = Receiver(self.target, 0)


def expected(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """What the model holds after a refit with `tensors`, by engine name, and the cache that it computes with."""
    table = torch.empty(6, 6)
    for row in range(6):
        for column in range(6):
            table[column, row] = tensors["turned.weight"][row, column]
    return {
        "turned.weight": table,
        "derived.table": table * 2,
        "replaced.weight": tensors["replaced.weight"],
        "other.weight": torch.cat([row.half() for row in tensors["other.weight"]]),
        "constant.weight": torch.tensor(tensors["constant.weight"].tolist()[::-1]),
        "norm.weight": tensors["norm.weight"],
        "added.weight": tensors["added.weight"] + 1,
        "kept.weight": tensors["kept.weight"],
        "cast.weight": tensors["cast.weight"].to(torch.bfloat16),
        "fused.weight": torch.cat([tensors["fused.q"], tensors["fused.k"]]),
        "padded.weight": torch.cat([tensors["padded.weight"], torch.zeros(NUM_PADDED_ROWS - 10, 4)]),
        "replaced.cache": tensors["replaced.weight"] * 3,
    }


def assert_holds(model: Model, tensors: Mapping[str, torch.Tensor]) -> None:
    found = {**dict(model.named_parameters()), **dict(model.named_buffers()), "replaced.cache": model.replaced.cache}
    wanted = expected(tensors)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def flip(tensor: torch.Tensor, bit: int = 0, element: int = 0) -> None:
    """Flip a bit of an element of a contiguous tensor, in place."""
    data = tensor.data.view(-1).view(torch.uint8)
    data[element * tensor.element_size() + bit // 8] ^= 1 << bit % 8
