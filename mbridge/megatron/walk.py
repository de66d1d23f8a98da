"""The tensors of Megatron-Core chunks under their local names, each with the number its layer has in the whole model.

Nothing here imports megatron or knows a family. Any `torch.nn.Module` whose layers carry `layer_number` can be walked,
such as the stand-ins that bear TransformerEngine's parameter names in tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import ModelError

# A member of a list of layers: `decoder.layers.3`, `mtp.layers.0`, `language_model.decoder.layers.3`.
_LAYER_PATH = re.compile(r"(?:^|\.)(?:decoder|mtp)\.layers\.\d+$")


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """One parameter or persistent buffer of this rank.

    `name` is relative to the bare model of chunk `chunk` (no `module.` of a wrapper) and holds the layer's number
    within that chunk. `global_layer` is the layer's number in the whole model, from 0, and None outside layers; for
    `mtp.layers` it is the depth, from 0. `tensor` is the `nn.Parameter` or buffer that was found: its storage may be
    replaced by an optimizer or an offload, and the object itself by another, so rather than keeping tensors look at
    `holder[key]`: where the module keeps it, its dict of parameters or of buffers.
    """

    chunk: int
    name: str
    global_layer: int | None
    tensor: torch.Tensor
    holder: Mapping[str, torch.Tensor | None] = field(repr=False, compare=False)
    key: str


def unwrap(model: nn.Module) -> nn.Module:
    """The bare model inside wrappers (DDP, Float16Module, FSDP, torch DDP), all of which hold it as `module`."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def walk(models: nn.Module | Sequence[nn.Module]) -> list[LocalTensor]:
    """Every parameter and persistent buffer of the chunks, in module order, each tensor object once.

    A tensor that is reached under two names (tied embeddings on one stage) keeps the first. Non-persistent buffers
    (rotary caches, token counters) and TransformerEngine's `_extra_state` are not weights and are left out.

    Raises:
        ModelError: no chunk at all, or a decoder layer that does not say its number.
    """
    chunks = [models] if isinstance(models, nn.Module) else list(models)
    if not chunks:
        raise ModelError("expected one model chunk or more, found an empty list: pass what get_model() returned")
    seen: set[int] = set()
    found: list[LocalTensor] = []
    for index, chunk in enumerate(chunks):
        bare = unwrap(chunk)
        layers = layer_numbers(bare, where=f"chunk {index}")
        for name, tensor, holder, key in _held_tensors(bare):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found.append(LocalTensor(index, name, _layer_of(name, layers), tensor, holder, key))
    return found


def layer_numbers(model: nn.Module, *, where: str = "the model") -> dict[str, int]:
    """The path of each outermost layer, such as `decoder.layers.0`, with its number in the whole model, from 0.

    The number is what Megatron-Core gave the module (`layer_number`, from 1), so uneven pipelines, virtual stages and
    layout strings need no arithmetic here.
    """
    numbers: dict[str, int] = {}
    for path, module in model.named_modules():
        if not _LAYER_PATH.search(path):
            continue
        number = getattr(module, "layer_number", None)
        if not isinstance(number, int) or number < 1:
            raise ModelError(
                f"{where}: layer {path} ({type(module).__name__}) should have an integer layer_number >= 1, as "
                f"Megatron-Core's TransformerLayer has; found {number!r}"
            )
        numbers[path] = number - 1
    return numbers


def _held_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, Mapping[str, torch.Tensor | None], str]]:
    """(name, tensor, dict of a module that holds it, key in that dict)."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for key, parameter in module.named_parameters(recurse=False):
            yield prefix + key, parameter, module._parameters, key
        for key, buffer in module.named_buffers(recurse=False):
            # The set is private to torch but has no public reader; state_dict() would copy and call hooks.
            if key not in module._non_persistent_buffers_set:
                yield prefix + key, buffer, module._buffers, key


def _layer_of(name: str, layers: dict[str, int]) -> int | None:
    """The number of the layer whose path begins `name`. Paths are few levels deep, so dotted prefixes are looked up."""
    end = name.find(".")
    while end != -1:
        number = layers.get(name[:end])
        if number is not None:
            return number
        end = name.find(".", end + 1)
    return None
