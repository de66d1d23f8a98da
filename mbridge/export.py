"""A model's tensors as HF tensors: to every rank, to one sender a stage, or into files.

Joins plan.py (what each rank of the stage stores), gather.py (collectives) and checkpoint.py (files) for `Bridge`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup

from .checkpoint import Checkpoint, ShardWriter, commit, discard, new_save_id, plan_shards
from .errors import MBridgeError, ModelError, PlanError, listed
from .gather import (
    Bucket,
    BucketPlan,
    broadcast_buckets,
    check_agreement,
    exchange,
    gather_buckets,
    on_all,
    plan_buckets,
    raise_on_all,
    world_group,
)
from .megatron import ParallelGroups
from .megatron.parallel import Group, replica_group
from .pieces import Piece, TensorSpec
from .plan import Stored, Table, agreement, digest, stored_by
from .spelling import Spelling
from .topology import Coordinates, Topology


@dataclass(frozen=True, slots=True)
class RankLayout:
    """Where one rank stands, and which tensors it stores (layer numbers global)."""

    topology: Topology
    at: Coordinates
    table: Table
    specs: tuple[TensorSpec, ...]
    stored: Stored

    def check_complete(self) -> None:
        """Raise ModelError if this rank lacks a parameter that it must have, wherever the layers are."""
        first, last = self.at.pp == 0, self.at.pp == self.topology.pp - 1
        missing = self.table.missing_in_stage(
            (spec.name for spec in self.specs), first=first, last=last, ep=self.topology.ep
        )
        if missing:
            raise ModelError(
                f"pipeline stage {self.at.pp} of {self.topology.pp} lacks parameters of the model that its config "
                f"describes (pass every chunk that get_model() returned):\n{listed(missing)}"
            )

    def owned_by_replica(self) -> list[Sequence[Piece]]:
        """Owned pieces of each rank of this replica of the stage. Their tensors have the same names: none is asked."""
        others = self.topology.replica_members(self.at)
        return [stored_by(self.table, self.topology, at, self.specs).owned for at in others]


class StageExport:
    """The export of one model, planned. Making one is collective; so is running each of its iterators."""

    def __init__(
        self,
        layout: RankLayout,
        tensors: Mapping[str, torch.Tensor],
        groups: ParallelGroups,
        spelling: Spelling,
        *,
        bucket_bytes: int,
        strict: bool,
    ) -> None:
        self.layout = layout
        self.tensors = tensors
        self.groups = groups
        self.world = world_group()
        self._stage_group = collective(replica_group(groups))
        self._pipeline_group = collective(groups.pp)
        every = spelling.groups(layout.table.groups())
        lines = agreement(layout.topology, [spec for group in every for spec in group])
        lines.append(f"bucket_bytes={bucket_bytes}, strict={strict}")
        check_agreement(digest(lines), lines, self.world)
        # What one rank stores is worked out by all of its stage (owned_by_replica), so they have to store the same.
        held = [f"{spec.name} {list(spec.shape)}" for spec in layout.specs]
        on_all(lambda: check_agreement(digest(held), held, self._stage_group), self.world)
        owned = [spelling.pieces(pieces, with_copies=True) for pieces in layout.owned_by_replica()]
        names = {piece.hf_name for rank in owned for piece in rank}
        mine = [number for number, group in enumerate(every) if group[0].name in names]
        by_stage = exchange(mine, self._pipeline_group)
        self.stages = [[every[number] for number in numbers] for numbers in by_stage]
        """Each stage's tensors, in layer order, those of one parameter together."""

        def plan() -> list[list[BucketPlan]]:
            _check_stages(every, by_stage, strict=strict)
            return [
                plan_buckets(stage, owned if number == layout.at.pp else None, bucket_bytes)
                for number, stage in enumerate(self.stages)
            ]

        self._plans = on_all(plan, self.world)

    def to_every_rank(self) -> Iterator[Bucket]:
        """Every stage's buckets, in memory of their own."""
        return broadcast_buckets(self._plans, self.tensors, self._stage_group, self._pipeline_group)

    def to_sender(self, *, reuse: bool) -> Iterator[Bucket]:
        """This stage's buckets on its first tp rank; the iterator is empty on the others."""
        plans = self._plans[self.layout.at.pp]
        buckets = gather_buckets(plans, self.tensors, self._stage_group, to_all=False, reuse=reuse)
        return (bucket for bucket in buckets if bucket is not None)


def _check_stages(every: Sequence[Sequence[TensorSpec]], by_stage: Sequence[Sequence[int]], *, strict: bool) -> None:
    """Raise PlanError if two stages answer for one tensor or, when `strict`, if none does."""
    num_owners = Counter(number for numbers in by_stage for number in numbers)
    absent = [spec.name for number, group in enumerate(every) if not num_owners[number] for spec in group]
    if absent and strict:
        raise PlanError(f"no pipeline stage has the parameters of these HF tensors:\n{listed(absent)}")
    doubled = [spec.name for number, group in enumerate(every) if num_owners[number] > 1 for spec in group]
    if doubled:
        raise PlanError(f"several pipeline stages have the parameters of these HF tensors:\n{listed(doubled)}")


def collective(group: Group) -> ProcessGroup | None:
    """The process group to call, None where there is nobody else in it."""
    return group.group if group.size > 1 else None


def save(
    export: StageExport,
    folder: Path,
    *,
    by_stage: bool,
    original: Checkpoint | None,
    config: Mapping[str, Any],
    source: Path | None,
) -> None:
    """Write a checkpoint, by rank 0 alone or by the sender of each stage. Collective. See `Bridge.save_weights`."""
    at, rank, world = export.layout.at, export.groups.rank, export.world
    stages = [[_as_saved(spec, original) for group in stage for spec in group] for stage in export.stages]
    writers = stages if by_stage else [[spec for stage in stages for spec in stage]]
    shards = plan_shards(writers, original.files if original is not None else None)
    save_id = exchange(new_save_id(), world)[0]
    first_replica = export.layout.topology.replica(at) == 0
    writes = export.layout.topology.rank_in_stage(at) == 0 and (by_stage or at.pp == 0)
    mine = shards[at.pp if by_stage else 0]
    writer = on_all(lambda: ShardWriter(folder, mine, save_id) if writes else None, world)
    try:
        error = None
        if first_replica:
            error = _drain(export.to_sender(reuse=True) if by_stage else export.to_every_rank(), writer)
        raise_on_all(error, world)
        if rank == 0:
            every = [shard for group in shards for shard in group]
            error = _caught(lambda: commit(folder, every, save_id, config=config, source=source))
        raise_on_all(error, world)
    finally:
        if writer is not None:
            discard(folder, save_id)


def _drain(buckets: Iterator[Bucket], writer: ShardWriter | None) -> MBridgeError | None:
    """Write what comes. After an error the rest is still received, since the other ranks take part in sending it."""
    error: MBridgeError | None = None
    for bucket in buckets:
        if writer is not None and error is None:
            error = _caught(lambda bucket=bucket: writer.add_all(bucket.tensors))  # type: ignore[misc]
    if writer is not None and error is None:
        error = _caught(writer.finish)
    return error


def _caught(action: Callable[[], None]) -> MBridgeError | None:
    try:
        action()
    except MBridgeError as error:
        return error
    return None


def _as_saved(spec: TensorSpec, original: Checkpoint | None) -> TensorSpec:
    """With the dtype that the original checkpoint has for it, if that is a float."""
    known = original is not None and spec.name not in original.odd_dtypes
    found = original.specs.get(spec.name) if original is not None and known else None
    return spec if found is None else spec._replace(dtype=found.dtype)
