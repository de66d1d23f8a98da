"""The seam between a refit and an engine, as trainer rank 0 drives it.

Only rank 0 holds an `Engine`. The syncer makes its calls one at a time, in one thread of its own, in this order:

    attach                                                        once, when the syncer is built
    pause, update, reset_cache, close_session, publish, resume    each refit that succeeds
    pause, update, close_session                                  one that fails while weights move: it stays paused
    close_session                                                 after attach, if a dead trainer left one open
    detach                                                        when the syncer is closed

Each call blocks until the engine has done it, or raises EngineError. `update` returns when every worker has started all
that writes weights, `close_session` when every worker has committed or given up. The outcome itself travels through the
control channel, from receiver.py in each worker.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Literal

from ..errors import EngineError, EngineStaleError, Failure
from ..messages import Invitation
from ..protocol import EngineState

InFlight = Literal["wait", "abort", "keep"]


class Engine(ABC):
    """An inference engine that can be refitted. `state` and `failure` are kept up to date by the syncer."""

    state: EngineState = EngineState.SERVING
    failure: Failure | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """What reports and errors call it."""

    @abstractmethod
    def num_workers(self) -> int:
        """How many worker processes will attach. Raises EngineGoneError if the engine cannot be reached."""

    @abstractmethod
    def attach(self, invitation: Invitation) -> None:
        """Have every worker call `Receiver.attach(invitation)`."""

    @abstractmethod
    def pause(self, in_flight: InFlight) -> None:
        """Stop scheduling; requests in flight are awaited, aborted or kept. New requests wait or are refused."""

    @abstractmethod
    def update(self, attempt: int, version: int, moves: bool) -> None:
        """Have every worker call `Receiver.open_session()` and `Receiver.run(attempt, version, moves)`."""

    @abstractmethod
    def close_session(self) -> None:
        """Have every worker call `Receiver.close_session()`."""

    @abstractmethod
    def reset_cache(self) -> None:
        """Drop what it cached of older weights. Called while the workers may still copy new ones, and it is paused."""

    @abstractmethod
    def publish(self, version: int) -> None:
        """Make `version` known to the engine."""

    @abstractmethod
    def resume(self) -> None:
        """Schedule again."""

    @abstractmethod
    def detach(self) -> None:
        """Have every worker call `Receiver.detach()`, if the engine still can. Must not raise for a dead engine."""

    def check_serving(self) -> None:
        """Raise EngineStaleError unless the engine may serve."""
        if self.state is EngineState.SERVING:
            return
        cause = f": {self.failure.message}" if self.failure else ""
        raise EngineStaleError(
            f"{self.name} is {self.state} and must not serve until a sync commits{cause}", origin=self.name
        )


def as_engine(thing: object) -> Engine:
    """`thing` itself if it is an Engine, else wrapped by the engine module whose `wrap` knows it.

    Asked are the files beside this one and the entry points `mbridge_rl.engines`; none of them imports its engine to
    answer.
    """
    if isinstance(thing, Engine):
        return thing
    names = [module.name for module in iter_modules(import_module(__package__).__path__)]
    builtin = [name for name in names if not name.startswith(("_", "base")) and not name.endswith("_worker")]
    wraps: list[Callable[[object], Engine | None]] = [import_module(f"{__package__}.{name}").wrap for name in builtin]
    wraps += [point.load().wrap for point in entry_points(group="mbridge_rl.engines")]
    for wrap in wraps:
        engine = wrap(thing)
        if engine is not None:
            return engine
    raise EngineError(
        f"{type(thing).__module__}.{type(thing).__qualname__} is not an engine that mbridge_rl knows: pass a vllm.LLM, "
        "the URL of a `vllm serve`, a torch.nn.Module, or an Engine of your own"
    )
