"""Megatron-Core's parallel state: starting it, ending it, reading it.

Everything is asked of `megatron.core.parallel_state` by its getters, so that a state built by Megatron-LM or an RL
framework, in any rank order, is described as it is. This is also where the environment of torchrun is read.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch re-exports it by a star import

from ..errors import TopologyError
from ..topology import Coordinates, Topology
from .runtime import RUNTIME, quiet

logger = logging.getLogger("mbridge")

DEFAULT_SEED: Final = 1234
DEFAULT_TIMEOUT_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Group:
    """A torch process group that this rank is in, and the global ranks in it, in group order."""

    group: dist.ProcessGroup
    ranks: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True, slots=True)
class ParallelGroups:
    """This rank's groups. `stage` is all ranks of its pipeline stage (tp x cp x dp), `edp` replicas of its experts."""

    rank: int  # in the world
    world_size: int
    tp: Group
    cp: Group
    dp: Group
    pp: Group
    ep: Group
    etp: Group
    edp: Group
    experts: Group  # etp x ep: ranks that together hold all experts of a layer
    stage: Group


def init_parallel(
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    cp: int = 1,
    *,
    seed: int = DEFAULT_SEED,
    backend: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Topology:
    """Start torch.distributed, Megatron-Core's parallel state and its random streams; on CPU also the CPU runtime.

    For scripts that have no framework to do it. Call it on every rank: under torchrun the world comes from the
    environment (RANK, WORLD_SIZE, MASTER_ADDR, ...), in a plain process it is one rank, and a world that
    torch.distributed already has is used. The data-parallel size is what the others leave over.

    Args:
        seed: of weight initialisation and dropout; made different between pipeline stages and tensor-parallel ranks.
        backend: of torch.distributed if it is started here. Default: nccl with a GPU for every local rank, else gloo.
        timeout_s: deadline of each collective.

    Raises:
        TopologyError: the sizes do not fit the world, or a parallel state of other sizes exists.
    """
    state = _parallel_state()
    started_world = not dist.is_initialized()
    if started_world:
        _start_world(backend, timeout_s)
    try:
        topology = _fit(tp, pp, vpp, ep, etp, cp, dist.get_world_size())
        if state.model_parallel_is_initialized():
            found, _ = read_topology()
            if found != topology:
                raise TopologyError(
                    f"asked for {topology}, but a parallel state of {found} exists; call destroy_parallel() first"
                )
        else:
            _start_parallel_state(topology, timeout_s)
    except TopologyError:
        if started_world:
            dist.destroy_process_group()
        raise
    RUNTIME.install()
    _seed(seed)
    logger.info("rank %d of %d: %s", dist.get_rank(), dist.get_world_size(), topology)
    return topology


def destroy_parallel() -> None:
    """End the parallel state, torch.distributed and the CPU runtime. Safe to call when none of them runs."""
    state = _parallel_state()
    if state.is_initialized():
        state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    RUNTIME.uninstall()


def ensure_parallel_state() -> None:
    """Leave with a parallel state, the CPU runtime where CUDA is absent, and seeded random streams.

    An existing parallel state is used as it is. In a plain process without set-up, a world of one rank is started, and
    the log says so. Several ranks without a parallel state cannot be guessed.

    Raises:
        TopologyError: there is a world of several ranks (torchrun, or torch.distributed) but no parallel state.
    """
    state = _parallel_state()
    if not state.model_parallel_is_initialized():
        world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
        if world_size > 1:
            raise TopologyError(
                f"this is one of {world_size} processes, but Megatron-Core's parallel state is not initialised, so how "
                "the model is to be split is unknown; before get_model(), call on every rank "
                "mbridge.megatron.init_parallel(tp=..., pp=...) or, after torch.distributed's own initialisation, "
                "megatron.core.parallel_state.initialize_model_parallel(...)"
            )
        logger.info("no parallel state found: starting Megatron-Core in a world of one rank")
        init_parallel()
    RUNTIME.install()
    if not _is_seeded():
        logger.info("Megatron-Core's random streams were not seeded: seeding them with %d", DEFAULT_SEED)
        _seed(DEFAULT_SEED)


def read_topology() -> tuple[Topology, Coordinates]:
    """The parallel sizes and this rank's place, as Megatron-Core reports them.

    Raises:
        TopologyError: the parallel state is not initialised.
    """
    state = _require_parallel_state()
    topology = Topology(
        tp=state.get_tensor_model_parallel_world_size(),
        pp=state.get_pipeline_model_parallel_world_size(),
        vpp=state.get_virtual_pipeline_model_parallel_world_size() or 1,
        ep=state.get_expert_model_parallel_world_size(),
        etp=state.get_expert_tensor_parallel_world_size(),
        cp=state.get_context_parallel_world_size(),
        dp=state.get_data_parallel_world_size(),
    )
    coordinates = Coordinates(
        tp=state.get_tensor_model_parallel_rank(),
        pp=state.get_pipeline_model_parallel_rank(),
        cp=state.get_context_parallel_rank(),
        dp=state.get_data_parallel_rank(),
        etp=state.get_expert_tensor_parallel_rank(),
        ep=state.get_expert_model_parallel_rank(),
        edp=state.get_expert_data_parallel_rank(),
    )
    return topology, coordinates


def read_groups() -> ParallelGroups:
    """This rank's process groups. No group is created. Raises TopologyError like `read_topology`."""
    state = _require_parallel_state()
    return ParallelGroups(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp=_group(state.get_tensor_model_parallel_group()),
        cp=_group(state.get_context_parallel_group()),
        dp=_group(state.get_data_parallel_group()),
        pp=_group(state.get_pipeline_model_parallel_group()),
        ep=_group(state.get_expert_model_parallel_group()),
        etp=_group(state.get_expert_tensor_parallel_group()),
        edp=_group(state.get_expert_data_parallel_group()),
        experts=_group(state.get_expert_tensor_and_model_parallel_group()),
        stage=_group(state.get_tensor_and_data_parallel_group(with_context_parallel=True)),
    )


def replica_group(groups: ParallelGroups) -> Group:
    """The ranks of Topology.replica_size, in rank order: together they hold every weight of the stage."""
    return max(groups.tp, groups.experts, key=lambda group: group.size)


def _group(group: dist.ProcessGroup) -> Group:
    return Group(group, tuple(dist.get_process_group_ranks(group)))


def _parallel_state() -> Any:
    with quiet():
        from megatron.core import parallel_state
    return parallel_state


def _require_parallel_state() -> Any:
    state = _parallel_state()
    if not (dist.is_initialized() and state.model_parallel_is_initialized()):
        raise TopologyError(
            "Megatron-Core's parallel state is not initialised; call mbridge.megatron.init_parallel(tp=..., pp=...), "
            "or get_model() for a world of one rank"
        )
    return state


def _start_world(backend: str | None, timeout_s: float) -> None:
    timeout = timedelta(seconds=timeout_s)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if backend is None:
        # NCCL refuses two ranks on one GPU. gloo reduces and gathers CUDA tensors too, but has neither send and recv
        # for them (so no pipeline) nor the coalesced reduction of Megatron-Core's DDP.
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        backend = "nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= local_ranks else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)


def _fit(tp: int, pp: int, vpp: int, ep: int, etp: int | None, cp: int, world_size: int) -> Topology:
    model_ranks = tp * pp * cp
    if model_ranks < 1 or world_size % model_ranks:
        raise TopologyError(
            f"tp * pp * cp = {tp} * {pp} * {cp} = {model_ranks} must divide the {world_size} ranks of the world"
        )
    return Topology(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, cp=cp, dp=world_size // model_ranks)


def _start_parallel_state(topology: Topology, timeout_s: float) -> None:
    try:
        _parallel_state().initialize_model_parallel(
            tensor_model_parallel_size=topology.tp,
            pipeline_model_parallel_size=topology.pp,
            virtual_pipeline_model_parallel_size=topology.vpp if topology.vpp > 1 else None,
            context_parallel_size=topology.cp,
            expert_model_parallel_size=topology.ep,
            expert_tensor_parallel_size=topology.expert_tp,
            distributed_timeout_minutes=max(1, round(timeout_s / 60)),
        )
    except (RuntimeError, AssertionError) as error:
        raise TopologyError(f"Megatron-Core refuses {topology}: {error}") from error


def _is_seeded() -> bool:
    with quiet():
        from megatron.core.tensor_parallel import get_cuda_rng_tracker
    return bool(get_cuda_rng_tracker().is_initialized())


def _seed(seed: int) -> None:
    """As Megatron-LM does: one seed a pipeline stage; the tracker makes streams of tensor-parallel ranks differ."""
    with quiet():
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    stage_seed = seed + 100 * int(_parallel_state().get_pipeline_model_parallel_rank())
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)
