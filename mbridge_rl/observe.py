"""What the outside sees of refits: log lines, metrics, ranges in a profiler, and the status of a fleet.

Nothing here takes part in a refit or reaches into one: the syncer says what happened. Trainer rank 0 holds the
`Observer`, since it alone knows the engines; every process may open ranges.

The log lines go to the logger "mbridge_rl.refit". Each is one line to read, and the same in fields that begin with
`refit_` (`LogRecord` attributes, which JSON formatters write out).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

from .errors import Failure, raised
from .metrics import Metrics
from .protocol import EngineState
from .report import SyncReport

if TYPE_CHECKING:
    from prometheus_client.registry import CollectorRegistry

LEVELS = {
    EngineState.SERVING: logging.INFO,
    EngineState.UPDATING: logging.DEBUG,  # in every refit, whose own line says more
    EngineState.STALE: logging.WARNING,
    EngineState.GONE: logging.ERROR,
}
RANGE_PREFIX = "mbridge."
_log = logging.getLogger("mbridge_rl.refit")


class Observer:
    """Told by a syncer what happens, it tells the log, and Prometheus if `prometheus_client` is installed.

    Args:
        registry: where the metrics go, by default prometheus_client.REGISTRY. Observers may share one.

    Raises ValueError if the registry has other metrics of the same names.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._metrics = _metrics(registry)
        self._states: dict[str, EngineState] = {}

    def refit_done(self, report: SyncReport) -> None:
        """A refit committed."""
        fields = {
            "outcome": "committed",
            "version": report.version,
            "engine": report.engine,
            "seconds": report.total_s,
            "phases": report.phases,
            "bytes": report.num_bytes,
            "num_tensors": report.num_tensors,
            "num_trainers": report.num_trainers,
            "num_workers": report.num_workers,
        }
        if _log.isEnabledFor(logging.INFO):
            _write(logging.INFO, str(report), fields)
        if self._metrics is not None:
            self._metrics.committed(report.total_s, report.phases, report.num_bytes)

    def refit_failed(self, failure: Failure, seconds: float, attempt: int, version: int) -> None:
        """Attempt number `attempt`, at `version`, failed after `seconds`."""
        text = f"refit v{version} failed after {seconds:.3f} s (attempt {attempt}): {describe(failure)}"
        fields = {
            "outcome": "failed",
            "version": version,
            "attempt": attempt,
            "seconds": seconds,
            "error": failure.kind,
            "reason": failure.message,
            "origin": failure.origin,
            "phase": failure.phase,
            "tensor": failure.tensor,
        }
        _write(logging.ERROR, text, fields)
        if self._metrics is not None:
            self._metrics.failed()

    def engine(self, name: str, state: EngineState, version: int) -> None:
        """`name` is in `state` and last committed `version`. Say it as often as you like: changes are logged."""
        before = self._states.get(name)
        self._states[name] = state
        if state is not before:
            is_routine = before is EngineState.UPDATING and state is EngineState.SERVING
            fields = {"engine": name, "state": state.value, "state_before": before and before.value, "version": version}
            was = f", was {before}" if before else ""
            level = logging.DEBUG if is_routine else LEVELS[state]
            _write(level, f"engine {name} is {state}, version {version}{was}", fields)
        if self._metrics is not None:
            self._metrics.engine(name, state, version)

    def forget(self, name: str) -> None:
        """The syncer has let go of the engine: its metrics end."""
        self._states.pop(name, None)
        if self._metrics is not None:
            self._metrics.forget(name)


def describe(failure: Failure) -> str:
    """The failure in one line: class, words, where it began."""
    return f"{failure.kind}: {raised(failure)}"


# --- ranges -----------------------------------------------------------------------------------------------------------


class PhaseRange:
    """A named range of time, as profilers show it: begin it and end it, or use it in a `with`.

    Costs next to nothing while nobody profiles. Begin and end it in the same thread. Ranges need not be nested.
    """

    __slots__ = ("_name", "_nvtx", "_record")

    def __init__(self, name: str) -> None:
        self._name = RANGE_PREFIX + name
        self._record: torch.profiler.record_function | None = None
        self._nvtx: int | None = None

    def begin(self) -> Self:
        """Begin. Ends first if it has begun already."""
        self.end()
        # Asked first, since record_function is not cheap while nobody profiles: a profiler of this thread, or of all?
        if torch._C._autograd._profiler_enabled():
            self._record = torch.profiler.record_function(self._name)
            self._record.__enter__()
        # Nsight Systems sees NVTX only, and record_function reaches that only under torch's emit_nvtx (which then
        # shows the range twice). NVTX itself knows whether a tool listens. Start and end need no nesting, unlike push
        # and pop.
        if torch.cuda.is_initialized():
            self._nvtx = torch.cuda.nvtx.range_start(self._name)
        return self

    def end(self) -> None:
        """End. Does nothing if it has not begun."""
        record, self._record = self._record, None
        nvtx, self._nvtx = self._nvtx, None
        if record is not None:
            record.__exit__(None, None, None)
        if nvtx is not None:
            torch.cuda.nvtx.range_end(nvtx)

    def __enter__(self) -> Self:
        return self.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def phase_range(name: str) -> PhaseRange:
    """`with phase_range("stream"):` shows up as "mbridge.stream" in torch.profiler and Nsight Systems."""
    return PhaseRange(name)


# --- status -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """One engine of a fleet, as trainer rank 0 knows it."""

    name: str
    state: EngineState
    version: int  # last committed; not what is in its memory while it is stale
    path: str  # "direct" | "bucket"
    transport: str
    num_workers: int
    failure: Failure | None = None  # why it is not serving
    last_refit_s: float | None = None

    def __str__(self) -> str:
        workers = f"{self.num_workers} worker{'' if self.num_workers == 1 else 's'}"
        parts = [f"{self.name}: {self.state}, version {self.version}", f"{workers} by {self.path}/{self.transport}"]
        if self.last_refit_s is not None:
            parts.append(f"last refit {1e3 * self.last_refit_s:.0f} ms")
        if self.failure is not None:
            parts.append(_one_line(describe(self.failure)))
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """A syncer and its engines. `broken`: why no later refit of this syncer can succeed."""

    version: int  # the last that was committed
    engines: tuple[EngineStatus, ...]
    broken: Failure | None = None

    @property
    def num_serving(self) -> int:
        """Engines that serve."""
        return sum(engine.state is EngineState.SERVING for engine in self.engines)

    def __str__(self) -> str:
        head = f"version {self.version}, {self.num_serving} of {len(self.engines)} engines serving"
        if self.broken is not None:
            head += f"; BROKEN, build a new WeightSyncer: {_one_line(describe(self.broken))}"
        return "\n  ".join([head, *map(str, self.engines)])


# --- inside -----------------------------------------------------------------------------------------------------------


def _metrics(registry: CollectorRegistry | None) -> Metrics | None:
    try:
        return Metrics(registry)
    except ModuleNotFoundError as error:
        if error.name != "prometheus_client":
            raise
        return None


def _write(level: int, text: str, fields: Mapping[str, object]) -> None:
    # A message of a foreign error may hold anything, also "%" and line ends.
    _log.log(level, "%s", _one_line(text), extra={f"refit_{name}": value for name, value in fields.items()})


def _one_line(text: str) -> str:
    return " ".join(text.split())
