"""What peers and strangers may send: the decoder, the hub over real sockets during a refit, and the state machine, fed
with what nobody should send. Deterministic: hypothesis draws the same examples each time.
"""

from __future__ import annotations

import ast
import os
import socket
import struct
import threading
import time
import tracemalloc
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import Phase as HypothesisPhase
from hypothesis import strategies as st

from mbridge.pieces import TensorSpec
from mbridge_rl import WeightSyncer
from mbridge_rl.control import Hub, Link, Received
from mbridge_rl.engines.module import ModuleEngine
from mbridge_rl.errors import Failure, ProtocolError, SyncError
from mbridge_rl.hosts import host_id
from mbridge_rl.messages import (
    Abort,
    AnyMessage,
    Applied,
    Check,
    Checked,
    Commit,
    Committed,
    Enter,
    Failed,
    Fill,
    Filled,
    Goodbye,
    Hello,
    Load,
    Loaded,
    Settled,
    Verification,
)
from mbridge_rl.protocol import Action, Call, EngineCall, EngineState, Lane, Peer, Phase, Refit, Taking
from mbridge_rl.verification import compare
from mbridge_rl.wire import MAX_FAILURE_CHARS, pack, unpack
from tests.mbridge_rl.fakes import FakeBridge, Tensors

TOKEN = "0123456789abcdef" * 2
KINDS: tuple[type[Any], ...] = typing.get_args(AnyMessage)
FUZZ = settings(
    max_examples=400, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


# --- values of any type that a message has ----------------------------------------------------------------------------


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Well-typed values, of extreme sizes too. Raises TypeError for a type that messages did not have so far."""
    plain: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(0, 3) | st.integers(-(2**63), 2**64 - 1),
        float: st.floats(),
        str: st.text(max_size=8),
        bool: st.booleans(),
        type(None): st.none(),
    }
    if kind in plain:
        return plain[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*map(values, arguments))
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is typing.Annotated:
        limits = arguments[1]
        assert isinstance(limits, msgspec.Meta) and limits.ge is not None and limits.lt is not None
        return st.integers(int(limits.ge), int(limits.lt) - 1)
    if origin is list or (origin is tuple and arguments[-1] is ...):
        made = st.lists(values(arguments[0]), max_size=3)
        return made if origin is list else made.map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    if isinstance(kind, type) and (issubclass(kind, msgspec.Struct) or is_dataclass(kind)):
        names = kind.__struct_fields__ if issubclass(kind, msgspec.Struct) else [f.name for f in fields(kind)]
        hints = typing.get_type_hints(kind, include_extras=True)
        return st.builds(kind, **{name: values(hints[name]) for name in names})
    raise TypeError(f"no values of {kind}")


MESSAGES = st.one_of(*map(values, KINDS))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
encode = msgspec.msgpack.encode


def decodes(payload: bytes) -> AnyMessage | None:
    """None if it is refused; any other error than ProtocolError fails the test."""
    try:
        message = unpack([TOKEN.encode(), payload], TOKEN)
    except ProtocolError as error:
        refused, message = str(error), None
    else:
        refused = ""
    assert TOKEN not in refused
    assert message is None or isinstance(message, KINDS)
    return message


# --- the decoder ------------------------------------------------------------------------------------------------------


@FUZZ
@given(MESSAGES)
def test_every_message_comes_back(message: AnyMessage) -> None:
    back = unpack(pack(message, TOKEN), TOKEN)
    assert type(back) is type(message)
    assert encode(back) == encode(message)  # NaN does not equal itself


@FUZZ
@given(st.binary(max_size=200) | JSON.map(encode))
def test_random_bytes_and_random_msgpack(payload: bytes) -> None:
    decodes(payload)


@FUZZ
@given(MESSAGES, st.lists(st.tuples(st.integers(0, 10_000), st.binary(min_size=1, max_size=6)), min_size=1, max_size=4))
def test_mutated_messages(message: AnyMessage, changes: list[tuple[int, bytes]]) -> None:
    payload = bytearray(encode(message))
    for position, new in changes:
        at = position % (len(payload) + 1)
        payload[at : at + (len(new) if position % 2 else 0)] = new  # replaced or inserted
        decodes(bytes(payload))
        decodes(bytes(payload[:at]))


@FUZZ
@given(MESSAGES, st.integers(0, 10_000), JSON)
def test_wrong_types(message: AnyMessage, which: int, value: Any) -> None:
    plain = msgspec.to_builtins(message)
    name = list(plain)[which % len(plain)]
    decodes(encode({**plain, name: value}))
    decodes(encode({**plain, f"{name}?": value}))
    decodes(encode({key: v for key, v in plain.items() if key != name}))


HUGE = [b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"]  # array, map, text, bytes, extension


@pytest.mark.parametrize("header", HUGE)
@pytest.mark.parametrize("field", ["unused", "unwritten", "loan", "failure", "type", "unknown"])
def test_lengths_that_are_not_there_cost_nothing(header: bytes, field: str) -> None:
    length = header + struct.pack(">I", 2**32 - 1)
    kind = {"unused": "Attached", "unwritten": "Attached", "loan": "Filled", "failure": "Failed"}.get(field, "Attached")
    fields_first = b"" if field == "type" else encode("type") + encode(kind)
    count = 1 if field == "type" else 2
    tracemalloc.start()
    assert decodes(bytes([0x80 + count]) + fields_first + encode(field) + length + b"\xa0" * 1000) is None
    assert decodes(length + b"\xa0" * 1000) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a", b"\xdc\x00\x01"])
@pytest.mark.parametrize("depth", [100, 100_000, 10_000_000])
def test_nesting_without_end(opening: bytes, depth: int) -> None:
    """Typed fields end it at once; a field that nobody knows is skipped, or refused when too deep."""
    nested = opening * depth + b"\x90"
    for field in ("unused", "unwritten"):
        assert decodes(b"\x82" + encode("type") + encode("Attached") + encode(field) + nested) is None
    skipped = b"\x83" + encode("type") + encode("Attached") + encode("?") + nested + encode("unused") + b"\x90"
    assert (decodes(skipped) is None) == (depth > 100)
    assert decodes(nested) is None


def test_a_failure_is_shortened() -> None:
    """It is shown, logged and sent on to every rank."""
    long = Failure("SyncError", "m" * 1_000_000, "o" * 1_000_000, "p", "t" * 1_000_000)
    for message in (Failed(1, long), Abort(1, long)):
        back = unpack(pack(message, TOKEN), TOKEN)
        assert isinstance(back, Failed | Abort)
        assert back.failure.message == "m" * MAX_FAILURE_CHARS + "..."
        assert back.failure.origin == "o" * MAX_FAILURE_CHARS + "..."
        assert back.failure.tensor == "t" * MAX_FAILURE_CHARS + "..."
        assert (back.failure.kind, back.failure.phase) == ("SyncError", "p")


# --- the state machine, and peers that lie ----------------------------------------------------------------------------

TRAINERS = [Peer("trainer", 0), Peer("trainer", 1)]
WORKERS = [Peer("worker", 0, 0), Peer("worker", 0, 1), Peer("worker", 1, 1)]
OTHERS = [Peer("trainer", 7), Peer("worker", 9, 0), Peer("worker", 0, 5), Peer("king", -1, -1)]
ATTEMPT, OLD, NEW = 1, 7, 8
FAILURES = st.builds(
    Failure,
    st.sampled_from(["SyncError", "EngineGoneError", "TransportError", "DeadlineError", "?"]),
    st.text(max_size=4),
)


def of_attempt(message: AnyMessage) -> AnyMessage:
    """Whoever drives the machine gives it messages of its attempt only."""
    return msgspec.structs.replace(message, attempt=ATTEMPT) if hasattr(message, "attempt") else message


PLAUSIBLE: list[AnyMessage] = [
    Enter(ATTEMPT, NEW),
    *(Filled(ATTEMPT, bucket, 0.0) for bucket in range(3)),
    *(Loaded(ATTEMPT, bucket, 0.0) for bucket in range(3)),
    Applied(ATTEMPT, 0.0, 0),
    Checked(ATTEMPT),
    Committed(ATTEMPT, True),
    Committed(ATTEMPT, False),
    Settled(ATTEMPT),
]


class Lie(NamedTuple):
    peer: Peer
    message: AnyMessage


class Death(NamedTuple):
    peer: Peer


class Returns(NamedTuple):
    """The engine's call comes back, if there is one."""

    engine: int
    failure: Failure | None


class Wait(NamedTuple):
    seconds: float


class Honest(NamedTuple):
    """The next thing that a well-behaved peer or engine does."""

    which: int


LIES = st.builds(
    Lie, st.sampled_from([*TRAINERS, *WORKERS, *OTHERS]), st.sampled_from(PLAUSIBLE) | MESSAGES.map(of_attempt)
)
EVENTS = st.one_of(
    st.builds(Honest, st.integers(0, 9)),
    LIES,
    LIES,
    st.builds(Death, st.sampled_from([*TRAINERS, *WORKERS, *OTHERS])),
    st.builds(Returns, st.integers(0, 1), st.none() | FAILURES),
    st.builds(Wait, st.sampled_from([0.0, 1.0, 1000.0])),
)


class Stage:
    """A machine, the honest answers to what it asked for, and an account of its own of what has happened."""

    def __init__(self, num_honest: int, is_checked: bool, is_meeting: bool, moves: bool, is_stale: bool) -> None:
        self.now, self.moves = 0.0, moves
        states = [EngineState.STALE if is_stale and moves else EngineState.SERVING, EngineState.SERVING]
        self.refit = Refit(
            attempt=ATTEMPT,
            last_version=OLD,
            engines=[Taking(0, 1, states[0]), Taking(1, 2, states[1], int(is_meeting))],
            lanes={0: Lane(2), 1: Lane(2, meets=True)},
            num_trainers=2,
            deadline_s=100.0,
            now=0.0,
            moves=moves,
            check=(0, 1) if is_checked else None,
            compare=lambda checked: Verification(0, 0, {}, {}),
        )
        self.pending: list[Lie | Returns] = [Lie(peer, Enter(ATTEMPT, NEW if moves else OLD)) for peer in TRAINERS]
        self.slow: list[Lie] = []  # answers that come when there is nothing else to do: of devices that still copy
        self.told_to_commit: set[Peer] = set()
        self.committed: set[Peer] = set()
        self.unsettled: set[Peer] = set()
        self.applied: set[Peer] = set()
        self.entered: dict[Peer, int] = {}
        self.called: list[tuple[int, EngineCall]] = []
        self.returned_well: set[tuple[int, EngineCall]] = set()
        for _ in range(num_honest):
            self.happens(Honest(0))

    def happens(self, event: Lie | Death | Returns | Wait | Honest) -> None:
        refit = self.refit
        if refit.finished:
            return
        self.now += 0.01
        match event:
            case Honest(which):
                answers = self.pending or self.slow
                if answers:
                    self.happens(answers.pop(which % len(answers)))
            case Lie(peer, message):
                self.note(peer, message)
                self.react(refit.receive(peer, message, self.now))
            case Death(peer):
                self.react(refit.lost(peer, "died", self.now))
            case Returns(engine, failure):
                call = refit.engine_call(engine)
                if call is not None:
                    if failure is None:
                        self.returned_well.add((engine, call))
                    self.react(refit.called(engine, failure, self.now))
            case Wait(seconds):
                self.now += seconds
                self.react(refit.tick(self.now))
        assert refit.waiting_for() is not None

    def note(self, peer: Peer, message: AnyMessage) -> None:
        if isinstance(message, Enter):
            self.entered.setdefault(peer, message.version)
        elif isinstance(message, Applied):
            self.applied.add(peer)
        elif isinstance(message, Committed) and peer in self.told_to_commit and peer not in self.committed:
            self.committed.add(peer)
            self.unsettled |= set() if message.is_settled else {peer}
        elif isinstance(message, Settled):
            self.unsettled.discard(peer)

    def react(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Call):
                self.called.append((action.engine, action.call))
                if action.call is EngineCall.RESUME and self.refit.failure is None:
                    assert self.committed >= set(WORKERS), "published before everyone has committed"
                if self.refit.sides[action.engine].state is not EngineState.GONE:
                    self.pending.append(Returns(action.engine, None))
                continue
            assert action.peer in TRAINERS + WORKERS, "a message to nobody"
            peer, message = action
            match message:
                case Fill(bucket=bucket, lane=lane):
                    self.pending.append(Lie(peer, Filled(ATTEMPT, bucket, 0.0, None, lane)))
                case Load(bucket=bucket):
                    self.pending.append(Lie(peer, Loaded(ATTEMPT, bucket, 0.0)))
                    if bucket == 1:
                        self.pending.append(Lie(peer, Applied(ATTEMPT, 0.0, 0)))
                case Check():
                    self.pending.append(Lie(peer, Checked(ATTEMPT)))
                case Commit():
                    assert self.applied >= set(WORKERS)
                    self.told_to_commit.add(peer)
                    self.pending.append(Lie(peer, Committed(ATTEMPT, False)))
                    self.slow.append(Lie(peer, Settled(ATTEMPT)))

    def end(self, is_honest: bool) -> None:
        """Everyone goes on, or nobody does: it must end."""
        for _ in range(200):
            if self.refit.finished:
                break
            self.happens(Honest(0) if is_honest and (self.pending or self.slow) else Wait(1000.0))
        else:
            raise AssertionError(f"it never ends; it waits for {self.refit.waiting_for()}")
        refit = self.refit
        states = {number: side.state for number, side in refit.sides.items()}
        if refit.phase is Phase.DONE:
            assert refit.failure is None
            assert set(states.values()) == {EngineState.SERVING}
            assert self.committed == set(WORKERS)
            assert not self.unsettled
            assert {self.entered[peer] for peer in TRAINERS} == {refit.version}
            assert refit.version > OLD or not self.moves
            assert self.returned_well >= {(engine, call) for engine in states for call in EngineCall}
        else:
            assert refit.failure is not None
            for engine, state in states.items():
                if self.moves and (engine, EngineCall.UPDATE) in self.called:
                    assert state in (EngineState.STALE, EngineState.GONE), "torn, and said to be serving"
            assert EngineState.UPDATING not in states.values()
        before = (refit.phase, refit.failure, dict(states))
        for peer in (*TRAINERS, *WORKERS, *OTHERS):  # too late for anything
            assert [a for m in PLAUSIBLE for a in refit.receive(peer, m, self.now)] == []
            refit.lost(peer, "died", self.now)
        assert refit.tick(self.now + 1e6) == []
        assert (refit.phase, refit.failure) == before[:2]


ENDS: Counter[str] = Counter()
AT: Counter[Phase] = Counter()


@settings(FUZZ, max_examples=2000)
@given(
    st.integers(0, 45),
    st.lists(EVENTS, max_size=10),
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    st.booleans(),
)
def test_peers_that_lie(
    num_honest: int, events: list[Any], options: tuple[bool, bool, bool, bool], is_honest: bool
) -> None:
    """No message, from anyone, in any phase, is an exception, a hang, or a commit that is none."""
    stage = Stage(num_honest, *options)
    AT[stage.refit.phase] += 1
    for event in events:
        stage.happens(event)
    stage.end(is_honest)
    ENDS[stage.refit.phase] += 1


def test_the_lies_came_in_all_phases() -> None:
    """Of the test before: that its examples went everywhere."""
    if not AT:
        pytest.skip("the test before did not run")
    expected = set(Phase) - {Phase.FAILING, Phase.FAILED}
    assert set(AT) >= expected, AT
    assert min(ENDS[Phase.DONE], ENDS[Phase.FAILED]) > 100, ENDS


SPECS = (TensorSpec("a", (4, 2), torch.float32), TensorSpec("b", (), torch.float32))


@settings(FUZZ, phases=[HypothesisPhase.generate])
@given(st.lists(values(Checked), min_size=5, max_size=5))
def test_checksums_that_lie(answers: list[Checked]) -> None:
    """Numbers of tensors that are none, boxes outside of them: found wrong, or unchecked, but no exception."""
    compare(SPECS, dict(zip([*TRAINERS, *WORKERS], answers, strict=True)))


# --- the hub, over sockets, during a refit ----------------------------------------------------------------------------


def weights(version: int) -> Tensors:
    shapes = {"a": (64, 8), "b": (7,), "c": (300, 16), "d": ()}
    return {name: torch.full(shape, float(100 * version + i)) for i, (name, shape) in enumerate(shapes.items())}


class Slow(torch.nn.Module):
    """Loads by name, not too fast for those who want to disturb it."""

    def __init__(self) -> None:
        super().__init__()
        for name, tensor in weights(0).items():
            self.register_buffer(name, tensor.clone())

    def load_weights(self, named: Any) -> set[str]:
        loaded = set()
        for name, tensor in named:
            time.sleep(0.002)
            self.get_buffer(name).copy_(tensor)
            loaded.add(name)
        return loaded

    def version(self) -> int | None:
        """None if it is torn."""
        held = [v for v in range(50) if all(torch.equal(self.get_buffer(n), t) for n, t in weights(v).items())]
        return held[0] if held else None


class Target(NamedTuple):
    """What an attacker knows."""

    endpoint: str
    token: str  # only some do


@contextmanager
def attacked(target: Target, attack: Callable[[Target, int], None], num_attackers: int = 3) -> Iterator[None]:
    """`attack(target, round)` again and again, in threads of its own."""
    stop = threading.Event()
    errors: list[BaseException] = []
    num_rounds = [0] * num_attackers

    def run(attacker: int) -> None:
        try:
            while not stop.is_set():
                attack(target, num_rounds[attacker] * num_attackers + attacker)
                num_rounds[attacker] += 1
        except BaseException as error:  # noqa: BLE001  to be raised in the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(num_attackers)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert errors == []
    assert sum(num_rounds) > 0


def raw_bytes(target: Target, number: int) -> None:
    """Not ZMQ at all, or a greeting and then nonsense."""
    host, port = target.endpoint.removeprefix("tcp://").rsplit(":", 1)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"PLAIN".ljust(20, b"\0") + bytes(32)
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=1) as raw:
        raw.sendall([os.urandom(200), greeting + os.urandom(200), greeting, b"\xff" * 64, b""][number % 5])
        time.sleep(0.01)


def wrong_tokens(target: Target, number: int) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as raw:
        raw.setsockopt(zmq.LINGER, 0)
        if number % 2:
            raw.setsockopt(zmq.PLAIN_USERNAME, b"mbridge")
            raw.setsockopt(zmq.PLAIN_PASSWORD, b"0" * (number % 60 + 1))
        raw.connect(target.endpoint)
        for message in PLAUSIBLE:
            raw.send_multipart(pack(message, "0" * 32), flags=zmq.NOBLOCK)
        time.sleep(0.01)


def with_token(target: Target, send: Callable[[zmq.Socket[bytes]], None]) -> None:
    from mbridge_rl.handshake import use_as_client

    with zmq.Context() as context, context.socket(zmq.DEALER) as raw:
        raw.setsockopt(zmq.LINGER, 200)
        use_as_client(raw, target.token, "")
        raw.connect(target.endpoint)
        send(raw)
        time.sleep(0.02)


def garbage(target: Target, number: int) -> None:
    """From one who got hold of the token, without a Hello."""

    def send(raw: zmq.Socket[bytes]) -> None:
        for message in PLAUSIBLE:
            payload = bytearray(encode(message))
            payload[number % len(payload)] ^= 1 + number % 255
            raw.send_multipart([target.token.encode(), bytes(payload)])
            raw.send_multipart([target.token.encode()] * (number % 5 + 1))

    with_token(target, send)


def replays(target: Target, number: int) -> None:
    """Messages as the refit's own peers send them, on another connection."""

    def send(raw: zmq.Socket[bytes]) -> None:
        for attempt in range(number % 30 + 1):
            for message in (*PLAUSIBLE, Failed(1, Failure("SyncError", "gotcha")), Goodbye()):
                changed = msgspec.structs.replace(message, attempt=attempt) if hasattr(message, "attempt") else message
                raw.send_multipart(pack(changed, target.token))

    with_token(target, send)


def impostors(target: Target, number: int) -> None:
    """A Hello of someone who is there already, or whom nobody knows, and then what that one would send."""
    hellos = [
        Hello("trainer", 0, 2**63, "h"),
        Hello("worker", 0, 1, "h"),
        Hello("trainer", 5, 2**63, host_id()),
        Hello("worker", 3, -1, host_id(), 9),
        Hello("king", -1, 0, host_id()),
    ]

    def send(raw: zmq.Socket[bytes]) -> None:
        raw.send_multipart(pack(hellos[number % len(hellos)], target.token))
        for message in PLAUSIBLE:
            raw.send_multipart(pack(msgspec.structs.replace(message, attempt=number % 30), target.token))

    with_token(target, send)


def target_of(sync: WeightSyncer) -> Target:
    hub = sync._side.hub  # type: ignore[union-attr]
    assert isinstance(hub, Hub)
    return Target(hub.endpoint, hub.token)


@pytest.mark.parametrize(
    ("attack", "may_fail"),
    [(raw_bytes, False), (wrong_tokens, False), (garbage, False), (replays, False), (impostors, True)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refits_under_attack(attack: Callable[[Target, int], None], may_fail: bool) -> None:
    """Strangers change nothing. One with the token may make a refit fail, but never serve torn weights."""
    module = Slow()
    engine, bridge = ModuleEngine(module), FakeBridge(weights(1))
    with WeightSyncer(bridge, engine, control_address="tcp://127.0.0.1:*", deadline_s=10, bucket_bytes=4096) as sync:
        with attacked(target_of(sync), attack):
            for version in range(1, 21):
                bridge.set(weights(version))
                started = time.monotonic()
                try:
                    sync.sync(version)
                except SyncError:
                    assert may_fail
                else:
                    assert module.version() == version
                assert time.monotonic() - started < 30
                if engine.state is EngineState.SERVING:
                    assert module.version() is not None, "torn, and serving"
        if not may_fail:
            bridge.set(weights(30))
            sync.sync(30)
            assert module.version() == 30


@settings(FUZZ, max_examples=60)
@given(st.lists(st.tuples(MESSAGES, st.binary(max_size=4), st.integers(0, 10_000)), min_size=1, max_size=5))
def test_mutated_frames_on_a_socket(sent: list[tuple[AnyMessage, bytes, int]]) -> None:
    """Whatever arrives, `wait` raises nothing, and the next honest message is heard."""
    hub = shared_hub()
    last = Enter(1, 2)
    link = Link(hub.endpoint, hub.token, hub_pid=os.getpid(), hub_host=host_id())
    for message, new, position in sent:
        frames = pack(message, hub.token)
        frame = bytearray(frames[position % 2])
        frame[position % (len(frame) + 1) :] = new
        link._socket.send_multipart([bytes(frame) if i == position % 2 else f for i, f in enumerate(frames)])
    link.send(last)
    end, heard = time.monotonic() + 10, False
    while not heard and time.monotonic() < end:
        heard = any(isinstance(event, Received) and event.message == last for event in hub.wait(1.0))
    assert heard
    link.close()


_HUBS: list[Hub] = []


def shared_hub() -> Hub:
    """One for all examples."""
    if not _HUBS:
        _HUBS.append(Hub())
    return _HUBS[0]


@pytest.fixture(autouse=True, scope="module")
def _close_hubs() -> Iterator[None]:
    yield
    for hub in _HUBS:
        hub.close()


# --- nothing is unpickled ---------------------------------------------------------------------------------------------

MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "multiprocessing"}
BUILTINS = {"eval", "exec", "compile"}
ATTRIBUTES = {"recv_pyobj", "send_pyobj", "recv_serialized", "allow_pickle"}


def unpicklers(source: str) -> list[str]:
    """What in `source` could run what a peer sent."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [alias.name for alias in names if alias.name.split(".")[0] in MODULES]
            case ast.ImportFrom(module=str(module), names=names):
                found += [module] if module.split(".")[0] in MODULES else []
                found += [f"{module}.load" for alias in names if module == "torch" and alias.name == "load"]
                found += [
                    alias.name for alias in names if module.startswith("torch.distributed") and is_object(alias.name)
                ]
            case ast.Call(func=ast.Name(id=name)) if name in BUILTINS:
                found.append(name)
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                found.append("torch.load")
            case ast.Attribute(attr=name) if name in ATTRIBUTES or is_object(name):
                found.append(name)
            case ast.keyword(arg=str(name)) if name in ATTRIBUTES:
                found.append(name)
    return found


def is_object(name: str) -> bool:
    """torch.distributed pickles in broadcast_object_list, all_gather_object, ..."""
    return name.endswith(("_object", "_object_list")) and name.startswith(
        ("all_", "broadcast_", "gather_", "scatter_", "send_", "recv_")
    )


def test_nothing_is_unpickled(repo_root: Path) -> None:
    files = sorted((repo_root / "mbridge_rl").rglob("*.py"))
    assert len(files) > 30
    found = {str(file.relative_to(repo_root)): unpicklers(file.read_text(encoding="utf-8")) for file in files}
    assert {file: what for file, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch\ntorch.load(f)",
        "from torch import load",
        "eval('1')",
        "dist.broadcast_object_list(x)",
        "dist.all_gather_object(x, y)",
        "from torch.distributed import scatter_object_list",
        "socket.recv_pyobj()",
        "numpy.load(f, allow_pickle=True)",
        "import multiprocessing.connection",
    ],
)
def test_what_could_unpickle_is_found(source: str) -> None:
    assert unpicklers(source) != []
