"""Cases of what an engine must say and do around refits: versions, one trainer at a time, verification, deadlines."""

from __future__ import annotations

import threading
import time
from functools import partial

import torch

from ..engines.base import Engine, InFlight
from ..errors import DeadlineError, EngineBusyError, Failure, SyncError, VersionError
from ..messages import Invitation
from ..protocol import EngineState
from ..receiver import GRACE_S
from .bench import DEADLINE_S, PURPOSE, Bench, Case, fail, raises
from .models import Model, bits

SHORT_S = 1.0  # the deadline of cases that wait for it
PATIENCE_S = 20.0  # beyond every deadline that such a case meets


def versions(bench: Bench, model: Model) -> None:
    """Versions grow, and the engine keeps what it has when one does not."""
    with bench.engine(model) as engine:
        bridge = bench.bridge(model)
        with bench.connect(bridge, engine) as syncer:
            first = syncer.version
            assert syncer.sync(first + 5).version == first + 5, "a version that was asked for is not the report's"
            bench.set(bridge, model, 1)
            for version in (first + 5, first, -1):
                again = partial(syncer.sync, version)
                raises(VersionError, again, f"version {version} after {first + 5} was accepted")
                assert syncer.version == first + 5, "a refused version is the syncer's"
                bench.is_serving(engine, "after a version was refused")
                bench.holds(engine, model, 0, "after a version was refused")
            assert syncer.sync().version == first + 6, "versions grow by one unless told otherwise"
            bench.holds(engine, model, 1)


def busy(bench: Bench, model: Model) -> None:
    """While one trainer is connected, a second is refused and disturbs nothing."""
    with bench.engine(model) as engine:
        bridge = bench.bridge(model)
        with bench.connect(bridge, engine) as syncer:
            syncer.sync()
            other = bench.bridge(model)
            raises(EngineBusyError, lambda: bench.connect(other, engine).close(), "two trainers on one engine")
            bench.is_serving(engine, "after a second trainer was refused")
            bench.set(bridge, model, 1)
            syncer.sync()
            bench.holds(engine, model, 1, "after a second trainer was refused")


def one_after_the_other(bench: Bench, model: Model) -> None:
    """The engine remembers its version from one trainer to the next."""
    with bench.engine(model) as engine:
        last = None
        for step in (1, 2, 3):
            bridge = bench.bridge(model)
            with bench.connect(bridge, engine) as syncer:
                assert last in (None, syncer.version), f"the engine forgot its version: {syncer.version}, it was {last}"
                bench.set(bridge, model, step)
                last = syncer.sync().version
            bench.is_serving(engine, "after its trainer left")
            bench.holds(engine, model, step, "after its trainer left")


def closed(bench: Bench, model: Model) -> None:
    """A closed syncer refits no more; the engine goes on serving, and can be refitted by another."""
    with bench.engine(model) as engine:
        syncer = bench.connect(bench.bridge(model), engine)
        syncer.sync()
        syncer.close()
        syncer.close()
        raises(SyncError, syncer.sync, "a closed syncer refits")
        raises(SyncError, syncer.verify, "a closed syncer verifies")
        bench.is_serving(engine, "after close()")
        bench.holds(engine, model, 0, "after close()")


def verification(bench: Bench, model: Model) -> None:
    """One bit that differs is found, and named; on the trainer's side and, where `read` shows it, on the engine's."""
    with bench.engine(model) as engine:
        bridge = bench.bridge(model)
        with bench.connect(bridge, engine) as syncer:
            names = bench.readable(model)
            for step in (1, 2):
                bench.set(bridge, model, step)
                found = syncer.sync(verify="full").verification
                assert found is not None, "a verified sync does not report what it compared"
                assert found.ok, f"a verified sync reports what is wrong and does not raise: {found}"
                unchecked = "; ".join(f"{name}: {reason}" for name, reason in found.unchecked.items())
                assert found.num_compared >= len(names), f"{found.num_compared} tensors were compared; not {unchecked}"
                bench.holds(engine, model, step, "after a verified sync")
            assert syncer.verify().ok, "verify() finds an error where there is none"
            for name in names:
                good = bridge.tensors
                bridge.tensors = {**good, name: _flipped(good[name])}
                wrong = list(syncer.verify().wrong)
                assert wrong == [name], f"verify() names {wrong} where the trainer has another bit in {name}"
                bridge.tensors = good
            for name in names:
                kept = bench.read(engine)[name]
                _flip(kept)
                if torch.equal(bits(bench.read(engine)[name]), bits(kept)):  # it is the engine's own memory
                    wrong = list(syncer.verify().wrong)
                    _flip(kept)
                    assert wrong == [name], f"verify() names {wrong} where a bit was flipped in the engine's {name}"
            assert syncer.verify().ok, "verify() finds an error where there is none any more"
            bench.is_serving(engine, "after verify()")


def checks(bench: Bench, model: Model) -> None:
    """A failure after everything was written: the engine must not serve what nobody has committed."""
    with bench.engine(model) as engine:
        bridge = bench.bridge(model)
        with bench.connect(bridge, engine) as syncer:
            version = syncer.sync().version
            bench.set(bridge, model, 1)
            syncer.before_totals = fail
            error = raises(
                SyncError, lambda: syncer.sync(verify="full"), "a trainer's failure before the commit went unnoticed"
            )
            assert PURPOSE in str(error), f"the error does not say what failed: {error}"
            bench.is_stale(engine, "after a failure before the commit")
            assert syncer.version == version, "the version advanced without a commit"
        with bench.connect(bridge, engine) as another:
            assert another.version == version, "the engine's version advanced without a commit"
            bench.is_stale(engine, "when a trainer finds it torn")
            raises(SyncError, another.verify, "a stale engine is verified as if it served")
            another.sync()
            bench.is_serving(engine, "after another trainer's commit")
            bench.holds(engine, model, 1, "after another trainer's commit")


def slow_trainer(bench: Bench, model: Model) -> None:
    """A trainer that does not fill a bucket: the engine gives up by itself, a little later than the deadline."""
    with bench.engine(model) as engine:
        bridge = bench.bridge(model)
        with bench.connect(bridge, engine, deadline_s=SHORT_S) as syncer:
            filled: list[int] = []
            syncer.before_fill = filled.append
            syncer.sync()
            bench.set(bridge, model, 1)
            # The last one: the first two are filled before the engine is paused.
            syncer.before_fill = lambda bucket: time.sleep(SHORT_S + GRACE_S + 1) if bucket == filled[-1] else None
            raises(DeadlineError, syncer.sync, "the engine's workers wait for a bucket beyond the deadline")
            bench.is_stale(engine, "after a deadline")
            syncer.before_fill = lambda bucket: None
            syncer.sync()
            bench.is_serving(engine, "after the sync after a deadline")
            bench.holds(engine, model, 1, "after the sync after a deadline")


def silent_engine(bench: Bench, model: Model) -> None:
    """An engine call that does not return, before it has done anything or after: an error within two deadlines."""
    with bench.engine(model) as engine:
        for step, late in enumerate((False, True), start=1):
            bridge = bench.bridge(model)
            bench.set(bridge, model, step)
            hanging = Hanging(engine, late=late)
            when = f"after its call did not return, {'after' if late else 'before'} it was made"
            try:
                with bench.connect(bridge, hanging, deadline_s=SHORT_S) as syncer:
                    started = time.monotonic()
                    raises(DeadlineError, syncer.sync, "an engine call that does not return went unnoticed")
                    waited_s = time.monotonic() - started
                    assert waited_s < PATIENCE_S, f"the error came after {waited_s:.0f} s, with deadline_s={SHORT_S:g}"
                    bench.is_stale(engine, when)
            finally:
                hanging.release()
            with bench.connect(bridge, engine) as syncer:
                syncer.sync()
                bench.is_serving(engine, f"after a new trainer's sync {when}")
                bench.holds(engine, model, step, f"after a new trainer's sync {when}")


class Hanging(Engine):
    """`engine`, whose `update` does not return until `release`: `late`, after it was done; else it is never done."""

    def __init__(self, engine: Engine, *, late: bool) -> None:
        self._engine, self._late = engine, late
        self._may_return, self._has_returned = threading.Event(), threading.Event()

    def release(self) -> None:
        """Let the call return, and wait until it has: the next trainer's calls come after it."""
        self._may_return.set()
        self._has_returned.wait(DEADLINE_S)

    def update(self, attempt: int, version: int, moves: bool) -> None:
        try:
            if self._late:
                self._engine.update(attempt, version, moves)
            self._may_return.wait(DEADLINE_S)
        finally:
            self._has_returned.set()

    @property
    def state(self) -> EngineState:
        return self._engine.state

    @state.setter
    def state(self, state: EngineState) -> None:
        self._engine.state = state

    @property
    def failure(self) -> Failure | None:
        return self._engine.failure

    @failure.setter
    def failure(self, failure: Failure | None) -> None:
        self._engine.failure = failure

    @property
    def name(self) -> str:
        return self._engine.name

    def num_workers(self) -> int:
        return self._engine.num_workers()

    def attach(self, invitation: Invitation) -> None:
        self._engine.attach(invitation)

    def pause(self, in_flight: InFlight) -> None:
        self._engine.pause(in_flight)

    def close_session(self) -> None:
        self._engine.close_session()

    def reset_cache(self) -> None:
        self._engine.reset_cache()

    def publish(self, version: int) -> None:
        self._engine.publish(version)

    def resume(self) -> None:
        self._engine.resume()

    def detach(self) -> None:
        self._engine.detach()


STATE_CASES = {
    "versions": Case(versions),
    "busy": Case(busy),
    "one_after_the_other": Case(one_after_the_other),
    "closed": Case(closed),
    "verification": Case(verification),
    "failure_before_the_commit": Case(checks),
    "slow_trainer": Case(slow_trainer),
    "silent_engine": Case(silent_engine),
}


def _flip(tensor: torch.Tensor) -> None:
    """Flip the lowest bit of the last element, in place."""
    bits(tensor)[-1:].bitwise_xor_(1)


def _flipped(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.clone()
    _flip(copy)
    return copy
