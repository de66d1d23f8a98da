"""Position-coded shards: every rank's pieces, exactly as the definition lays them out (reference.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mbridge.position_coded import differences, even_stages, family_rows
from tests.mbridge.reference import Model, padded_vocab

FAMILIES = ["llama", "qwen2", "qwen3"]


@pytest.mark.parametrize("naming", ["local", "te"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rank_holds_the_reference_shards(family: str, tp: int, naming: str) -> None:
    model = Model(family)
    assert model.vocab % 2 == 1 and model.groups < 4
    assert differences(model, family_rows(model), tp=tp, naming=naming) == []


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_query_groups_fewer_equal_and_more_than_ranks(tp: int, groups: int) -> None:
    model = Model(groups=groups)
    assert differences(model, family_rows(model), tp=tp) == []


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "stages",
    [
        even_stages(6, 2),
        even_stages(6, 3),
        [[0], [1, 2, 3, 4], [5]],
        [[0, 1, 2, 3, 4, 5], []],
        [[0, 2, 4], [1, 3, 5]],
    ],
    ids=["PP2", "PP3", "PP3 uneven", "PP2 with no layer on the last", "PP2 VPP3"],
)
@pytest.mark.parametrize("tp", [1, 2])
def test_pipeline_stages(tp: int, stages: list[list[int]], tied: bool) -> None:
    model = Model(layers=6, tied=tied)
    assert differences(model, family_rows(model), tp=tp, stages=stages) == []


@pytest.mark.parametrize("vocab", [1, 31, 32, 33])
@pytest.mark.parametrize(("tp", "divisor"), [(1, 1), (2, 1), (4, 8), (8, 5)])
def test_vocabulary_padding(vocab: int, tp: int, divisor: int) -> None:
    model = Model(vocab=vocab)
    padded = padded_vocab(vocab, tp, divisor)
    assert differences(model, family_rows(model), tp=tp, padded=padded) == []


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    tp=st.sampled_from([1, 2, 3, 4, 6]),
    groups=st.integers(1, 6),
    heads_a_group=st.integers(1, 3),
    head_dim=st.sampled_from([1, 2, 6]),
    ffn_a_rank=st.integers(1, 4),
    hidden=st.integers(1, 9),
    vocab=st.integers(1, 20),
    tied=st.booleans(),
    naming=st.sampled_from(["local", "te"]),
    split=st.integers(0, 3),
)
def test_any_sizes(
    family: str, tp: int, groups: int, heads_a_group: int, head_dim: int, ffn_a_rank: int, hidden: int, vocab: int,
    tied: bool, naming: str, split: int,
) -> None:  # fmt: skip
    heads = groups * heads_a_group
    model = Model(
        family, layers=3, hidden=hidden, ffn=ffn_a_rank * tp, heads=heads * tp, groups=groups * tp,
        head_dim=head_dim, vocab=vocab, tied=tied,
    )  # fmt: skip
    if heads * head_dim % tp == 0 and 2 * groups * head_dim % tp == 0:
        model = replace(model, heads=heads, groups=groups)  # boundaries inside groups, where the rows divide at all
    stages = [[0, 1, 2]] if split == 0 else [list(range(split)), list(range(split, 3))]
    assert differences(model, family_rows(model), tp=tp, stages=stages, naming=naming) == []
