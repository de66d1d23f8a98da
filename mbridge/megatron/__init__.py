"""The only package of mbridge that imports Megatron-Core.

    runtime.py   Megatron-Core without CUDA: a table of small fixes, installed and undone as one
    rng.py       the random streams of Megatron-Core on CPU
    parallel.py  starting, ending and reading the parallel state
    config.py    TransformerConfig from a MegatronConfig, the topology and the machine
    build.py     GPTModel chunks from them
    mla.py       what the local layers lack for multi-latent attention
    walk.py      the parameters and buffers of chunks, with global layer numbers

Importing this package does not import megatron; calling its functions does (about 3 s the first time).
"""

from __future__ import annotations

from .build import build_chunks
from .config import transformer_config
from .parallel import (
    ParallelGroups,
    destroy_parallel,
    ensure_parallel_state,
    init_parallel,
    read_groups,
    read_topology,
)
from .runtime import RUNTIME, CpuRuntime, cpu_tensors, forward_backward_func
from .walk import LocalTensor, unwrap, walk

__all__ = [
    "RUNTIME",
    "CpuRuntime",
    "LocalTensor",
    "ParallelGroups",
    "build_chunks",
    "cpu_tensors",
    "destroy_parallel",
    "ensure_parallel_state",
    "forward_backward_func",
    "init_parallel",
    "read_groups",
    "read_topology",
    "transformer_config",
    "unwrap",
    "walk",
]
