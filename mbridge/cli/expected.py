"""Which local tensors a rank will have, from the family's table and the topology alone: no model, no process group.

Megatron-Core's own rules for what a stage holds are repeated here; tests compare them with models that it built.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from ..errors import TopologyError
from ..families import Row
from ..ops import ColumnOrReplicated, Replicated, Vocab, local_shape
from ..pieces import TensorSpec
from ..plan import Table
from ..topology import Coordinates, Topology

Naming = Literal["te", "local"]

# What Megatron-LM's main branch calls the layer inside an MTP layer; 0.16 calls it transformer_layer.
_LATER_NAME = "mtp_model_layer"


class Expected(NamedTuple):
    """A local tensor of a rank (layer number global), its row, and what {layer} and {expert} of the row stand for."""

    spec: TensorSpec
    row: Row
    layer: int | None
    expert: int | None  # counted from the rank's first


def fitting_topology(tp: int, pp: int, vpp: int, ep: int, etp: int | None) -> Topology:
    """The topology with the fewest data-parallel replicas in which the experts' sizes fit."""
    sizes = {"tp": tp, "pp": pp, "vpp": vpp, "ep": ep, "etp": tp if etp is None else etp}
    wrong = [f"{axis} = {size}" for axis, size in sizes.items() if size < 1]
    if wrong:
        raise TopologyError(f"sizes must be positive: {', '.join(wrong)}")
    dp = math.lcm(tp, ep * sizes["etp"]) // tp
    return Topology(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=sizes["etp"], dp=dp)


def layers_of_rank(
    num_layers: int, topology: Topology, at: Coordinates, first: int | None = None, last: int | None = None
) -> list[int]:
    """Decoder layers of a rank, chunk after chunk; `first` and `last` are the numbers in those stages if uneven.

    Source: megatron/core/transformer/transformer_block.py `get_num_layers_to_build`, transformer_layer.py
    `get_transformer_layer_offset` (0.16.1).
    """
    given = {0: first, topology.pp - 1: last}
    if topology.pp == 1 and (first is not None or last is not None):
        raise TopologyError("an uneven split needs pp > 1")
    left = num_layers - (first or 0) - (last or 0)
    num_even = topology.pp - sum(size is not None for size in given.values())
    if left < 0 or left % max(num_even, 1) or (left and not num_even):
        raise TopologyError(
            f"{num_layers} layers cannot be split over pp={topology.pp} stages with {first} in the first and {last} in "
            "the last (None: as the others); what those leave over must divide over the others"
        )
    even = left // max(num_even, 1)
    counts = [even if (size := given.get(stage)) is None else size for stage in range(topology.pp)]
    odd = [count for count in counts if count % topology.vpp]
    if odd:
        raise TopologyError(f"vpp={topology.vpp} must divide the layers of each stage, which are {counts}")
    per_chunk = [count // topology.vpp for count in counts]
    offset = sum(per_chunk[: at.pp])
    return [
        chunk * sum(per_chunk) + offset + number for chunk in range(topology.vpp) for number in range(per_chunk[at.pp])
    ]


def expected_tensors(
    table: Table,
    topology: Topology,
    at: Coordinates,
    *,
    naming: Naming,
    padded_vocab: int,
    layers: Sequence[int],
) -> list[Expected]:
    """The local tensors of the rank at `at`, whose decoder layers are `layers`, in the order of the table.

    Raises TopologyError if a size does not divide what it cuts.
    """
    first, last = at.pp == 0, at.pp == topology.pp - 1
    has_mtp = any(row.hf_offset for row in table.rows)
    mine = set(layers)
    after_layers = False
    found: list[Expected] = []
    for row, layer in table.in_layer_order():
        after_layers = after_layers or layer is not None
        if layer is not None:
            held = last if row.hf_offset else layer in mine
        elif after_layers:
            # On one stage, a tied output layer uses the embedding itself.
            held = last and not (row.copy and first)
        else:
            held = first or (last and has_mtp)  # MTP layers embed tokens again, where they are
        if held:
            found += _of_row(row, layer, table, topology, naming, padded_vocab)
    return found


def _of_row(
    row: Row, layer: int | None, table: Table, topology: Topology, naming: Naming, padded_vocab: int
) -> Iterator[Expected]:
    names = [name for name in row.mcore if _LATER_NAME not in name.split(".")]
    name = names[0 if naming == "te" else -1]
    duplicated = naming == "te" and isinstance(row.op, ColumnOrReplicated)
    shape = local_shape(
        Replicated() if duplicated else row.op,
        row.shapes,
        topology.expert_tp if row.num_experts else topology.tp,
        padded_vocab if isinstance(row.op, Vocab) else None,
    )
    if row.num_experts % topology.ep:
        raise TopologyError(f"ep={topology.ep} must divide the {row.num_experts} experts")
    for expert in range(row.num_experts // topology.ep) if row.num_experts else (None,):
        local = name.replace("{layer}", str(layer)).replace("{expert}", str(expert))
        yield Expected(TensorSpec(local, shape, row.dtype or table.dtype), row, layer, expert)
