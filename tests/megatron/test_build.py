"""build_chunks: what it refuses, and what reaches Megatron-Core."""

from __future__ import annotations

import logging
import re
import zlib
from typing import Any

import pytest
import torch
from small_models import BATCH, LENGTH, VOCAB, small_mla, small_moe, small_qwen2

from mbridge.errors import ConfigError, TopologyError, UnsupportedConfigError
from mbridge.megatron.config import check_divisible
from mbridge.topology import Topology


@pytest.mark.parametrize(
    ("topology", "changes", "problems"),
    [
        (Topology(tp=3, dp=2), {}, ["num_attention_heads=4", "vocab_size=64", "num_query_groups=2"]),
        (Topology(tp=4), {}, []),
        (Topology(tp=4), {"ffn_hidden_size": 50}, ["ffn_hidden_size=50"]),
        (Topology(pp=3), {}, ["pp=3 * vpp=1 must divide num_layers=4"]),
        (Topology(pp=3), {"num_layers_in_first_pipeline_stage": 2}, []),
        (Topology(pp=2, vpp=3), {}, ["pp=2 * vpp=3 must divide num_layers=4"]),
        (Topology(ep=3, dp=3), {"num_moe_experts": 4}, ["ep=3 must divide num_moe_experts=4"]),
        (Topology(etp=2, dp=2), {"moe_ffn_hidden_size": 15}, ["etp=2 must divide moe_ffn_hidden_size=15"]),
    ],
    ids=str,
)
def test_sizes_that_do_not_divide_are_all_listed(
    topology: Topology, changes: dict[str, Any], problems: list[str]
) -> None:
    config = small_qwen2(**changes)
    if not problems:
        check_divisible(config.transformer, config.gpt, topology)
        return
    with pytest.raises(TopologyError) as caught:
        check_divisible(config.transformer, config.gpt, topology)
    assert str(caught.value).count("\n") == len(problems)
    for problem in problems:
        assert problem in str(caught.value)


def refusals() -> None:
    from mbridge.megatron import build_chunks

    def refused(error: type[Exception], match: str, **arguments: Any) -> pytest.ExceptionInfo[Exception]:
        with pytest.raises(error, match=match) as caught:
            build_chunks(small_qwen2(), **{"dtype": torch.float32, "bf16": False, **arguments})
        return caught

    refused(ConfigError, "fp16=True and bf16=True exclude", fp16=True, bf16=True)
    refused(ConfigError, r"bf16=True casts .* but dtype=torch\.float32", bf16=True)
    refused(ConfigError, "spec must be", spec="apex")
    refused(UnsupportedConfigError, "spec='te' cannot be built: TransformerEngine is not installed", spec="te")
    refused(TypeError, "TransformerConfig has no field no_such", extra_transformer={"no_such": 1})
    refused(TypeError, "GPTModel takes no argument no_such", extra_gpt={"no_such": 1})
    refused(TypeError, "DistributedDataParallelConfig.*no_such", wrap_with_ddp=True, ddp_config={"no_such": 1})
    caught = refused(UnsupportedConfigError, "Megatron-Core refuses", extra_transformer={"recompute_granularity": "x"})
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(TypeError, match="unexpected keyword"):
        build_chunks(small_qwen2(), dtype=torch.float32, bf16=False, no_such=1)  # type: ignore[call-arg]


def test_refusals_name_what_is_wrong(ranks: Any) -> None:
    ranks.run(refusals, 1)


def impossible_split() -> str:
    from mbridge.megatron import build_chunks, init_parallel

    init_parallel(pp=2, vpp=2)
    extra = {"num_layers_in_first_pipeline_stage": 1}  # one layer cannot make two chunks
    with pytest.raises((TopologyError, UnsupportedConfigError)) as caught:
        build_chunks(small_qwen2(), dtype=torch.float32, bf16=False, extra_transformer=extra)
    return str(caught.value)


def test_a_split_that_megatron_refuses_is_our_error(ranks: Any) -> None:
    for message in ranks.run(impossible_split, 2):
        assert message.startswith("Megatron-Core refuses")


def configs() -> None:
    from mbridge.megatron import build_chunks, init_parallel, transformer_config, unwrap

    init_parallel(tp=2)
    extra = {"layernorm_epsilon": 0.5}
    (chunk,) = build_chunks(small_qwen2(), dtype=torch.bfloat16, extra_transformer=extra)
    alone = vars(transformer_config(small_qwen2(), dtype=torch.bfloat16, extra_transformer=extra))
    for name, value in vars(unwrap(chunk).config).items():
        assert callable(value) or alone[name] == value, name


def test_the_config_alone_is_that_of_the_chunks(ranks: Any) -> None:
    ranks.run(configs, 2)


def callbacks_and_overrides() -> None:
    from mbridge.megatron import build_chunks, init_parallel, read_topology, unwrap

    init_parallel(pp=2, vpp=2)
    stage = read_topology()[1].pp
    calls: list[tuple[Any, dict[str, Any]]] = []

    def value_head(model: Any, **keywords: Any) -> None:
        calls.append((model, keywords))
        if keywords["post_process"]:
            model.output_layer.weight = torch.nn.Parameter(torch.zeros(1, keywords["config"].hidden_size))

    marker = object()
    chunks = build_chunks(
        small_qwen2(),
        dtype=torch.bfloat16,
        post_model_creation_callbacks=[value_head],
        extra_transformer={"layernorm_epsilon": 0.5, "attention_backend": "auto"},
        extra_gpt={"max_sequence_length": 99},
        hf_config=marker,
        initialize=False,
    )
    assert [unwrap(chunk) for chunk in chunks] == [model for model, _ in calls]
    assert [(keywords["pre_process"], keywords["post_process"]) for _, keywords in calls] == (
        [(True, False), (False, False)] if stage == 0 else [(False, False), (False, True)]
    )
    for index, (model, keywords) in enumerate(calls):
        assert keywords["hf_config"] is marker
        assert keywords["config"] is model.config
        assert model.vp_stage == index
        assert model.config.init_method(torch.zeros(50)).std() > 0  # works, although it was not used
        assert model.max_sequence_length == 99
        assert model.config.layernorm_epsilon == 0.5
        assert model.config.attention_backend.name == "auto"
        assert model.config.pipeline_dtype is torch.bfloat16
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    if stage == 1:
        assert unwrap(chunks[-1]).output_layer.weight.shape == (1, 32)


def test_callbacks_and_overrides_reach_every_chunk(ranks: Any) -> None:
    ranks.run(callbacks_and_overrides, 2)


def weights(*, topology: dict[str, int], **arguments: Any) -> dict[str, tuple[torch.Tensor, bool, int]]:
    from mbridge.megatron import build_chunks, init_parallel, walk

    init_parallel(**topology, seed=9)
    chunks = build_chunks(small_qwen2(), dtype=torch.float32, bf16=False, **arguments)
    return {
        local.name: (
            local.tensor.detach().clone(),
            local.tensor.tensor_model_parallel,  # type: ignore[attr-defined]
            local.tensor.partition_dim,  # type: ignore[attr-defined]
        )
        for local in walk(chunks)
    }


def test_cpu_initialization_draws_the_same_model_for_every_tensor_parallel_size(ranks: Any) -> None:
    (whole,) = ranks.run(weights, 1, topology={}, use_cpu_initialization=True)
    halves = ranks.run(weights, 2, topology={"tp": 2}, use_cpu_initialization=True)
    for name, (full, parallel, dim) in whole.items():
        for rank, half in enumerate(halves):
            if name.endswith("linear_fc1.weight"):  # a rank holds its part of gate, then its part of up
                expected = torch.cat([part.chunk(2)[rank] for part in full.chunk(2)])
            else:
                expected = full.chunk(2, dim)[rank] if parallel else full
            assert torch.equal(half[name][0], expected), name


def test_each_rank_draws_its_own_shard_and_equal_replicas(ranks: Any) -> None:
    first, second = ranks.run(weights, 2, topology={"tp": 2})
    for name, (tensor, parallel, _) in first.items():
        constant = tensor.std() == 0  # norms and biases
        assert torch.equal(tensor, second[name][0]) == (not parallel or bool(constant)), name
    qkv = first["decoder.layers.1.self_attention.linear_qkv.weight"][0]
    assert qkv.std().item() == pytest.approx(0.02, rel=0.2)


def test_without_initialization_the_tensor_parallel_attributes_are_there(ranks: Any) -> None:
    (drawn,) = ranks.run(weights, 1, topology={})
    (bare,) = ranks.run(weights, 1, topology={}, initialize=False)
    assert {name: value[1:] for name, value in bare.items()} == {name: value[1:] for name, value in drawn.items()}


def moe_logits(*, topology: dict[str, int]) -> tuple[torch.Tensor, list[str]]:
    from mbridge.megatron import build_chunks, init_parallel, walk

    init_parallel(**topology)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mbridge").addHandler(handler)
    (model,) = build_chunks(
        small_moe(),
        dtype=torch.float32,
        bf16=False,
        extra_transformer={"moe_token_dispatcher_type": "alltoall"},
    )
    logging.getLogger("mbridge").removeHandler(handler)
    for local in walk(model):  # every expert alike, so that no expert's number matters
        name = re.sub(r"local_experts\.\d+", "local_experts", local.name)
        torch.manual_seed(zlib.crc32(name.encode()))
        local.tensor.data.normal_(0, 0.1)
    tokens = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % VOCAB
    mask = torch.triu(torch.ones(LENGTH, LENGTH), 1).bool()[None, None]
    logits = model(tokens, torch.arange(LENGTH).expand(BATCH, -1), mask)
    logits.square().mean().backward()
    return logits.detach(), records


def test_experts_over_two_ranks_compute_as_one(ranks: Any) -> None:
    ((one, records),) = ranks.run(moe_logits, 1, topology={})
    assert any("moe_token_dispatcher_type='alltoall' cannot be used; 'allgather'" in record for record in records)
    for logits, _ in ranks.run(moe_logits, 2, topology={"ep": 2}):
        torch.testing.assert_close(logits, one, atol=1e-5, rtol=1e-5)


def mla_logits(*, topology: dict[str, int], q_lora_rank: int | None, **transformer: Any) -> torch.Tensor:
    from mbridge.megatron import build_chunks, init_parallel

    init_parallel(**topology)
    (model,) = build_chunks(
        small_mla(q_lora_rank=q_lora_rank, **transformer),
        dtype=torch.float32,
        bf16=False,
        use_cpu_initialization=True,
    )
    tokens = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % VOCAB
    mask = torch.triu(torch.ones(LENGTH, LENGTH), 1).bool()[None, None]
    logits = model(tokens, torch.arange(LENGTH).expand(BATCH, -1), mask)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return logits.detach()


@pytest.mark.parametrize("q_lora_rank", [None, 16])
def test_latent_attention_with_local_layers_computes_the_same_over_two_ranks(
    ranks: Any, q_lora_rank: int | None
) -> None:
    (one,) = ranks.run(mla_logits, 1, topology={}, q_lora_rank=q_lora_rank)
    halves = ranks.run(mla_logits, 2, topology={"tp": 2}, q_lora_rank=q_lora_rank)
    assert one.std() > 1e-3
    torch.testing.assert_close(torch.cat(halves, dim=-1), one, atol=1e-5, rtol=1e-5)


def mtp_names(*, topology: dict[str, int]) -> list[tuple[int, str, int | None]]:
    from mbridge.megatron import build_chunks, init_parallel, walk

    init_parallel(**topology)
    chunks = build_chunks(small_qwen2(mtp_num_layers=1), dtype=torch.float32, bf16=False)
    return [(local.chunk, local.name, local.global_layer) for local in walk(chunks)]


def test_multi_token_prediction_lives_on_the_last_stage(ranks: Any) -> None:
    first, last = ranks.run(mtp_names, 2, topology={"pp": 2})
    assert not [name for _, name, _ in first if name.startswith("mtp.")]
    of_mtp = {name: layer for _, name, layer in last if name.startswith("mtp.")}
    assert {"mtp.layers.0.enorm.weight", "mtp.layers.0.transformer_layer.mlp.linear_fc1.weight"} <= of_mtp.keys()
    assert set(of_mtp.values()) == {0}
    assert (0, "embedding.word_embeddings.weight", None) in last


def expert_bias() -> torch.dtype:
    from mbridge.megatron import build_chunks, walk

    (model,) = build_chunks(
        small_moe(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True), dtype=torch.bfloat16
    )
    return next(local.tensor.dtype for local in walk(model) if local.name.endswith("router.expert_bias"))


def test_expert_bias_stays_in_fp32(ranks: Any) -> None:
    assert ranks.run(expert_bias, 1) == [torch.float32]
