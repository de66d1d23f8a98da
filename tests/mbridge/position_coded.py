"""The position-coded check: does a table describe what the definition says? For the layout and mutation tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mbridge.families import Row, find_family
from mbridge.hf_config import normalise
from mbridge.pieces import Piece, TensorSpec
from mbridge.plan import Stored, Table, stored_by
from mbridge.topology import Coordinates, Topology
from tests.mbridge.reference import Model, local_tensors

UNWRITTEN = -1


def family_rows(model: Model) -> list[Row]:
    return list(find_family(model.family).rows(normalise(model.config())))


def even_stages(num_layers: int, pp: int) -> list[list[int]]:
    share = num_layers // pp
    return [list(range(stage * share, (stage + 1) * share)) for stage in range(pp)]


def differences(
    model: Model,
    rows: Sequence[Row],
    *,
    tp: int = 1,
    stages: Sequence[Sequence[int]] | None = None,
    naming: str = "local",
    padded: int | None = None,
) -> list[str]:
    """What differs between the table `rows` and the definition, over every rank of tp x len(stages).

    `stages` lists the layers of each pipeline stage. Loading must give each rank the reference shards exactly, and
    putting together what the ranks own must give each HF tensor exactly, each element from one rank.
    Raises what planning raises.
    """
    stages = [list(range(model.layers))] if stages is None else stages
    hf = model.coded()
    table = Table(rows, model.layers, torch.int64)
    topology = Topology(tp=tp, pp=len(stages))
    found: list[str] = []
    rebuilt = {name: torch.full_like(tensor, UNWRITTEN) for name, tensor in hf.items()}
    times_sent = {name: torch.zeros_like(tensor) for name, tensor in hf.items()}
    for pp, layers in enumerate(stages):
        for rank in range(tp):
            where = f"pp {pp} tp {rank}"
            reference = local_tensors(
                model, hf, rank=rank, tp=tp, naming=naming, layers=layers,
                first=pp == 0, last=pp == len(stages) - 1, padded=padded,
            )  # fmt: skip
            specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in reference.items()]
            stored = stored_by(table, topology, Coordinates(tp=rank, pp=pp, etp=rank), specs)
            found += [f"{where}: {text}" for text in _load_differences(hf, reference, stored)]
            for piece in stored.owned:
                source = piece.region.of(reference[piece.local_name].contiguous())
                rebuilt[piece.hf_name][piece.box.slices] = source
                times_sent[piece.hf_name][piece.box.slices] += 1
    for name, tensor in hf.items():
        if not torch.equal(rebuilt[name], tensor):
            found.append(f"export: {name} differs")
        if not bool((times_sent[name] == 1).all()):
            found.append(f"export: {name} has elements that are not sent exactly once")
    listed = [spec.name for spec in table.tensors()]
    if sorted(listed) != sorted(hf):
        found.append(f"export: the table lists {sorted(set(listed) ^ set(hf))} wrongly, or some twice")
    return found


def _load_differences(hf: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], stored: Stored) -> list[str]:
    loaded = {name: torch.full_like(tensor, UNWRITTEN).contiguous() for name, tensor in reference.items()}
    written = {name: torch.zeros_like(tensor) for name, tensor in loaded.items()}
    for piece in stored.pieces:
        piece.region.of(loaded[piece.local_name]).copy_(hf[piece.hf_name][piece.box.slices])
        piece.region.of(written[piece.local_name]).add_(1)
    for name, region in stored.padding:
        region.of(loaded[name]).zero_()
        region.of(written[name]).add_(1)
    found = [f"{name} differs" for name, tensor in reference.items() if not torch.equal(loaded[name], tensor)]
    return found + [f"{name} is not written exactly once" for name, n in written.items() if not bool((n == 1).all())]


def numel_of(pieces: Sequence[Piece]) -> int:
    return sum(piece.box.numel for piece in pieces)
