"""Starting, reading and ending the parallel state, in worlds of several processes and in none."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from mbridge.errors import TopologyError
from mbridge.topology import Coordinates, Topology

PROGRAM_TIMEOUT_S = 90.0


def described(*, topology: dict[str, int]) -> tuple[Topology, Topology, Coordinates, dict[str, tuple[int, ...]]]:
    from mbridge.megatron import init_parallel, read_groups, read_topology

    started = init_parallel(**topology)
    init_parallel(**topology)  # the same sizes again: nothing to do
    found, place = read_topology()
    groups = read_groups()
    axes = ("tp", "cp", "dp", "pp", "ep", "etp", "edp", "stage")
    return started, found, place, {axis: getattr(groups, axis).ranks for axis in axes}


@pytest.mark.parametrize(
    ("world_size", "sizes", "expected"),
    [
        (1, {}, Topology()),
        (4, {"tp": 2, "pp": 2}, Topology(tp=2, pp=2)),
        (4, {"tp": 2}, Topology(tp=2, dp=2)),
        (2, {"pp": 2, "vpp": 3}, Topology(pp=2, vpp=3)),
        (4, {"tp": 2, "ep": 2, "etp": 1}, Topology(tp=2, ep=2, etp=1, dp=2)),
        (4, {"pp": 2, "ep": 2}, Topology(pp=2, ep=2, dp=2)),
        (4, {"cp": 2, "tp": 2}, Topology(cp=2, tp=2)),
    ],
    ids=str,
)
def test_topology_and_place_as_megatron_reports_them(
    ranks: Any, world_size: int, sizes: dict[str, int], expected: Topology
) -> None:
    for rank, (started, found, place, groups) in enumerate(ranks.run(described, world_size, topology=sizes)):
        assert started == found == expected
        assert place == expected.coordinates(rank)
        for axis in ("tp", "cp", "dp", "pp", "ep", "etp", "edp"):
            assert groups[axis].index(rank) == getattr(place, axis)
        assert len(groups["stage"]) == expected.stage_size
        assert rank in groups["stage"]


def in_another_order() -> tuple[Topology, Coordinates]:
    from megatron.core import parallel_state

    from mbridge.megatron import ensure_parallel_state, read_topology

    parallel_state.initialize_model_parallel(2, 1, order="dp-tp-cp-ep-pp", expert_tensor_parallel_size=1)
    ensure_parallel_state()
    return read_topology()


def test_a_state_in_another_rank_order_is_read_as_it_is(ranks: Any) -> None:
    places = [place for _, place in ranks.run(in_another_order, 4)]
    assert [(place.dp, place.tp) for place in places] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def refusals() -> list[str]:
    from mbridge.megatron import ensure_parallel_state, init_parallel, read_groups, read_topology

    messages: list[str] = []

    def refused(call: Any, **sizes: int) -> None:
        with pytest.raises(TopologyError) as caught:
            call(**sizes)
        messages.append(str(caught.value))

    refused(read_topology)
    refused(read_groups)
    refused(ensure_parallel_state)
    refused(init_parallel, tp=3)
    refused(init_parallel, tp=0)
    refused(init_parallel, tp=2, vpp=2)
    refused(init_parallel, tp=2, ep=2, etp=2)
    init_parallel(tp=2)
    refused(init_parallel, pp=2)
    ensure_parallel_state()  # uses what is there
    assert read_topology()[0] == Topology(tp=2)
    return messages


def test_what_does_not_fit_is_refused_and_can_be_put_right(ranks: Any) -> None:
    (messages, _) = ranks.run(refusals, 2)
    expected = [
        "not initialised; call",
        "not initialised; call",
        "one of 2 processes, but Megatron-Core's parallel state is not initialised",
        "tp * pp * cp = 3 * 1 * 1 = 3 must divide the 2 ranks",
        "tp * pp * cp = 0 * 1 * 1 = 0",
        "vpp=2 needs pp > 1",
        "etp * ep = 2 * 2 must divide the 2 ranks",
        "asked for Topology(tp=1, pp=2",
    ]
    for message, part in zip(messages, expected, strict=True):
        assert part in message


def test_a_plain_process_becomes_a_world_of_one_rank_and_says_so() -> None:
    program = """
        import logging
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        from mbridge.megatron import destroy_parallel, ensure_parallel_state, read_topology
        ensure_parallel_state()
        ensure_parallel_state()
        print(read_topology()[0])
        destroy_parallel()
        destroy_parallel()
    """
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=PROGRAM_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(Topology())
    assert done.stderr.count("mbridge: no parallel state found: starting Megatron-Core in a world of one rank") == 1
    assert "Warning" not in done.stderr


def as_torchrun_starts_it() -> tuple[str, Topology, int]:
    """What happens in a process that torchrun started, before torch.distributed is initialised."""
    from mbridge.megatron import destroy_parallel, ensure_parallel_state, init_parallel, read_topology

    rank, world_size = dist.get_rank(), dist.get_world_size()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = [probe.getsockname()[1]]
        dist.broadcast_object_list(port)
    destroy_parallel()
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port[0]),
    }
    with mock.patch.dict(os.environ, environment):
        with pytest.raises(TopologyError) as caught:
            ensure_parallel_state()
        init_parallel(tp=2)
        topology, place = read_topology()
    return str(caught.value), topology, place.tp


def test_under_torchrun_a_bare_start_is_refused_and_init_parallel_reads_the_environment(ranks: Any) -> None:
    for rank, (message, topology, tp) in enumerate(ranks.run(as_torchrun_starts_it, 2)):
        assert "one of 2 processes" in message
        assert "init_parallel(tp=..., pp=...)" in message
        assert topology == Topology(tp=2)
        assert tp == rank
