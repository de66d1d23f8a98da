"""Models built in every topology train on CPU, and compute the same losses from the same weights.

The weights are filled from the name and the *global* layer number that `walk` reports, so a wrong number, a missing or
a doubled tensor, or a wrong stage shows as another loss. Tensor-parallel shards are cut here by the definition of the
layouts, not by mbridge's.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from small_models import (
    BATCH,
    FFN,
    GROUPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LENGTH,
    NUM_MICROBATCHES,
    VOCAB,
    small_qwen2,
)
from torch import nn

# Full shapes by the end of the name; the last column is how tensor parallelism cuts them.
SHAPES = {
    "word_embeddings.weight": ((VOCAB, HIDDEN), "rows"),
    "output_layer.weight": ((VOCAB, HIDDEN), "rows"),
    "linear_qkv.weight": (((HEADS + 2 * GROUPS) * HEAD_DIM, HIDDEN), "rows"),
    "linear_qkv.bias": (((HEADS + 2 * GROUPS) * HEAD_DIM,), "rows"),
    "linear_proj.weight": ((HIDDEN, HEADS * HEAD_DIM), "columns"),
    "linear_fc1.weight": ((2 * FFN, HIDDEN), "gate and up"),
    "linear_fc2.weight": ((HIDDEN, FFN), "columns"),
    "layernorm.weight": ((HIDDEN,), "whole"),
}


def reference_shard(name: str, global_layer: int | None, tp_rank: int, tp: int, *, tied: bool) -> torch.Tensor:
    """The part of a seeded full tensor that one tensor-parallel rank holds."""
    leaf = name.split(".", 3)[-1] if global_layer is not None else name
    if tied and leaf == "output_layer.weight":
        leaf = "embedding.word_embeddings.weight"
    shape, cut = next(value for end, value in SHAPES.items() if leaf.endswith(end))
    generator = torch.Generator().manual_seed(zlib.crc32(f"{global_layer}/{leaf}".encode()))
    full = torch.randn(shape, generator=generator) * 0.1
    if cut == "whole":
        return full + 1.0
    if cut == "columns":
        return full.chunk(tp, dim=1)[tp_rank]
    if cut == "gate and up":
        return torch.cat([half.chunk(tp)[tp_rank] for half in full.chunk(2)])
    return full.chunk(tp)[tp_rank]


def batches(count: int) -> Iterator[torch.Tensor]:
    """Micro-batches of token ids [BATCH, LENGTH + 1]; always the same ones."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        yield torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)


def forward_step(data: Iterator[torch.Tensor], model: nn.Module) -> tuple[torch.Tensor, Any]:
    tokens = next(data)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    mask = torch.triu(torch.ones(LENGTH, LENGTH), 1).bool()[None, None]
    output = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        mean = output.float().mean()
        return mean, {"loss": mean.item()}

    return output, loss


def train(
    *,
    topology: dict[str, int],
    num_steps: int = 3,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    fill: bool = True,
    **build: Any,
) -> list[float]:
    """Losses of a few SGD steps on this rank; empty on ranks without the last stage."""
    from megatron.core.distributed import finalize_model_grads

    from mbridge.megatron import build_chunks, forward_backward_func, init_parallel, read_topology, walk

    init_parallel(**topology)
    extra = build.pop("extra_transformer", {})
    chunks = build_chunks(
        small_qwen2(tied=tied),
        dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        wrap_with_ddp=True,
        ddp_config={"use_distributed_optimizer": False},
        extra_transformer={"finalize_model_grads_func": finalize_model_grads, **extra},
        **build,
    )
    place = read_topology()[1]
    if fill:
        for local in walk(chunks):
            local.tensor.data.copy_(
                reference_shard(local.name, local.global_layer, place.tp, topology.get("tp", 1), tied=tied)
            )
    schedule = forward_backward_func()
    losses: list[float] = []
    for _ in range(num_steps):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        data = [batches(NUM_MICROBATCHES) for _ in chunks]
        reports = schedule(
            forward_step_func=partial(forward_step),
            data_iterator=data if len(data) > 1 else data[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=NUM_MICROBATCHES,
            seq_length=LENGTH,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        if reports:
            losses.append(sum(report["loss"] for report in reports) / len(reports))
        with torch.no_grad():
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter -= 0.5 * parameter.main_grad.to(parameter.dtype)
    return losses


@pytest.fixture(scope="module")
def expected(ranks: Any) -> dict[bool, list[float]]:
    """Losses of one rank that holds everything, tied and not."""
    losses = {tied: ranks.run(train, 1, topology={}, tied=tied)[0] for tied in (False, True)}
    for series in losses.values():
        assert series[0] > series[1] > series[2]
    return losses


@pytest.mark.parametrize(
    ("world_size", "topology", "extra", "tied"),
    [
        (2, {"tp": 2}, {}, True),
        (4, {"tp": 4}, {}, False),
        (2, {"pp": 2}, {}, False),
        (2, {"pp": 2}, {}, True),
        (2, {"pp": 2}, {"num_layers_in_first_pipeline_stage": 1}, False),
        (2, {"pp": 2, "vpp": 2}, {}, True),
        (4, {"tp": 2, "pp": 2}, {}, True),
        (4, {"pp": 2}, {}, False),
    ],
    ids=["TP2 tied", "TP4, 2 query groups", "PP2", "PP2 tied", "PP2 uneven", "VPP2 tied", "TP2 PP2 tied", "PP2 DP2"],
)
def test_every_topology_computes_the_losses_of_one_rank(
    ranks: Any,
    expected: dict[bool, list[float]],
    world_size: int,
    topology: dict[str, int],
    extra: dict[str, int],
    tied: bool,
) -> None:
    results = [
        losses
        for losses in ranks.run(train, world_size, topology=topology, tied=tied, extra_transformer=extra)
        if losses
    ]
    assert results
    for losses in results:
        assert losses == pytest.approx(expected[tied], abs=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_trains(ranks: Any, expected: dict[bool, list[float]], dtype: torch.dtype) -> None:
    results = ranks.run(train, 2, topology={"pp": 2}, dtype=dtype)
    assert results[1] == pytest.approx(expected[False], abs=0.05)
    assert results[1][0] > results[1][-1]


def optimize(*, topology: dict[str, int], dtype: torch.dtype, distributed: bool) -> list[tuple[float, float]]:
    """(gradient norm, loss) of steps of Megatron-Core's own Adam; the loss is 0.0 on ranks without the last stage."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from mbridge.megatron import build_chunks, cpu_tensors, forward_backward_func, init_parallel, read_topology, walk

    init_parallel(**topology)
    half = dtype is torch.bfloat16
    (model,) = build_chunks(
        small_qwen2(),
        dtype=dtype,
        bf16=half,
        wrap_with_ddp=True,
        ddp_config={"use_distributed_optimizer": distributed},
        extra_transformer={"finalize_model_grads_func": finalize_model_grads},
    )
    place = read_topology()[1]
    for local in walk(model):
        shard = reference_shard(local.name, local.global_layer, place.tp, topology.get("tp", 1), tied=False)
        local.tensor.data.copy_(shard)
    settings = OptimizerConfig(
        optimizer="adam", lr=0.01, bf16=half, params_dtype=dtype, use_distributed_optimizer=distributed, clip_grad=1.0
    )
    with cpu_tensors():
        optimizer = get_megatron_optimizer(settings, [model])
    steps: list[tuple[float, float]] = []
    for _ in range(3):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches(NUM_MICROBATCHES),
            model=model,
            num_microbatches=NUM_MICROBATCHES,
            seq_length=LENGTH,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        with cpu_tensors():
            succeeded, norm, _ = optimizer.step()
        assert succeeded
        steps.append((float(norm), sum(report["loss"] for report in reports) / NUM_MICROBATCHES))
    return steps


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed optimizer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_megatrons_optimizer_takes_the_same_steps_in_every_topology(
    ranks: Any, dtype: torch.dtype, distributed: bool
) -> None:
    """The norm counts each gradient once, so it is right only if the tensor-parallel attributes are."""
    (one,) = ranks.run(optimize, 1, topology={}, dtype=dtype, distributed=distributed)
    assert one[0][1] > one[1][1] > one[2][1]
    tolerance = 2e-5 if dtype is torch.float32 else 0.05
    for steps in ranks.run(optimize, 4, topology={"tp": 2}, dtype=dtype, distributed=distributed):
        for (norm, loss), (expected_norm, expected_loss) in zip(steps, one, strict=True):
            assert norm == pytest.approx(expected_norm, rel=tolerance, abs=tolerance)
            assert loss == pytest.approx(expected_loss, abs=tolerance)
