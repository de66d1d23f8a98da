"""Who may connect to the hub: ZMQ's own handshakes, with the session's token as the one secret.

Without a key the token is the password of a PLAIN handshake. With one, CURVE encrypts: a peer knows the server's public
key, so it refuses any other server, and proves that it knows the token, of which its own key pair is made. Either way
a stranger is turned away by `Doorman` before it can send a message: nothing of his is kept, decoded or queued.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import NamedTuple

import zmq
from zmq.utils import z85

from .errors import SyncError

USER = b"mbridge"
HANDSHAKE_MS = 10_000  # a connection that has not said who it is by then is closed
MAX_ANSWERS = 64  # between two looks at the messages


class KeyPair(NamedTuple):
    """Z85, of CURVE."""

    public: bytes
    secret: bytes


def server_keys(key: str | None) -> KeyPair | None:
    """Of the hub: None without `key`, a fresh pair for "auto", else those of the secret `key` (Z85, 40 characters).

    Raises SyncError if libzmq was built without CURVE, or `key` is not a key.
    """
    if key is None:
        return None
    if not zmq.has("curve"):
        raise SyncError(
            f"key= asks for encryption, and libzmq {zmq.zmq_version()} here was built without CURVE: install pyzmq "
            "from its wheels, or pass no key",
            phase="connect",
        )
    if key == "auto":
        return KeyPair(*zmq.curve_keypair())
    try:
        secret = key.encode("ascii")
        return KeyPair(zmq.curve_public(secret), secret)
    except (ValueError, zmq.ZMQError):  # no cause: it may show the key
        raise SyncError(
            'key= must be "auto" or a secret CURVE key in Z85 (40 characters, as zmq.curve_keypair() makes them), '
            f"found something else of {len(key)} characters",
            phase="connect",
        ) from None


def use_as_server(socket: zmq.Socket[bytes], keys: KeyPair | None) -> None:
    """Before `socket` is bound; its context must have a Doorman."""
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.ZAP_DOMAIN, USER)
    if keys is None:
        socket.setsockopt(zmq.PLAIN_SERVER, 1)
    else:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)


def use_as_client(socket: zmq.Socket[bytes], token: str, server_key: str) -> None:
    """Before `socket` is connected. `server_key`: the server's public key, "" if it has none."""
    if not server_key:
        socket.setsockopt(zmq.PLAIN_USERNAME, USER)
        socket.setsockopt(zmq.PLAIN_PASSWORD, token.encode())
        return
    if not zmq.has("curve"):
        raise SyncError("trainer rank 0 encrypts, and libzmq here was built without CURVE", phase="connect")
    keys = _client_keys(token)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    socket.setsockopt(zmq.CURVE_SERVERKEY, server_key.encode())


class Doorman:
    """Answers libzmq's question who may connect (ZAP, RFC 27), for all sockets of one context."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], token: str, keys: KeyPair | None) -> None:
        """Must be there before a socket is bound."""
        self.num_refused = 0
        self.socket = context.socket(zmq.REP)
        self.socket.bind("inproc://zeromq.zap.01")
        self._expected = (
            (b"PLAIN", USER, token.encode()) if keys is None else (b"CURVE", z85.decode(_client_keys(token).public))
        )

    def answer(self) -> None:
        """Whoever has asked, at most MAX_ANSWERS. Does not block."""
        for _ in range(MAX_ANSWERS):
            try:
                version, request, _, _, _, *who = self.socket.recv_multipart(flags=zmq.NOBLOCK)
            except zmq.Again:
                return
            is_known = self._knows(who)
            self.num_refused += not is_known
            status = (b"200", b"") if is_known else (b"400", b"not of this session")
            self.socket.send_multipart([version, request, *status, b"", b""])

    def _knows(self, who: list[bytes]) -> bool:
        """In constant time, for a given number of parts."""
        if len(who) != len(self._expected):
            return False
        return all([hmac.compare_digest(*pair) for pair in zip(who, self._expected, strict=True)])  # noqa: C419


def _client_keys(token: str) -> KeyPair:
    """Of every peer of a session. (What encrypts are keys that CURVE makes afresh for each connection.)"""
    secret = z85.encode(hashlib.sha256(b"mbridge peer " + token.encode()).digest())
    return KeyPair(zmq.curve_public(secret), secret)
