"""GPTModel chunks from a `MegatronConfig`: layer spec, pipeline and virtual stages, device, precision, DDP.

What a model family means in Megatron-Core's words comes in `MegatronConfig`; what the ranks are comes from the parallel
state. This module adds only what follows from the two, and from the machine.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import nn

from ..errors import TopologyError, UnsupportedConfigError
from ..families import MegatronConfig
from .config import (
    NOTHING,
    Spec,
    check_divisible,
    check_precision,
    new_config,
    refusals,
    resolve_spec,
    transformer_arguments,
    transformer_config,
)
from .parallel import ensure_parallel_state, read_topology
from .runtime import cpu_tensors, quiet

__all__ = ["Spec", "build_chunks", "transformer_config"]

INIT_METHODS: Final = ("init_method", "output_layer_init_method", "embedding_init_method")


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
    extra_transformer: Mapping[str, Any] = NOTHING,
    extra_gpt: Mapping[str, Any] = NOTHING,
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
    check_precision(dtype, fp16=fp16, bf16=bf16)
    use_te = resolve_spec(spec)
    transformer = transformer_arguments(
        config,
        topology,
        dtype=dtype,
        fp16=fp16,
        bf16=bf16,
        use_te=use_te,
        use_cpu_initialization=use_cpu_initialization,
        extra=extra_transformer,
    )
    gpt = {**config.gpt, **extra_gpt}
    check_divisible(transformer, gpt, topology)

    megatron_config = new_config(transformer)
    chunks: list[nn.Module] = []
    for vp_stage in range(topology.vpp):
        first = coordinates.pp == 0 and vp_stage == 0
        last = coordinates.pp == topology.pp - 1 and vp_stage == topology.vpp - 1
        chunk = _build_chunk(
            megatron_config,
            gpt,
            use_te=use_te,
            initialize=initialize,
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


def _build_chunk(
    config: Any,
    gpt: Mapping[str, Any],
    *,
    use_te: bool,
    initialize: bool,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
) -> nn.Module:
    with quiet():
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec

    unknown = sorted(gpt.keys() - inspect.signature(GPTModel.__init__).parameters.keys())
    if unknown:
        raise TypeError(f"GPTModel takes no argument {', '.join(unknown)}")
    with refusals("the pipeline split", TopologyError):
        block = get_gpt_decoder_block_spec(
            config, use_transformer_engine=use_te, normalization=config.normalization, vp_stage=vp_stage
        )
        if config.multi_latent_attention and not use_te:
            from .mla import use_local_mla_attention

            use_local_mla_attention(block)
        mtp = None
        if config.mtp_num_layers:
            mtp = get_gpt_mtp_block_spec(config, block, use_transformer_engine=use_te, vp_stage=vp_stage)
    drawing = nullcontext() if initialize else _drawing_nothing(config)
    with refusals("the model", UnsupportedConfigError), cpu_tensors(), drawing:
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
def _drawing_nothing(config: Any) -> Iterator[None]:
    """Initialisation that leaves weights as they are allocated.

    Not `perform_initialization=False`: local layers would then lack the tensor-parallel attributes by which the
    optimizer counts each gradient once. The methods are put back, for callbacks that make layers of their own.
    """
    methods = {name: getattr(config, name) for name in INIT_METHODS}
    for name in methods:
        setattr(config, name, _leave_as_allocated)
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(config, name, method)


def _leave_as_allocated(weight: torch.Tensor) -> torch.Tensor:
    return weight


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
