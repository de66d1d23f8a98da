"""What Prometheus sees of refits, if `prometheus_client` is installed. It is imported when a `Metrics` is made.

    mbridge_refit_seconds{phase}          histogram; phase "total" is the whole refit, from sync() until it is over
    mbridge_refit_bytes_total             model bytes of refits that committed
    mbridge_refits_total{outcome}         attempts: "committed" or "failed"
    mbridge_engine_version{engine}        what the engine last committed
    mbridge_engine_state{engine,state}    1 for the state that the engine is in, 0 for the others

Made once per registry: all syncers of a process add to the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from .protocol import EngineState

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge, Histogram
    from prometheus_client.registry import CollectorRegistry

    M = TypeVar("M", Counter, Gauge, Histogram)

# fmt: off
BUCKETS_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 300.0
)
# fmt: on
COMMITTED, FAILED = "committed", "failed"
WHOLE = "total"  # beside the names of phases


class Metrics:
    """The metrics of one registry (by default prometheus_client.REGISTRY). Thread-safe, as prometheus_client is.

    Raises ValueError if something else in the registry has one of the names.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        make = partial(_once, REGISTRY if registry is None else registry)
        self._seconds = make(
            Histogram, "mbridge_refit_seconds", "Seconds of refits, by phase", "phase", buckets=BUCKETS_S
        )
        self._bytes = make(Counter, "mbridge_refit_bytes", "Model bytes of refits that committed")
        self._refits = make(Counter, "mbridge_refits", "Attempts at a refit, by outcome", "outcome")
        # "mostrecent": where several processes write to one PROMETHEUS_MULTIPROC_DIR, the last one to speak is right.
        gauge = partial(make, Gauge, multiprocess_mode="mostrecent")
        self._version = gauge(
            "mbridge_engine_version", "Version of the weights that the engine last committed", "engine"
        )
        self._state = gauge("mbridge_engine_state", "1 for the state that the engine is in", "engine", "state")
        for outcome in (COMMITTED, FAILED):
            self._refits.labels(outcome)  # there from the start: a rate sees the first failure too

    def committed(self, total_s: float, phases: Mapping[str, float], num_bytes: int) -> None:
        """A refit committed."""
        self._refits.labels(COMMITTED).inc()
        self._bytes.inc(num_bytes)
        for phase, seconds in ({WHOLE: total_s} | dict(phases)).items():
            self._seconds.labels(phase).observe(seconds)

    def failed(self) -> None:
        """An attempt failed. Its time would be that of the deadline: it is in no histogram."""
        self._refits.labels(FAILED).inc()

    def engine(self, name: str, state: EngineState, version: int) -> None:
        """What `name` is and serves now."""
        self._version.labels(name).set(version)
        for each in sorted(EngineState, key=lambda each: each is state):  # never two at 1, if read in between
            self._state.labels(name, each.value).set(each is state)

    def forget(self, name: str) -> None:
        """The engine has left: what was last known of it is no longer true."""
        with suppress(KeyError):  # prometheus_client before 0.20, if nothing was known of it
            self._version.remove(name)
        for state in EngineState:
            with suppress(KeyError):
                self._state.remove(name, state.value)


def _once(registry: CollectorRegistry, kind: type[M], name: str, what: str, *labels: str, **options: Any) -> M:
    """A new metric, or the one that an earlier syncer put into `registry`."""
    try:
        return kind(name, what, labels, registry=registry, **options)
    except ValueError:  # the name is taken; prometheus_client has no public way to ask by whom
        found = registry._names_to_collectors.get(name)
    if isinstance(found, kind) and found._labelnames == labels:
        return found
    raise ValueError(
        f"the registry has another metric that clashes with {name} ({type(found).__name__}); "
        "pass a registry of its own: Observer(registry=CollectorRegistry())"
    )
