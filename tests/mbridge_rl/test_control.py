"""The control channel over real sockets."""

from __future__ import annotations

import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import zmq

from mbridge_rl.control import MAX_MESSAGE_BYTES, Hub, Link, Lost, Received, Woken
from mbridge_rl.errors import DeadlineError, ProtocolError, SyncError, TrainerLostError
from mbridge_rl.handshake import use_as_client
from mbridge_rl.hosts import host_id
from mbridge_rl.messages import AnyMessage, Attached, Commit, Enter, Goodbye, Hello


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6 loopback")
HUBS = [
    pytest.param({}, id="unix"),
    pytest.param({"address": "tcp://127.0.0.1:*"}, id="tcp"),
    pytest.param({"address": "tcp://localhost:*", "key": "auto"}, id="curve"),
    pytest.param({"address": "tcp://[::1]:*", "key": "auto"}, id="ipv6", marks=needs_ipv6),
]


@pytest.fixture(params=HUBS)
def hub(request: pytest.FixtureRequest) -> Iterator[Hub]:
    made = Hub(**request.param)
    yield made
    made.close()


def link_to(hub: Hub, token: str | None = None, pid: int | None = None) -> Link:
    return Link(
        hub.endpoint, token or hub.token, hub_pid=pid or os.getpid(), hub_host=host_id(), server_key=hub.server_key
    )


def pumped(hub: Hub, seconds: float) -> list[Received | Lost | Woken]:
    """All that happens within `seconds`."""
    end, events = time.monotonic() + seconds, []
    while (left := end - time.monotonic()) > 0:
        events += hub.wait(left)
    return events


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
    friend.send(Enter(1, 2))
    event = first(hub)
    assert isinstance(event, Received)
    assert event.message == Enter(1, 2)
    with pytest.raises(DeadlineError, match="waiting for an answer"):
        stranger.recv(0.2, "an answer")
    assert pumped(hub, 0.3) == []
    assert hub.num_rejected >= 1
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
        [b"{token}", b"\x81\xa4type\xa1\xff"],  # text that is not UTF-8
        [b"{token}", b"\x82\xa4type\xa7Goodbye\xa1x" + b"\x91" * 100_000 + b"\x90"],  # nested without end
        [b"0" * 32, msgspec.msgpack.encode({"type": "Goodbye"})],
        [b"{token}", msgspec.msgpack.encode(["a"]), b"more"],
        [b"{token}"],
        [b"", b""],
    ],
)
def test_what_does_not_decode_is_dropped(hub: Hub, frames: list[bytes]) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as raw:
        raw.setsockopt(zmq.LINGER, 0)
        raw.setsockopt(zmq.IPV6, 1)
        use_as_client(raw, hub.token, hub.server_key)
        raw.connect(hub.endpoint)
        raw.send_multipart([frame.replace(b"{token}", hub.token.encode()) for frame in frames])
        end = time.monotonic() + 10
        while hub.num_rejected == 0 and time.monotonic() < end:
            assert list(hub.wait(0.2)) == []
    assert hub.num_rejected == 1


def test_an_oversize_message_never_arrives(hub: Hub) -> None:
    link, friend = link_to(hub), link_to(hub)
    link.send(Attached(["x" * (MAX_MESSAGE_BYTES + 1)]))
    friend.send(Enter(1, 2))
    event = first(hub)
    assert isinstance(event, Received)
    assert event.message == Enter(1, 2)
    assert pumped(hub, 0.5) == []
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
    assert [stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()] == [0o600]
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
        [sys.executable, "-c", "from mbridge_rl.hosts import host_id; print(host_id())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == host_id()


# --- who may come from where ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:*", "tcp://*:*", "tcp://[::]:*", "tcp://192.0.2.1:*"])
def test_other_hosts_only_if_asked_for(address: str) -> None:
    with pytest.raises(SyncError, match=r"other hosts.*bind="):
        Hub(address)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"address": "tcp://127.0.0.1"}, "expected tcp://HOST:PORT"),
        ({"address": "udp://127.0.0.1:1"}, "expected tcp://HOST:PORT"),
        ({"address": "tcp://127.0.0.1:1;127.0.0.1:2"}, "expected tcp://HOST:PORT"),
        ({"address": "ipc://@abstract"}, "absolute path"),
        ({"address": "ipc://relative"}, "absolute path"),
        ({"address": "ipc:///nowhere/at/all"}, "cannot listen on"),
        ({"bind": "tcp://no-such-host.invalid:*"}, "has no address"),
        ({"bind": "tcp://192.0.2.1:*"}, "cannot listen on"),  # no address of this host
        ({"bind": "tcp://0.0.0.0:*"}, "advertise="),
        ({"bind": "tcp://0.0.0.0:*", "advertise": "0.0.0.0"}, "cannot connect to"),
        ({"advertise": "node-0"}, "no meaning"),
        ({"address": "tcp://127.0.0.1:*", "bind": "tcp://127.0.0.1:*"}, "found both"),
        ({"key": "s3cret"}, "must be"),
        ({"key": "s3cret" * 6 + "~~~~"}, "must be"),
    ],
)
def test_bad_arguments_are_typed_errors(
    options: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    num_files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SyncError, match=words) as caught:
        Hub(**options)
    assert "s3cret" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == num_files


@pytest.mark.parametrize(
    ("bind", "advertise", "expected"),
    [
        ("tcp://0.0.0.0:*", "127.0.0.1", "tcp://127.0.0.1:"),
        ("tcp://*:*", "localhost", "tcp://localhost:"),
        ("tcp://lo:*", None, "tcp://127.0.0.1:"),
        pytest.param("tcp://[::]:*", "::1", "tcp://[::1]:", marks=needs_ipv6),
        pytest.param("tcp://[::]:*", "127.0.0.1", "tcp://127.0.0.1:", marks=needs_ipv6),
    ],
)
def test_bind_and_advertise(bind: str, advertise: str | None, expected: str) -> None:
    hub = Hub(bind=bind, advertise=advertise, key="auto")
    assert hub.endpoint.startswith(expected)
    link = link_to(hub)
    link.send(Enter(1, 2))
    event = first(hub)
    assert isinstance(event, Received)
    assert event.message == Enter(1, 2)
    link.close()
    hub.close()


def test_a_remote_hub_without_encryption_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        hub = Hub(bind="tcp://0.0.0.0:*", advertise="192.0.2.1")
    assert "not encrypted" in caplog.text
    hub.close()


def test_nothing_that_exists_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "control"
    path.write_text("precious")
    with pytest.raises(SyncError, match="exists"):
        Hub(f"ipc://{path}")
    assert path.read_text() == "precious"
    hub = Hub(f"ipc://{tmp_path}/other")
    assert stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o600
    with pytest.raises(SyncError, match="exists"):
        Hub(f"ipc://{tmp_path}/other")
    hub.close()


# --- encryption -------------------------------------------------------------------------------------------------------


def test_a_given_key_is_the_servers() -> None:
    public, secret = zmq.curve_keypair()
    hub = Hub("tcp://127.0.0.1:*", key=secret.decode())
    assert hub.server_key == public.decode()
    assert Hub().server_key == ""
    link = link_to(hub)
    link.send(Enter(1, 2))
    assert isinstance(first(hub), Received)
    link.close()
    hub.close()


@pytest.mark.parametrize("server_key", ["", zmq.curve_keypair()[0].decode()], ids=["no key", "another key"])
def test_an_encrypting_hub_and_another_key(server_key: str) -> None:
    """The peer knows the token, and still nothing passes, either way."""
    hub = Hub("tcp://127.0.0.1:*", key="auto")
    link = Link(hub.endpoint, hub.token, hub_pid=os.getpid(), hub_host=host_id(), server_key=server_key)
    link.send(Enter(1, 1))
    assert pumped(hub, 0.5) == []
    with pytest.raises(DeadlineError):
        link.recv(0.1, "x")
    link.close()
    hub.close()


def test_a_peer_that_wants_encryption_refuses_a_hub_without() -> None:
    hub = Hub("tcp://127.0.0.1:*")
    key = zmq.curve_keypair()[0].decode()
    link = Link(hub.endpoint, hub.token, hub_pid=os.getpid(), hub_host=host_id(), server_key=key)
    link.send(Enter(1, 1))
    assert pumped(hub, 0.5) == []
    link.close()
    hub.close()


@pytest.mark.parametrize("key", [None, "auto"])
def test_what_travels(key: str | None) -> None:
    """A relay between peer and hub sees the words of a message, unless it is encrypted; and never, then, the token."""
    hub = Hub("tcp://127.0.0.1:*", key=key)
    seen = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as server:
        link = Link(
            f"tcp://127.0.0.1:{server.getsockname()[1]}",
            hub.token,
            hub_pid=os.getpid(),
            hub_host=host_id(),
            server_key=hub.server_key,
        )
        link.send(Attached(["plainly visible"]))
        server.settimeout(10)
        near, _ = server.accept()
        with near, socket.create_connection(("127.0.0.1", int(hub.endpoint.rpartition(":")[2]))) as far:
            near.setblocking(False)
            far.setblocking(False)
            end, events = time.monotonic() + 10, []
            while not events and time.monotonic() < end:
                for source, sink in ((near, far), (far, near)):
                    try:
                        data = source.recv(65536)
                    except BlockingIOError:
                        continue
                    seen += data
                    sink.sendall(data)
                events += hub.wait(0.01)
    assert [event.message for event in events if isinstance(event, Received)] == [Attached(["plainly visible"])]
    assert (b"plainly visible" in seen, hub.token.encode() in seen) == ((True, True) if key is None else (False, False))
    link.close()
    hub.close()


def test_encryption_that_libzmq_lacks_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zmq.has", lambda capability: False)
    with pytest.raises(SyncError, match="without CURVE"):
        Hub("tcp://127.0.0.1:*", key="auto")
    with pytest.raises(SyncError, match="without CURVE"):
        Link("tcp://127.0.0.1:1", "0" * 32, hub_pid=os.getpid(), hub_host=host_id(), server_key="x" * 40)


def test_the_handshake_alone_turns_strangers_away(hub: Hub) -> None:
    """Even one whose messages carry the token: nothing of his is read, so nothing of his is queued."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as raw:
        raw.setsockopt(zmq.LINGER, 0)
        raw.setsockopt(zmq.IPV6, 1)
        use_as_client(raw, "0" * 32, hub.server_key)
        raw.connect(hub.endpoint)
        raw.send_multipart([hub.token.encode(), msgspec.msgpack.encode(Enter(1, 1))])
        assert pumped(hub, 0.5) == []
    assert hub.num_rejected >= 1


# --- floods -----------------------------------------------------------------------------------------------------------


def test_strangers_hold_no_memory_and_fill_no_log(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    strangers = [link_to(hub, "0" * 32) for _ in range(20)]
    for stranger in strangers:
        stranger.send(Attached(["x" * 1_000_000]))
    friend = link_to(hub)
    friend.send(Enter(1, 2))
    with caplog.at_level(logging.WARNING):
        event = first(hub)
        assert isinstance(event, Received)
        assert event.message == Enter(1, 2)
        assert pumped(hub, 0.5) == []
    assert hub.num_rejected >= len(strangers)
    assert len(caplog.records) <= 2 + hub.num_rejected.bit_length()
    assert hub.token not in caplog.text
    with ThreadPoolExecutor(len(strangers)) as pool:  # each waits for its message to leave
        list(pool.map(Link.close, strangers))
    friend.close()


def test_a_wait_hands_out_a_bounded_number(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while a friend goes on and on: rank 0 gets back to its deadlines, and nothing is lost."""
    monkeypatch.setattr("mbridge_rl.control.MAX_EVENTS", 16)
    link = link_to(hub)
    sent = [Enter(1, version) for version in range(200)]
    for message in sent:
        link.send(message)
    end, got, largest = time.monotonic() + 30, [], 0
    while len(got) < len(sent) and time.monotonic() < end:
        events = list(hub.wait(1.0))
        largest = max(largest, len(events))
        got += [event.message for event in events if isinstance(event, Received)]
        time.sleep(0.005)  # while more arrives
    assert got == sent
    assert largest == 16
    link.close()


LEAK = """
import gc, os
from mbridge_rl.control import Hub, Link
from mbridge_rl.hosts import host_id
from mbridge_rl.messages import Goodbye

hub = Hub()
link = Link(hub.endpoint, hub.token, hub_pid=os.getpid(), hub_host=host_id())
link.send(Goodbye())
hub.cycle = link.cycle = [hub, link]
del hub, link
gc.collect()
print("collected")
"""


def test_ends_that_nobody_closed_are_collected_without_a_hang() -> None:
    done = subprocess.run([sys.executable, "-c", LEAK], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "collected\n"
