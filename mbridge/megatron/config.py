"""TransformerConfig from a `MegatronConfig`, the parallel sizes and the machine; and what is refused before building.

Values come in layers, a later one wins: defaults < family < local layers < caller < what a CPU cannot do otherwise.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final, Literal

import torch

from ..errors import ConfigError, TopologyError, UnsupportedConfigError, listed
from ..families import MegatronConfig
from ..topology import Topology
from .parallel import ensure_parallel_state, read_topology
from .runtime import CPU_MOE_DEFAULTS, CPU_TRANSFORMER_DEFAULTS, quiet

logger = logging.getLogger("mbridge")

Spec = Literal["auto", "te", "local"]
NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})

# Keys of TransformerConfig that make stages of different depth; Megatron-Core then checks the split itself.
UNEVEN_PIPELINE_KEYS: Final = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)

# What WrappedTorchNorm, the norm of local layers without apex, refuses, or what needs kernels of apex or grouped_gemm.
# Unlike the runtime's values for the CPU, a caller's own win over them.
LOCAL_SPEC_DEFAULTS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "sequence_parallel": False,
        "moe_grouped_gemm": False,
    }
)


def transformer_config(
    config: MegatronConfig,
    *,
    dtype: torch.dtype,
    spec: Spec = "auto",
    extra_transformer: Mapping[str, Any] = NOTHING,
) -> Any:
    """The TransformerConfig that `build_chunks` would give its chunks; a new one at each call. Errors as there."""
    ensure_parallel_state()
    arguments = transformer_arguments(
        config,
        read_topology()[0],
        dtype=dtype,
        fp16=dtype is torch.float16,
        bf16=dtype is torch.bfloat16,
        use_te=resolve_spec(spec),
        use_cpu_initialization=False,
        extra=extra_transformer,
    )
    return new_config(arguments)


def check_divisible(transformer: Mapping[str, Any], gpt: Mapping[str, Any], topology: Topology) -> None:
    """Raise one TopologyError that lists everything the parallel sizes do not divide."""
    problems: list[str] = []

    def divides(axis: str, size: int, what: str, count: int | None) -> None:
        if count is not None and count % size:
            problems.append(f"{axis}={size} must divide {what}={count}")

    tp = topology.tp
    divides("tp", tp, "num_attention_heads", transformer["num_attention_heads"])
    divides("tp", tp, "ffn_hidden_size", transformer.get("ffn_hidden_size"))
    divides("tp", tp, "the padded vocab_size", gpt.get("vocab_size"))
    divides("tp", tp, "moe_shared_expert_intermediate_size", transformer.get("moe_shared_expert_intermediate_size"))
    divides("etp", topology.expert_tp, "moe_ffn_hidden_size", transformer.get("moe_ffn_hidden_size"))
    divides("ep", topology.ep, "num_moe_experts", transformer.get("num_moe_experts"))
    if topology.expert_tp > 1 and transformer.get("add_bias_linear") and transformer.get("num_moe_experts"):
        problems.append(f"etp={topology.expert_tp} must be 1: Megatron-Core has expert biases only without expert TP")
    groups = transformer.get("num_query_groups")
    if groups is not None and groups % tp and tp % groups:
        problems.append(f"tp={tp} must divide num_query_groups={groups}, or be divided by it")
    num_stages = topology.pp * topology.vpp
    if not any(transformer.get(key) for key in UNEVEN_PIPELINE_KEYS) and transformer["num_layers"] % num_stages:
        problems.append(
            f"pp={topology.pp} * vpp={topology.vpp} must divide num_layers={transformer['num_layers']}, or the "
            f"split be given by one of {', '.join(UNEVEN_PIPELINE_KEYS)}"
        )
    if problems:
        raise TopologyError(f"the model cannot be split as {topology}:\n{listed(problems)}")


def check_precision(dtype: torch.dtype, *, fp16: bool, bf16: bool) -> None:
    if fp16 and bf16:
        raise ConfigError("fp16=True and bf16=True exclude each other; give one")
    half = torch.float16 if fp16 else torch.bfloat16 if bf16 else None
    if half is not None and half is not dtype:
        raise ConfigError(
            f"{'fp16' if fp16 else 'bf16'}=True casts parameters to {half}, but dtype={dtype} was asked for; give "
            f"dtype={half}, or fp16=False, bf16=False"
        )


def resolve_spec(spec: str) -> bool:
    """Whether to build TransformerEngine layers. They need CUDA even to be constructed."""
    if spec not in ("auto", "te", "local"):
        raise ConfigError(f"spec must be 'auto', 'te' or 'local', found {spec!r}")
    if spec == "local":
        return False
    with quiet():
        from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
    usable = bool(HAVE_TE) and torch.cuda.is_available()
    if spec == "te" and not usable:
        missing = "TransformerEngine is not installed" if not HAVE_TE else "there is no CUDA device"
        raise UnsupportedConfigError(f"spec='te' cannot be built: {missing}; use spec='local' or 'auto'")
    return usable


def transformer_arguments(
    config: MegatronConfig,
    topology: Topology,
    *,
    dtype: torch.dtype,
    fp16: bool,
    bf16: bool,
    use_te: bool,
    use_cpu_initialization: bool,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of TransformerConfig: defaults < family < local spec < `extra` < what the CPU cannot do otherwise."""
    arguments: dict[str, Any] = {
        # RL frameworks send micro-batches of different lengths down the pipeline and do not say so themselves.
        "variable_seq_lengths": topology.pp > 1,
        "overlap_p2p_comm": topology.vpp > 1,
        "batch_p2p_comm": topology.vpp == 1,
        "sequence_parallel": topology.tp > 1,
        "moe_token_dispatcher_type": "alltoall",  # Megatron-Core's default, allgather, refuses variable lengths
        **config.transformer,
        **({} if use_te else LOCAL_SPEC_DEFAULTS),
    }
    arguments |= extra
    if not torch.cuda.is_available():
        has_experts = bool(arguments.get("num_moe_experts"))
        forced = {**CPU_TRANSFORMER_DEFAULTS, **(CPU_MOE_DEFAULTS if has_experts else {})}
        for name, value in forced.items():
            if name in extra and extra[name] != value:
                logger.warning("without CUDA, %s=%r cannot be used; %r is used instead", name, extra[name], value)
            arguments[name] = value
    return arguments | {
        "tensor_model_parallel_size": topology.tp,
        "pipeline_model_parallel_size": topology.pp,
        "virtual_pipeline_model_parallel_size": topology.vpp if topology.vpp > 1 else None,
        "expert_model_parallel_size": topology.ep,
        "expert_tensor_parallel_size": topology.expert_tp,
        "context_parallel_size": topology.cp,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "fp16": fp16,
        "bf16": bf16,
        "use_cpu_initialization": use_cpu_initialization,
    }


def new_config(arguments: dict[str, Any]) -> Any:
    with quiet():
        from megatron.core.fusions.fused_bias_geglu import quick_gelu
        from megatron.core.transformer import MLATransformerConfig, TransformerConfig
        from megatron.core.transformer.enums import AttnBackend

    config_class = MLATransformerConfig if arguments.get("multi_latent_attention") else TransformerConfig
    known = {field.name for field in dataclasses.fields(config_class)}
    # GPTModel reads the settings of yarn without MLA from attributes that are not fields of the dataclass.
    loose = [name for name in arguments if name.startswith("yarn_") and name not in known]
    attributes = {name: arguments.pop(name) for name in loose}
    unknown = sorted(arguments.keys() - known)
    if unknown:
        raise TypeError(f"{config_class.__name__} has no field {', '.join(unknown)}")
    if isinstance(backend := arguments.get("attention_backend"), str):
        arguments["attention_backend"] = AttnBackend[backend]
    if arguments.get("activation_func") == "quick_gelu":  # fused kernels are chosen by the function's identity
        arguments["activation_func"] = quick_gelu
    with refusals("the model's config", UnsupportedConfigError), quiet():
        config = config_class(**arguments)
    for name, value in attributes.items():
        setattr(config, name, value)
    return config


@contextmanager
def refusals(what: str, error_class: type[Exception]) -> Iterator[None]:
    """Turn Megatron-Core's own checks into our errors."""
    try:
        yield
    except (AssertionError, ValueError, NotImplementedError) as error:
        raise error_class(f"Megatron-Core refuses {what}: {error}") from error
