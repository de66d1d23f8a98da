"""The trainer of the GPU benchmarks: Megatron chunks on the GPU with weights drawn in place, at no cost of time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from shapes import SHAPES

from mbridge import AutoBridge, Bridge

INIT_METHODS = ("init_method", "output_layer_init_method", "embedding_init_method")


def bridge_of(shape: str) -> Bridge:
    """A bridge whose models keep their weights as they are allocated, until `fill`."""
    bridge = AutoBridge.from_config(SHAPES[shape])
    bridge.set_extra_args(**dict.fromkeys(INIT_METHODS, _as_allocated))
    return bridge


def fill(bridge: Bridge, seed: int) -> None:
    """New random weights in place; norms near one. Each rank draws its own."""
    live = bridge.live_tensors(bridge.models)
    device = next(iter(live.values())).device
    generator = torch.Generator(device).manual_seed(1000 * seed + dist.get_rank())
    for name, tensor in live.items():
        if tensor.is_floating_point():
            is_norm = tensor.dim() == 1 and not name.endswith("bias")
            tensor.data.normal_(1.0 if is_norm else 0.0, 0.1 if is_norm else 0.02, generator=generator)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def change_one_element(bridge: Bridge) -> tuple[str, Callable[[], object]]:
    """Change one element of the largest matrix. Returns the matrix's name, and what puts the element back."""
    live = bridge.live_tensors(bridge.models)
    name = max((n for n, t in live.items() if t.dim() == 2), key=lambda n: live[n].numel())
    element = live[name].data.view(-1)[7:8]
    before = element.clone()
    element.add_(1.0)
    return name, lambda: element.copy_(before)


def _as_allocated(weight: torch.Tensor) -> torch.Tensor:
    return weight
