"""WeightSyncer: plans once, connects, and refits an engine at every `sync()`.

Every trainer rank builds one. Rank 0 drives the engine and conducts the refit (conductor.py), the others follow
(follower.py); all of them fill the buckets with the pieces they own. torch.distributed is used only while it is built,
to agree on the plan: a refit itself goes over the control channel, where every wait has a deadline and a dead process
is an event.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import msgspec
import torch

from mbridge.errors import MBridgeError

from .agreement import Offer, agree, digest_of, owned_boxes, world
from .buckets import Layout, plan_buckets, write_set_up
from .conductor import Conductor
from .control import host_id
from .engines.base import InFlight, as_engine
from .errors import SyncError, TransportError, as_failure
from .filler import Filler
from .follower import Follower
from .messages import Done
from .report import SyncReport
from .transports.base import NUM_SLOTS, Transport, transport_class

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mbridge.plan import TrainerPlan

COPY_LIMIT_BYTES = 128 << 20  # measured over at most this much


class BridgeLike(Protocol):
    """What a syncer uses of `mbridge.Bridge`."""

    @property
    def models(self) -> Sequence[Any]: ...

    def plan(self, models: Sequence[Any]) -> TrainerPlan: ...

    def local_tensors(self, models: Sequence[Any]) -> Mapping[str, torch.Tensor]: ...


class WeightSyncer:
    """Refits one engine from a sharded trainer. Build it on every trainer rank, call `sync()` on every rank.

    Args:
        bridge: the `mbridge.Bridge` of the trainer's models.
        engine: a `vllm.LLM`, the URL of a `vllm serve`, a `torch.nn.Module`, or an `engines.base.Engine`; used on
            rank 0 only, others may pass None.
        models: Megatron chunks; by default what `bridge.get_model()` built last.
        transport: name of a transport, or "auto".
        deadline_s: longest time without progress, in any wait, before a refit fails on all ranks.
        bucket_bytes: size of a bucket; two are allocated. By default chosen from the model's size.
        reset_prefix_cache: drop what the engine cached of older weights, after each commit.
        in_flight: "wait" for requests in flight before a refit, "abort" them, or "keep" them (they go on with the new
            weights).
        group: process group of the trainer ranks, by default the whole job. Used only here.
        control_address: where rank 0 listens, such as "tcp://127.0.0.1:*"; by default a private Unix socket.

    Raises SyncError (or PlanError) with the same words on every rank: PlanMismatchError, EngineBusyError,
    EngineMismatchError, EngineGoneError, TransportError, DeadlineError.
    """

    def __init__(
        self,
        bridge: BridgeLike,
        engine: object = None,
        *,
        models: Sequence[Any] | None = None,
        transport: str = "auto",
        deadline_s: float = 120.0,
        bucket_bytes: int | None = None,
        reset_prefix_cache: bool = True,
        in_flight: InFlight = "wait",
        group: ProcessGroup | None = None,
        control_address: str | None = None,
    ) -> None:
        if in_flight not in ("wait", "abort", "keep"):
            raise ValueError(f'in_flight must be "wait", "abort" or "keep", found {in_flight!r}')
        if deadline_s <= 0:
            raise ValueError(f"deadline_s must be positive, found {deadline_s}")
        self.rank, self.num_trainers = world(group)
        self.version = 0  # what the engine serves
        self.layout: Layout
        self._bridge, self._models, self._deadline_s = bridge, models, deadline_s
        self._attempt, self._closed = 0, False
        self._slots: Transport | None = None
        self._side: Conductor | Follower | None = None  # on rank 0; on the others

        def conductor() -> Conductor:
            return Conductor(
                as_engine(engine),
                num_trainers=self.num_trainers,
                deadline_s=deadline_s,
                in_flight=in_flight,
                reset_prefix_cache=reset_prefix_cache,
                address=control_address,
            )

        try:
            self._connect(conductor, "shared_memory" if transport == "auto" else transport, bucket_bytes, group)
        except BaseException:
            self.close()
            raise

    @property
    def models(self) -> Sequence[Any]:
        """The Megatron chunks this syncer sends."""
        return self._bridge.models if self._models is None else self._models

    def sync(self, version: int | None = None) -> SyncReport:
        """Refit the engine with the trainer's current weights, as `version` (default: the last one plus 1).

        Call it on every rank. Blocks until the engine serves the new weights. Raises the same SyncError on every rank:
        then the engine serves what it served (if nothing had been written), or is stale and stays paused until a later
        sync.
        """
        if self._closed or self._side is None:
            raise SyncError("this WeightSyncer is closed")
        self._attempt += 1
        version = self.version + 1 if version is None else version
        try:
            done = self._side.run(self._attempt, version, self._begin, self._fill)
        finally:
            self._filler.end()
        self.version = done.version
        return self._report(done)

    def close(self) -> None:
        """Leave the engine and free the buckets. The engine goes on serving. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._side is not None:
            self._side.close()
        if self._slots is not None:
            self._slots.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(
        self, conductor: Callable[[], Conductor], transport: str, bucket_bytes: int | None, group: ProcessGroup | None
    ) -> None:
        mine, plan, layout = self._offer(conductor, transport, bucket_bytes)
        offers = agree(mine, plan, group)
        if plan is None or layout is None:
            raise AssertionError("agree() raises when a rank has no plan")
        if any(offer.host != offers[0].host for offer in offers):
            raise TransportError(f"trainer ranks run on several hosts; transport {transport!r} needs them on one")
        self.layout = layout
        if self._side is None:
            self._side = Follower(offers[0], self.rank, self._deadline_s)
            try:
                self._slots = transport_class(transport).open(offers[0].address)
            except TransportError as error:
                self._side.report(error)
                raise
        if self._slots is None:
            raise AssertionError("rank 0 has made its slots with its offer")
        slots = [self._slots.slot(i) for i in range(NUM_SLOTS)]
        self._filler = Filler(layout, plan.owned, slots)
        if isinstance(self._side, Follower):
            self.version = self._side.connect().version
        else:
            set_up = write_set_up(layout, transport, self._slots.address)
            self.version = self._side.connect(set_up, _copy_limit(slots)).version
            self._slots.everyone_attached()

    def _offer(
        self, conductor: Callable[[], Conductor], transport: str, bucket_bytes: int | None
    ) -> tuple[Offer, TrainerPlan | None, Layout | None]:
        """This rank's offer and plan. If it cannot plan, the offer says why: the other ranks wait for it."""
        try:
            plan = self._bridge.plan(self.models)
            layout = plan_buckets(plan.tensors, plan.fusion_groups, bucket_bytes, plan.optional_names)
            digest = digest_of(plan.digest, layout)
            offer = Offer(digest=digest, owned=owned_boxes(plan.owned), pid=os.getpid(), host=host_id())
            if self.rank == 0:
                self._side = conductor()
                self._slots = transport_class(transport).create(layout.bucket_bytes)
                hub, address = self._side.hub, self._slots.address
                offer = msgspec.structs.replace(offer, endpoint=hub.endpoint, token=hub.token, address=address)
        except MBridgeError as error:
            if self.num_trainers == 1:
                raise
            return Offer(failure=as_failure(error, f"trainer rank {self.rank}", "connect")), None, None
        return offer, plan, layout

    def _begin(self) -> None:
        """Look the sources up afresh: they may have moved since the last refit."""
        try:
            sources = self._bridge.local_tensors(self.models)
        except MBridgeError as error:
            raise SyncError(f"the bridge cannot find its tensors: {error}", phase="enter") from error
        self._filler.begin(sources)

    def _fill(self, bucket: int) -> None:
        self._filler.fill(bucket)

    def _report(self, done: Done) -> SyncReport:
        stats, layout = done.stats, self.layout
        return SyncReport(
            version=done.version,
            engine=stats.engine,
            total_s=stats.total_s,
            phases=stats.phases,
            fill_s=stats.fill_s,
            load_s=stats.load_s,
            num_bytes=layout.num_bytes,
            num_tensors=len(layout.tensors),
            num_buckets=layout.num_buckets,
            num_trainers=stats.num_trainers,
            num_workers=stats.num_workers,
            paths={layout.tensors[group[0]].name: "bucket" for group in layout.groups if group},
            trainer_extra_bytes=NUM_SLOTS * layout.bucket_bytes,
            engine_extra_bytes=stats.engine_extra_bytes,
            copy_limit_gb_s=stats.copy_limit_gb_s,
        )


def _copy_limit(slots: list[torch.Tensor]) -> float:
    """GB/s (1e9) of a memcpy from one slot to the other: the best of three."""
    size = min(slots[0].numel(), COPY_LIMIT_BYTES)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        slots[1][:size].copy_(slots[0][:size])
        best = min(best, time.perf_counter() - started)
    return size / best / 1e9
