"""Megatron-Core's random streams on CPU. Imported late: it subclasses a class of megatron.

Megatron-Core draws initial weights and dropout masks from named streams ("model-parallel-rng" differs between
tensor-parallel ranks, "data-parallel-rng" does not) and keeps their states in the CUDA generator. Here the same streams
live in torch's CPU generator, so a sharded model on CPU is initialised, and drops out, by the same rules as on GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.tensor_parallel.random import (
    _MODEL_PARALLEL_RNG_TRACKER_NAME,
    CudaRNGStatesTracker,
)


class CpuRngTracker(CudaRNGStatesTracker):
    """`CudaRNGStatesTracker` with torch's CPU generator in place of CUDA's."""

    def add(self, name: str, seed: int) -> None:
        """Begin stream `name` at `seed`."""
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def fork(self, name: str = _MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Draw from stream `name` inside the block, and from the stream used before after it."""
        if name not in self.states_:
            raise KeyError(f"random stream {name!r} was never seeded; call model_parallel_cuda_manual_seed(seed) first")
        outer = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)


def get_cpu_rng_state(device: object = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    """Stands for `_get_cuda_rng_state`; activation recomputation saves the state before a forward with it."""
    return torch.get_rng_state()


def set_cpu_rng_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
    """Stands for `_set_cuda_rng_state`."""
    torch.set_rng_state(new_state)
