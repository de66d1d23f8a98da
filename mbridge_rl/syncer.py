"""WeightSyncer: plans once, connects, and refits engines at every `sync()`.

Every trainer rank builds one. Rank 0 drives the engines and conducts the refit (conductor.py), the others follow
(follower.py). On the direct path all of them lend the memory of their parameters to the engines' workers (lender.py),
on the bucket path they fill buckets with the pieces they own (filler.py), or broadcast them (broadcaster.py).
The application's torch.distributed is used only to connect, to agree on the plan: a refit itself goes over the control
channel, where every wait has a deadline and a dead process is an event.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, get_args

import msgspec
import torch

from mbridge.errors import MBridgeError

from .agreement import Offer, agree, digest_of, owned_boxes, share, world
from .buckets import Layout, plan_buckets
from .conductor import Conductor, OnError, Options
from .control import Hub
from .endpoints import numeric_host
from .engines.base import InFlight
from .errors import EngineError, SyncError, TransportError, as_failure
from .fleet import Member
from .follower import Follower
from .hosts import host_id
from .lanes import LOCAL, REMOTE, TrainerLanes, Way
from .messages import Check, Done, Fill, Lends, Loan
from .observe import FleetStatus, Observer
from .report import SyncReport, VerifyReport
from .source import Source, totals
from .transports.base import COLLECTIVE, transport_for

if TYPE_CHECKING:
    from prometheus_client.registry import CollectorRegistry
    from torch.distributed import ProcessGroup

    from mbridge.plan import TrainerPlan

COPY_LIMIT_BYTES = (128 << 20, 1 << 30)  # measured over so much, on a CPU and on an accelerator
NUM_SHARES = 16  # verify="sampled" compares one tensor in so many, others each time
PathChoice = Literal["auto", "direct", "bucket"]
Mode = Literal["broadcast", "sharded"]
Verify = Literal["full", "sampled"]
_log = logging.getLogger(__name__)


class BridgeLike(Protocol):
    """What a syncer uses of `mbridge.Bridge`."""

    @property
    def models(self) -> Sequence[Any]: ...

    def plan(self, models: Sequence[Any]) -> TrainerPlan: ...

    def live_tensors(self, models: Sequence[Any]) -> Mapping[str, torch.Tensor]: ...


class WeightSyncer:
    """Refits engines from a sharded trainer. Build it on every trainer rank, call `sync()` on every rank.

    Args:
        bridge: the `mbridge.Bridge` of the trainer's models.
        engine: a `vllm.LLM`, the URL of a `vllm serve`, a `torch.nn.Module`, an `engines.base.Engine`, or a list of
            these (a fleet); used on rank 0 only, others may pass None.
        models: Megatron chunks; by default what `bridge.get_model()` built last.
        transport: name of a transport, or "auto": for engines on the trainers' host CUDA IPC if parameters are on a
            GPU, else shared memory; "collective" (NCCL or gloo broadcasts) for engines elsewhere.
        path: "direct" copies from the trainers' memory into the engine's, "bucket" gathers HF tensors in buckets that
            the engine loads. "auto" is "direct" for parameters on a GPU, where engines keep weights as they are loaded,
            and "bucket" where the memory cannot be shared, which is logged, or is not on a GPU (vLLM packs nearly
            everything there, and shared memory would have to hold the model).
        mode: what engines that are reached by a collective get: "broadcast" of everything to all their workers, or
            "sharded": to each worker what it needs, once its first refit (a broadcast) has shown that. Replicas share
            what is sent.
        deadline_s: longest time without progress, in any wait, before a refit fails on all ranks.
        bucket_bytes: size of a bucket; two are allocated. By default chosen from the model's size.
        reset_prefix_cache: drop what the engine cached of older weights, in each refit, while it is paused.
        in_flight: "wait" for requests in flight before a refit, "abort" them, or "keep" them (they go on with the new
            weights).
        on_error: if an engine of a fleet fails, "raise" for all, or "quarantine" it: the others get the new weights in
            the same `sync()`, it stays stale and is left behind until `add_engine`.
        rolling: refit one engine after the other, so that the others serve meanwhile (two versions at a time).
        group: process group of the trainer ranks, by default the whole job. Used only to connect.
        control_address: where rank 0 listens, such as "tcp://127.0.0.1:*"; by default a private Unix socket.
        bind: the same, for engines or trainer ranks on other hosts, who can reach it: "tcp://eth0:*", "tcp://10.0.0.5:*",
            "tcp://0.0.0.0:*" (with `advertise`).
        advertise: name or address of rank 0's host that the others connect to, if it is not the one in `bind`.
        key: "auto", or a secret CURVE key: encrypt the control channel. (Weights themselves are not encrypted.)
        registry: of prometheus_client, for metrics (see metrics.py); by default its own, if it is installed.

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
        mode: Mode = "broadcast",
        deadline_s: float = 120.0,
        bucket_bytes: int | None = None,
        reset_prefix_cache: bool = True,
        in_flight: InFlight = "wait",
        on_error: OnError = "raise",
        rolling: bool = False,
        group: ProcessGroup | None = None,
        control_address: str | None = None,
        bind: str | None = None,
        advertise: str | None = None,
        key: str | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        for name, value, choice in (
            ("in_flight", in_flight, InFlight),
            ("path", path, PathChoice),
            ("mode", mode, Mode),
            ("on_error", on_error, OnError),
        ):
            if value not in get_args(choice):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choice))}; found {value!r}")
        if deadline_s <= 0:
            raise ValueError(f"deadline_s must be positive, found {deadline_s}")
        self.rank, self.num_trainers = world(group)
        self.version = 0  # what the engines serve
        self.layout: Layout
        self._bridge, self._models, self._group = bridge, models, group
        self._options = Options(deadline_s, in_flight, reset_prefix_cache, on_error, rolling)
        self._transport, self._path, self._bucket_bytes = transport, path, bucket_bytes
        self._is_sharded = mode == "sharded"
        self._make_hub = partial(Hub, control_address, bind=bind, advertise=advertise, key=key)
        self._observer = Observer(registry)
        self._closed = False
        self._busy = threading.Lock()  # held by the one call that may be under way
        self._num_sampled = 0  # how many checks were of a sample: each is of the next one
        self._lanes: TrainerLanes
        self._paths: tuple[Sequence[str], dict[str, str]] | None = None  # names reloaded, and the report's paths
        self._side: Conductor | Follower | None = None  # on rank 0; on the others
        engines = list(engine) if isinstance(engine, list | tuple) else [engine]
        try:
            self._connect(engines)
        except BaseException:
            self.close()
            raise

    @property
    def models(self) -> Sequence[Any]:
        """The Megatron chunks this syncer sends."""
        return self._bridge.models if self._models is None else self._models

    def sync(self, version: int | None = None, *, verify: Verify | None = None) -> SyncReport:
        """Refit the engines with the trainer's current weights, as `version` (default: the last one plus 1).

        Call it on every rank. Blocks until the engines serve the new weights. Raises the same SyncError on every rank:
        then an engine serves what it served (if nothing had been written), or is stale and stays paused until a later
        sync. With `verify`, checksums of the engines' own memory are compared with the trainer's before the commit:
        of all tensors ("full"), or of one in 16, others each time ("sampled"). A difference is a VerifyError.
        """
        with self._alone():
            version = self.version + 1 if version is None else version
            done = self._run(version, moves=True, verify=verify)
            self.version = done.version
            return self._report(done)

    def status(self) -> FleetStatus:
        """What rank 0 knows of each engine. On the other ranks, only the version."""
        if isinstance(self._side, Conductor):
            return self._side.status(self._lanes.ways)
        return FleetStatus(self.version, ())

    def verify(self, how: Verify = "full") -> VerifyReport:
        """Compare the engines' memory with the trainer's current weights, without moving any. Call it on every rank.

        What is wrong is in the report, by name, and so is what could not be compared: what an engine repacks or
        derives is known only by the checksums that the last `sync(verify=...)` took. Raises the same SyncError on every
        rank: EngineStaleError if an engine may not serve.
        """
        with self._alone():
            done = self._run(self.version, moves=False, verify=how)
            if done.stats.verification is None:
                raise SyncError("nobody compared anything", phase="check")
            return VerifyReport.of(done.stats.verification, done.stats.total_s)

    def add_engine(self, engine: object = None, *, refit: bool = True) -> SyncReport | None:
        """Take a new engine, or one that was left behind, into the fleet. Call it on every rank (rank 0's counts).

        With `refit` it gets the trainer's current weights as the version that the others have, before it may serve:
        call it between a `sync()` and the next change of the weights. Without, it is paused only at the next `sync()`,
        and serves until then what it has. The other engines serve throughout. Raises SyncError on every rank: then the
        engine is not in the fleet.
        """
        with self._alone():
            self._check_open()
            joining = self._join(engine)
            if not refit:
                return None
            try:
                done = self._run(max(self.version, 1), moves=True, verify=None, only=joining)
            except SyncError:
                self._dismiss(joining)
                raise
            self.version = done.version
            return self._report(done)

    def remove_engine(self, engine: object = None) -> None:
        """Let an engine go. It goes on serving, if it does. Call it on every rank (rank 0's counts)."""
        with self._alone():
            self._check_open()
            if not isinstance(self._side, Conductor):
                return
            member = self._side.fleet.member_of(engine)
            if member is None:
                raise EngineError(f"{engine!r} is not in this fleet")
            self._side.fleet.dismiss(member)
            self._observer.forget(member.name)

    def close(self) -> None:
        """Leave the engines and free the buckets. The engines go on serving. Calling it again does nothing."""
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

    # --- connecting --------------------------------------------------------------------------------------------------

    def _connect(self, engines: Sequence[object]) -> None:
        """Connect along the best way that the memory allows. Every rank tries the same ways in the same order."""
        ways = self._ways()
        for way in ways:
            try:
                self._connect_along(way, engines)
                return
            except TransportError as error:
                if way == ways[-1]:
                    raise
                _log.warning("no %s path through %s, trying the next: %s", way.path, way.transport, error)
                self._leave()

    def _ways(self) -> list[Way]:
        """Ways to engines on this host; those elsewhere are reached by a collective in any case."""
        if self._transport == COLLECTIVE:
            return [Way("bucket", COLLECTIVE)]
        try:
            live = self._bridge.live_tensors(self.models)
        except MBridgeError:
            live = {}  # this rank's offer will say why
        best = transport_for(live.values()) if self._transport == "auto" else self._transport
        transports = [best] if self._transport != "auto" else list(dict.fromkeys((best, "shared_memory")))
        is_direct = self._path == "direct" or (self._path == "auto" and best != "shared_memory")
        direct = [Way("direct", best)] if is_direct else []
        return direct + ([] if self._path == "direct" else [Way("bucket", name) for name in transports])

    def _connect_along(self, way: Way, engines: Sequence[object]) -> None:
        mine, plan, layout, joining = self._offer(way, engines)
        offers = agree(mine, plan, self._group)
        if plan is None or layout is None:
            raise AssertionError("agree() raises when a rank has no plan")
        self.layout, self._plan = layout, plan
        self._lanes = TrainerLanes(
            self.rank, plan, layout, self._live, offers, self._host(), is_sharded=self._is_sharded
        )
        if self._side is None:
            self._side = Follower(offers[0], self.rank, self._options.deadline_s)
        self._open_lanes(offers[0].lanes)
        self._attach(joining)

    def _offer(
        self, way: Way, engines: Sequence[object]
    ) -> tuple[Offer, TrainerPlan | None, Layout | None, list[Member]]:
        """This rank's offer and plan. If it cannot plan, the offer says why: the other ranks wait for it."""
        joining: list[Member] = []
        try:
            plan = self._bridge.plan(self.models)
            self._live = self._bridge.live_tensors(self.models)
            layout = plan_buckets(plan.tensors, plan.fusion_groups, self._bucket_bytes, plan.optional_names)
            digest = digest_of(plan.digest, layout, way.path)
            offer = Offer(digest=digest, owned=owned_boxes(plan.owned), pid=os.getpid(), host=host_id())
            if self.rank == 0:
                hub = self._make_hub()
                self._side = Conductor(
                    plan.tensors,
                    num_trainers=self.num_trainers,
                    options=self._options,
                    hub=hub,
                    observer=self._observer,
                )
                self._side.copy_limit_gb_s = _copy_limit(_device_of(self._live))
                joining = self._side.invite(engines)
                lanes = self._lanes_of(joining, way)
                offer = msgspec.structs.replace(
                    offer, endpoint=hub.endpoint, token=hub.token, server_key=hub.server_key, lanes=lanes
                )
        except MBridgeError as error:
            if self.num_trainers == 1:
                raise
            return Offer(failure=as_failure(error, f"trainer rank {self.rank}", "connect")), None, None, []
        return offer, plan, layout, joining

    def _host(self) -> str:
        """The numeric address of rank 0 that others reach: where it listens."""
        return numeric_host(self._side.hub.endpoint if isinstance(self._side, Conductor) else "")

    def _lanes_of(self, joining: Sequence[Member], way: Way) -> dict[int, tuple[str, str]]:
        """Put each engine on its lane; the lanes that are used, with their ways."""
        for member in joining:
            is_remote = way.transport == COLLECTIVE or (self._transport == "auto" and member.hosts != {host_id()})
            member.lane = REMOTE if is_remote else LOCAL
        ways = {LOCAL: way, REMOTE: Way("bucket", COLLECTIVE)}
        return {lane: (ways[lane].path, ways[lane].transport) for lane in sorted({m.lane for m in joining})}

    def _open_lanes(self, lanes: Mapping[int, tuple[str, str]]) -> None:
        """Make this rank's half of each lane that is not there yet. Raises the same SyncError on every rank."""
        failure, addresses = None, {}
        new = {lane: Way(*way) for lane, way in lanes.items() if lane not in self._lanes.ways}
        try:
            for lane, way in new.items():
                addresses[lane] = self._lanes.create(lane, way)
        except SyncError as error:
            failure = as_failure(error, f"trainer rank {self.rank}", "connect")
        addresses = share(failure, addresses, self._group)[0]
        failure = None
        try:
            for lane in new:
                self._lanes.open(lane, addresses[lane])
        except SyncError as error:
            failure = as_failure(error, f"trainer rank {self.rank}", "connect")
        share(failure, {}, self._group)

    def _attach(self, joining: Sequence[Member]) -> None:
        """The new engines' workers open their half."""
        assert self._side is not None
        if isinstance(self._side, Conductor):
            self._side.lanes, self._side.store = self._lanes.flows(), self._lanes.store
            used = {member.lane for member in joining}
            answer = self._side.connect(joining, {lane: self._lanes.set_up(lane, self._lends([lane])) for lane in used})
            self._side.version = answer.version
            self._lanes.everyone_attached()
        else:
            for lends in self._lends():
                self._side.lend(lends)
            answer = self._side.connect()
        self.version = max(self.version, answer.version)

    def _join(self, engine: object) -> list[Member]:
        """Connect one more engine."""
        joining: list[Member] = []
        failure, lanes = None, {}
        if isinstance(self._side, Conductor):
            try:
                old = self._side.fleet.member_of(engine)
                if old is not None:
                    self._side.fleet.dismiss(old)
                joining = self._side.invite([engine])
                lanes = self._lanes_of(joining, self._lanes.ways.get(LOCAL, self._ways()[0]))
            except SyncError as error:
                failure = as_failure(error, "trainer rank 0", "connect")
        try:
            self._open_lanes(share(failure, lanes, self._group)[0])
            self._attach(joining)
        except SyncError:
            self._dismiss(joining)
            raise
        return joining

    def _dismiss(self, members: Sequence[Member]) -> None:
        if isinstance(self._side, Conductor):
            for member in members:
                self._side.fleet.dismiss(member)

    # --- one refit ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise SyncError("another call of this WeightSyncer is under way; wait for it")
        try:
            yield
        finally:
            self._busy.release()

    def _check_open(self) -> None:
        if self._closed or self._side is None:
            raise SyncError("this WeightSyncer is closed")

    def _run(self, version: int, *, moves: bool, verify: Verify | None, only: Sequence[Member] | None = None) -> Done:
        self._check_open()
        if verify is not None and verify not in get_args(Verify):
            raise ValueError(f'verify must be "full", "sampled" or None, found {verify!r}')
        succeeded = False
        lanes, side = self._lanes, self._side
        assert side is not None
        source = Source(lanes.begin, self._fill, self._totals, lambda good: lanes.end(succeeded=good, is_last=False))
        try:
            if isinstance(side, Conductor):
                num_shares = NUM_SHARES if verify == "sampled" else 1
                check = None if verify is None else (self._num_sampled % num_shares, num_shares)
                self._num_sampled += verify == "sampled"
                done = side.run(version, source, moves=moves, check=check, only=only)
            else:
                done = side.run(version, source)
            succeeded = True
        finally:
            self.version = max(self.version, side.version)  # also if it failed: it is not given again
            # Without a move, workers hear nothing of what has moved.
            lanes.end(succeeded=succeeded, is_last=moves and only is None)
        return done

    def _fill(self, message: Fill, breathe: Callable[[], None]) -> Loan | None:
        return self._lanes.fill(message, breathe)

    def _lends(self, lanes: Sequence[int] | None = None) -> list[Lends]:
        return self._lanes.lends(lanes)

    def _totals(self, message: Check) -> dict[int, int]:
        return totals(message, self._plan.tensors, self._plan.owned, self._live)

    def _report(self, done: Done) -> SyncReport:
        stats, layout, lanes = done.stats, self.layout, self._lanes
        if self._paths is None or self._paths[0] != stats.reloaded:
            self._paths = (stats.reloaded, _paths(layout, [way.path for way in lanes.ways.values()], stats.reloaded))
        checked = stats.verification
        report = SyncReport(
            version=done.version,
            engine=stats.engine,
            total_s=stats.total_s,
            phases=stats.phases,
            fill_s=stats.fill_s,
            load_s=stats.load_s,
            num_bytes=layout.num_bytes,
            num_tensors=len(layout.tensors),
            num_buckets=layout.num_buckets if any(way.path == "bucket" for way in lanes.ways.values()) else 0,
            num_trainers=stats.num_trainers,
            num_workers=stats.num_workers,
            paths=self._paths[1],
            reasons=stats.reasons,
            calls_s=stats.calls_s,
            unwritten=stats.unwritten,
            trainer_extra_bytes=lanes.extra_bytes,
            engine_extra_bytes=stats.engine_extra_bytes,
            copy_limit_gb_s=stats.copy_limit_gb_s,
            verification=None if checked is None else VerifyReport.of(checked, stats.phases.get("check", 0.0)),
            quarantined=stats.quarantined,
            mode=stats.mode,
            wire_bytes=stats.wire_bytes,
        )
        if isinstance(self._side, Conductor):
            self._observer.refit_done(report)
        return report

    def _leave(self) -> None:
        if self._side is not None:
            self._side.close()
            self._side = None
        if hasattr(self, "_lanes"):
            self._lanes.close()


def _paths(layout: Layout, lanes: Sequence[str], reloaded: Sequence[str]) -> dict[str, str]:
    """Fusion group (by its first HF name) -> the path it took; with two lanes, both, such as "direct+bucket"."""
    names = set(reloaded)

    def along(lane: str, group: Sequence[int]) -> str:
        is_reloaded = lane == "direct" and any(layout.tensors[t].name in names for t in group)
        return "reload" if is_reloaded else lane

    return {
        layout.tensors[group[0]].name: "+".join(along(lane, group) for lane in lanes)
        for group in layout.groups
        if group
    }


def _device_of(live: Mapping[str, torch.Tensor]) -> torch.device:
    return next((tensor.device for tensor in live.values()), torch.device("cpu"))


@cache
def _copy_limit(device: torch.device) -> float | None:
    """GB/s (1e9) of a plain copy on `device`: the best of five. None if there is no room for it.

    Measured once in a process: it is the device's, and takes as long as a small refit.
    """
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
