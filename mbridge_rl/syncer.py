"""WeightSyncer: plans once, connects, and refits an engine at every `sync()`.

Every trainer rank builds one. Rank 0 drives the engine and conducts the refit (conductor.py), the others follow
(follower.py). On the direct path all of them lend the memory of their parameters to the engine's workers (lender.py),
on the bucket path they fill buckets with the pieces they own (filler.py). torch.distributed is used only while it is
built, to agree on the plan: a refit itself goes over the control channel, where every wait has a deadline and a dead
process is an event.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self, get_args

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
from .lender import Lender
from .messages import Check, Done, Lends, Loan
from .report import SyncReport, VerifyReport
from .source import Source, totals
from .transports.base import NUM_SLOTS, Transport, transport_class, transport_for

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mbridge.plan import TrainerPlan

COPY_LIMIT_BYTES = (128 << 20, 1 << 30)  # measured over so much, on a CPU and on an accelerator
NUM_SHARES = 16  # verify="sampled" compares one tensor in so many, others each time
PathChoice = Literal["auto", "direct", "bucket"]
Verify = Literal["full", "sampled"]
_log = logging.getLogger(__name__)


class Way(NamedTuple):
    """One way for the weights to go."""

    path: str
    transport: str


class BridgeLike(Protocol):
    """What a syncer uses of `mbridge.Bridge`."""

    @property
    def models(self) -> Sequence[Any]: ...

    def plan(self, models: Sequence[Any]) -> TrainerPlan: ...

    def live_tensors(self, models: Sequence[Any]) -> Mapping[str, torch.Tensor]: ...


class WeightSyncer:
    """Refits one engine from a sharded trainer. Build it on every trainer rank, call `sync()` on every rank.

    Args:
        bridge: the `mbridge.Bridge` of the trainer's models.
        engine: a `vllm.LLM`, the URL of a `vllm serve`, a `torch.nn.Module`, or an `engines.base.Engine`; used on
            rank 0 only, others may pass None.
        models: Megatron chunks; by default what `bridge.get_model()` built last.
        transport: name of a transport, or "auto": CUDA IPC for parameters on a GPU, else shared memory.
        path: "direct" copies from the trainers' memory into the engine's, "bucket" gathers HF tensors in buckets that
            the engine loads. "auto" is "direct" for parameters on a GPU, where engines keep weights as they are loaded,
            and "bucket" where the memory cannot be shared, which is logged, or is not on a GPU (vLLM packs nearly
            everything there, and shared memory would have to hold the model).
        deadline_s: longest time without progress, in any wait, before a refit fails on all ranks.
        bucket_bytes: size of a bucket; two are allocated. By default chosen from the model's size.
        reset_prefix_cache: drop what the engine cached of older weights, in each refit, while it is paused.
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
        path: PathChoice = "auto",
        deadline_s: float = 120.0,
        bucket_bytes: int | None = None,
        reset_prefix_cache: bool = True,
        in_flight: InFlight = "wait",
        group: ProcessGroup | None = None,
        control_address: str | None = None,
    ) -> None:
        if in_flight not in ("wait", "abort", "keep"):
            raise ValueError(f'in_flight must be "wait", "abort" or "keep", found {in_flight!r}')
        if path not in get_args(PathChoice):
            raise ValueError(f'path must be "auto", "direct" or "bucket", found {path!r}')
        if deadline_s <= 0:
            raise ValueError(f"deadline_s must be positive, found {deadline_s}")
        self.rank, self.num_trainers = world(group)
        self.version = 0  # what the engine serves
        self.layout: Layout
        self._bridge, self._models, self._deadline_s = bridge, models, deadline_s
        self._attempt, self._closed = 0, False
        self._num_sampled = 0  # how many checks were of a sample: each is of the next one
        self._slots: Transport | None = None
        self._mover: Filler | Lender
        self._live: Mapping[str, torch.Tensor] = {}
        self._paths: tuple[Sequence[str], dict[str, str]] | None = None  # names reloaded, and the report's paths
        self._side: Conductor | Follower | None = None  # on rank 0; on the others

        def conductor(layout: Layout) -> Conductor:
            return Conductor(
                as_engine(engine),
                layout.tensors,
                num_trainers=self.num_trainers,
                deadline_s=deadline_s,
                in_flight=in_flight,
                reset_prefix_cache=reset_prefix_cache,
                address=control_address,
            )

        try:
            self._connect(conductor, transport, path, bucket_bytes, group)
        except BaseException:
            self.close()
            raise

    @property
    def models(self) -> Sequence[Any]:
        """The Megatron chunks this syncer sends."""
        return self._bridge.models if self._models is None else self._models

    def sync(self, version: int | None = None, *, verify: Verify | None = None) -> SyncReport:
        """Refit the engine with the trainer's current weights, as `version` (default: the last one plus 1).

        Call it on every rank. Blocks until the engine serves the new weights. Raises the same SyncError on every rank:
        then the engine serves what it served (if nothing had been written), or is stale and stays paused until a later
        sync. With `verify`, checksums of the engine's own memory are compared with the trainer's before the commit:
        of all tensors ("full"), or of one in 16, others each time ("sampled"). A difference is a VerifyError.
        """
        version = self.version + 1 if version is None else version
        done = self._run(version, moves=True, verify=verify)
        self.version = done.version
        return self._report(done)

    def verify(self, how: Verify = "full") -> VerifyReport:
        """Compare the engine's memory with the trainer's current weights, without moving any. Call it on every rank.

        What is wrong is in the report, by name, and so is what could not be compared: what the engine repacks or
        derives is known only by the checksums that the last `sync(verify=...)` took. Raises the same SyncError on every
        rank: EngineStaleError if the engine may not serve.
        """
        done = self._run(self.version, moves=False, verify=how)
        if done.stats.verification is None:
            raise SyncError("nobody compared anything", phase="check")
        return VerifyReport.of(done.stats.verification, done.stats.total_s)

    def close(self) -> None:
        """Leave the engine and free the buckets. The engine goes on serving. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        self._leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(
        self,
        conductor: Callable[[Layout], Conductor],
        transport: str,
        path: PathChoice,
        bucket_bytes: int | None,
        group: ProcessGroup | None,
    ) -> None:
        """Connect along the best way that the memory allows. Every rank tries the same ways in the same order."""
        ways = self._ways(transport, path)
        for way in ways:
            try:
                self._connect_along(way, conductor, bucket_bytes, group)
                return
            except TransportError as error:
                if way == ways[-1]:
                    raise
                _log.warning("no %s path through %s, trying the next: %s", way.path, way.transport, error)
                self._leave()

    def _ways(self, transport: str, path: PathChoice) -> list[Way]:
        try:
            live = self._bridge.live_tensors(self.models)
        except MBridgeError:
            live = {}  # this rank's offer will say why
        best = transport_for(live.values()) if transport == "auto" else transport
        transports = [best] if transport != "auto" else list(dict.fromkeys((best, "shared_memory")))
        direct = [Way("direct", best)] if path == "direct" or (path == "auto" and best != "shared_memory") else []
        return direct + ([] if path == "direct" else [Way("bucket", name) for name in transports])

    def _connect_along(
        self, way: Way, conductor: Callable[[Layout], Conductor], bucket_bytes: int | None, group: ProcessGroup | None
    ) -> None:
        mine, plan, layout = self._offer(way, conductor, bucket_bytes)
        offers = agree(mine, plan, group)
        if plan is None or layout is None:
            raise AssertionError("agree() raises when a rank has no plan")
        if any(offer.host != offers[0].host for offer in offers):
            raise TransportError(f"trainer ranks run on several hosts; transport {way.transport!r} needs them on one")
        self.layout, self._plan = layout, plan
        if self._side is None:
            self._side = Follower(offers[0], self.rank, self._deadline_s)
        if way.path == "bucket":
            self._mover = Filler(layout, plan.owned, self._open_slots(way, offers[0]))
        if isinstance(self._side, Conductor):
            set_up = write_set_up(layout, way.transport, self._slots.address if self._slots else {}, self._lends())
            self.version = self._side.connect(set_up, _copy_limit(self._live)).version
            if self._slots is not None:
                self._slots.everyone_attached()
            return
        for lends in self._lends():
            self._side.lend(lends)
        self.version = self._side.connect().version

    def _open_slots(self, way: Way, rank_0: Offer) -> list[torch.Tensor]:
        if self._slots is None:
            try:
                self._slots = transport_class(way.transport).open(rank_0.address)
            except TransportError as error:
                if isinstance(self._side, Follower):
                    self._side.report(error)
                raise
        return [self._slots.slot(i) for i in range(NUM_SLOTS)]

    def _lends(self) -> list[Lends]:
        return [self._mover.lends] if isinstance(self._mover, Lender) else []

    def _offer(
        self, way: Way, conductor: Callable[[Layout], Conductor], bucket_bytes: int | None
    ) -> tuple[Offer, TrainerPlan | None, Layout | None]:
        """This rank's offer and plan. If it cannot plan, the offer says why: the other ranks wait for it."""
        try:
            plan = self._bridge.plan(self.models)
            self._live = self._bridge.live_tensors(self.models)
            layout = plan_buckets(plan.tensors, plan.fusion_groups, bucket_bytes, plan.optional_names)
            kind = transport_class(way.transport)
            if way.path == "direct":
                self._mover = Lender(self.rank, plan.tensors, plan.owned, self._live, kind)
            digest = digest_of(plan.digest, layout, way.path)
            offer = Offer(digest=digest, owned=owned_boxes(plan.owned), pid=os.getpid(), host=host_id())
            if self.rank == 0:
                self._side = conductor(layout)
                hub = self._side.hub
                offer = msgspec.structs.replace(offer, endpoint=hub.endpoint, token=hub.token)
                if way.path == "bucket":
                    self._slots = kind.create(layout.bucket_bytes)
                    offer = msgspec.structs.replace(offer, address=self._slots.address)
        except MBridgeError as error:
            if self.num_trainers == 1:
                raise
            return Offer(failure=as_failure(error, f"trainer rank {self.rank}", "connect")), None, None
        return offer, plan, layout

    def _run(self, version: int, *, moves: bool, verify: Verify | None) -> Done:
        if self._closed or self._side is None:
            raise SyncError("this WeightSyncer is closed")
        if verify is not None and verify not in get_args(Verify):
            raise ValueError(f'verify must be "full", "sampled" or None, found {verify!r}')
        self._attempt += 1
        succeeded = False
        try:
            source = Source(self._begin, self._fill, self._totals)
            if isinstance(self._side, Conductor):
                num_shares = NUM_SHARES if verify == "sampled" else 1
                check = None if verify is None else (self._num_sampled % num_shares, num_shares)
                self._num_sampled += verify == "sampled"
                done = self._side.run(self._attempt, version, source, moves=moves, check=check)
            else:
                done = self._side.run(self._attempt, version, source)
            succeeded = True
        finally:
            self._mover.end(succeeded=succeeded and moves)  # without a move, workers hear nothing of what has moved
        return done

    def _begin(self) -> None:
        """Read the sources afresh from the modules that held them when the syncer was built: they may have moved."""
        self._mover.begin(self._live)

    def _fill(self, bucket: int) -> Loan | None:
        return self._mover.fill(bucket)

    def _totals(self, message: Check) -> dict[int, int]:
        return totals(message, self._plan.tensors, self._plan.owned, self._live)

    def _report(self, done: Done) -> SyncReport:
        stats, layout = done.stats, self.layout
        is_direct = isinstance(self._mover, Lender)
        if self._paths is None or self._paths[0] != stats.reloaded:
            self._paths = (stats.reloaded, _paths(layout, stats.reloaded if is_direct else None))
        checked = stats.verification
        return SyncReport(
            version=done.version,
            engine=stats.engine,
            total_s=stats.total_s,
            phases=stats.phases,
            fill_s=stats.fill_s,
            load_s=stats.load_s,
            num_bytes=layout.num_bytes,
            num_tensors=len(layout.tensors),
            num_buckets=0 if is_direct else layout.num_buckets,
            num_trainers=stats.num_trainers,
            num_workers=stats.num_workers,
            paths=self._paths[1],
            reasons=stats.reasons,
            calls_s=stats.calls_s,
            unwritten=stats.unwritten,
            trainer_extra_bytes=0 if is_direct else NUM_SLOTS * layout.bucket_bytes,
            engine_extra_bytes=stats.engine_extra_bytes,
            copy_limit_gb_s=stats.copy_limit_gb_s,
            verification=None if checked is None else VerifyReport.of(checked, stats.phases.get("check", 0.0)),
        )

    def _leave(self) -> None:
        if self._side is not None:
            self._side.close()
            self._side = None
        if self._slots is not None:
            self._slots.close()
            self._slots = None


def _paths(layout: Layout, reloaded: Sequence[str] | None) -> dict[str, str]:
    """Fusion group (by its first HF name) -> the path it took; `reloaded` is None on the bucket path."""
    if reloaded is None:
        return {layout.tensors[group[0]].name: "bucket" for group in layout.groups if group}
    names = set(reloaded)
    return {
        layout.tensors[group[0]].name: "reload" if any(layout.tensors[t].name in names for t in group) else "direct"
        for group in layout.groups
        if group
    }


def _copy_limit(live: Mapping[str, torch.Tensor]) -> float | None:
    """GB/s (1e9) of a plain copy on the device of the parameters: the best of five. None if there is no room for it."""
    device = next(iter(live.values())).device if live else torch.device("cpu")
    try:
        source = torch.ones(COPY_LIMIT_BYTES[device.type != "cpu"], dtype=torch.uint8, device=device)
        target = torch.ones_like(source)
    except torch.OutOfMemoryError:
        return None
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    num_bytes = source.numel()
    if device.type == "cuda":
        del source, target
        torch.cuda.empty_cache()  # it would stay this process's, and an engine on the same GPU may need it
    return num_bytes / best / 1e9
