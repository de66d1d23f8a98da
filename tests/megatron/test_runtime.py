"""The CPU runtime: undone exactly, and random streams and recomputation by the rules of a GPU."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import LENGTH, small_qwen2

from mbridge.megatron import RUNTIME, CpuRuntime, cpu_tensors
from mbridge.megatron.runtime import FIXES, Fix

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the fixes apply only without CUDA")


def attributes() -> dict[str, dict[str, int]]:
    """The identity of every attribute of every module that a fix touches."""
    modules = {fix.module: importlib.import_module(fix.module) for fix in FIXES}
    return {name: {key: id(value) for key, value in vars(module).items()} for name, module in modules.items()}


@pytest.fixture(autouse=True)
def bare() -> Iterator[None]:
    """Another test in this process may have started the runtime and left it on, as programs do."""
    was_installed = RUNTIME.installed
    RUNTIME.uninstall()
    yield
    if was_installed:
        RUNTIME.install()


@without_cuda
def test_undone_exactly_and_idempotent() -> None:
    runtime = CpuRuntime()
    before = attributes()
    runtime.install()
    first = attributes()
    assert first != before
    assert runtime.installed
    runtime.install()
    assert attributes() == first
    assert torch.cuda.current_device() == torch.device("cpu")
    torch.cuda.synchronize()
    runtime.uninstall()
    assert attributes() == before
    runtime.uninstall()
    assert attributes() == before
    assert not runtime.installed


@without_cuda
def test_undone_when_the_block_raises() -> None:
    before = attributes()
    with pytest.raises(ZeroDivisionError), CpuRuntime():
        _ = 1 / 0
    assert attributes() == before


@without_cuda
def test_what_someone_else_changed_since_is_left_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    before = torch.cuda.synchronize
    try:
        with caplog.at_level(logging.WARNING, "mbridge"), CpuRuntime():
            torch.cuda.synchronize = theirs = lambda: None
        assert torch.cuda.synchronize is theirs
        assert "torch.cuda.synchronize was changed after mbridge replaced it" in caplog.text
    finally:
        torch.cuda.synchronize = before


def test_a_fix_whose_condition_does_not_hold_changes_nothing() -> None:
    fix = Fix("math", "pi", replacement=lambda: 3, needed=lambda module: module.pi > 4, why="", until="")
    with CpuRuntime((fix,)) as runtime:
        assert not runtime.installed


def test_every_fix_says_why_and_until_when() -> None:
    assert all(fix.why and fix.until for fix in FIXES)
    assert len({fix.name for fix in FIXES}) == len(FIXES)


@without_cuda
def test_cuda_means_the_cpu_only_inside_cpu_tensors() -> None:
    with cpu_tensors():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, device=torch.device("cuda", 0)).device.type == "cpu"
        assert torch.ones(2).to("cuda:0").device.type == "cpu"
        assert torch.ones(2).to(device="cuda", dtype=torch.float16).dtype is torch.float16
        tensor = torch.ones(2)
        assert tensor.cuda() is tensor
        assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
        assert torch.zeros(2, device="meta").device.type == "meta"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


def after_a_whole_life() -> tuple[bool, bool]:
    from mbridge.megatron import build_chunks, destroy_parallel, init_parallel

    destroy_parallel_was_clean = not RUNTIME.installed
    before = attributes()
    init_parallel()
    build_chunks(small_qwen2(), dtype=torch.float32, bf16=False)
    assert RUNTIME.installed
    destroy_parallel()
    return destroy_parallel_was_clean, attributes() == before


def test_destroy_parallel_undoes_the_runtime_after_building(ranks: Any) -> None:
    assert ranks.run(after_a_whole_life, 1) == [(True, True)]


def drawn() -> tuple[list[float], list[float], list[float]]:
    """Draws inside the tensor-parallel stream, outside, and inside after the same seed again."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    from mbridge.megatron import init_parallel

    def draw() -> tuple[list[float], list[float]]:
        with get_cuda_rng_tracker().fork():
            inside = torch.rand(2).tolist()
        outside = torch.rand(2).tolist()
        with get_cuda_rng_tracker().fork():
            inside += torch.rand(2).tolist()
        return inside, outside

    init_parallel(tp=2, seed=5)
    inside, outside = draw()
    torch.manual_seed(5)
    model_parallel_cuda_manual_seed(5)
    again, _ = draw()
    with pytest.raises(KeyError, match="'nowhere' was never seeded"), get_cuda_rng_tracker().fork("nowhere"):
        pass
    return inside, outside, again


def test_random_streams_differ_between_tensor_parallel_ranks_only_inside_the_fork(ranks: Any) -> None:
    (inside0, outside0, again0), (inside1, outside1, again1) = ranks.run(drawn, 2)
    assert inside0 == again0
    assert inside1 == again1
    assert set(inside0).isdisjoint(inside1)
    assert len(set(inside0)) == 4
    assert outside0 == outside1


def gradient(*, recompute: bool) -> list[float]:
    from mbridge.megatron import build_chunks, init_parallel

    init_parallel(seed=3)
    settings = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    (model,) = build_chunks(
        small_qwen2(hidden_dropout=0.3, attention_dropout=0.3),
        dtype=torch.float32,
        bf16=False,
        extra_transformer=settings if recompute else {},
    )
    torch.manual_seed(11)
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH)
    mask = torch.triu(torch.ones(LENGTH, LENGTH), 1).bool()[None, None]
    model(tokens, torch.arange(LENGTH).expand(2, -1), mask, labels=tokens).mean().backward()
    return [parameter.grad.double().sum().item() for parameter in model.parameters()]


def test_recomputation_repeats_the_dropout_of_the_forward(ranks: Any) -> None:
    plain = ranks.run(gradient, 1, recompute=False)[0]
    recomputed = ranks.run(gradient, 1, recompute=True)[0]
    assert recomputed == pytest.approx(plain, rel=1e-5, abs=1e-5)
    assert any(abs(value) > 1e-3 for value in plain)
