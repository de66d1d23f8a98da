"""Cases of what is sent: models with which a transport or an engine may go wrong. Each refit must be exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mbridge.plan import TrainerPlan

from ..errors import EngineLoadError, EngineMismatchError, SyncError
from ..protocol import EngineState
from . import models
from .bench import PURPOSE, Bench, Case, fail, raises
from .bridge import StridedBridge, WholeBridge
from .models import Model


def exact(bench: Bench, model: Model, kind: type[WholeBridge] = WholeBridge, *, backwards: bool = False) -> None:
    """Three refits, each from new memory, arrive bit for bit. `backwards`: in another order than the engine's."""
    sent = model.reversed() if backwards else model
    with bench.engine(model) as engine:
        bridge = bench.bridge(sent, kind)
        with bench.connect(bridge, engine) as syncer:
            for step in (1, 2, 3):
                bench.set(bridge, sent, step)
                version = syncer.version
                report = syncer.sync()
                assert report.version == version + 1, "versions grow by one unless told otherwise"
                assert report.num_tensors == len(model.sent), f"the report counts {report.num_tensors} tensors"
                bench.is_serving(engine, "after a commit")
                bench.holds(engine, model, step)


def fills(bench: Bench, model: Model) -> None:
    """A trainer that fails in a bucket: the next sync repairs what that left behind.

    Until then the engine is stale, or it serves the weights that it had, if the failure came before it was touched.
    """
    with bench.engine(model) as engine:
        bridge = bench.bridge(model)
        with bench.connect(bridge, engine) as syncer:
            filled: list[int] = []
            syncer.before_fill = filled.append
            syncer.sync()
            assert sorted(set(filled)) == list(range(len(filled))), f"the trainer was asked for buckets {filled}"
            for step, bucket in enumerate(filled, start=1):
                bench.set(bridge, model, step)
                version = syncer.version
                syncer.before_fill = partial(_fail_at, bucket)
                when = f"after the trainer failed in bucket {bucket}"
                error = raises(SyncError, syncer.sync, f"a trainer's failure in bucket {bucket} went unnoticed")
                assert PURPOSE in str(error), f"the error does not say what failed in bucket {bucket}: {error}"
                if engine.state is EngineState.SERVING:
                    bench.holds(engine, model, step - 1, f"in an engine that serves {when}")
                else:
                    bench.is_stale(engine, when)
                assert syncer.version == version, f"the version advanced {when}"
                syncer.before_fill = lambda _: None
                report = syncer.sync()
                assert report.version == version + 1, f"version {report.version} {when}, not {version + 1}"
                bench.is_serving(engine, f"after the sync {when}")
                bench.holds(engine, model, step, f"after the sync {when}")


def loads(bench: Bench, model: Model) -> None:
    """The engine's loader fails in a bucket: EngineLoadError names the tensor, and the next sync repairs it.

    Each on a connection of its own: on the direct path the loader is needed in the first refit only.
    """
    assert bench.fail_load is not None
    with bench.engine(model) as engine:
        bridge = bench.bridge(model)
        with bench.connect(bridge, engine) as syncer:
            layout, last = syncer.layout, syncer.version
            parts = layout.by_bucket()
        names = {max(b for b, found in enumerate(parts) if any(p.tensor in g for p in found)): g for g in layout.groups}
        for bucket, group in names.items():
            name = layout.tensors[group[0]].name
            when = f"after the loader failed at {name}, in bucket {bucket}"
            bench.set(bridge, model, bucket + 1)
            with bench.connect(bridge, engine) as syncer:
                assert syncer.version == last, f"the engine has version {syncer.version} instead of {last}"
                bench.fail_load(engine, name)
                error = raises(EngineLoadError, syncer.sync, f"the loader's error at {name} went unnoticed")
                assert name in str(error), f"the error does not name {name}, at which the loader failed: {error}"
                bench.is_stale(engine, when)
                assert syncer.version == last, f"the version advanced {when}"
                last = syncer.sync().version
                bench.is_serving(engine, f"after the sync {when}")
                bench.holds(engine, model, bucket + 1, f"after the sync {when}")


def refused(
    bench: Bench, model: Model, bad: WholeBridge, kind: type[SyncError], names: Sequence[str], what: str
) -> None:
    """`bad` must be refused with an error that names one of `names`, while the engine serves `model` undisturbed."""
    with bench.engine(model) as engine:
        with bench.connect(bench.bridge(model), engine) as syncer:
            version = syncer.sync().version
        error = raises(kind, lambda: bench.connect(bad, engine).close(), f"{what} was accepted")
        assert any(name in str(error) for name in names), f"{what}: the error names none of {list(names)}: {error}"
        bench.is_serving(engine, f"after {what} was refused")
        bench.holds(engine, model, 0, f"after {what} was refused")
        with bench.connect(bench.bridge(model), engine) as syncer:
            assert syncer.version == version, f"the version is {syncer.version} after {what} was refused"
            syncer.sync()


def two_to_one_place(bench: Bench, model: Model) -> None:
    """Two HF tensors that the loader writes to one memory, of which none is optional: which would win?"""
    with bench.engine(model) as engine:
        what = "embed and head, which are one in the engine,"
        bridge = bench.bridge(model)
        error = raises(EngineMismatchError, lambda: bench.connect(bridge, engine).close(), f"{what} were accepted")
        named = {"embed", "head"} <= set(str(error).replace(",", " ").split())
        assert named, f"{what}: the error does not name them: {error}"


class _Twice(WholeBridge):
    """Plans its first tensor twice."""

    def plan(self, models: Sequence[Any]) -> TrainerPlan:
        plan = super().plan(models)
        first = plan.tensors[:1]
        return replace(plan, tensors=(*plan.tensors, *first), fusion_groups=(*plan.fusion_groups, (first[0].name,)))


def duplicate_name(bench: Bench, model: Model) -> None:
    bad = bench.bridge(model, _Twice)
    refused(bench, model, bad, SyncError, [""], "a name that comes twice")


def missing_name(bench: Bench, model: Model) -> None:
    *rest, last = model.sent
    bad = bench.bridge(model._replace(tensors={name: model.tensors[name] for name in rest}))
    refused(
        bench, model, bad, EngineMismatchError, [last, last.replace(".", "/")], "a trainer without one of the tensors"
    )


def extra_name(bench: Bench, model: Model) -> None:
    name = "one.tensor.more"
    bad = bench.bridge(model._replace(tensors={**model.tensors, name: models.made((3, 2))}))
    refused(bench, model, bad, EngineMismatchError, [name], "a tensor more")


def other_shape(bench: Bench, model: Model) -> None:
    name = next(name for name, tensor in model.sent.items() if tensor.dim() == 2)
    smaller = model.tensors[name][:-2, :-2].clone()
    bad = bench.bridge(model._replace(tensors={**model.tensors, name: smaller}))
    refused(bench, model, bad, EngineMismatchError, [name], "a tensor of another shape")


DATA_CASES = {
    "exact": Case(exact),
    "order": Case(partial(exact, backwards=True)),
    "strided_sources": Case(partial(exact, kind=StridedBridge)),
    "dtypes": Case(exact, models.every_dtype),
    "strided_sources_of_every_dtype": Case(partial(exact, kind=StridedBridge), models.every_dtype),
    "no_dims_and_no_elements": Case(exact, models.no_dims_and_no_elements),
    "no_tensors": Case(exact, models.nothing),
    "no_elements": Case(exact, models.no_elements),
    "oversize": Case(exact, models.oversize),
    "fusion_groups": Case(exact, models.grouped),
    "fp32_buffer": Case(exact, models.mixed_precision),
    "trainer_fails_in_each_bucket": Case(fills),
    "loader_fails_in_each_bucket": Case(loads, needs_failing_load=True),
}
MISMATCH_CASES = {
    "tied_sent_once": Case(exact, partial(models.tied, unsent=True)),
    "tied_sent_twice": Case(exact, partial(models.tied, optional=True)),
    "two_to_one_place": Case(two_to_one_place, models.tied),
    "duplicate_name": Case(duplicate_name),
    "missing_name": Case(missing_name, models.usual),
    "extra_name": Case(extra_name),
    "other_shape": Case(other_shape),
}


def _fail_at(bucket: int, now: int) -> None:
    if bucket == now:
        fail()
