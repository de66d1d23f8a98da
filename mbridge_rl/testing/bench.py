"""What the cases of both suites share: an engine to refit, a syncer that can be made to fail, words for violations."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

from mbridge.errors import MBridgeError

from ..engines.base import Engine, as_engine
from ..errors import EngineStaleError, SyncError
from ..messages import Check, Fill, Loan
from ..protocol import EngineState
from ..syncer import WeightSyncer
from .bridge import Tensors, WholeBridge
from .models import BUCKET_BYTES, Model, at_step, bits

DEADLINE_S = 30.0
PURPOSE = "a failure on purpose"
E = TypeVar("E", bound=Exception)


class Case(NamedTuple):
    """One thing that every engine or transport must do. `check` raises AssertionError that says what was violated."""

    check: Callable[[Bench, Model], None]
    model: Callable[[], Model] | None = None  # the case's own; None: any will do
    needs_failing_load: bool = False


class Saboteur(WeightSyncer):
    """Calls a function before each bucket is filled, and before it adds up what `verify` compares."""

    before_fill: Callable[[int], object] = staticmethod(lambda bucket: None)
    before_totals: Callable[[], object] = staticmethod(lambda: None)

    def _fill(self, message: Fill, breathe: Callable[[], None]) -> Loan | None:
        self.before_fill(message.bucket)
        return super()._fill(message, breathe)

    def _totals(self, message: Check) -> dict[int, int]:
        self.before_totals()
        return super()._totals(message)


@dataclass(frozen=True)
class Bench:
    """An engine under test, or the engine that a transport under test leads to."""

    make: Callable[[Tensors], object]
    read: Callable[[Engine], Tensors]
    stop: Callable[[Engine], object] = lambda engine: None
    options: Mapping[str, Any] = field(default_factory=dict)  # of the syncer
    unreadable: Container[str] = ()
    fail_load: Callable[[Engine, str], object] | None = None
    device: str = "cpu"

    @contextmanager
    def engine(self, model: Model) -> Iterator[Engine]:
        engine = as_engine(self.make(model.tensors))
        try:
            yield engine
        finally:
            self.stop(engine)

    def bridge(self, model: Model, kind: type[WholeBridge] = WholeBridge) -> WholeBridge:
        tensors = {name: tensor.to(self.device, copy=True) for name, tensor in model.sent.items()}
        return kind(tensors, groups=model.groups, optional=model.optional)

    def connect(self, bridge: WholeBridge, engine: Engine, **options: Any) -> Saboteur:
        return Saboteur(
            bridge, engine, **{"bucket_bytes": BUCKET_BYTES, "deadline_s": DEADLINE_S, **self.options, **options}
        )

    def set(self, bridge: WholeBridge, model: Model, step: int) -> None:
        """The weights of `step` at new addresses."""
        bridge.tensors = {name: t.to(self.device) for name, t in at_step(model.sent, step).items()}

    def holds(self, engine: Engine, model: Model, step: int, when: str = "after a refit") -> None:
        """Assert that `engine` holds the weights of `step`, bit for bit."""
        found = self.read(engine)
        for name, tensor in at_step(model.tensors, step).items():
            if name in self.unreadable:
                continue
            assert name in found, f"{name}: cannot be read from the engine {when}"
            assert found[name].dtype == tensor.dtype, f"{name}: {found[name].dtype} instead of {tensor.dtype} {when}"
            assert found[name].shape == tensor.shape, f"{name}: {list(found[name].shape)} {when}"
            assert torch.equal(bits(found[name].cpu()), bits(tensor)), f"{name}: other values than the trainer's {when}"

    def is_stale(self, engine: Engine, when: str) -> None:
        """Assert that `engine` says that it must not serve."""
        assert engine.state in (EngineState.STALE, EngineState.GONE), (
            f"the engine is {engine.state} instead of stale {when}"
        )
        raises(EngineStaleError, engine.check_serving, f"a stale engine serves {when}")

    def is_serving(self, engine: Engine, when: str) -> None:
        assert engine.state is EngineState.SERVING, f"the engine is {engine.state} instead of serving {when}"

    def readable(self, model: Model) -> list[str]:
        """Names of sent tensors with elements that `read` gives back."""
        return [n for n, t in model.sent.items() if n not in self.unreadable and t.numel() and n not in model.optional]


def raises(kind: type[E], call: Callable[[], object], violation: str) -> E:
    """The error of `kind` that `call` raises. Any other outcome is the violation."""
    try:
        call()
    except kind as error:
        return error
    except MBridgeError as error:
        raise AssertionError(f"{violation}: expected {kind.__name__}, got {type(error).__name__}: {error}") from error
    raise AssertionError(violation)


def fail() -> None:
    """What a Saboteur may do."""
    raise SyncError(PURPOSE)


def selected(cases: Sequence[str], names: Iterable[str] | None) -> list[str]:
    """`names`, or all. Raises ValueError for a name that is no case's."""
    if names is None:
        return list(cases)
    names = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in cases]
    if unknown:
        raise ValueError(f"no case is called {unknown[0]!r}; there are {', '.join(cases)}")
    return names


def run_case(name: str, check: Callable[[], None]) -> None:
    """Run a case. What it violates is told with the case's name, also if a refit that must succeed fails."""
    try:
        check()
    except AssertionError as violation:
        raise AssertionError(f"{name}: {violation}") from violation
    except MBridgeError as error:
        raise AssertionError(f"{name}: failed where it must not: {type(error).__name__}: {error}") from error
