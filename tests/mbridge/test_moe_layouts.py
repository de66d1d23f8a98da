"""Position-coded shards of MoE layers, latent attention and MTP layers: exactly as moe_reference.py lays them out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbridge.errors import ModelError, PlanError, TopologyError
from mbridge.hf_config import normalise
from mbridge.pieces import Box, Piece, Region, TensorSpec, join
from mbridge.plan import Table, check_owned, stored_by
from mbridge.topology import Coordinates, Topology
from tests.mbridge.moe_coded import MODELS, differences, load_differences, rows_of
from tests.mbridge.moe_reference import MoeModel, Place, local_tensors, place_of
from tests.mbridge.position_coded import even_stages

NAMINGS = [("te", "grouped"), ("te", "sequential"), ("local", "sequential"), ("local", "legacy")]
GRIDS = [(tp, ep, etp) for tp in (1, 2, 4) for ep in (1, 2, 4) for etp in (1, 2)]


@pytest.mark.parametrize(("naming", "experts"), NAMINGS, ids=[" ".join(pair) for pair in NAMINGS])
@pytest.mark.parametrize(("tp", "ep", "etp"), GRIDS, ids=[f"TP{t} EP{e} ETP{x}" for t, e, x in GRIDS])
@pytest.mark.parametrize("name", MODELS)
def test_every_rank_holds_the_reference_shards(
    name: str, tp: int, ep: int, etp: int, naming: Any, experts: Any
) -> None:
    model = MODELS[name]
    assert model.vocab % 2 == 1 and model.groups < 4
    assert differences(model, rows_of(model), tp=tp, ep=ep, etp=etp, naming=naming, experts=experts) == []


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize("topology", [(1, 2, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1), (1, 2, 2)], ids=str)
def test_each_replica_of_a_stage_owns_every_element_once(name: str, topology: tuple[int, int, int]) -> None:
    tp, ep, etp = topology
    model = MODELS[name]
    assert differences(model, rows_of(model), tp=tp, ep=ep, etp=etp, replicas=2) == []


STAGES = {
    "PP2": even_stages(4, 2),
    "PP2 uneven": [[0], [1, 2, 3]],
    "PP2 VPP2": [[0, 2], [1, 3]],
    "PP3 uneven": [[0], [1, 2], [3]],
    "PP2 with no layer on the last": [[0, 1, 2, 3], []],
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("name", MODELS)
def test_pipeline_stages(name: str, stages: str, tied: bool) -> None:
    model = replace(MODELS[name], layers=4, tied=tied)
    found = differences(model, rows_of(model), tp=2, ep=2, etp=1, stages=STAGES[stages], naming="te", experts="grouped")
    assert found == []


@pytest.mark.parametrize("experts", ["sequential", "grouped"])
@pytest.mark.parametrize("name", ["transformer_layer", "mtp_model_layer"])
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_both_names_of_the_layer_in_an_mtp_layer(family: str, name: str, experts: Any) -> None:
    model = replace(MODELS[family], num_mtp=2)
    found = differences(
        model, rows_of(model), tp=2, ep=2, etp=1, stages=[[0], [1]], naming="te", experts=experts, mtp_name=name
    )
    assert found == []


def test_an_mtp_layer_has_experts_whatever_the_decoder_has() -> None:
    """It lies behind the last layer, so `first_k_dense_replace` does not reach it."""
    model = MoeModel("deepseek_v3", layers=2, first_dense=2, num_mtp=1)
    assert differences(model, rows_of(model), tp=2, ep=4, etp=1) == []


@pytest.mark.parametrize(
    ("model", "dense"),
    [
        (MoeModel("qwen2_moe", layers=5, head_dim=3, sparse_step=2), [0, 2, 4]),
        (MoeModel("qwen2_moe", layers=5, head_dim=3, sparse_step=2, mlp_only=(1,)), [0, 1, 2, 4]),
        (MoeModel("qwen3_moe", layers=5, sparse_step=3), [0, 1, 3, 4]),
        (MoeModel("qwen3_moe", layers=3, mlp_only=(0, 1, 2)), [0, 1, 2]),
        (MoeModel("qwen3_moe", layers=3, sparse_step=4), [0, 1, 2]),
        (MoeModel("deepseek_v3", layers=3), []),
        (MoeModel("deepseek_v2", layers=3, first_dense=2), [0, 1]),
        (MoeModel("glm4_moe", layers=3, first_dense=1), [0]),
        (MoeModel("mixtral", layers=3), []),
    ],
    ids=lambda value: value.family if isinstance(value, MoeModel) else str(value),
)
def test_which_layers_are_dense(model: MoeModel, dense: list[int]) -> None:
    assert [layer for layer in range(model.layers) if model.is_dense(layer)] == dense
    assert differences(model, rows_of(model), tp=2, ep=2, etp=1) == []
    table = Table(rows_of(model), model.layers, torch.int64)
    for layer in range(model.layers):
        assert (table.match(f"decoder.layers.{layer}.mlp.router.weight") is None) is (layer in dense)
        assert (table.match(f"decoder.layers.{layer}.mlp.linear_fc1.weight") is None) is (layer not in dense)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    grid=st.sampled_from([*GRIDS, (3, 1, 3), (3, 3, 1), (1, 3, 2), (6, 3, 2), (2, 6, 1)]),
    naming=st.sampled_from(NAMINGS),
    local_experts=st.integers(1, 3),
    ffn=st.integers(1, 3),
    hidden=st.integers(1, 4),
    ranks=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    tied=st.booleans(),
    split=st.integers(0, 2),
)
def test_any_sizes(
    name: str, grid: tuple[int, int, int], naming: tuple[Any, Any], local_experts: int, ffn: int, hidden: int,
    ranks: tuple[int, int, int, int, int], tied: bool, split: int,
) -> None:  # fmt: skip
    tp, ep, etp = grid
    q_rank, kv_rank, nope, value, rope = ranks
    both = tp * etp  # a width that divides over either
    model = replace(
        MODELS[name], hidden=hidden * 12, heads=12, groups=2 if tp in (1, 2, 4) else 6,
        head_dim=hidden if name == "qwen2_moe" else 2 * value, ffn=ffn * tp, moe_ffn=ffn * both, shared_ffn=ffn * tp,
        num_experts=local_experts * ep, topk=1, nope=nope, value=value, tied=tied,
        q_rank=None if name == "moonlight" else q_rank * tp,
        kv_rank=kv_rank, rope=rope * tp - kv_rank % tp,  # their sum divides, they need not
    )  # fmt: skip
    layers = list(range(model.layers))
    stages = [layers] if split == 0 else [layers[:split], layers[split:]]
    found = differences(
        model, rows_of(model), tp=tp, ep=ep, etp=etp, stages=stages, naming=naming[0], experts=naming[1]
    )
    assert found == []


@settings(max_examples=100, deadline=None)
@given(
    num_experts=st.integers(1, 5), rows=st.integers(1, 4), columns=st.integers(1, 4), cuts=st.integers(1, 4),
    by_rows=st.booleans(),
)  # fmt: skip
def test_a_packed_region_joins_with_any_division_of_the_expert(
    num_experts: int, rows: int, columns: int, cuts: int, by_rows: bool
) -> None:
    """weight2 of GroupedMLP, whose experts lie transposed, from and to HF tensors cut into slabs along either dim."""
    packed = torch.arange(1, num_experts * rows * columns + 1).reshape(num_experts * columns, rows)
    pieces, slabs = [], []
    whole = {}
    for expert in range(num_experts):
        region = Region(expert * rows * columns, (rows, columns), (1, rows))
        pieces.append(Piece(f"e{expert}", Box.whole((rows, columns)), "packed", region))
        by_definition = torch.zeros((rows, columns), dtype=torch.int64)
        for i in range(rows):
            for j in range(columns):
                by_definition[i, j] = packed[expert * columns + j, i]
        whole[f"e{expert}"] = by_definition
        assert torch.equal(region.of(packed), by_definition)
        length = rows if by_rows else columns
        edges = sorted({0, length, *range(0, length, cuts)})
        for start, stop in itertools.pairwise(edges):
            box = Box((start, 0), (stop, columns)) if by_rows else Box((0, start), (rows, stop))
            slabs.append(Piece(f"e{expert}", box, f"e{expert}", _at(box, (rows, columns))))
    got = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    for copy in join(pieces, slabs):
        copy.destination.of(got[copy.destination_name]).copy_(copy.source.of(packed))
    assert all(torch.equal(got[name], whole[name]) for name in whole)
    back = torch.zeros_like(packed)
    for copy in join(slabs, pieces):
        copy.destination.of(back).copy_(copy.source.of(got[copy.source_name]))
    assert torch.equal(back, packed)


def _at(box: Box, shape: tuple[int, int]) -> Region:
    return Region(box.start[0] * shape[1] + box.start[1], box.shape, (shape[1], 1))


def specs_of(model: MoeModel, place: Place = Place(), **more: Any) -> list[TensorSpec]:  # noqa: B008 - frozen
    held = local_tensors(model, model.coded(), place, **more)
    return [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in held.items()]


def stored(model: MoeModel, specs: Sequence[TensorSpec], topology: Topology | None = None) -> Any:
    table = Table(rows_of(model), model.layers, torch.int64)
    return stored_by(table, topology or Topology(), Coordinates(), specs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_an_expert_bias_that_was_cast_is_refused(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]
    specs = [s._replace(dtype=dtype) if s.name.endswith("expert_bias") else s for s in specs_of(model)]
    with pytest.raises(ModelError, match=r"expert_bias' is torch\.\w+, expected torch\.float32 \(it must not be cast"):
        stored(model, specs)


def test_parts_of_an_moe_layer_that_are_not_there_are_listed() -> None:
    model = MODELS["qwen2_moe"]
    specs = specs_of(model)
    gone = {
        "decoder.layers.3.mlp.shared_experts.gate_weight",
        "decoder.layers.3.mlp.router.weight",
        "decoder.layers.3.mlp.experts.local_experts.5.linear_fc2.weight",
        "decoder.layers.1.mlp.linear_fc1.weight",
    }
    with pytest.raises(ModelError) as caught:
        stored(model, [spec for spec in specs if spec.name not in gone])
    text = str(caught.value)
    assert "layers.3.mlp.shared_experts.gate_weight: not in this model" in text
    assert "layers.3.mlp.router.weight: not in this model" in text
    assert "experts.local_experts.5.linear_fc2.weight: not in this model" in text
    assert "layers.1.mlp.linear_fc1.weight: not in this model" in text


def test_one_expert_more_than_the_rank_has_is_refused() -> None:
    model = MODELS["mixtral"]
    extra = TensorSpec("decoder.layers.0.mlp.experts.local_experts.4.linear_fc2.weight", (12, 8), torch.int64)
    with pytest.raises(ModelError, match=r"this rank has 4 of 8 experts \(ep=2\)"):
        stored(model, [*specs_of(model, place_of(0, 1, 2, 1)), extra], Topology(ep=2, dp=2))


@pytest.mark.parametrize("weight", ["weight1", "weight2"])
def test_a_packed_tensor_of_another_size_is_refused(weight: str) -> None:
    model = MODELS["mixtral"]
    specs = [
        spec._replace(shape=(spec.shape[0], spec.shape[1] + 1)) if spec.name.endswith(weight) else spec
        for spec in specs_of(model, experts="legacy")
    ]
    with pytest.raises(ModelError, match=rf"experts\.{weight}' has shape .*; 8 experts of"):
        stored(model, specs)


def test_experts_that_do_not_divide_are_refused() -> None:
    model = MODELS["mixtral"]
    with pytest.raises((ModelError, TopologyError), match="experts"):
        stored(model, specs_of(model), Topology(ep=3, dp=3))


def test_one_owner_less_or_more_is_seen() -> None:
    """The audit that `differences` relies on finds an expert that nobody, or two ranks, answer for."""
    model = MODELS["mixtral"]
    topology = Topology(ep=2, dp=2)
    table = Table(rows_of(model), model.layers, torch.int64)
    owned = [
        stored_by(table, topology, topology.coordinates(rank), specs_of(model, place_of(rank, 1, 2, 1))).owned
        for rank in range(2)
    ]
    check_owned(table.tensors(), owned)
    assert all(".experts." in piece.hf_name for piece in owned[1])
    for wrong in ([owned[0], owned[0]], owned[:1], [*owned, owned[1]]):
        with pytest.raises(PlanError):
            check_owned(table.tensors(), wrong)


def test_load_differences_sees_one_element() -> None:
    model = MODELS["deepseek_v3"]
    hf = model.coded()
    reference = local_tensors(model, hf, Place(), experts="legacy")
    found = stored(model, [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in reference.items()])
    assert load_differences(hf, reference, found) == []
    hf["model.layers.1.mlp.experts.3.up_proj.weight"][2, 1] = 0
    assert load_differences(hf, reference, found) == ["decoder.layers.1.mlp.experts.weight1 differs"]


def test_the_config_is_read_in_both_spellings() -> None:
    """Mixtral's num_local_experts, transformers 5's num_mtp_layers."""
    assert normalise({"num_local_experts": 4})["num_experts"] == 4
    assert normalise({"num_mtp_layers": 2})["num_nextn_predict_layers"] == 2
