"""WeightSyncer: plans once, connects, and refits an engine at every `sync()`.

Every trainer rank builds one. Rank 0 drives the engine and conducts the refit (conductor.py); all ranks, rank 0
included, fill the buckets with the pieces they own. torch.distributed is used only while it is built, to agree on the
plan: a refit itself goes over the control channel, where every wait has a deadline and a dead process is an event.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch

from mbridge.errors import MBridgeError

from .agreement import Offer, agree, digest_of, owned_boxes, world
from .buckets import Layout, plan_buckets, write_set_up
from .conductor import Conductor
from .control import Hub, Link, host_id
from .engines.base import InFlight, as_engine
from .errors import Failure, ProtocolError, SyncError, TrainerLostError, TransportError, raised
from .filler import Filler
from .messages import (
    Abort,
    Connected,
    Done,
    Enter,
    Failed,
    Fill,
    Filled,
    Goodbye,
    Hello,
)
from .receiver import GRACE_S
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
        engine: a `vllm.LLM`, the URL of a `vllm serve`, a `torch.nn.Module`, or an `engines.base.Engine`; used on rank
        0
            only, others may pass None.
        models: Megatron chunks; by default what `bridge.get_model()` built last.
        transport: name of a transport, or "auto".
        deadline_s: longest time without progress, in any wait, before a refit fails on all ranks.
        bucket_bytes: size of a bucket; two are allocated. By default chosen from the model's size.
        reset_prefix_cache: drop what the engine cached of older weights, after each commit.
        in_flight: "wait" for requests in flight before a refit, "abort" them, or "keep" them (they go on with new
        weights). group: process group of the trainer ranks, by default the whole job. Used only here. control_address:
        where rank 0 listens, such as "tcp://127.0.0.1:*"; by default a private Unix socket.

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
        self.version = 0
        self._bridge, self._models, self._deadline_s = bridge, models, deadline_s
        self._attempt, self._closed = 0, False
        self._broken: Failure | None = None
        self._slots: Transport | None = None
        self._conductor: Conductor | None = None
        self._link: Link | None = None
        try:
            self._connect(engine, transport, bucket_bytes, group, control_address, in_flight, reset_prefix_cache)
        except BaseException:
            self.close()
            raise

    def sync(self, version: int | None = None) -> SyncReport:
        """Refit the engine with the trainer's current weights, as `version` (default: the last one plus 1).

        Call it on every rank. Blocks until the engine serves the new weights. Raises the same SyncError on every rank:
        then the engine serves what it served (if nothing had been written), or is stale and stays paused until a later
        sync.
        """
        if self._closed:
            raise SyncError("this WeightSyncer is closed")
        self._attempt += 1
        version = self.version + 1 if version is None else version
        try:
            done = self._conduct(version) if self._conductor is not None else self._follow(version)
        except SyncError as error:
            if isinstance(error, TrainerLostError):
                self._broken = error.failure
            raise
        finally:
            self._filler.end()
        self.version = done.version
        return self._report(done)

    def close(self) -> None:
        """Leave the engine and free the buckets. The engine goes on serving. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._conductor is not None:
            self._conductor.close()
        if self._link is not None:
            self._link.send(Goodbye())
            self._link.close()
        if self._slots is not None:
            self._slots.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- building ----------------------------------------------------------------------------------------------------

    def _connect(
        self,
        engine: object,
        transport: str,
        bucket_bytes: int | None,
        group: ProcessGroup | None,
        control_address: str | None,
        in_flight: InFlight,
        reset_prefix_cache: bool,
    ) -> None:
        kind = "shared_memory" if transport == "auto" else transport
        failure, plan, layout, hub, address = None, None, None, None, {}
        try:
            plan = self._bridge.plan(self.models)
            layout = plan_buckets(plan.tensors, plan.fusion_groups, bucket_bytes, plan.optional_names)
            if self.rank == 0:
                resolved = as_engine(engine)
                self._slots = transport_class(kind).create(layout.bucket_bytes)
                address = self._slots.address
                hub = Hub(control_address)
                self._conductor = Conductor(
                    hub,
                    resolved,
                    num_trainers=self.num_trainers,
                    deadline_s=self._deadline_s,
                    in_flight=in_flight,
                    reset_prefix_cache=reset_prefix_cache,
                )
        except MBridgeError as error:
            # The other ranks wait in `agree`: they get this error too.
            failure = _failure(error, f"trainer rank {self.rank}")
            if self.num_trainers == 1:
                raise
        offer = Offer(
            failure=failure,
            digest=digest_of(plan.digest, layout) if plan and layout else "",
            owned=owned_boxes(plan.owned) if plan else [],
            pid=os.getpid(),
            host=host_id(),
            endpoint=hub.endpoint if hub else "",
            token=hub.token if hub else "",
            address=address,
        )
        offers = agree(offer, plan.tensors if plan else (), plan.fusion_groups if plan else (), group)
        if plan is None or layout is None:
            raise AssertionError("agree() raises when a rank has no plan")
        self.layout: Layout = layout
        if any(other.host != offers[0].host for other in offers) and kind == "shared_memory":
            raise TransportError(f"trainer ranks run on several hosts; transport {kind!r} needs them on one")
        if self._conductor is None:
            self._join(offers[0], transport_class(kind))
        assert self._slots is not None
        slots = [self._slots.slot(i) for i in range(NUM_SLOTS)]
        self._filler = Filler(layout, plan.owned, slots)
        if self._conductor is not None:
            limit = _copy_limit(slots)
            connected = self._conductor.connect(write_set_up(layout, kind, self._slots.address), limit)
            self._slots.everyone_attached()
        else:
            connected = self._await_connected()
        self.version = connected.version

    def _join(self, hub: Offer, transport: type[Transport]) -> None:
        self._link = Link(hub.endpoint, hub.token, hub_pid=hub.pid, hub_host=hub.host)
        self._link.send(Hello("trainer", self.rank, os.getpid(), host_id()))
        try:
            self._slots = transport.open(hub.address)
        except TransportError as error:
            self._link.send(Failed(0, _failure(error, f"trainer rank {self.rank}")))
            raise

    def _await_connected(self) -> Connected:
        assert self._link is not None
        message = self._link.recv(self._deadline_s + GRACE_S, "the engine to connect")
        if isinstance(message, Abort):
            raise raised(message.failure)
        if not isinstance(message, Connected):
            raise ProtocolError(f"expected Connected, got {type(message).__name__}")
        return message

    @property
    def models(self) -> Sequence[Any]:
        """The Megatron chunks this syncer sends."""
        return self._bridge.models if self._models is None else self._models

    # --- one refit ---------------------------------------------------------------------------------------------------

    def _conduct(self, version: int) -> Done:
        assert self._conductor is not None
        return self._conductor.run(
            self._attempt, version, self.version, self.layout.num_buckets, self._begin, self._fill
        )

    def _follow(self, version: int) -> Done:
        link, attempt = self._link, self._attempt
        assert link is not None
        if self._broken is not None:
            raise raised(self._broken)
        try:
            self._reporting(self._begin)
            link.send(Enter(attempt, version))
            while True:
                match link.recv(self._deadline_s + GRACE_S, "the next step of the refit"):
                    case Fill(attempt=a, bucket=bucket) if a == attempt:
                        started = time.perf_counter()
                        if self._reporting(partial(self._fill, bucket)):
                            link.send(Filled(attempt, bucket, time.perf_counter() - started))
                    case Done(attempt=a) as done if a == attempt:
                        return done
                    case Abort(attempt=a, failure=failure) if a == attempt:
                        raise raised(failure)
                    case message if getattr(message, "attempt", attempt) >= attempt:
                        raise ProtocolError(f"rank {self.rank} got {type(message).__name__} during a refit")
        except BaseException as error:  # also Ctrl-C
            # Rank 0 knows already (Abort) and ignores this, or learns now why this rank leaves.
            link.send(Failed(attempt, _failure(error, f"trainer rank {self.rank}")))
            raise

    def _reporting(self, step: Callable[[], None]) -> bool:
        """Whether `step` succeeded. If not, rank 0 is told; its Abort then comes back to this rank as to all others."""
        assert self._link is not None
        try:
            step()
        except SyncError as error:
            self._link.send(Failed(self._attempt, _failure(error, f"trainer rank {self.rank}")))
            return False
        return True

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


def _failure(error: BaseException, origin: str) -> Failure:
    """`error` in plain strings, for the other ranks."""
    if isinstance(error, SyncError):
        f = error.failure
        return Failure(f.kind, f.message, f.origin or origin, f.phase, f.tensor)
    return Failure("SyncError", f"{type(error).__name__}: {error}", origin)


def _copy_limit(slots: list[torch.Tensor]) -> float:
    """GB/s (1e9) of a memcpy from one slot to the other: the best of three."""
    size = min(slots[0].numel(), COPY_LIMIT_BYTES)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        slots[1][:size].copy_(slots[0][:size])
        best = min(best, time.perf_counter() - started)
    return size / best / 1e9
