"""The control channel of a syncer: typed msgpack messages over ZMQ between trainer rank 0 (`Hub`) and its peers
(`Link`).

Every message is two frames: the session's token, and a msgpack struct of messages.py. What has another token, does not
decode or is larger than `MAX_MESSAGE_BYTES` is dropped and logged: it never reaches the refit. Nothing is unpickled.
By default the hub listens on a Unix socket in a directory that only this user can enter.

A peer on the same host is watched through a pidfd, so its death is an event (within milliseconds) and not a timeout.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
import zmq

from .errors import DeadlineError, ProtocolError, TrainerLostError
from .messages import AnyMessage, Goodbye

MAX_MESSAGE_BYTES = 64 << 20
LINGER_MS = 1000  # a last message (Abort, Goodbye) may take this long to leave
MAX_SOCKET_PATH = 100  # of the 107 bytes that a Unix socket's address may have
_log = logging.getLogger(__name__)
_encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def host_id() -> str:
    """Equal in two processes exactly if they run on one boot of one host and see each other's process ids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"


def open_pidfd(pid: int) -> int | None:
    """A file descriptor that becomes readable when process `pid` ends; None where the kernel has none.

    Raises ProcessLookupError if there is no such process.
    """
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:  # ENOSYS, or a sandbox without it: deadlines still hold
        return None


class Received(NamedTuple):
    peer: bytes
    message: AnyMessage


class Lost(NamedTuple):
    peer: bytes


class Woken(NamedTuple):
    """`Hub.wake` was called."""


class Hub:
    """Rank 0's end. Not thread-safe, except for `wake`."""

    def __init__(self, address: str | None = None) -> None:
        """Listen on `address` ("tcp://127.0.0.1:*"), by default on a Unix socket of our own."""
        self.token = secrets.token_hex(16)
        self.num_rejected = 0
        self._directory = None if address is not None else _private_directory()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.BACKLOG, 4096)  # all ranks connect at once
        self._socket.bind(address or f"ipc://{self._directory}/control")
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._wake_lock = threading.Lock()  # against a `wake` from another thread while `close` closes the descriptor
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._pidfds: dict[int, bytes] = {}
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake, zmq.POLLIN)

    def wake(self) -> None:
        """Make the current or next `wait` return. From any thread."""
        with self._wake_lock:
            if not self._context.closed:
                os.eventfd_write(self._wake, 1)

    def watch(self, peer: bytes, pid: int) -> None:
        """Report Lost(peer) once process `pid`, on this host, has ended. At once if it already has."""
        try:
            pidfd = open_pidfd(pid)
        except ProcessLookupError:
            pidfd = os.eventfd(1, os.EFD_CLOEXEC)  # readable for good, like the pidfd of a dead process
        if pidfd is not None:
            self._pidfds[pidfd] = peer
            self._poller.register(pidfd, zmq.POLLIN)

    def send(self, peer: bytes, message: AnyMessage) -> bool:
        """Queue `message` for `peer`; False if that peer has no connection any more."""
        try:
            self._socket.send_multipart([peer, self.token.encode(), _encode(message)], flags=zmq.NOBLOCK)
        except (zmq.error.Again, zmq.error.ZMQError) as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def wait(self, timeout_s: float) -> Iterator[Received | Lost | Woken]:
        """What has happened; waits up to `timeout_s` seconds for the first event. Messages come before deaths."""
        ready = dict(self._poller.poll(max(0, round(timeout_s * 1000))))
        if self._socket in ready:
            yield from self._received()
        if self._wake in ready:
            os.eventfd_read(self._wake)
            yield Woken()
        for pidfd, peer in list(self._pidfds.items()):
            if pidfd in ready:
                yield from self._received()  # its last words, if any
                self._forget(pidfd)
                yield Lost(peer)

    def hide_endpoint(self) -> None:
        """Remove the socket's name once everyone is connected, so that a crash leaves nothing behind."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def close(self) -> None:
        """Close, after sending what is queued (at most LINGER_MS). Calling it again does nothing."""
        if self._context.closed:
            return
        for pidfd in list(self._pidfds):
            self._forget(pidfd)
        with self._wake_lock:
            self._context.destroy(linger=LINGER_MS)
            os.close(self._wake)
        self.hide_endpoint()

    def _received(self) -> Iterator[Received]:
        while True:
            try:
                peer, *frames = self._socket.recv_multipart(flags=zmq.NOBLOCK)
            except zmq.error.Again:
                return
            message = self._checked(frames)
            if message is not None:
                yield Received(peer, message)

    def _checked(self, frames: list[bytes]) -> AnyMessage | None:
        try:
            return _open(frames, self.token)
        except ProtocolError as error:
            self.num_rejected += 1
            _log.warning("dropped a message on %s: %s", self.endpoint, error)
            return None

    def _forget(self, pidfd: int) -> None:
        del self._pidfds[pidfd]
        self._poller.unregister(pidfd)
        os.close(pidfd)


class Link:
    """A peer's end: one connection to the hub. Not thread-safe."""

    def __init__(self, endpoint: str, token: str, *, hub_pid: int, hub_host: str) -> None:
        self._token = token
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 5000)  # of a worker whose trainer has gone
        self._socket.connect(endpoint)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._pidfd: int | None = None
        self._hub_died = False
        if hub_host == host_id():
            try:
                self._pidfd = open_pidfd(hub_pid)
            except ProcessLookupError:
                self._hub_died = True
        if self._pidfd is not None:
            self._poller.register(self._pidfd, zmq.POLLIN)

    def send(self, message: AnyMessage) -> None:
        """Queue `message` for the hub."""
        self._socket.send_multipart([self._token.encode(), _encode(message)], flags=zmq.NOBLOCK)

    def recv(self, deadline_s: float, what: str) -> AnyMessage:
        """The next message.

        Raises TrainerLostError if rank 0 died, DeadlineError after `deadline_s` ("waiting for `what`").
        """
        end = time.monotonic() + deadline_s
        while True:
            left = end - time.monotonic()
            ready = {} if self._hub_died else dict(self._poller.poll(max(0, round(left * 1000))))
            if self._socket in ready:
                message = _open(self._socket.recv_multipart(), self._token)
                if isinstance(message, Goodbye):
                    raise TrainerLostError("trainer rank 0 closed its WeightSyncer", origin="trainer rank 0")
                return message
            if self._hub_died or self._pidfd in ready:
                self._hub_died = True
                raise TrainerLostError(
                    "trainer rank 0 died; build a new WeightSyncer on the survivors", origin="trainer rank 0"
                )
            if left <= 0:
                raise DeadlineError(f"nothing came from trainer rank 0 for {deadline_s:g} s while waiting for {what}")

    def is_released(self, patience_s: float) -> bool:
        """Whether the hub died or said Goodbye; waits up to `patience_s` for a Goodbye that is still on its way."""
        try:
            while True:
                self.recv(patience_s, "Goodbye")  # messages of a refit that is over
        except TrainerLostError:
            return True
        except (DeadlineError, ProtocolError):
            return False

    def close(self) -> None:
        """Close, after sending what is queued. Calling it again does nothing."""
        if self._context.closed:
            return
        if self._pidfd is not None:
            os.close(self._pidfd)
        self._context.destroy(linger=LINGER_MS)


def _open(frames: list[bytes], token: str) -> AnyMessage:
    """The message in `frames`. Raises ProtocolError, without showing contents, if it is not one of this session."""
    if len(frames) != 2 or not hmac.compare_digest(frames[0], token.encode()):
        raise ProtocolError("a message without this session's token")
    try:
        return _decoder.decode(frames[1])
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ProtocolError(f"a message that does not decode: {error}") from error


def _private_directory() -> Path:
    """A new directory that only this user can enter (mode 0700), with a path short enough for a Unix socket."""
    for parent in (None, "/tmp"):
        path = Path(tempfile.mkdtemp(prefix="mbridge-", dir=parent))
        if len(str(path)) < MAX_SOCKET_PATH - len("/control"):
            return path
        with suppress(OSError):
            path.rmdir()
    raise ProtocolError("no directory with a path short enough for a Unix socket; set TMPDIR, or pass control_address")
