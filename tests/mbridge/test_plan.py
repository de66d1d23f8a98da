"""Tables and plans: what a table refuses, who owns what, and how ranks find out that they disagree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mbridge.errors import ModelError, PlanError, TopologyError
from mbridge.ops import QKV, Column, GateUp, Replicated, RowParallel, Vocab, layout, local_shape
from mbridge.pieces import Box, TensorSpec
from mbridge.plan import Stored, Table, TrainerPlan, agreement, check_owned, digest, first_difference, stored_by
from mbridge.topology import Coordinates, Topology
from tests.mbridge.position_coded import family_rows, numel_of
from tests.mbridge.reference import Model, local_tensors

MODEL = Model(layers=2)


def table_of(model: Model = MODEL, dtype: torch.dtype = torch.int64) -> Table:
    return Table(family_rows(model), model.layers, dtype)


def specs_of(model: Model = MODEL, *, rank: int = 0, tp: int = 1, **stage: object) -> list[TensorSpec]:
    held = local_tensors(model, model.coded(), rank=rank, tp=tp, **stage)  # type: ignore[arg-type]
    return [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in held.items()]


def stored(specs: list[TensorSpec], *, tp: int = 1, rank: int = 0, model: Model = MODEL) -> Stored:
    return stored_by(table_of(model), Topology(tp=tp), Coordinates(tp=rank, etp=rank), specs)


def edited(name: str, **changes: object) -> list[TensorSpec]:
    specs = specs_of()
    assert any(spec.name == name for spec in specs)
    return [spec._replace(**changes) if spec.name == name else spec for spec in specs]


def test_a_table_lists_the_tensors_of_the_checkpoint() -> None:
    for model in (MODEL, Model("llama", tied=True), Model("qwen3", layers=3)):
        specs = table_of(model, torch.bfloat16).tensors()
        assert {spec.name: spec.shape for spec in specs} == model.hf_shapes()
        assert {spec.dtype for spec in specs} == {torch.bfloat16}


def test_tensors_are_in_layer_order_and_those_of_a_parameter_together() -> None:
    groups = [tuple(spec.name for spec in group) for group in table_of().groups()]
    layer = [name.split(".")[2] if name.startswith("model.layers") else None for group in groups for name in group]
    assert layer == [None, *["0"] * 12, *["1"] * 12, None, None]
    at = "model.layers.1."
    assert tuple(f"{at}self_attn.{p}_proj.weight" for p in "qkv") in groups
    assert tuple(f"{at}self_attn.{p}_proj.bias" for p in "qkv") in groups
    assert (at + "mlp.gate_proj.weight", at + "mlp.up_proj.weight") in groups


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.self_attention.linear_qkv.weights",
        "xdecoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers..self_attention.linear_qkv.weight",
        "decoder.layers.0.mlp.linear_fc3.weight",
        "decoder.layers.2.mlp.linear_fc1.weight",
        "output_layer.bias",
    ],
)
def test_an_unknown_parameter_is_refused(name: str) -> None:
    assert table_of().match(name) is None
    with pytest.raises(ModelError, match="no row of the family's table has this name") as caught:
        stored([*specs_of(), TensorSpec(name, (3,), torch.int64)])
    assert repr(name) in str(caught.value)


def test_every_problem_is_listed() -> None:
    specs = edited("decoder.layers.1.mlp.linear_fc2.weight", shape=(24, 41))
    specs = [spec for spec in specs if spec.name != "decoder.layers.0.self_attention.linear_qkv.bias"]
    specs = [
        spec._replace(dtype=torch.float16) if spec.name == "decoder.layers.0.input_layernorm.weight" else spec
        for spec in specs
    ]
    with pytest.raises(ModelError) as caught:
        stored([*specs, TensorSpec("extra.weight", (1,), torch.int64)])
    text = str(caught.value)
    assert "'decoder.layers.1.mlp.linear_fc2.weight' has shape [24, 41]" in text
    assert "[24, 40] was expected" in text
    assert "decoder.layers.0.self_attention.linear_qkv.bias: not in this model" in text
    assert "'decoder.layers.0.input_layernorm.weight' is torch.float16, expected torch.int64" in text
    assert "'extra.weight' [1]" in text


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("decoder.layers.0.self_attention.linear_qkv.weight", (48, 25)),
        ("decoder.layers.0.self_attention.linear_qkv.weight", (47, 24)),
        ("decoder.layers.0.self_attention.linear_qkv.weight", (48,)),
        ("decoder.layers.0.self_attention.linear_qkv.bias", (48, 1)),
        ("decoder.layers.0.mlp.linear_fc1.weight", (40, 24)),
        ("decoder.layers.0.mlp.linear_fc2.weight", (40, 24)),
        ("decoder.layers.0.mlp.linear_fc2.weight", (24,)),
        ("decoder.final_layernorm.weight", ()),
        ("decoder.final_layernorm.weight", (23,)),
        ("output_layer.weight", (37, 1)),
        ("output_layer.weight", (36, 24)),
        ("embedding.word_embeddings.weight", (38, 23)),
    ],
)
def test_a_shape_that_the_config_does_not_make_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=r"was expected|not the one its config describes"):
        stored(edited(name, shape=shape))


def test_each_element_of_a_stage_has_one_owner() -> None:
    tp = 4
    owned = [stored(specs_of(rank=rank, tp=tp), tp=tp, rank=rank).owned for rank in range(tp)]
    check_owned(table_of().tensors(), owned)
    norms = [piece for rank in owned[1:] for piece in rank if "norm" in piece.hf_name]
    assert norms == []
    whole = sum(tensor.numel() for tensor in MODEL.coded().values())
    assert sum(map(numel_of, owned)) == whole
    with pytest.raises(PlanError, match="two pieces claim"):
        check_owned(table_of().tensors(), [*owned, owned[0]])
    with pytest.raises(PlanError, match="cover"):
        check_owned(table_of().tensors(), owned[1:])
    with pytest.raises(PlanError, match=r"rank 0 answers for 'model\.embed_tokens"):
        check_owned(table_of().tensors()[1:], owned)


def test_a_tied_copy_is_stored_and_not_owned() -> None:
    model = replace(MODEL, tied=True)
    found = stored(specs_of(model, layers=[1], first=False), model=model)
    assert "output_layer.weight" in {piece.local_name for piece in found.pieces}
    assert "output_layer.weight" not in {piece.local_name for piece in found.owned}


def test_replicas_own_nothing_and_share_the_digest() -> None:
    topology = Topology(tp=1, dp=2)
    plans = []
    for at in (Coordinates(dp=0), Coordinates(dp=1)):
        held = stored_by(table_of(), topology, at, specs_of())
        plans.append(TrainerPlan.of(table_of(), topology, at, held))
    assert plans[0].pieces == plans[1].pieces
    assert plans[0].owned == plans[0].pieces
    assert plans[1].owned == ()
    assert plans[0].digest == plans[1].digest
    assert plans[0].tensors == tuple(table_of().tensors())
    assert [name for group in plans[0].fusion_groups for name in group] == [spec.name for spec in plans[0].tensors]


def test_the_digest_tells_plans_apart() -> None:
    base = agreement(Topology(tp=2), table_of().tensors())
    others = [
        agreement(Topology(tp=4), table_of().tensors()),
        agreement(Topology(tp=2), table_of(dtype=torch.bfloat16).tensors()),
        agreement(Topology(tp=2), table_of(replace(MODEL, layers=3)).tensors()),
        agreement(Topology(tp=2), table_of(replace(MODEL, ffn=48)).tensors()),
        agreement(Topology(tp=2), table_of(Model("llama")).tensors()),
    ]
    assert len({digest(lines) for lines in [base, *others]}) == 1 + len(others)
    assert first_difference([base, base, base]) is None
    assert first_difference([base, base, others[3]]) == (
        "rank 0 has model.layers.0.mlp.gate_proj.weight [40, 24] torch.int64, "
        "rank 2 has model.layers.0.mlp.gate_proj.weight [48, 24] torch.int64"
    )
    assert first_difference([base, base[:-1]]) == "rank 0 has lm_head.weight [37, 24] torch.int64, rank 1 has nothing"


def test_sizes_that_do_not_divide_are_refused() -> None:
    for op, shapes in [
        (Column(), [(6, 4)]),
        (RowParallel(), [(4, 6)]),
        (Vocab(), [(6, 4)]),
        (QKV(2), [(4, 1), (1, 1), (1, 1)]),
        (GateUp(), [(6, 4), (6, 4)]),
    ]:
        with pytest.raises(TopologyError, match="do not divide over 4 ranks"):
            local_shape(op, shapes, 4)
    assert local_shape(Replicated(), [(6, 4)], 4) == (6, 4)
    assert local_shape(GateUp(), [(6, 4), (6, 4)], 2) == (6, 4)
    with pytest.raises(TopologyError):  # 4 + 4 rows divide over 8 ranks, gate's 4 do not
        local_shape(GateUp(), [(4, 4), (4, 4)], 8)


def test_a_chunk_boundary_may_fall_inside_a_head() -> None:
    found = layout(QKV(1), "qkv", [(4, 2), (2, 2), (2, 2)], "local", (2, 2), 1, 4)
    assert [(piece.hf_name, piece.box) for piece in found.pieces] == [("q", Box((2, 0), (4, 2)))]
