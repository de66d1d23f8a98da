"""Parallel sizes and a rank's place in them. Arithmetic only: no process group is touched here.

Ranks are numbered as Megatron-Core numbers them by default (`order="tp-cp-ep-dp-pp"` of
megatron/core/parallel_state.py): tensor parallel varies fastest, pipeline slowest. Experts re-divide the ranks of one
pipeline stage as etp x ep x edp, again fastest first.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import TopologyError


@dataclass(frozen=True, slots=True)
class Topology:
    """Sizes of the parallel axes. `vpp` is the number of model chunks that a pipeline rank holds."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    cp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        if self.etp is None:
            object.__setattr__(self, "etp", self.tp)
        for axis in ("tp", "pp", "vpp", "ep", "etp", "cp", "dp"):
            size = getattr(self, axis)
            if not isinstance(size, int) or size < 1:
                raise TopologyError(f"{axis} must be a positive integer, found {size!r}")
        if self.vpp > 1 and self.pp == 1:
            raise TopologyError(f"vpp={self.vpp} needs pp > 1: interleaved stages exist only in a pipeline")
        if self.stage_size % (self.expert_tp * self.ep):
            raise TopologyError(
                f"etp * ep = {self.expert_tp} * {self.ep} must divide the {self.stage_size} ranks of a pipeline stage "
                f"(tp * cp * dp = {self.tp} * {self.cp} * {self.dp})"
            )

    @property
    def expert_tp(self) -> int:
        """Tensor-parallel size inside experts, `tp` unless set."""
        assert self.etp is not None  # __post_init__ fills it in
        return self.etp

    @property
    def stage_size(self) -> int:
        """Ranks in one pipeline stage."""
        return self.tp * self.cp * self.dp

    @property
    def replica_size(self) -> int:
        """Consecutive ranks of a stage that together hold every one of its weights: tp, or etp * ep if that is more."""
        dense, expert = self.tp, self.expert_tp * self.ep
        if max(dense, expert) % min(dense, expert):
            raise TopologyError(f"tp = {dense} and etp * ep = {expert}: one must be a multiple of the other")
        return max(dense, expert)

    def replica(self, at: Coordinates) -> int:
        """Which of its stage's replicas (blocks of `replica_size` ranks) a rank belongs to."""
        return self.rank_in_stage(at) // self.replica_size

    def rank_in_stage(self, at: Coordinates) -> int:
        return at.tp + self.tp * (at.cp + self.cp * at.dp)

    def owns(self, at: Coordinates, axis: str | None, *, expert: bool) -> bool:
        """Whether, inside its replica, the rank answers for a parameter cut over `axis` (None: whole on each rank)."""
        size, index = (self.expert_tp * self.ep, at.etp) if expert else (self.tp, at.tp)
        return self.rank_in_stage(at) % self.replica_size < size and (axis is not None or index == 0)

    def replica_members(self, at: Coordinates) -> list[Coordinates]:
        """The coordinates of every rank in this rank's replica, in rank order."""
        first = at.pp * self.stage_size + self.replica(at) * self.replica_size
        return [self.coordinates(first + number) for number in range(self.replica_size)]

    @property
    def world_size(self) -> int:
        return self.stage_size * self.pp

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` (0 <= rank < world_size) stands on each axis, in Megatron-Core's default order."""
        if not 0 <= rank < self.world_size:
            raise TopologyError(f"rank {rank} is outside a world of {self.world_size} ranks ({self})")
        pp, in_stage = divmod(rank, self.stage_size)
        dp_cp, tp = divmod(in_stage, self.tp)
        dp, cp = divmod(dp_cp, self.cp)
        edp_ep, etp = divmod(in_stage, self.expert_tp)
        edp, ep = divmod(edp_ep, self.ep)
        return Coordinates(tp=tp, pp=pp, cp=cp, dp=dp, etp=etp, ep=ep, edp=edp)


@dataclass(frozen=True, slots=True)
class Coordinates:
    """A rank's index on each axis. `edp` counts the replicas of an expert shard."""

    tp: int = 0
    pp: int = 0
    cp: int = 0
    dp: int = 0
    etp: int = 0
    ep: int = 0
    edp: int = 0
