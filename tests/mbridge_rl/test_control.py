"""The control channel over real sockets."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from mbridge_rl.control import MAX_MESSAGE_BYTES, Hub, Link, Lost, Received, Woken, host_id
from mbridge_rl.errors import DeadlineError, ProtocolError, TrainerLostError
from mbridge_rl.messages import AnyMessage, Attached, Commit, Enter, Goodbye, Hello


@pytest.fixture(params=[None, "tcp://127.0.0.1:*"])
def hub(request: pytest.FixtureRequest) -> Iterator[Hub]:
    made = Hub(request.param)
    yield made
    made.close()


def link_to(hub: Hub, token: str | None = None, pid: int | None = None) -> Link:
    return Link(hub.endpoint, token or hub.token, hub_pid=pid or os.getpid(), hub_host=host_id())


def first(hub: Hub, timeout_s: float = 5.0) -> Received | Lost | Woken:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        for event in hub.wait(end - time.monotonic()):
            return event
    raise AssertionError("nothing happened")


def test_there_and_back(hub: Hub) -> None:
    link = link_to(hub)
    sent: list[AnyMessage] = [Enter(1, 2), Attached(["x" * 100_000])]
    for message in sent:
        link.send(message)
    got = []
    while len(got) < 2:
        event = first(hub)
        assert isinstance(event, Received)
        got.append(event.message)
        peer = event.peer
    assert got == sent
    assert hub.send(peer, Commit(3))
    assert link.recv(5, "x") == Commit(3)
    link.close()
    link.close()


def test_wrong_token_is_dropped(hub: Hub) -> None:
    stranger, friend = link_to(hub, "0" * 32), link_to(hub)
    stranger.send(Enter(1, 1))
    assert list(hub.wait(1.0)) == []
    assert hub.num_rejected == 1
    friend.send(Enter(1, 2))
    event = first(hub)
    assert isinstance(event, Received)
    assert event.message == Enter(1, 2)
    with pytest.raises(DeadlineError, match="waiting for an answer"):
        stranger.recv(0.2, "an answer")
    stranger.close()
    friend.close()


@pytest.mark.parametrize(
    "frames",
    [
        [b"garbage"],
        [b"{token}", b"\x80"],
        [b"{token}", b"not msgpack"],
        [b"{token}", msgspec.msgpack.encode({"type": "Enter", "attempt": "one", "version": 2})],
        [b"{token}", msgspec.msgpack.encode({"type": "Eval", "code": "1"})],
        [b"{token}", msgspec.msgpack.encode(["a"]), b"more"],
        [b"{token}"],
        [b"", b""],
    ],
)
def test_what_does_not_decode_is_dropped(hub: Hub, frames: list[bytes]) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as raw:
        raw.connect(hub.endpoint)
        raw.send_multipart([frame.replace(b"{token}", hub.token.encode()) for frame in frames])
        assert list(hub.wait(2.0)) == []
    assert hub.num_rejected == 1


def test_an_oversize_message_never_arrives(hub: Hub) -> None:
    link, friend = link_to(hub), link_to(hub)
    link.send(Attached(["x" * (MAX_MESSAGE_BYTES + 1)]))
    friend.send(Enter(1, 2))
    event = first(hub)
    assert isinstance(event, Received)
    assert event.message == Enter(1, 2)
    assert list(hub.wait(1.0)) == []
    link.close()
    friend.close()


def test_a_link_refuses_a_hub_with_another_token(hub: Hub) -> None:
    link = link_to(hub)
    link.send(Hello("trainer", 1, 2, "h"))
    event = first(hub)
    assert isinstance(event, Received)
    hub.token = "1" * 32
    hub.send(event.peer, Commit(1))
    with pytest.raises(ProtocolError, match="token"):
        link.recv(5, "x")
    link.close()


def test_a_dead_peer_is_an_event(hub: Hub) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    hub.watch(b"peer", child.pid)
    assert list(hub.wait(0.1)) == []
    child.send_signal(signal.SIGKILL)
    started = time.monotonic()
    assert first(hub) == Lost(b"peer")
    assert time.monotonic() - started < 2
    child.wait()
    hub.watch(b"again", child.pid)  # dead already
    assert first(hub) == Lost(b"again")
    assert list(hub.wait(0.1)) == []  # each once


def test_a_dead_hub_is_an_event(hub: Hub) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    link = link_to(hub, pid=child.pid)
    child.kill()
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(TrainerLostError, match="rank 0 died"):
            link.recv(30, "x")
    assert time.monotonic() - started < 2
    assert link.is_released(0.1)
    child.wait()
    gone = link_to(hub, pid=child.pid)
    with pytest.raises(TrainerLostError):
        gone.recv(30, "x")
    link.close()
    gone.close()


def test_goodbye_releases_a_link(hub: Hub) -> None:
    link = link_to(hub)
    link.send(Hello("worker", 0, 1, "h"))
    event = first(hub)
    assert isinstance(event, Received)
    assert not link.is_released(0.05)
    hub.send(event.peer, Commit(1))  # left over from a refit
    hub.send(event.peer, Goodbye())
    assert link.is_released(1.0)
    link.close()


def test_wake(hub: Hub) -> None:
    hub.wake()
    hub.wake()
    assert list(hub.wait(1.0)) == [Woken()]
    assert list(hub.wait(0.0)) == []
    hub.close()
    hub.wake()  # too late, and harmless


def test_sending_to_nobody(hub: Hub) -> None:
    assert hub.send(b"nobody", Commit(1)) is False


def test_the_socket_is_private_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    hub = Hub()
    (directory,) = tmp_path.iterdir()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    link = link_to(hub)
    link.send(Enter(1, 1))
    event = first(hub)
    assert isinstance(event, Received)
    hub.hide_endpoint()
    assert list(tmp_path.iterdir()) == []
    hub.send(event.peer, Commit(1))  # who is connected stays connected
    assert link.recv(5, "x") == Commit(1)
    link.close()
    hub.close()


def test_a_long_tmpdir_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("d" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    hub = Hub()
    assert list(long.iterdir()) == []
    hub.close()


def test_host_id_is_stable() -> None:
    other = subprocess.run(
        [sys.executable, "-c", "from mbridge_rl.control import host_id; print(host_id())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == host_id()
