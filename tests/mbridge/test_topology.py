"""Rank arithmetic against nested loops in Megatron-Core's order: tp fastest, then cp, dp, pp."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbridge.errors import TopologyError
from mbridge.topology import Coordinates, Topology

sizes = st.integers(1, 3)


@given(tp=sizes, cp=sizes, dp=sizes, pp=sizes)
def test_ranks_are_numbered_tp_first_pp_last(tp: int, cp: int, dp: int, pp: int) -> None:
    topology = Topology(tp=tp, pp=pp, cp=cp, dp=dp)
    rank = 0
    for pipeline in range(pp):
        for data in range(dp):
            for context in range(cp):
                for tensor in range(tp):
                    at = topology.coordinates(rank)
                    assert (at.tp, at.cp, at.dp, at.pp) == (tensor, context, data, pipeline)
                    assert (topology.replica(at) == 0) == (data == context == 0)
                    rank += 1
    assert rank == topology.world_size == topology.stage_size * pp
    with pytest.raises(TopologyError, match=f"rank {rank} is outside"):
        topology.coordinates(rank)


@given(etp=sizes, ep=sizes, edp=sizes, pp=sizes)
def test_experts_divide_the_ranks_of_a_stage_again(etp: int, ep: int, edp: int, pp: int) -> None:
    topology = Topology(tp=1, dp=etp * ep * edp, pp=pp, ep=ep, etp=etp)
    places = Counter()
    for rank in range(topology.world_size):
        at = topology.coordinates(rank)
        places[at.pp, at.etp, at.ep, at.edp] += 1
    assert len(places) == topology.world_size
    assert {place[1:] for place in places} == {(a, b, c) for a in range(etp) for b in range(ep) for c in range(edp)}


@pytest.mark.parametrize("axis", ["tp", "pp", "vpp", "ep", "etp", "cp", "dp"])
@pytest.mark.parametrize("size", [0, -1, 1.5, "2"])
def test_sizes_are_positive_integers(axis: str, size: object) -> None:
    with pytest.raises(TopologyError, match=f"{axis} must be a positive integer"):
        Topology(**{axis: size})  # type: ignore[arg-type]


def test_impossible_combinations() -> None:
    with pytest.raises(TopologyError, match="vpp=2 needs pp > 1"):
        Topology(vpp=2)
    with pytest.raises(TopologyError, match="must divide the 4 ranks"):
        Topology(tp=2, dp=2, ep=3)
    assert Topology(tp=4).expert_tp == 4
    assert Topology(tp=4, etp=1).expert_tp == 1
    assert Topology().coordinates(0) == Coordinates()
