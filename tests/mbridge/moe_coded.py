"""The position-coded check for families with experts, over every rank of a world. For the layout and mutation tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from mbridge.errors import PlanError
from mbridge.families import Row, find_family
from mbridge.hf_config import normalise
from mbridge.pieces import Piece, TensorSpec
from mbridge.plan import Stored, Table, check_owned, stored_by
from mbridge.topology import Coordinates, Topology
from tests.mbridge.moe_reference import Experts, MoeModel, local_tensors, place_of

UNWRITTEN = -1

# One model of each shape that a family can take.
MODELS: dict[str, MoeModel] = {
    # Without a head_dim of its own: hidden / heads.
    "qwen2_moe": MoeModel("qwen2_moe", layers=4, head_dim=3, sparse_step=2, mlp_only=(1,)),
    "qwen3_moe": MoeModel("qwen3_moe", mlp_only=(1,), tied=True),
    "mixtral": MoeModel("mixtral", layers=2),
    "deepseek_v3": MoeModel("deepseek_v3", layers=2, first_dense=1, num_mtp=1),
    "moonlight": MoeModel("deepseek_v3", layers=2, first_dense=1, q_rank=None, num_shared=1),
    "deepseek_v2": MoeModel("deepseek_v2", layers=2, first_dense=1),
    "glm4_moe": MoeModel("glm4_moe", layers=2, first_dense=1, num_mtp=2),
}


def rows_of(model: MoeModel) -> list[Row]:
    return list(find_family(model.family).rows(normalise(model.config())))


def differences(
    model: MoeModel,
    rows: Sequence[Row],
    *,
    tp: int = 1,
    ep: int = 1,
    etp: int = 1,
    replicas: int = 1,
    stages: Sequence[Sequence[int]] | None = None,
    naming: Literal["te", "local"] = "local",
    experts: Experts = "sequential",
    mtp_name: str = "transformer_layer",
) -> list[str]:
    """What differs between the table `rows` and the definition, over every rank of each stage.

    A stage has `replicas` times the ranks that hold each weight once, max(tp, etp * ep). Loading must give each rank
    the reference shards exactly; what the ranks of each replica own must make up each HF tensor exactly, each element
    from one rank. Raises what planning raises.
    """
    stages = [list(range(model.layers))] if stages is None else stages
    hf = model.coded()
    table = Table(rows, model.layers, torch.int64)
    replica_size = max(tp, etp * ep)
    stage_size = replicas * replica_size
    topology = Topology(tp=tp, pp=len(stages), ep=ep, etp=etp, dp=stage_size // tp)
    found: list[str] = []
    owned: dict[int, list[Sequence[Piece]]] = {replica: [] for replica in range(replicas)}
    rebuilt = [{name: torch.full_like(tensor, UNWRITTEN) for name, tensor in hf.items()} for _ in range(replicas)]
    for pp, layers in enumerate(stages):
        for rank in range(stage_size):
            where, place = f"stage {pp} rank {rank}", place_of(rank, tp, ep, etp)
            reference = local_tensors(
                model, hf, place, naming=naming, experts=experts, layers=layers,
                first=pp == 0, last=pp == len(stages) - 1, mtp_name=mtp_name,
            )  # fmt: skip
            specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in reference.items()]
            at = Coordinates(
                tp=place.tp, pp=pp, dp=rank // tp, etp=place.etp, ep=place.ep, edp=rank // (etp * ep)
            )  # fmt: skip
            if topology.coordinates(pp * stage_size + rank) != at:
                found.append(f"{where}: topology says {topology.coordinates(pp * stage_size + rank)}, not {at}")
            stored = stored_by(table, topology, at, specs)
            found += [f"{where}: {text}" for text in load_differences(hf, reference, stored)]
            replica = rank // replica_size
            if topology.replica(at) != replica:
                found.append(f"{where}: in replica {topology.replica(at)}, not {replica}")
            owned[replica].append(stored.owned)
            for piece in stored.owned:
                source = piece.region.of(reference[piece.local_name].contiguous())
                rebuilt[replica][piece.hf_name][piece.box.slices] = source
    for replica in range(replicas):
        found += [
            f"export of replica {replica}: {name} differs"
            for name, tensor in hf.items()
            if not torch.equal(rebuilt[replica][name], tensor)
        ]
        try:
            check_owned(table.tensors(), owned[replica])
        except PlanError as error:
            found.append(f"export of replica {replica}: {error}")
    listed = {spec.name: spec for spec in table.tensors()}
    if sorted(spec.name for spec in table.tensors()) != sorted(hf):
        found.append(f"the table lists {sorted(listed.keys() ^ hf.keys())} wrongly, or some twice")
    found += [
        f"the table has {listed[name]} for {list(tensor.shape)} {tensor.dtype}"
        for name, tensor in hf.items()
        if name in listed and (listed[name].shape, listed[name].dtype) != (tuple(tensor.shape), tensor.dtype)
    ]
    return found


def load_differences(hf: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], stored: Stored) -> list[str]:
    """How what the pieces load differs from the reference shards."""
    loaded = {name: torch.full_like(tensor, UNWRITTEN).contiguous() for name, tensor in reference.items()}
    written = {name: torch.zeros_like(tensor).contiguous() for name, tensor in loaded.items()}
    for piece in stored.pieces:
        piece.region.of(loaded[piece.local_name]).copy_(hf[piece.hf_name][piece.box.slices])
        piece.region.of(written[piece.local_name]).add_(1)
    for name, region in stored.padding:
        region.of(loaded[name]).zero_()
        region.of(written[name]).add_(1)
    found = [f"{name} differs" for name, tensor in reference.items() if not torch.equal(loaded[name], tensor)]
    return found + [f"{name} is not written exactly once" for name, n in written.items() if not bool((n == 1).all())]
