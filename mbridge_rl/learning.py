"""After a refit that went through the engine's loader whole: which modules can be written from outside from now on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mbridge.pieces import Shape

from .checksum import whole_checksums
from .errors import EngineLoadError
from .placement import Expected, Placement, compare_in_place
from .target import Target

CONSTANT = "all its values are equal, so that what happens to them after loading cannot be seen"


def not_loaded(target: Target, placement: Placement) -> dict[str, int]:
    """Checksums of what no HF tensor goes to, in modules to which some go. Taken before a load, for `learn`.

    Not of a tensor that another module holds too, by the name that is written: it is the same memory (vLLM's routed
    experts hold their router's bias).
    """
    written = {placement.module_of[name] for name in placement.written}
    live = target.live()
    loaded = {_memory(live[name]) for name in placement.written if name in live}
    names = [
        name
        for name, module in placement.module_of.items()
        if module in written
        and name not in placement.written
        and name in live
        and not (live[name].numel() and _memory(live[name]) in loaded)
    ]
    return whole_checksums({name: live[name] for name in names})


def _memory(tensor: torch.Tensor) -> tuple[object, ...]:
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def learn(
    target: Target,
    placement: Placement,
    expected: Sequence[Expected],
    shapes: Mapping[str, Shape],
    before: Mapping[str, int],
) -> dict[str, str]:
    """Engine name -> why it does not hold what was loaded, as it was loaded (`expected`).

    Adds to `placement.opaque` each module of which that is true, or whose post-processing makes more than values, or
    of which nothing can be told. `shapes`: of the HF tensors; `before`: what `not_loaded` said before the load.

    Raises EngineLoadError for a tensor that an earlier refit found as it was loaded: what changed it this time is no
    post-processing. Then nothing is taken for granted of it any more.
    """
    live = target.live()
    changed = compare_in_place(expected, live, placement.formats, shapes)
    surprising = sorted(placement.kept & changed.keys())
    if surprising:
        placement.kept -= changed.keys()
        name = surprising[0]
        raise EngineLoadError(
            f"{len(surprising)} of the engine's tensors do not hold what was loaded, as they did in earlier refits, "
            f"such as {name}: {changed[name]}",
            tensor=next(item.piece.hf_name for item in expected if item.piece.local_name == name),
        )
    for name, reason in changed.items():
        placement.opaque.setdefault(placement.module_of[name], f"{name}: {reason}")
    written = {placement.module_of[name] for name in placement.written}
    after = not_loaded(target, placement)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            placement.opaque.setdefault(placement.module_of[name], f"{name}: made of what is loaded")
    for name in live:
        module = name.rpartition(".")[0]
        if module in written and name not in placement.formats:
            placement.opaque.setdefault(module, f"{name}: made after loading")
    for module, reason in target.remade().items():
        if module in written:
            placement.opaque.setdefault(module, reason)
    for module in constant_modules(live, placement, target.processed_modules() - placement.opaque.keys()):
        placement.opaque[module] = CONSTANT
    names = {item.piece.local_name for item in expected}
    placement.kept |= {name for name in names - changed.keys() if placement.module_of[name] not in placement.opaque}
    return changed


def constant_modules(live: Mapping[str, torch.Tensor], placement: Placement, modules: set[str]) -> set[str]:
    """Those of `modules` to which only constant tensors are loaded: of them a comparison of values tells nothing.

    Permuting the rows of one of them would not show. `modules` hold what was loaded.
    """
    varied: set[str] = set()
    seen: set[str] = set()
    for piece in sorted(placement.pieces, key=lambda p: -p.box.numel):
        module = placement.module_of[piece.local_name]
        if module in modules and module not in varied:
            seen.add(module)
            if not _is_constant(piece.region.of(live[piece.local_name])):
                varied.add(module)
    return seen - varied


def _is_constant(tensor: torch.Tensor) -> bool:
    if tensor.numel() < 2:
        return True
    first = tensor[(0,) * tensor.dim()]
    return bool((tensor == first).all())
