"""Which process sees which GPU, and what every process of the multi-GPU benchmarks has in its environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

# NVLink multicast is left off: on some virtual machines a program that uses it takes the GPUs out of service.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_USE_NCCL_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
}


def settle(gpus: str, *, simulate: bool) -> None:
    """Let this process see these GPUs ("0,1"; none if `simulate`). Call it before anything touches CUDA."""
    os.environ.update(NO_MULTICAST)
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if simulate else gpus
    if simulate:  # workers of one CPU engine share the cores, rather than bind a socket each
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@contextmanager
def children_see(gpus: str, *, simulate: bool) -> Iterator[None]:
    """Processes that are started inside see these GPUs. This one must have touched its own before."""
    before = os.environ["CUDA_VISIBLE_DEVICES"]
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if simulate else gpus
    try:
        yield
    finally:
        os.environ["CUDA_VISIBLE_DEVICES"] = before
