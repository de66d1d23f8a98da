"""The two suites: which cases an engine or a transport goes through."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from functools import partial
from typing import Any

from ..engines.base import Engine
from ..engines.module import ModuleEngine
from ..syncer import PathChoice
from ..transports.base import Transport, transport_class
from .bench import Bench, Case, run_case, selected
from .bridge import Groups, Tensors
from .memory import MEMORY_CASES, Memory, no_lending
from .models import Model, ReferenceModule, grouped, usual
from .refits import DATA_CASES, MISMATCH_CASES
from .states import STATE_CASES

Names = tuple[str, ...]


def arrival(bench: Bench, model: Model) -> None:
    """The loader gets every tensor once, in the trainer's order, and a fusion group in one call."""
    with bench.engine(model) as engine:
        with bench.connect(bench.bridge(model), engine) as syncer:
            syncer.sync()
            layout = syncer.layout
        bench.holds(engine, model, 0)
        calls = [call for call in _module(engine).calls if call]
        names = [name for call in calls for name in call]
        twice = sorted({name for name in names if names.count(name) > 1})
        assert not twice, f"{', '.join(twice)} came more than once"
        missing = sorted(model.sent.keys() - set(names))
        assert not missing, f"{', '.join(missing)} did not come"
        wanted = [layout.tensors[number].name for group in layout.groups for number in group]
        assert names == wanted, f"the order is {', '.join(names)} instead of {', '.join(wanted)}"
        for group in model.groups:
            assert any(set(group) <= set(call) for call in calls), f"the group {', '.join(group)} came in parts"


_TRANSPORT = {"arrival": Case(arrival, grouped), **DATA_CASES}
_ENGINE = {**DATA_CASES, **MISMATCH_CASES, **STATE_CASES}
TRANSPORT_CASES: Names = (*MEMORY_CASES, *_TRANSPORT)
ENGINE_CASES: Names = tuple(_ENGINE)


def check_transport(
    kind: str | type[Transport],
    slot_bytes: int = 3 << 12,
    *,
    device: str = "cpu",
    lends: bool = True,
    cases: Iterable[str] | None = None,
) -> Names:
    """Check a transport, given by the name that it is registered under (see transports/base.py), or by its class.

    First its memory: two mappings of the same slots (if it is shared), and tensors of `device` that it `lends`. Then
    refits of a module through it, along the bucket path and, if it lends, the direct path. `cases`: names from
    TRANSPORT_CASES, by default all. Returns what was run, in the form "case" or "case, path". Raises AssertionError at
    the first violation; ValueError for an unknown case, or a class that is not registered.
    """
    kind = transport_class(kind) if isinstance(kind, str) else kind
    memory = Memory(kind, slot_bytes, device)
    ran: list[str] = []
    for name in selected(TRANSPORT_CASES, cases):
        if name in _TRANSPORT:
            _check_registered(kind)
            for path in ("bucket", "direct") if lends and name != "arrival" else ("bucket",):
                bench = _module_bench(device, {"transport": kind.name, "path": path})
                ran.append(f"{name}, {path}")
                run_case(ran[-1], partial(_run, _TRANSPORT[name], bench, None))
        elif kind.is_shared or name == "lending":
            check = no_lending if name == "lending" and not lends else MEMORY_CASES[name]
            ran.append(name)
            run_case(name, partial(check, memory))
    return tuple(ran)


def check_engine(
    make: Callable[[Tensors], object],
    read: Callable[[Engine], Tensors],
    *,
    stop: Callable[[Engine], object] = lambda engine: None,
    fail_load: Callable[[Engine, str], object] | None = None,
    tensors: Tensors | None = None,
    groups: Groups = (),
    unreadable: Container[str] = (),
    path: PathChoice = "bucket",
    transport: str = "auto",
    device: str = "cpu",
    cases: Iterable[str] | None = None,
    bucket_bytes: int | None = None,
) -> Names:
    """Check an engine, in refits by a trainer of one rank.

    Args:
        make: builds the engine, or whatever WeightSyncer takes as one, with a model that has the given tensors: HF
            name -> tensor, whose values do not matter. Two names of one tensor object are tied: one memory.
        read: the HF tensors that the engine holds now. Where it returns the engine's own memory rather than copies,
            bits are flipped there too.
        stop: called with each engine at the end of its case.
        fail_load: make the engine's loader raise, once, when it gets data of the given HF name. Without it
            loader_fails_in_each_bucket is left out.
        tensors, groups: of an engine that holds one model only: `make` gets them in every case, and cases that have a
            model of their own are left out. `make` may then return the same engine each time.
        unreadable: names that `read` does not give back as they were sent (packed, quantised): not compared.
        path, transport: as for WeightSyncer.
        device: of the trainer's tensors.
        cases: names from ENGINE_CASES, by default all.
        bucket_bytes: of the trainer; by default a kilobyte. A model should fill three buckets or more.

    Returns the names of the cases that were run. Raises AssertionError at the first violation; ValueError for an
    unknown case, or one that was asked for and cannot be run.
    """
    options: dict[str, Any] = {"path": path, "transport": transport}
    options |= {} if bucket_bytes is None else {"bucket_bytes": bucket_bytes}
    bench = Bench(make, read, stop, options, unreadable, fail_load, device)
    fixed = None if tensors is None else Model(tensors, groups)
    ran: list[str] = []
    for name in selected(ENGINE_CASES, cases):
        case = _ENGINE[name]
        reason = ""
        if case.needs_failing_load and fail_load is None:
            reason = "needs fail_load"
        elif case.model is not None and fixed is not None:
            reason = "has a model of its own, and this engine holds another"
        if not reason:
            ran.append(name)
            run_case(name, partial(_run, case, bench, fixed))
        elif cases is not None:
            raise ValueError(f"case {name!r} {reason}")
    return tuple(ran)


def _run(case: Case, bench: Bench, fixed: Model | None) -> None:
    case.check(bench, fixed or (case.model or usual)())


def _module_bench(device: str, options: dict[str, Any]) -> Bench:
    return Bench(
        make=lambda tensors: ReferenceModule(tensors).to(device),
        read=lambda engine: _module(engine).tensors(),
        options=options,
        fail_load=lambda engine, name: setattr(_module(engine), "fail_at", name),
        device=device,
    )


def _module(engine: Engine) -> ReferenceModule:
    assert isinstance(engine, ModuleEngine)
    assert isinstance(engine.module, ReferenceModule)
    return engine.module


def _check_registered(kind: type[Transport]) -> None:
    """Processes find a transport by its name: so must the suite."""
    if transport_class(kind.name) is not kind:
        raise ValueError(
            f"the transport that is registered as {kind.name!r} is another class than {kind.__qualname__}: give it a "
            "name of its own and an entry point in the group mbridge_rl.transports, or select cases of memory"
        )
