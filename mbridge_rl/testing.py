"""Conformance suites: what every transport and every engine must do. For our own tests and for those of third parties.

    check_transport(MyTransport)
    check_engine(make_engine, read)

Each raises AssertionError that says what was violated. `WholeBridge` is the smallest trainer: one rank, whole HF
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mbridge.pieces import TensorSpec, whole_pieces
from mbridge.plan import TrainerPlan

from .engines.base import Engine
from .errors import EngineBusyError, EngineStaleError, SyncError, TransportError, VersionError
from .messages import Check
from .protocol import EngineState
from .syncer import PathChoice, WeightSyncer
from .transports.base import NUM_SLOTS, Address, Lent, Transport

Tensors = Mapping[str, torch.Tensor]


class LiveView(Mapping[str, torch.Tensor]):
    """A view of the dict that `read` returns at each access."""

    def __init__(self, read: Callable[[], Tensors]) -> None:
        self._read = read

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


class WholeBridge:
    """A trainer of one rank that holds `tensors`, HF name -> tensor, whole and under their HF names."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = dict(tensors)
        self.models: Sequence[Any] = ()

    def plan(self, models: Sequence[Any]) -> TrainerPlan:
        specs = tuple(TensorSpec(name, tuple(t.shape), t.dtype) for name, t in self.tensors.items())
        pieces, groups = tuple(whole_pieces(specs)), tuple((spec.name,) for spec in specs)
        return TrainerPlan(specs, groups, pieces, pieces, optional_names=frozenset(), digest="whole")

    def live_tensors(self, models: Sequence[Any]) -> Tensors:
        return LiveView(lambda: self.tensors)


def check_transport(
    kind: type[Transport], slot_bytes: int = 3 << 12, *, device: str = "cpu", lends: bool = True
) -> None:
    """Two mappings of the same slots: what is written through one is read through the other; who creates destroys.

    Then, if it `lends`, tensors of `device` are lent: what is mapped is their memory, views of one storage included.
    """
    creator = kind.create(slot_bytes)
    try:
        peer = kind.open(creator.address)
        for index in range(NUM_SLOTS):
            mine, theirs = creator.slot(index), peer.slot(index)
            for slot in (mine, theirs):
                assert slot.dtype == torch.uint8, "a slot is uint8"
                assert slot.shape == (slot_bytes,), "a slot is flat and has slot_bytes"
                assert slot.data_ptr() % 16 == 0, "a slot is aligned for every dtype"
            mine.fill_(index + 1)
            assert theirs.eq(index + 1).all(), "the peer does not see what the creator wrote"
            theirs[::2] = 77
            assert mine[::2].eq(77).all(), "the creator does not see what the peer wrote"
        assert creator.slot(0)[1::2].eq(1).all(), "slots overlap"
        creator.everyone_attached()
        creator.slot(0).fill_(9)
        assert peer.slot(0).eq(9).all(), "everyone_attached() must not part those who are attached"
        peer.close()
        peer.close()
        creator.slot(1).fill_(3)
    finally:
        creator.close()
        creator.close()
    if lends:
        _check_lending(kind, device)
    else:
        _raises(TransportError, lambda: kind.lend({"a": torch.zeros(1, device=device)}), "lent what cannot be mapped")


def _check_lending(kind: type[Transport], device: str) -> None:
    whole = torch.arange(3000, dtype=torch.float32, device=device)
    tensors = {
        "part": whole[100:200].view(10, 10),
        "other": torch.arange(77, device=device).to(torch.bfloat16),
        "whole": whole,
        "empty": torch.empty(0, device=device),
    }
    lent = kind.lend(tensors)
    assert set(lent.places) == {"part", "other", "whole"}, "every tensor with elements has a place, no other has"
    assert len(lent.segments) <= 2, "tensors of one storage lie in one segment"
    mapped = [kind.map_segment(address) for address in lent.segments]

    def check(name: str, violation: str) -> None:
        index, offset = lent.places[name]
        tensor, segment = tensors[name], mapped[index].bytes
        assert segment.dtype == torch.uint8, "a segment is uint8"
        assert segment.dim() == 1, "a segment is flat"
        there = segment[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        assert torch.equal(there, tensor), f"{name}: {violation}"

    for name in lent.places:
        check(name, "what is mapped are other bytes than the tensor's")
    whole[150] = -1
    assert tensors["part"][5, 0].eq(-1), "lending parted a tensor from its view"
    for name in lent.places:
        check(name, "what is written after lending is not seen")
    assert kind.lend(tensors) == lent, "the same memory, lent again, has the same addresses"
    moved = kind.lend({**tensors, "other": tensors["other"].clone()})
    assert _where(moved, "other") != _where(lent, "other"), "other memory has the same address"
    assert _where(moved, "part") == _where(lent, "part"), "a tensor that did not move has another address"
    for segment in mapped:
        segment.close()
        segment.close()
        _raises(TransportError, lambda segment=segment: segment.bytes, "a closed segment still has bytes")  # type: ignore[misc]


def _where(lent: Lent, name: str) -> tuple[Address, int]:
    index, offset = lent.places[name]
    return lent.segments[index], offset


def check_engine(
    make: Callable[[], Engine], read: Callable[[Engine], Tensors], tensors: Tensors, *, path: PathChoice = "bucket"
) -> None:
    """Refits an engine from `make()`, which must hold the model of `tensors`; `read(engine)` gives its HF tensors back.

    Weights arrive exactly and again and again; versions grow; a second trainer is refused; after a failed refit the
    engine is stale, and serves after the next.
    """
    engine, bridge = make(), WholeBridge(tensors)
    size = max(t.nbytes for t in tensors.values()) // 2  # some tensors are split
    with WeightSyncer(bridge, engine, bucket_bytes=size, deadline_s=30, path=path) as syncer:
        first = syncer.version
        for step in (1, 2, 3):
            bridge.tensors = {name: _changed(t, step) for name, t in tensors.items()}
            report = syncer.sync()
            assert report.version == first + step, "versions grow by one unless told otherwise"
            _compare(read(engine), bridge.tensors)
        report = syncer.sync(verify="full")
        assert report.verification is not None, "a verified sync reports what it compared"
        assert report.verification.num_compared == len(tensors), f"not all compared: {report.verification}"
        _compare(read(engine), bridge.tensors)
        assert syncer.verify().ok, "verify() finds an error where there is none"
        name = next(iter(tensors))
        bridge.tensors[name] = _changed(bridge.tensors[name], 1)
        assert list(syncer.verify().wrong) == [name], "verify() does not name the tensor that differs"
        syncer.sync()
        _raises(VersionError, lambda: syncer.sync(first), "a version that does not grow was accepted")
        _raises(EngineBusyError, lambda: WeightSyncer(bridge, engine), "two trainers on one engine")
        assert _state(engine) is EngineState.SERVING, "a refused refit must not touch the engine"
    with _Failing(bridge, engine, bucket_bytes=size, deadline_s=30, path=path) as failing:
        assert failing.version == first + 5, "the engine forgot its version"
        _raises(SyncError, lambda: failing.sync(verify="full"), "a trainer's failure went unnoticed")
        assert _state(engine) is EngineState.STALE, "a torn engine must be stale"
        _raises(EngineStaleError, engine.check_serving, "a stale engine serves")
        failing.fails = False
        failing.sync(verify="full")
        assert _state(engine) is EngineState.SERVING, "a commit makes an engine serve again"
        _compare(read(engine), bridge.tensors)


class _Failing(WeightSyncer):
    """Fails in a refit, after weights were written, while `fails`."""

    fails = True

    def _totals(self, message: Check) -> dict[int, int]:
        if self.fails:
            raise SyncError("a failure on purpose")
        return super()._totals(message)


def _state(engine: Engine) -> EngineState:
    return engine.state


def _changed(tensor: torch.Tensor, step: int) -> torch.Tensor:
    return (tensor.double() * (1 + step / 4) + step / 8).to(tensor.dtype)


def _compare(found: Tensors, wanted: Tensors) -> None:
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, f"{name}: {found[name].dtype} instead of {tensor.dtype}"
        assert torch.equal(found[name].cpu(), tensor), f"{name}: other values than the trainer's"


def _raises(kind: type[Exception], call: Callable[[], object], violation: str) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(violation)
