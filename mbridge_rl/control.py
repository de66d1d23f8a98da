"""The control channel of a syncer: typed msgpack messages over ZMQ between trainer rank 0 (`Hub`) and its peers
(`Link`).

Who does not know the session's token cannot connect (handshake.py); what does not decode is dropped and logged
(wire.py): it never reaches the refit. Nothing is unpickled. By default the hub listens on a Unix socket in a directory
that only this user can enter; on TCP it listens on loopback, unless told to `bind` elsewhere (endpoints.py).

A peer on the same host is watched through a pidfd, so its death is an event (within milliseconds) and not a timeout.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import zmq

from .endpoints import connect, is_remote, listen, listening_address, peers_endpoint, private_directory
from .errors import DeadlineError, ProtocolError, SyncError, TrainerLostError
from .handshake import Doorman, KeyPair, server_keys, use_as_client, use_as_server
from .hosts import host_id, open_pidfd
from .messages import AnyMessage, Goodbye
from .wire import MAX_MESSAGE_BYTES, pack, unpack

LINGER_MS = 1000  # a last message (Abort, Goodbye) may take this long to leave
HEARTBEAT_MS, SILENCE_MS = 2000, 10_000  # how often a connection is tried; after how much silence it is dropped
MAX_EVENTS = 4096  # of one `wait`: no flood of messages keeps rank 0 from its deadlines
MAX_QUEUED = 256  # messages of one peer that wait here for rank 0; a refit needs a handful
_log = logging.getLogger(__name__)


class Received(NamedTuple):
    peer: bytes
    message: AnyMessage


class Lost(NamedTuple):
    peer: bytes


class Woken(NamedTuple):
    """`Hub.wake` was called."""


class Hub:
    """Rank 0's end. Not thread-safe, except for `wake`."""

    def __init__(
        self,
        address: str | None = None,
        *,
        bind: str | None = None,
        advertise: str | None = None,
        key: str | None = None,
    ) -> None:
        """Listen on `address` or `bind`, by default on a Unix socket of our own.

        Args:
            address: "tcp://127.0.0.1:*" or "ipc:///path". Refused if other hosts can reach it.
            bind: the same, for other hosts too: "tcp://10.0.0.5:*", "tcp://[fd00::5]:4000", "tcp://eth0:*".
            advertise: name or address of this host that peers connect to. Needed if `bind` is "tcp://0.0.0.0:*".
            key: "auto", or the hub's secret CURVE key, to encrypt: peers then need `server_key`, beside the token.

        Raises SyncError.
        """
        if address is not None and bind is not None:
            raise SyncError(f"expected address or bind, found both: {address!r}, {bind!r}", phase="connect")
        keys = server_keys(key)
        self.token = secrets.token_hex(16)
        self.server_key = "" if keys is None else keys.public.decode()  # public, "" without CURVE
        self._num_undecoded = 0
        given = address or bind
        wanted = None if given is None else listening_address(given, may_be_remote=bind is not None)
        self._directory = None if wanted is not None else private_directory()
        self._context = zmq.Context()
        try:
            self._doorman = Doorman(self._context, self.token, keys)
            self._socket = self._listen(wanted or f"ipc://{self._directory}/control", keys)
            self.endpoint = peers_endpoint(self._socket.getsockopt_string(zmq.LAST_ENDPOINT), advertise)
        except BaseException:
            self._context.destroy(linger=0)
            self.hide_endpoint()
            raise
        if keys is None and is_remote(self.endpoint):
            _log.warning("the control channel on %s is not encrypted; pass key='auto'", self.endpoint)
        weakref.finalize(self, _end, self._context, self._socket, self._doorman.socket)
        self._wake_lock = threading.Lock()  # against a `wake` from another thread while `close` closes the descriptor
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._pidfds: dict[int, bytes] = {}
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._doorman.socket, zmq.POLLIN)
        self._poller.register(self._wake, zmq.POLLIN)

    @property
    def num_rejected(self) -> int:
        """Handshakes of strangers, and messages that were none."""
        return self._doorman.num_refused + self._num_undecoded

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

    def unwatch(self, peer: bytes) -> None:
        """Its process may live on: it is of no interest any more."""
        for pidfd in [pidfd for pidfd, watched in self._pidfds.items() if watched == peer]:
            self._forget(pidfd)

    def send(self, peer: bytes, message: AnyMessage) -> bool:
        """Queue `message` for `peer`; False if that peer has no connection any more."""
        try:
            self._socket.send_multipart([peer, *pack(message, self.token)], flags=zmq.NOBLOCK)
        except (zmq.error.Again, zmq.error.ZMQError) as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def wait(self, timeout_s: float) -> Iterator[Received | Lost | Woken]:
        """What has happened; waits up to `timeout_s` seconds for the first event. Messages come before deaths.

        Lets peers in meanwhile. Hands out at most MAX_EVENTS messages (and as many before each death).
        """
        ready = dict(self._poller.poll(max(0, round(timeout_s * 1000))))
        if self._doorman.socket in ready:
            self._refuse_strangers()
        if self._socket in ready:
            yield from self._received()
        if self._wake in ready:
            os.eventfd_read(self._wake)
            yield Woken()
        for pidfd, peer in list(self._pidfds.items()):
            if pidfd in ready and pidfd in self._pidfds:  # it may have been forgotten meanwhile
                yield from self._received()  # its last words, if any
                self._forget(pidfd)
                yield Lost(peer)

    def show_endpoint(self) -> None:
        """Listen on a Unix socket of another name, if the last one is hidden: peers are about to come."""
        if self._directory is not None and not self._directory.exists():
            self._directory = private_directory()
            self.endpoint = f"ipc://{self._directory}/control"
            listen(self._socket, self.endpoint)

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

    def _listen(self, address: str, keys: KeyPair | None) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.RCVHWM, MAX_QUEUED)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.BACKLOG, 4096)  # all ranks connect at once
        if address.startswith("tcp://"):  # a peer on another host that hangs or is cut off is found out by ZMQ
            socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE_MS)
        use_as_server(socket, keys)
        listen(socket, address)
        return socket

    def _refuse_strangers(self) -> None:
        before = self._doorman.num_refused
        self._doorman.answer()
        if _is_worth_a_line(before, self._doorman.num_refused):
            _log.warning("refused %d connections to %s: wrong token", self._doorman.num_refused, self.endpoint)

    def _received(self) -> Iterator[Received]:
        for _ in range(MAX_EVENTS):
            try:
                peer, *frames = self._socket.recv_multipart(flags=zmq.NOBLOCK)
            except zmq.error.Again:
                return
            message = self._checked(frames)
            if message is not None:
                yield Received(peer, message)

    def _checked(self, frames: list[bytes]) -> AnyMessage | None:
        try:
            return unpack(frames, self.token)
        except ProtocolError as error:
            self._num_undecoded += 1
            if _is_worth_a_line(self._num_undecoded - 1, self._num_undecoded):
                _log.warning("dropped message %d on %s: %s", self._num_undecoded, self.endpoint, error)
            return None

    def _forget(self, pidfd: int) -> None:
        del self._pidfds[pidfd]
        self._poller.unregister(pidfd)
        os.close(pidfd)


class Link:
    """A peer's end: one connection to the hub. Not thread-safe."""

    def __init__(self, endpoint: str, token: str, *, hub_pid: int, hub_host: str, server_key: str = "") -> None:
        """`server_key`: of a hub that encrypts; no other hub is spoken to. Raises SyncError."""
        self._token = token
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 5000)  # of a worker whose trainer has gone
        try:
            use_as_client(self._socket, token, server_key)
            connect(self._socket, endpoint)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        weakref.finalize(self, _end, self._context, self._socket)
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
        """Queue `message` for the hub. Raises TrainerLostError if it has taken none for so long that no more fit."""
        try:
            self._socket.send_multipart(pack(message, self._token), flags=zmq.NOBLOCK)
        except zmq.Again as error:
            raise TrainerLostError("trainer rank 0 takes no messages any more", origin="trainer rank 0") from error

    def recv(self, deadline_s: float, what: str) -> AnyMessage:
        """The next message.

        Raises TrainerLostError if rank 0 died, DeadlineError after `deadline_s` ("waiting for `what`").
        """
        end = time.monotonic() + deadline_s
        while True:
            left = end - time.monotonic()
            ready = {} if self._hub_died else dict(self._poller.poll(max(0, round(left * 1000))))
            if self._socket in ready:
                message = unpack(self._socket.recv_multipart(), self._token)
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


def _end(context: zmq.Context[zmq.Socket[bytes]], *sockets: zmq.Socket[bytes]) -> None:
    """Close what nobody closed. (A context that is collected before its sockets waits for them for ever.)"""
    if not context.closed:
        for socket in sockets:
            socket.close(linger=0)
        context.destroy(linger=0)


def _is_worth_a_line(before: int, after: int) -> bool:
    """Whether a count passed a power of two: a flood must not fill the log."""
    return before.bit_length() != after.bit_length()
