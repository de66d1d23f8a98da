"""GPTModel chunks from a `MegatronConfig`: layer spec, pipeline and virtual stages, device, precision, DDP.

What a model family means in Megatron-Core's words comes in `MegatronConfig`; what the ranks are comes from the parallel
state. This module adds only what follows from the two, and from the machine.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from torch import nn

from ..errors import ConfigError, TopologyError, UnsupportedConfigError, listed
from ..families import MegatronConfig
from ..topology import Topology
from .parallel import ensure_parallel_state, read_topology
from .runtime import CPU_MOE_DEFAULTS, CPU_TRANSFORMER_DEFAULTS, cpu_tensors, quiet

logger = logging.getLogger("mbridge")

Spec = Literal["auto", "te", "local"]
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})

# Keys of TransformerConfig that make stages of different depth; Megatron-Core then checks the split itself.
UNEVEN_PIPELINE_KEYS: Final = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)

# What WrappedTorchNorm, the norm of local layers without apex, refuses, or what needs apex's kernels.
LOCAL_SPEC_DEFAULTS: Final[Mapping[str, Any]] = MappingProxyType(
    {"masked_softmax_fusion": False, "persist_layer_norm": False, "sequence_parallel": False}
)


def build_chunks(
    config: MegatronConfig,
    *,
    dtype: torch.dtype,
    spec: Spec = "auto",
    wrap_with_ddp: bool = False,
    fp16: bool = False,
    bf16: bool = True,
    use_cpu_initialization: bool = False,
    initialize: bool = True,
    ddp_config: Mapping[str, Any] | object | None = None,
    data_parallel_random_init: bool = True,
    post_model_creation_callbacks: Sequence[Callable[..., object]] = (),
    extra_transformer: Mapping[str, Any] = _NOTHING,
    extra_gpt: Mapping[str, Any] = _NOTHING,
    hf_config: object = None,
) -> list[nn.Module]:
    """This rank's chunks, one per virtual pipeline stage, on its device, in training mode.

    Starts a world of one rank if there is no parallel state (`ensure_parallel_state`). Collective when pp > 1 and
    embeddings are tied, and when `wrap_with_ddp`: call it on every rank.

    Args:
        dtype: of the parameters.
        spec: "te" TransformerEngine's layers, "local" Megatron-Core's own, "auto" the first where it can run.
        fp16, bf16: wrap each chunk in Float16Module, which casts inputs down and outputs up; must agree with `dtype`.
        use_cpu_initialization: draw each whole weight on the CPU and keep this rank's shard: slow, and the same for
            every tensor-parallel size. Otherwise each rank draws its own shard.
        initialize: False leaves weights as they are allocated, for a model that is about to be loaded: fast.
        ddp_config: fields of Megatron-Core's DistributedDataParallelConfig, or one, laid over
            `grad_reduce_in_fp32=True, use_distributed_optimizer=True`.
        data_parallel_random_init: broadcast parameters from the first data-parallel rank after wrapping with DDP.
        post_model_creation_callbacks: called on each bare chunk, before it is moved to its device and wrapped, as
            `callback(model, pre_process=, post_process=, config=, hf_config=)`; they change the model in place.
        extra_transformer, extra_gpt: win over the family's arguments of TransformerConfig and GPTModel.
        hf_config: handed to the callbacks, not read.

    Raises:
        TopologyError: a parallel size does not divide what it splits.
        UnsupportedConfigError: Megatron-Core refuses the config, or the spec cannot run here.
        TypeError: a name that neither TransformerConfig nor GPTModel knows.
    """
    ensure_parallel_state()
    topology, coordinates = read_topology()
    _check_precision(dtype, fp16=fp16, bf16=bf16)
    use_te = _resolve_spec(spec)
    transformer = _transformer_arguments(
        config,
        topology,
        dtype=dtype,
        fp16=fp16,
        bf16=bf16,
        use_te=use_te,
        use_cpu_initialization=use_cpu_initialization,
        initialize=initialize,
        extra=extra_transformer,
    )
    gpt = {**config.gpt, **extra_gpt}
    check_divisible(transformer, gpt, topology)

    megatron_config = _transformer_config(transformer)
    chunks: list[nn.Module] = []
    for vp_stage in range(topology.vpp):
        first = coordinates.pp == 0 and vp_stage == 0
        last = coordinates.pp == topology.pp - 1 and vp_stage == topology.vpp - 1
        chunk = _build_chunk(
            megatron_config,
            gpt,
            use_te=use_te,
            pre_process=first,
            post_process=last,
            vp_stage=vp_stage if topology.vpp > 1 else None,
        )
        for callback in post_model_creation_callbacks:
            callback(chunk, pre_process=first, post_process=last, config=megatron_config, hf_config=hf_config)
        chunks.append(chunk)
    return _finish(
        chunks,
        megatron_config,
        half=fp16 or bf16,
        wrap_with_ddp=wrap_with_ddp,
        ddp_config=ddp_config,
        broadcast=data_parallel_random_init,
    )


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


def _check_precision(dtype: torch.dtype, *, fp16: bool, bf16: bool) -> None:
    if fp16 and bf16:
        raise ConfigError("fp16=True and bf16=True exclude each other; give one")
    half = torch.float16 if fp16 else torch.bfloat16 if bf16 else None
    if half is not None and half is not dtype:
        raise ConfigError(
            f"{'fp16' if fp16 else 'bf16'}=True casts parameters to {half}, but dtype={dtype} was asked for; give "
            f"dtype={half}, or fp16=False, bf16=False"
        )


def _resolve_spec(spec: str) -> bool:
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


def _transformer_arguments(
    config: MegatronConfig,
    topology: Topology,
    *,
    dtype: torch.dtype,
    fp16: bool,
    bf16: bool,
    use_te: bool,
    use_cpu_initialization: bool,
    initialize: bool,
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
    if not initialize:
        # Not `perform_initialization=False`: local layers would then lack the tensor-parallel attributes that
        # Megatron-Core's optimizer needs to count gradients once.
        methods = ("init_method", "output_layer_init_method", "embedding_init_method")
        arguments |= dict.fromkeys(methods, _leave_as_allocated)
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


def _leave_as_allocated(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _transformer_config(arguments: dict[str, Any]) -> Any:
    with quiet():
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
    with _refusals("the model's config", UnsupportedConfigError), quiet():
        config = config_class(**arguments)
    for name, value in attributes.items():
        setattr(config, name, value)
    return config


def _build_chunk(
    config: Any, gpt: Mapping[str, Any], *, use_te: bool, pre_process: bool, post_process: bool, vp_stage: int | None
) -> nn.Module:
    with quiet():
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec

    unknown = sorted(gpt.keys() - inspect.signature(GPTModel.__init__).parameters.keys())
    if unknown:
        raise TypeError(f"GPTModel takes no argument {', '.join(unknown)}")
    with _refusals("the pipeline split", TopologyError):
        block = get_gpt_decoder_block_spec(
            config, use_transformer_engine=use_te, normalization=config.normalization, vp_stage=vp_stage
        )
        if config.multi_latent_attention and not use_te:
            from .mla import use_local_mla_attention

            use_local_mla_attention(block)
        mtp = None
        if config.mtp_num_layers:
            mtp = get_gpt_mtp_block_spec(config, block, use_transformer_engine=use_te, vp_stage=vp_stage)
    with _refusals("the model", UnsupportedConfigError), cpu_tensors():
        model: nn.Module = GPTModel(
            config=config,
            transformer_layer_spec=block,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            **({"mtp_block_spec": mtp} if mtp is not None else {}),
            **gpt,
        )
    return model


@contextmanager
def _refusals(what: str, error_class: type[Exception]) -> Iterator[None]:
    """Turn Megatron-Core's own checks into our errors."""
    try:
        yield
    except (AssertionError, ValueError, NotImplementedError) as error:
        raise error_class(f"Megatron-Core refuses {what}: {error}") from error


def _finish(
    chunks: list[nn.Module],
    config: Any,
    *,
    half: bool,
    wrap_with_ddp: bool,
    ddp_config: Mapping[str, Any] | object | None,
    broadcast: bool,
) -> list[nn.Module]:
    """Attributes, device, precision and DDP, in the order in which Megatron-LM's get_model does them."""
    with quiet():
        from megatron.core.tensor_parallel import (
            set_defaults_if_not_set_tensor_model_parallel_attributes,
        )
        from megatron.core.transformer.module import Float16Module

    for chunk in chunks:
        for parameter in chunk.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        if torch.cuda.is_available():
            chunk.cuda(torch.cuda.current_device())
    bare = list(chunks)
    if half:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
        _keep_expert_bias_in_fp32(bare)
    if wrap_with_ddp:
        chunks = _wrap_with_ddp(chunks, config, ddp_config, broadcast=broadcast)
    return chunks


def _keep_expert_bias_in_fp32(chunks: Sequence[nn.Module]) -> None:
    """Float16Module casts every floating buffer; a router's expert bias decides routing by fp32 differences."""
    for chunk in chunks:
        for module in chunk.modules():
            restore = getattr(module, "_maintain_float32_expert_bias", None)
            if restore is not None:
                restore()


def _wrap_with_ddp(
    chunks: Sequence[nn.Module], config: Any, ddp_config: Mapping[str, Any] | object | None, *, broadcast: bool
) -> list[nn.Module]:
    with quiet():
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
        )

    if isinstance(ddp_config, DistributedDataParallelConfig):
        settings = ddp_config
    else:
        given = dict(ddp_config) if isinstance(ddp_config, Mapping) else {}
        settings = DistributedDataParallelConfig(
            **{"grad_reduce_in_fp32": True, "use_distributed_optimizer": True, **given}
        )
    # Buckets matter only where communication overlaps the backward pass, and there only for the chunk that ends it.
    if not settings.overlap_grad_reduce:
        settings = dataclasses.replace(settings, bucket_size=None)
    with cpu_tensors():
        wrapped = [
            DistributedDataParallel(config=config, ddp_config=settings, module=chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        ]
    if broadcast:
        for chunk in wrapped:
            chunk.broadcast_params()
    return wrapped
