"""The direct path over real sockets and real shared memory: trainers lend, workers copy; and what can go wrong."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from mbridge_rl import SyncReport, WeightSyncer
from mbridge_rl.borrower import Borrower
from mbridge_rl.buckets import Layout, plan_buckets
from mbridge_rl.engines.base import InFlight
from mbridge_rl.engines.module import ModuleEngine
from mbridge_rl.errors import (
    EngineGoneError,
    EngineLoadError,
    EngineStaleError,
    PlanMismatchError,
    SyncError,
    TrainerLostError,
    TransportError,
)
from mbridge_rl.lanes import Way
from mbridge_rl.learning import CONSTANT
from mbridge_rl.lender import Lender
from mbridge_rl.messages import Check, Fill, Invitation, Lends, Loan
from mbridge_rl.protocol import NUM_DIRECT_STEPS, EngineState
from mbridge_rl.receiver import Receiver
from mbridge_rl.syncer import PathChoice
from mbridge_rl.testing import WholeBridge
from mbridge_rl.transports.shared_memory import SharedMemory
from tests.mbridge_rl import processing
from tests.mbridge_rl.fakes import FakeBridge, Tensors
from tests.mbridge_rl.processing import ProcessingEngine
from tests.mbridge_rl.ranks import run_ranks
from tests.mbridge_rl.test_sync import DEADLINE_S, GROUPS, Module, assert_holds, errors, shapes, weights
from tests.mbridge_rl.worker_engine import ProcessEngine

SHM = Path("/dev/shm")


class Spy(WeightSyncer):
    """Remembers what it announced, and can be told to fail after the weights were written."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.loans: list[Loan | None] = []  # of each refit
        self.filled = threading.Event()
        self.before_fill: Callable[[], object] = lambda: None
        self.before_totals: Callable[[], object] = lambda: None
        super().__init__(*args, **{"deadline_s": DEADLINE_S, "path": "direct", **kwargs})

    def _fill(self, message: Fill, breathe: Callable[[], None]) -> Loan | None:
        self.before_fill()
        loan = super()._fill(message, breathe)
        if message.bucket == 0:
            self.loans.append(loan)
        elif loan is not None:
            assert self.loans[-1] is None, "announced twice in one refit"
            self.loans[-1] = loan
        self.filled.set()
        return loan

    def _totals(self, message: Check) -> dict[int, int]:
        self.before_totals()
        return super()._totals(message)


def overwrite(bridge: FakeBridge, tensors: Tensors) -> None:
    """New weights at the same addresses."""
    for piece in bridge.pieces:
        piece.region.of(bridge.local[piece.local_name]).copy_(tensors[piece.hf_name][piece.box.slices])


def make(rank: int, num_ranks: int, engine: object, **options: Any) -> tuple[FakeBridge, Spy]:
    bridge = FakeBridge(weights(1), rank, num_ranks, groups=GROUPS)
    return bridge, Spy(bridge, engine if rank == 0 else None, **options)


# --- refits -----------------------------------------------------------------------------------------------------------


Engines = ProcessEngine | None  # on rank 0; on the others


def refits(rank: int, num_ranks: int, engine: Engines) -> tuple[list[SyncReport], list[Loan | None]]:
    bridge, sync = make(rank, num_ranks, engine)
    first, reports = sync.version + 1, []

    def refit() -> None:
        reports.append(sync.sync())
        if engine is not None:
            assert_holds(engine, sync.version)

    with sync:
        overwrite(bridge, weights(first))
        refit()
        overwrite(bridge, weights(first + 1))
        refit()
        bridge.set(weights(first + 2))
        refit()
        overwrite(bridge, weights(first + 3))
        refit()
        overwrite(bridge, weights(first + 4))
        before = bridge.local["local.head"]
        before.data = before.data.clone()  # as an offload does it: the tensor is the same, its memory is not
        assert bridge.local["local.head"] is before
        refit()
        overwrite(bridge, weights(first + 5))
        refit()
    return reports, sync.loans


def assert_refits(reports: list[SyncReport], loans: list[Loan | None]) -> None:
    """Only what moved was announced, and only the first refit went through the engine's loader."""
    assert [loan is None for loan in loans] == [True, True, False, True, False, True]
    third, fifth = loans[2], loans[4]
    assert third is not None and fifth is not None
    assert len(fifth.segments) == len(third.segments)
    assert sum(segment not in third.segments for segment in fifth.segments) == 1  # workers map this one only
    assert [set(report.paths.values()) for report in reports] == [{"reload"}] + [{"direct"}] * 5
    last = reports[-1]
    assert last.num_bytes == sum(t.nbytes for t in weights(0).values())
    assert (last.num_buckets, last.trainer_extra_bytes, last.engine_extra_bytes) == (0, 0, 0)
    assert last.reasons == {}


def test_refits_of_one_worker_by_one_rank() -> None:
    engine = ProcessEngine(shapes(), 1)
    assert_refits(*refits(0, 1, engine))
    engine.stop()


def stories(rank: int, num_ranks: int) -> tuple[Any, Any, Any]:
    """Processes are slow to start, so several syncers meet the same ones here, one after the other."""
    engine = ProcessEngine(shapes(), 2) if rank == 0 else None
    first = falls_back(rank, num_ranks, engine)
    return first, refits(rank, num_ranks, engine), changed_on_rank_1(rank, num_ranks, engine)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What `stories` returned on each of three ranks."""
    outcomes = run_ranks(3, tmp_path_factory.mktemp("stories"), stories)
    assert errors(outcomes) == [None] * 3
    return [outcome.value for outcome in outcomes]


def test_refits_of_two_workers_by_three_ranks(told: list[Any]) -> None:
    for _, (reports, loans), _ in told:
        assert_refits(reports, loans)
        assert reports == told[0][1][0]  # the same on every rank


def test_memory_that_was_freed_and_allocated_anew_at_its_old_address() -> None:
    """The pointer is the same, the memory is not: a worker that goes by pointers reads what was there before."""
    module = torch.nn.Module()
    module.register_buffer("a", torch.zeros(1 << 18))
    bridge, met = WholeBridge({"a": shared(1)}), 0
    with Spy(bridge, ModuleEngine(module)) as sync:
        sync.sync()
        for step in range(2, 8):
            before = bridge.tensors["a"].data_ptr()
            del bridge.tensors["a"]
            bridge.tensors["a"] = shared(step)
            met += bridge.tensors["a"].data_ptr() == before
            sync.sync()
            assert module.a.eq(step).all()
    if not met:
        pytest.skip("the kernel gave no address twice")


def shared(value: int) -> torch.Tensor:
    storage = torch.UntypedStorage._new_using_filename_cpu(4 << 18)
    return torch.tensor([], dtype=torch.float32).set_(storage).fill_(value)


def test_auto_does_not_lend_memory_of_a_cpu() -> None:
    module = Module()
    bridge = FakeBridge(weights(1))
    held = bridge.local["local.embed"].view(torch.int16).numpy()  # and lending this would be an error
    with WeightSyncer(bridge, module, deadline_s=DEADLINE_S) as sync:
        assert set(sync.sync().paths.values()) == {"bucket"}
    assert module.holds(1)
    assert not any(tensor.is_shared() for tensor in bridge.local.values())
    assert held.flags.writeable


# --- sources that are not as they were planned ------------------------------------------------------------------------


def reinterpreted(local: Tensors) -> None:
    local["local.embed"] = local["local.embed"].view(torch.float16)  # the same address and size


def shortened(local: Tensors) -> None:
    local["local.embed"] = local["local.embed"][:10]  # the same address


def transposed(local: Tensors) -> None:
    local["local.embed"] = local["local.embed"].t()  # the same address, dtype and size


def widened(local: Tensors) -> None:
    local["local.embed"] = local["local.embed"].float()


def gone(local: Tensors) -> None:
    del local["local.embed"]


def test_a_source_that_changed_since_the_plan() -> None:
    module = Module()
    engine = ModuleEngine(module)
    bridge, sync = make(0, 1, engine)
    with sync:
        sync.sync()
        for change in (reinterpreted, shortened, transposed, widened, gone):
            held, version = dict(bridge.local), sync.version
            change(bridge.local)
            with pytest.raises(PlanMismatchError, match=r"local\.embed") as caught:
                sync.sync()
            assert caught.value.failure.tensor == "local.embed", change
            if engine.state is EngineState.SERVING:  # it was not even paused
                assert module.holds(version)
            else:
                assert engine.state is EngineState.STALE
            bridge.local = held
            overwrite(bridge, weights(version + 1))
            sync.sync()
            assert engine.state is EngineState.SERVING
            assert module.holds(version + 1)


def changed_on_rank_1(rank: int, num_ranks: int, engine: Engines) -> str:
    bridge, sync = make(rank, num_ranks, engine)
    with sync:
        version = sync.version + 1
        overwrite(bridge, weights(version))
        sync.sync()
        held = bridge.local["local.head"]
        if rank == 1:
            bridge.local["local.head"] = held.float()
        with pytest.raises(PlanMismatchError, match=r"local\.head") as caught:
            sync.sync()
        if engine is not None and engine.state is EngineState.SERVING:
            assert_holds(engine, version)
        bridge.local["local.head"] = held
        overwrite(bridge, weights(version + 1))
        sync.sync()
        if engine is not None:
            assert_holds(engine, version + 1)
    return str(caught.value)


def test_a_source_that_changed_on_one_rank_is_an_error_on_all(told: list[Any]) -> None:
    assert "trainer rank 1" in told[0][2]
    assert [words for _, _, words in told] == [told[0][2]] * 3


def test_a_local_tensor_of_another_dtype_than_its_hf_tensor() -> None:
    bridge = FakeBridge(weights(1))
    bridge.local["local.embed"] = bridge.local["local.embed"].float()
    with pytest.raises(PlanMismatchError, match=r"local\.embed.*bfloat16, found torch\.float32"):
        Spy(bridge, Module())


# --- memory that turns out to have moved while workers copy -----------------------------------------------------------


class Stable(SharedMemory):
    """Whose stamp tells when memory was freed, as that of CUDA memory does."""

    freed = 0

    @classmethod
    def stamp(cls) -> object:
        return cls.freed


def test_what_moved_without_being_freed_is_found_in_the_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = FakeBridge(weights(1), groups=GROUPS)
    live = bridge.live_tensors([])
    lender = Lender(0, bridge.specs, bridge.pieces, live, Stable)

    def refit() -> list[Loan | None]:
        lender.begin(live)
        steps = [lender.fill(step) for step in range(NUM_DIRECT_STEPS)]
        lender.end(succeeded=True)
        return steps

    assert refit() == [None, None]
    lent = lender.lends().loan
    kept = bridge.local
    bridge.set(weights(2))  # `kept` keeps the old memory from being freed
    first, second = refit()
    assert first is None
    assert second is not None and second != lent
    assert refit() == [None, None]
    del kept
    monkeypatch.setattr(Stable, "freed", 1)
    bridge.set(weights(3))
    first, second = refit()  # something was freed: nobody may read before all is looked at
    assert first is not None
    assert second is None
    monkeypatch.setattr(Stable, "freed", 2)
    assert refit() == [None, None]  # it was nothing of ours


class Late(Spy):
    """Says in the second step only what has moved: workers have read the old memory by then."""

    def _fill(self, message: Fill, breathe: Callable[[], None]) -> Loan | None:
        loan = WeightSyncer._fill(self, message, breathe)
        if message.bucket == 0:
            self.loans.append(loan)
            return None
        assert loan is None
        return self.loans[-1]


def test_a_worker_copies_again_what_had_moved() -> None:
    module = Module()
    bridge = FakeBridge(weights(1), groups=GROUPS)
    with Late(bridge, ModuleEngine(module)) as sync:
        for version in (1, 2, 3, 4):
            if version != 3:
                bridge.set(weights(version))
            else:
                overwrite(bridge, weights(version))
            sync.sync()
            assert module.holds(version)
    assert [loan is None for loan in sync.loans[1:]] == [False, True, False]


class Copying(ModuleEngine):
    """As if its device copied until the engine serves again."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self.served = threading.Event()
        target = self.receiver._target
        target.pending = lambda: partial(self.served.wait, DEADLINE_S)  # type: ignore[method-assign,assignment,return-value]

    def resume(self) -> None:
        time.sleep(0.1)
        self.served.set()

    def pause(self, in_flight: InFlight) -> None:
        self.served.clear()


def test_the_engine_serves_while_its_device_copies_and_the_trainer_waits() -> None:
    module = Module()
    bridge = FakeBridge(weights(1), groups=GROUPS)
    engine = Copying(module)
    with Spy(bridge, engine) as sync:
        for version in (1, 2, 3):
            overwrite(bridge, weights(version))
            sync.sync()  # it would wait for ever if the engine's resume came after its device
            assert engine.served.is_set()
            assert module.holds(version)
        sync.verify()
    assert sync.version == 3


# --- what has moved is announced until a refit has succeeded ----------------------------------------------------------


def test_a_failed_refit_announces_moved_memory_again() -> None:
    module = Module()
    engine = ModuleEngine(module)
    bridge, sync = make(0, 1, engine)

    def fail() -> None:
        raise SyncError("on purpose")

    with sync:
        sync.sync()
        bridge.set(weights(2))
        sync.before_totals = fail
        with pytest.raises(SyncError, match="on purpose"):
            sync.sync(verify="full")
        assert engine.state is EngineState.STALE
        sync.before_totals = lambda: None
        overwrite(bridge, weights(3))
        sync.sync()
        assert module.holds(3)
        sync.sync()
    assert sync.loans[0] is None and sync.loans[3] is None
    assert sync.loans[1] is not None
    assert sync.loans[2] == sync.loans[1]


class FailsToPause(ModuleEngine):
    """Once, after trainer rank 0 has announced what it has."""

    wait_for: threading.Event | None = None

    def pause(self, in_flight: InFlight) -> None:
        if self.wait_for is not None:
            assert self.wait_for.wait(DEADLINE_S)
            self.wait_for = None
            raise EngineLoadError("cannot pause")


def test_a_verification_does_not_count_as_having_told_the_workers() -> None:
    module = Module()
    engine = FailsToPause(module)
    bridge, sync = make(0, 1, engine)
    with sync:
        sync.sync(verify="full")
        bridge.set(weights(2))
        sync.filled.clear()
        engine.wait_for = sync.filled
        with pytest.raises(EngineLoadError, match="cannot pause"):
            sync.sync()
        assert engine.state is EngineState.SERVING and module.holds(1)
        assert set(sync.verify().wrong) == set(weights(1))  # the trainer has gone on, the engine has not
        sync.sync()
        assert module.holds(2)


# --- memory that cannot be lent, or not be mapped ---------------------------------------------------------------------


def numpy_held(rank: int, num_ranks: int) -> None:
    bridge = FakeBridge(weights(1), rank, num_ranks)
    if rank == 1:
        bridge.local["local.layers.1.experts"] = torch.from_numpy(np.zeros((2, 6, 11), np.float32))
    WeightSyncer(bridge, Module() if rank == 0 else None, path="direct", deadline_s=DEADLINE_S)


def test_memory_that_one_rank_cannot_lend_is_an_error_on_all(tmp_path: Path) -> None:
    found = errors(run_ranks(2, tmp_path, numpy_held))
    for error in found:
        assert isinstance(error, TransportError)
        assert "'local.layers.1.experts' is also held by a numpy array" in str(error)
        assert "trainer rank 1" in str(error)
    assert str(found[0]) == str(found[1])


class Vanishing(WeightSyncer):
    """The file that holds a tensor has lost its name when the workers hear of it."""

    hidden: Path | None = None

    def _lends(self, lanes: Sequence[int] | None = None) -> list[Lends]:
        lends = super()._lends(lanes)
        if lends and self.rank == self.num_trainers - 1 and self.hidden is None:
            self.hidden = Path(str(lends[0].loan.segments[0]["path"]))
            self.hidden.rename(f"{self.hidden}_hidden")
        return lends

    def _connect_along(self, *args: Any) -> None:
        try:
            super()._connect_along(*args)
        finally:
            if self.hidden is not None:
                Path(f"{self.hidden}_hidden").rename(self.hidden)  # torch wants to remove it
                self.hidden = None


class VanishingOrBuckets(Vanishing):
    def _ways(self) -> list[Way]:
        return [Way("direct", "shared_memory"), Way("bucket", "shared_memory")]


class OneCallAtATime(ModuleEngine):
    """As engines are: a call while another one runs is an error. Its workers are slow to come back."""

    is_busy = False

    def attach(self, invitation: Invitation) -> None:
        assert not self.is_busy
        self.is_busy = True
        super().attach(invitation)
        time.sleep(0.2)
        self.is_busy = False


def test_memory_that_a_worker_cannot_map(caplog: pytest.LogCaptureFixture) -> None:
    module = Module()
    engine = OneCallAtATime(module)
    bridge = FakeBridge(weights(1), groups=GROUPS)
    with pytest.raises(TransportError, match=r"cannot open the trainer's memory .*torch_.*No such file") as caught:
        Vanishing(bridge, engine, path="direct", deadline_s=DEADLINE_S)
    assert "engine worker 0" in caught.value.failure.origin
    assert not engine.is_busy  # nothing is left of the failed connection
    with VanishingOrBuckets(bridge, engine, deadline_s=DEADLINE_S) as sync:
        assert set(sync.sync().paths.values()) == {"bucket"}
        assert module.holds(1)
    (warning,) = (record.getMessage() for record in caplog.records if record.name == "mbridge_rl.syncer")
    assert warning.startswith("no direct path through shared_memory, trying the next: cannot open the trainer's memory")


def falls_back(rank: int, num_ranks: int, engine: Engines) -> list[str]:
    bridge = FakeBridge(weights(1), rank, num_ranks, groups=GROUPS)
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mbridge_rl.syncer").addHandler(handler)
    with VanishingOrBuckets(bridge, engine, deadline_s=DEADLINE_S) as sync:
        for version in (1, 2):
            bridge.set(weights(version))
            assert set(sync.sync().paths.values()) == {"bucket"}
            if engine is not None:
                assert_holds(engine, version)
    return warnings


def test_all_ranks_take_the_next_way_together(told: list[Any]) -> None:
    (warning,) = told[0][0]
    assert "cannot open the trainer's memory" in warning
    assert [warnings for warnings, _, _ in told] == [[warning]] * 3


# --- messages that make no sense --------------------------------------------------------------------------------------


def layout_of(bridge: FakeBridge) -> Layout:
    return plan_buckets(bridge.specs, bridge.groups)


def lend(bridge: FakeBridge) -> Lends:
    return Lender(0, bridge.specs, bridge.pieces, bridge.local, SharedMemory).lends()


def replaced(lends: Lends, at: int = 0, **changes: Any) -> Lends:
    """With other values in piece `at`."""
    fields = dict(zip(("number", "start", "stop", "local", "offset", "stride"), lends.pieces[at], strict=True))
    pieces = list(lends.pieces)
    pieces[at] = tuple({**fields, **changes}.values())  # type: ignore[call-overload]
    return msgspec.structs.replace(lends, pieces=pieces)


def placed(lends: Lends, at: int, place: tuple[int, int]) -> Lends:
    places = list(lends.loan.places)
    places[at] = place
    return msgspec.structs.replace(lends, loan=Loan(lends.loan.segments, places))


def addressed(lends: Lends, **changes: Any) -> Lends:
    first, *rest = lends.loan.segments
    segment = {key: value for key, value in {**first, **changes}.items() if value is not None}
    return msgspec.structs.replace(lends, loan=Loan([segment, *rest], lends.loan.places))


def retyped(lends: Lends, dtype: str, numel: int) -> Lends:
    return msgspec.structs.replace(lends, tensors=[(lends.tensors[0][0], dtype, numel), *lends.tensors[1:]])


# Piece 0 is that of "a", [6, 4] of a local tensor [6, 5]; tensor 1 is "b" with 3 elements.
TWO = {"a": torch.arange(24.0).view(6, 4), "b": torch.arange(3.0)}
NONSENSE: dict[str, Callable[[Lends], Lends]] = {
    "HF tensor 99": lambda lends: replaced(lends, number=99),
    "HF tensor -1": lambda lends: replaced(lends, number=-1),
    "local tensor 99": lambda lends: replaced(lends, local=99),
    "local tensor -1": lambda lends: replaced(lends, local=-1),
    "a box of other dims": lambda lends: replaced(lends, start=(0,)),
    "dims that do not exist": lambda lends: replaced(lends, start=(0,) * 4, stop=(1,) * 4, stride=(1,) * 4),
    "a stride too many": lambda lends: replaced(lends, stride=(5, 1, 1)),
    "rows that do not exist": lambda lends: replaced(lends, stop=(7, 4)),
    "a box turned round": lambda lends: replaced(lends, start=(3, 0), stop=(2, 4)),
    "elements past the end": lambda lends: replaced(lends, offset=2),
    "elements before the start": lambda lends: replaced(lends, offset=-1),
    "a negative stride": lambda lends: replaced(lends, offset=25, stride=(-5, 1)),
    "segment 99": lambda lends: placed(lends, 1, (99, 0)),
    "segment -1": lambda lends: placed(lends, 1, (-1, 0)),
    "past the end of a segment": lambda lends: placed(lends, 1, (1, 4)),
    "before a segment": lambda lends: placed(lends, 1, (1, -4)),
    "between two elements": lambda lends: placed(lends, 1, (0, 2)),
    "a place too few": lambda lends: msgspec.structs.replace(lends, loan=Loan(lends.loan.segments, [(0, 0)])),
    "no path": lambda lends: addressed(lends, path=None),
    "a path that does not exist": lambda lends: addressed(lends, path="/dev/shm/nothing-there"),
    "a path with a zero": lambda lends: addressed(lends, path="/dev/shm/\0"),
    "another inode": lambda lends: addressed(lends, inode=1),
    "more bytes than the file": lambda lends: addressed(lends, num_bytes=1 << 40),
    "fewer bytes than none": lambda lends: addressed(lends, num_bytes=-5),
    "no number": lambda lends: addressed(lends, offset="many"),
    "an unknown dtype": lambda lends: retyped(lends, "float3", 30),
    "no dtype": lambda lends: retyped(lends, "Tensor", 30),
    "more elements than memory": lambda lends: retyped(lends, "float32", 1 << 40),
    "negative elements": lambda lends: retyped(lends, "float32", -30),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_a_borrower_refuses_nonsense(what: str) -> None:
    bridge = FakeBridge(TWO)
    layout, lends = layout_of(bridge), lend(bridge)
    good = Borrower(layout, [lends], SharedMemory, torch.device("cpu"))
    assert all(torch.equal(tensor, TWO[name]) for name, tensor in good.whole())
    nonsense = NONSENSE[what](lends)
    with pytest.raises(SyncError):
        Borrower(layout, [nonsense], SharedMemory, torch.device("cpu"))
    if nonsense.loan != lends.loan:  # it may also come later
        with pytest.raises(SyncError):
            good.update({0: nonsense.loan})
        before = good.generation
        good.update({0: lends.loan})
        assert good.generation == before + 1  # although nothing has moved: it was left without any memory
        assert all(torch.equal(tensor, TWO[name]) for name, tensor in good.whole())
    with pytest.raises(SyncError, match="rank 7"):
        good.update({7: lends.loan})
    good.close()


class Tampering(Spy):
    tamper = staticmethod(NONSENSE["HF tensor 99"])

    def _lends(self, lanes: Sequence[int] | None = None) -> list[Lends]:
        return [self.tamper(lends) for lends in super()._lends(lanes)]


class TamperingLater(Spy):
    def _fill(self, message: Fill, breathe: Callable[[], None]) -> Loan | None:
        loan = super()._fill(message, breathe)
        return loan and Loan(loan.segments, [(number, offset + (1 << 30)) for number, offset in loan.places])


def test_a_worker_survives_nonsense_and_the_trainer_hears_of_it() -> None:
    engine = ProcessEngine(shapes(), 1)
    bridge = FakeBridge(weights(1))
    with pytest.raises(SyncError, match="HF tensor 99") as caught:
        Tampering(bridge, engine)
    assert "engine worker 0" in caught.value.failure.origin
    with TamperingLater(bridge, engine) as sync:
        bridge.set(weights(1))
        with pytest.raises(SyncError, match="outside of its segments") as caught:
            sync.sync()
        assert "engine worker 0" in caught.value.failure.origin
    assert engine.status() == [(0, True)]
    with Spy(bridge, engine) as sync:
        sync.sync()
    assert_holds(engine, 1)
    engine.stop()


# --- modules that cannot be written from outside ----------------------------------------------------------------------


@pytest.mark.parametrize("keeps", [False, True])
def test_exactly_the_opaque_modules_are_reloaded(keeps: bool) -> None:
    engine = ProcessingEngine(keeps)
    bridge = WholeBridge(processing.weights(1, constant=True))
    opaque = processing.OPAQUE_IF_KEPT if keeps else processing.OPAQUE
    opaque_names = [name for name in processing.SHAPES if name.split(".")[0] in opaque]
    with Spy(bridge, engine) as sync:
        report = sync.sync()
        assert engine.target.loaded == list(processing.SHAPES)
        assert engine.target.modules is None
        assert set(report.paths.values()) == {"reload"}
        processing.assert_holds(engine.model, bridge.tensors)
        for step in range(2, 6):
            bridge.tensors = processing.weights(step)
            report = sync.sync()
            assert engine.target.loaded == opaque_names
            assert engine.target.modules == {*opaque, *(("derived",) if keeps else ())}
            processing.assert_holds(engine.model, bridge.tensors)
    assert report.paths == {name: "reload" if name in opaque_names else "direct" for name in processing.SHAPES}
    kept = "kept.weight may go here: the loader keeps the tensor itself"
    assert report.reasons == {
        "turned": "turned.weight: its values change after loading",
        "replaced": processing.CACHE_REPLACED,
        "other": "other.weight: loaded as [4, 6] torch.float32 of stride [6, 1], "
        "kept as [24] torch.float16 of stride [1]",
        "constant": CONSTANT,
        "added": "added.weight: add",
        **(dict.fromkeys(("kept", "padded", "derived"), kept) if keeps else {}),
    }


def test_what_a_module_shares_with_another_or_derives_from_it() -> None:
    """Shared memory is written under its other name; a module with something made of weights is reloaded."""
    engine = ProcessingEngine()
    model = engine.model
    model.fused.register_parameter("shared", model.norm.weight)  # as vLLM's routed experts hold their router's bias
    model.cast.register_buffer("derived", torch.zeros_like(model.norm.weight), persistent=False)
    engine.target = processing.Processing(model)
    engine.receiver = Receiver(engine.target, 0)

    def derive() -> None:
        with torch.no_grad():
            model.cast.derived.copy_(model.norm.weight * 2)

    engine.target.after_finish = derive
    bridge = WholeBridge(processing.weights(1))
    with Spy(bridge, engine) as sync:
        sync.sync()
        bridge.tensors = processing.weights(2)
        reasons = sync.sync().reasons
    assert "fused" not in reasons
    assert reasons["cast"] == "cast.derived: made of what is loaded"
    assert torch.equal(model.fused.get_parameter("shared"), bridge.tensors["norm.weight"])


def test_values_that_differ_show_what_happens_to_them() -> None:
    """A module that may be processed, and is not constant, is judged by a comparison alone."""
    engine = ProcessingEngine()
    with Spy(WholeBridge(processing.weights(1)), engine) as sync:
        sync.sync()
        reasons = sync.sync().reasons
    assert {"constant", "padded"} <= engine.target.processed_modules()
    assert reasons["constant"] == "constant.weight: its values change after loading"
    assert "padded" not in reasons


def test_a_refit_that_failed_in_the_engines_loader_is_repaired_by_the_next() -> None:
    engine = ProcessingEngine()
    bridge = WholeBridge(processing.weights(1))
    with Spy(bridge, engine) as sync:
        sync.sync()
        for step, moment in ((2, "begin"), (4, "finish")):
            bridge.tensors = processing.weights(step)
            broken = setattr_once(engine.target, moment)
            with pytest.raises(
                EngineLoadError, match=r"the engine failed to (take new weights|finish a refit): ValueError: broken"
            ):
                sync.sync()
            assert broken
            assert engine.state is EngineState.STALE
            bridge.tensors = processing.weights(step + 1)
            sync.sync()
            processing.assert_holds(engine.model, bridge.tensors)


@pytest.mark.parametrize("path", ["direct", "bucket"])
def test_what_is_corrupted_in_a_refit_that_learns_anew_is_no_post_processing(path: PathChoice) -> None:
    engine = ProcessingEngine()
    bridge = WholeBridge(processing.weights(1))
    with WeightSyncer(bridge, engine, path=path) as sync:
        sync.sync(verify="full")
        assert setattr_once(engine.target, "begin")
        with pytest.raises(EngineLoadError, match="broken"):
            sync.sync()
        bridge.tensors = processing.weights(2)
        engine.target.after_finish = lambda: processing.flip(engine.model.norm.weight)
        with pytest.raises(EngineLoadError, match=r"1 of the engine's tensors .* norm\.weight") as caught:
            sync.sync(verify="full")
        assert caught.value.failure.tensor == "norm.weight"
        assert engine.state is EngineState.STALE
        assert sync.sync(verify="full").verification is not None
        processing.assert_holds(engine.model, bridge.tensors)
        assert sync.verify().ok


def setattr_once(target: Any, name: str) -> bool:
    """The method `name` of `target` raises at its next call."""

    def broken(*_: object) -> None:
        delattr(target, name)
        raise ValueError("broken")

    setattr(target, name, broken)
    return True


class Halved(torch.nn.Module):
    """bf16, fed by a trainer in fp32."""

    def __init__(self) -> None:
        super().__init__()
        for name, tensor in halves(0).items():
            self.register_buffer(name, torch.zeros_like(tensor, dtype=torch.bfloat16))

    def load_weights(self, named: Any) -> set[str]:
        loaded = set()
        for name, tensor in named:
            self.get_buffer(name).copy_(tensor)
            loaded.add(name)
        return loaded


def halves(step: int) -> Tensors:
    """All kinds of floats: random bits."""
    generator = torch.Generator().manual_seed(step)
    random = torch.randint(-(2**31), 2**31, (64, 33), generator=generator, dtype=torch.int64)
    return {"a": random.to(torch.int32).view(torch.float32), "b": torch.randn(7, generator=generator)}


def test_a_cast_goes_directly_and_is_the_same_as_torchs() -> None:
    module = Halved()
    bridge = FakeBridge(halves(1))
    with Spy(bridge, ModuleEngine(module)) as sync:
        for step in range(1, 4):
            bridge.set(halves(step))
            report = sync.sync()
            for name, tensor in halves(step).items():
                assert torch.equal(module.get_buffer(name).view(torch.int16), tensor.bfloat16().view(torch.int16))
    assert set(report.paths.values()) == {"direct"}


class Dropping(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 4))


def test_an_engine_that_lost_a_parameter() -> None:
    module = Dropping()
    engine = ModuleEngine(module)
    bridge = WholeBridge({"weight": torch.randn(4, 4)})
    with Spy(bridge, engine) as sync:
        sync.sync()
        held = module.weight
        del module.weight
        with pytest.raises(SyncError, match="weight") as caught:
            sync.sync()
        assert engine.state is EngineState.STALE
        module.weight = held
        sync.sync()
        assert torch.equal(module.weight, bridge.tensors["weight"])
    assert "engine worker 0" in caught.value.failure.origin


# --- processes that die -----------------------------------------------------------------------------------------------


def files_of(pid: int) -> list[Path]:
    """What torch keeps in shared memory for a process."""
    return list(SHM.glob(f"torch_{pid}_*"))


def assert_no_files(pid: int) -> None:
    end = time.monotonic() + 10
    while left := files_of(pid):
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.02)


def killed_trainer(rank: int, num_ranks: int, directory: Path) -> float:
    engine = ProcessEngine(shapes(), 2) if rank == 0 else None
    bridge, sync = make(rank, num_ranks, engine)
    sync.sync()
    overwrite(bridge, weights(2))
    if rank == 1:

        def die() -> None:
            (directory / "pid").write_text(f"{os.getpid()} {len(files_of(os.getpid()))}")
            os.kill(os.getpid(), signal.SIGKILL)

        sync.before_totals = die
    started = time.monotonic()
    with pytest.raises(TrainerLostError, match="trainer rank 1 died"):
        sync.sync(verify="full")
    seconds = time.monotonic() - started
    if engine is not None:
        assert engine.state is EngineState.STALE  # the workers have written, and wait for Commit
        with pytest.raises(EngineStaleError, match="rank 1 died"):
            engine.check_serving()
        assert engine.status() == [(1, True)] * 2
    with pytest.raises(TrainerLostError):  # for good
        sync.sync()
    sync.close()
    return seconds


def test_a_killed_trainer_is_an_error_on_the_others_and_leaves_no_files(tmp_path: Path) -> None:
    outcomes = run_ranks(3, tmp_path, killed_trainer, tmp_path)
    assert outcomes[1].exit_code == -signal.SIGKILL
    assert [outcomes[0].error, outcomes[2].error] == [None, None]
    assert max(outcomes[0].value, outcomes[2].value) < 5  # an event, not the deadline
    pid, num_files = (tmp_path / "pid").read_text().split()
    assert int(num_files) > 0
    assert_no_files(int(pid))


def killed_worker(rank: int, num_ranks: int) -> tuple[float, int]:
    engine = ProcessEngine(shapes(), 2) if rank == 0 else None
    bridge, sync = make(rank, num_ranks, engine)
    sync.sync()
    bridge.set(weights(2))
    if engine is not None:
        sync.before_fill = engine.processes[1].kill
    started = time.monotonic()
    with pytest.raises(EngineGoneError):
        sync.sync(verify="full")
    seconds = time.monotonic() - started
    if engine is not None:
        assert engine.state is EngineState.GONE
        with pytest.raises(EngineStaleError, match="gone"):
            engine.check_serving()
    for call in (sync.sync, sync.verify):
        with pytest.raises(EngineGoneError):
            call()
    sync.close()
    return seconds, os.getpid()


def test_an_engine_whose_worker_is_killed_is_gone(tmp_path: Path) -> None:
    outcomes = run_ranks(2, tmp_path, killed_worker)
    assert errors(outcomes) == [None, None]
    assert max(seconds for seconds, _ in (o.value for o in outcomes)) < 5
    for _, pid in (o.value for o in outcomes):
        assert_no_files(pid)
