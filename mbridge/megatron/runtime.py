"""Megatron-Core on a machine without CUDA.

Megatron-Core 0.16 builds, trains and pipelines models on CPU over gloo once a few attributes answer for the CPU. Each
is one `Fix` in `FIXES`: what is replaced, why, on which condition, and when the entry can go. `RUNTIME.install()`
applies those whose condition holds and remembers what was there; `RUNTIME.uninstall()` puts exactly that back. On a
machine with CUDA and TransformerEngine no condition holds and nothing is changed.

What cannot be an attribute is a mode: `cpu_tensors()` turns `device="cuda"` arguments and `.cuda()` into the CPU's
while it is active. Building a model enters it by itself; a training loop enters it around a pipeline schedule and
around Megatron-Core's optimizer, or takes its schedule from `forward_backward_func()`.
"""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

logger = logging.getLogger("mbridge")

_ABSENT: Final = object()

# TransformerConfig values that a model on CPU must have, whatever its config says: fusions are CUDA kernels or apex's.
CPU_TRANSFORMER_DEFAULTS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "cross_entropy_loss_fusion": False,
        "sequence_parallel": False,
    }
)

# The same for a model with experts: the alltoall dispatcher creates a CUDA stream, and allgather, which replaces it,
# refuses variable lengths; grouped experts need grouped_gemm or TransformerEngine.
CPU_MOE_DEFAULTS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "moe_token_dispatcher_type": "allgather",
        "variable_seq_lengths": False,
        "moe_grouped_gemm": False,
        "moe_permute_fusion": False,
        "moe_router_fusion": False,
        "moe_shared_expert_overlap": False,
    }
)


@dataclass(frozen=True, slots=True)
class Fix:
    """One attribute that Megatron-Core reads and that has no usable value here."""

    module: str
    attribute: str
    replacement: Callable[[], object]
    needed: Callable[[ModuleType], bool]
    why: str
    until: str

    @property
    def name(self) -> str:
        return f"{self.module}.{self.attribute}"


def _no_cuda(module: ModuleType) -> bool:
    return not torch.cuda.is_available()


def _no_cuda_tracker(module: ModuleType) -> bool:
    """A tracker that a caller chose (for inference, or TransformerEngine's) is left alone."""
    tracker = module._CUDA_RNG_STATE_TRACKER
    return not torch.cuda.is_available() and (tracker is None or type(tracker) is module.CudaRNGStatesTracker)


def _lacks_te_gemm(module: ModuleType) -> bool:
    return not hasattr(module, "te_general_gemm")


def _claims_te(module: ModuleType) -> bool:
    return bool(module.HAVE_TE) and not isinstance(getattr(module, "TELinear", None), type)


def _cpu_device() -> torch.device:
    """Stands for `torch.cuda.current_device`, which raises without CUDA."""
    return torch.device("cpu")


def _synchronize(device: object = None) -> None:
    """Stands for `torch.cuda.synchronize`, which raises without CUDA. CPU work is done when its call returns."""


def _window_mask(num_queries: int, num_keys: int, window: tuple[int, int]) -> torch.Tensor:
    """Bool [num_queries, num_keys], True outside the window of `window` = (tokens before, after) each query."""
    distance = torch.arange(num_keys) - torch.arange(num_keys - num_queries, num_keys)[:, None]
    return (distance < -window[0]) | (distance > window[1])


def _cpu_tracker() -> object:
    from .rng import CpuRngTracker

    return CpuRngTracker()


def _rng_getter() -> object:
    from .rng import get_cpu_rng_state

    return get_cpu_rng_state


def _rng_setter() -> object:
    from .rng import set_cpu_rng_state

    return set_cpu_rng_state


_RANDOM: Final = "megatron.core.tensor_parallel.random"

FIXES: Final[tuple[Fix, ...]] = (
    Fix(
        "torch.cuda",
        "current_device",
        replacement=lambda: _cpu_device,
        needed=_no_cuda,
        why="rotary tables, masks, gather outputs and p2p buffers are allocated on torch.cuda.current_device()",
        until="it asks for the device of an input or a parameter instead",
    ),
    Fix(
        "torch.cuda",
        "synchronize",
        replacement=lambda: _synchronize,
        needed=_no_cuda,
        why="p2p_communication.py synchronizes after every batched send and receive",
        until="p2p_communication.py synchronizes only CUDA tensors",
    ),
    Fix(
        _RANDOM,
        "_CUDA_RNG_STATE_TRACKER",
        replacement=_cpu_tracker,
        needed=_no_cuda_tracker,
        why="weight initialisation and dropout fork the CUDA generator",
        until="the tracker takes a torch.Generator of any device",
    ),
    Fix(
        _RANDOM,
        "_CUDA_RNG_STATE_TRACKER_INITIALIZED",
        replacement=lambda: True,
        needed=_no_cuda,
        why="otherwise the first get_cuda_rng_tracker() replaces the tracker above",
        until="the tracker's own fix goes",
    ),
    Fix(
        _RANDOM,
        "_get_cuda_rng_state",
        replacement=_rng_getter,
        needed=_no_cuda,
        why="activation recomputation saves the CUDA generator's state",
        until="recomputation saves only generators of devices that exist",
    ),
    Fix(
        _RANDOM,
        "_set_cuda_rng_state",
        replacement=_rng_setter,
        needed=_no_cuda,
        why="activation recomputation restores the CUDA generator's state",
        until="recomputation saves only generators of devices that exist",
    ),
    Fix(
        "megatron.core.transformer.moe.moe_utils",
        "te_general_gemm",
        replacement=lambda: None,
        needed=_lacks_te_gemm,
        why="0.16.1 tests it against None in the router, but defines it only where TransformerEngine is installed",
        until="moe_utils.py sets it to None when its import fails",
    ),
    Fix(
        "megatron.core.fusions.fused_softmax",
        "get_sliding_window_causal_mask",
        replacement=lambda: _window_mask,
        needed=_no_cuda,
        why='a layer with a sliding window makes its mask on device "cuda", whatever mask it is given',
        until="transformer/utils.py makes it on the device of the scores",
    ),
    Fix(
        "megatron.core.transformer.multi_latent_attention",
        "HAVE_TE",
        replacement=lambda: False,
        needed=_claims_te,
        why="0.16.1 leaves it True without TransformerEngine, and calls isinstance with the mock TELinear",
        until="multi_latent_attention.py takes HAVE_TE from extensions/transformer_engine.py",
    ),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what Megatron-Core warns of and a user of mbridge cannot act on: absent apex and TransformerEngine, and the
    deprecation of its own default for `cuda_graph_scope`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(Transformer Engine and )?Apex (is|are) not installed")
        warnings.filterwarnings("ignore", message=r"full scope is deprecated")
        yield


@dataclass(frozen=True, slots=True)
class _Applied:
    module: ModuleType
    fix: Fix
    original: object  # _ABSENT where there was no such attribute
    replacement: object


class CpuRuntime:
    """The fixes as one thing that is on or off. A context manager, or `install()` and `uninstall()`; both idempotent.

    What it changes belongs to the process, so use the one instance `RUNTIME`.
    """

    def __init__(self, fixes: tuple[Fix, ...] = FIXES) -> None:
        self._fixes = fixes
        self._applied: list[_Applied] = []

    @property
    def installed(self) -> bool:
        return bool(self._applied)

    def install(self) -> None:
        """Apply every fix whose condition holds. A second call, and a machine that needs none, change nothing."""
        if self._applied:
            return
        for fix in self._fixes:
            with quiet():
                module = importlib.import_module(fix.module)
            if not fix.needed(module):
                continue
            applied = _Applied(module, fix, module.__dict__.get(fix.attribute, _ABSENT), fix.replacement())
            setattr(module, fix.attribute, applied.replacement)
            self._applied.append(applied)
        if self._applied:
            logger.debug("Megatron-Core runtime fixes: %s", ", ".join(entry.fix.name for entry in self._applied))

    def uninstall(self) -> None:
        """Put back exactly what `install` replaced. What someone changed since is left as it is, and logged."""
        while self._applied:
            entry = self._applied.pop()
            if entry.module.__dict__.get(entry.fix.attribute, _ABSENT) is not entry.replacement:
                logger.warning("%s was changed after mbridge replaced it; it is left as it is", entry.fix.name)
            elif entry.original is _ABSENT:
                delattr(entry.module, entry.fix.attribute)
            else:
                setattr(entry.module, entry.fix.attribute, entry.original)

    def __enter__(self) -> CpuRuntime:
        self.install()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.uninstall()


RUNTIME: Final = CpuRuntime()


class _CpuTensors(TorchFunctionMode):
    """Sends what is asked to be on CUDA to the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizer compares this name with "torch.cuda.FloatTensor" and the like.
            return func(*args).replace("torch.", "torch.cuda.", 1) if args[0].device.type == "cpu" else func(*args)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and (device == "cuda" or device.startswith("cuda:"))


def cpu_tensors() -> AbstractContextManager[object]:
    """A block in which `device="cuda"` means the CPU; with CUDA present it changes nothing.

    Megatron-Core's schedules allocate `torch.zeros(..., device="cuda")`, and a tied embedding split over pipeline
    stages is moved with `.cuda()` while the model is built. Can go when both use the device of the model.
    """
    return nullcontext() if torch.cuda.is_available() else _CpuTensors()


def forward_backward_func() -> Callable[..., Any]:
    """Megatron-Core's `get_forward_backward_func()` for the current parallel state, usable on CPU and CUDA alike."""
    with quiet():
        from megatron.core.pipeline_parallel import get_forward_backward_func

    schedule: Callable[..., Any] = get_forward_backward_func()

    @functools.wraps(schedule)
    def run(*args: Any, **kwargs: Any) -> Any:
        with cpu_tensors():
            return schedule(*args, **kwargs)

    return run
