"""A planted error must fail the position-coded check: if it passes, the check is blind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest

from mbridge.errors import MBridgeError
from mbridge.families import Row
from mbridge.ops import QKV, Column, GateUp, Replicated, Segment, Vocab
from mbridge.pieces import Shape
from tests.mbridge.position_coded import differences, even_stages, family_rows
from tests.mbridge.reference import Model

# hidden == heads * head_dim == ffn, so that no mutant is found out by the shape of a whole tensor alone.
SQUARE = Model(layers=2, hidden=32, ffn=32, heads=8, groups=4, head_dim=4)


def ends(row: Row, name: str) -> bool:
    return row.mcore[0].endswith(name)


def change(model: Model, name: str, edit: Callable[[Row], Row]) -> list[Row]:
    rows = family_rows(model)
    assert sum(ends(row, name) for row in rows) == 1
    return [edit(row) if ends(row, name) else row for row in rows]


def swap_hf(rows: Sequence[Row], one: str, other: str) -> list[Row]:
    names = {one: other, other: one}
    swapped = [replace(row, hf=tuple(names.get(name, name) for name in row.hf)) for row in rows]
    assert swapped != list(rows)
    return swapped


@dataclass(frozen=True, slots=True)
class ReversedGroups(QKV):
    def segments(self, shapes: Sequence[Shape], size: int, rows: int) -> Sequence[Segment]:
        by_group = QKV.segments(self, shapes, size, rows)
        return [s for g in reversed(range(self.num_groups)) for s in by_group[3 * g : 3 * g + 3]]


@dataclass(frozen=True, slots=True)
class NotInterleaved(QKV):
    def segments(self, shapes: Sequence[Shape], size: int, rows: int) -> Sequence[Segment]:
        return [Segment(tensor, 0, shape[0]) for tensor, shape in enumerate(shapes)]


@dataclass(frozen=True, slots=True)
class WholeGateThenUp(GateUp):
    """[gate; up] cut into chunks: what one gets by forgetting that each rank has both."""

    def segments(self, shapes: Sequence[Shape], size: int, rows: int) -> Sequence[Segment]:
        return [Segment(tensor, 0, shape[0]) for tensor, shape in enumerate(shapes)]


@dataclass(frozen=True, slots=True)
class PaddedAtFront(Vocab):
    def segments(self, shapes: Sequence[Shape], size: int, rows: int) -> Sequence[Segment]:
        return list(reversed(Vocab.segments(self, shapes, size, rows)))


@dataclass(frozen=True, slots=True)
class OneRowLate(Column):
    """Rows 1.. then row 0."""

    def segments(self, shapes: Sequence[Shape], size: int, rows: int) -> Sequence[Segment]:
        return [Segment(0, 1, shapes[0][0]), Segment(0, 0, 1)]


LAYER = "model.layers.{layer}."
QWEN3 = replace(SQUARE, family="qwen3")
TIED = replace(SQUARE, tied=True)

MUTANTS: dict[str, tuple[Model, Callable[[], list[Row]], int]] = {
    "gate and up swapped": (
        SQUARE,
        lambda: swap_hf(family_rows(SQUARE), LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"),
        1,
    ),
    "gate and up not cut together": (
        SQUARE,
        lambda: change(SQUARE, "linear_fc1.weight", lambda row: replace(row, op=WholeGateThenUp())),
        2,
    ),
    "k and v swapped": (
        SQUARE,
        lambda: swap_hf(family_rows(SQUARE), LAYER + "self_attn.k_proj.weight", LAYER + "self_attn.v_proj.weight"),
        1,
    ),
    "k and v biases swapped": (
        SQUARE,
        lambda: swap_hf(family_rows(SQUARE), LAYER + "self_attn.k_proj.bias", LAYER + "self_attn.v_proj.bias"),
        1,
    ),
    "q_norm and k_norm swapped": (
        QWEN3,
        lambda: swap_hf(family_rows(QWEN3), LAYER + "self_attn.q_norm.weight", LAYER + "self_attn.k_norm.weight"),
        1,
    ),
    "the layer's two norms swapped": (
        SQUARE,
        lambda: swap_hf(
            family_rows(SQUARE), LAYER + "input_layernorm.weight", LAYER + "post_attention_layernorm.weight"
        ),
        1,
    ),
    "bias dropped": (SQUARE, lambda: [row for row in family_rows(SQUARE) if not ends(row, "linear_qkv.bias")], 1),
    "groups reversed": (
        SQUARE,
        lambda: change(SQUARE, "linear_qkv.weight", lambda row: replace(row, op=ReversedGroups(4))),
        1,
    ),
    "wrong number of groups": (
        SQUARE,
        lambda: change(SQUARE, "linear_qkv.weight", lambda row: replace(row, op=QKV(2))),
        1,
    ),
    "q, k, v not interleaved": (
        SQUARE,
        lambda: change(SQUARE, "linear_qkv.weight", lambda row: replace(row, op=NotInterleaved(4))),
        1,
    ),
    "bias not interleaved": (
        SQUARE,
        lambda: change(SQUARE, "linear_qkv.bias", lambda row: replace(row, op=NotInterleaved(4))),
        1,
    ),
    "o_proj column parallel": (
        SQUARE,
        lambda: change(SQUARE, "linear_proj.weight", lambda row: replace(row, op=Column())),
        2,
    ),
    "down_proj rotated by a row": (
        SQUARE,
        lambda: change(SQUARE, "linear_fc2.weight", lambda row: replace(row, op=OneRowLate())),
        1,
    ),
    "vocabulary padded at the front": (
        SQUARE,
        lambda: change(SQUARE, "word_embeddings.weight", lambda row: replace(row, op=PaddedAtFront())),
        2,
    ),
    "head replicated": (
        SQUARE,
        lambda: change(SQUARE, "output_layer.weight", lambda row: replace(row, op=Replicated())),
        2,
    ),
    "head read from the embedding": (
        SQUARE,
        lambda: change(SQUARE, "output_layer.weight", lambda row: replace(row, hf=("model.embed_tokens.weight",))),
        1,
    ),
    "final norm read from a layer": (
        SQUARE,
        lambda: change(
            SQUARE, "final_layernorm.weight", lambda row: replace(row, hf=("model.layers.0.input_layernorm.weight",))
        ),
        1,
    ),
    "every layer read from layer 0": (
        SQUARE,
        lambda: change(
            SQUARE, "linear_fc2.weight", lambda row: replace(row, hf=("model.layers.0.mlp.down_proj.weight",))
        ),
        1,
    ),
    "the tied copy sent too": (
        TIED,
        lambda: change(TIED, "output_layer.weight", lambda row: replace(row, copy=False)),
        1,
    ),
    "an owner taken for a copy": (
        SQUARE,
        lambda: change(SQUARE, "linear_fc2.weight", lambda row: replace(row, copy=True)),
        1,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_error_is_seen(name: str) -> None:
    model, rows, tp = MUTANTS[name]
    stages = even_stages(model.layers, 2)
    assert differences(model, family_rows(model), tp=tp, stages=stages) == [], "the check fails without the error"
    try:
        found = differences(model, rows(), tp=tp, stages=stages)
    except MBridgeError as error:
        found = [str(error)]
    assert found


def test_one_rank_cannot_tell_column_from_row_parallel() -> None:
    """Why the check has to run at tp > 1: the plainest of all errors is invisible on one rank."""
    rows = change(SQUARE, "linear_fc2.weight", lambda row: replace(row, op=Column()))
    assert differences(SQUARE, rows, tp=1) == []
    with pytest.raises(MBridgeError, match=r"linear_fc2\.weight.*\[16, 32\] was expected"):
        differences(SQUARE, rows, tp=2)
