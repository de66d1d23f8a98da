"""Who is connected to trainer rank 0, and what they say: the hub's routes with names."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterable, Iterator
from typing import NamedTuple

from .control import Hub, Lost, Received
from .errors import DeadlineError, EngineGoneError, TrainerLostError, raised
from .hosts import host_id
from .messages import Alive, AnyMessage, Failed, Hello
from .protocol import Peer

BEAT_S = 5.0  # how often the others hear that rank 0 still waits; a quarter of the deadline if that is less
NO_CONNECTION = "has no connection any more"
Arrived = Callable[[Peer, AnyMessage], None]
_log = logging.getLogger(__name__)


class Heard(NamedTuple):
    """`peer` sent `message`; it is lost if that is None, and `how` says in which way."""

    peer: Peer
    message: AnyMessage | None
    how: str = ""


class Switchboard:
    """Knows peers by name. Used by one thread."""

    def __init__(self, hub: Hub, deadline_s: float) -> None:
        self.hub = hub
        self._deadline_s = deadline_s
        self._routes: dict[Peer, bytes] = {}
        self._peers: dict[bytes, Peer] = {}
        self.expects: Callable[[Peer], bool] = lambda peer: True  # who may say Hello
        self.lost: dict[Peer, str] = {}  # peers that were lost while others were waited for, and how
        self._beat_s = min(BEAT_S, deadline_s / 4)
        self._next_beat = 0.0

    @property
    def trainers(self) -> list[Peer]:
        """The other trainer ranks that are connected."""
        return [peer for peer in self._routes if peer.role == "trainer"]

    def workers_of(self, engine: int) -> list[Peer]:
        return [peer for peer in self._routes if peer.role == "worker" and peer.engine == engine]

    def send(self, peer: Peer, message: AnyMessage) -> bool:
        """Whether `peer` still has a connection."""
        route = self._routes.get(peer)
        return route is not None and self.hub.send(route, message)

    def send_all(self, peers: Iterable[Peer], message: AnyMessage) -> None:
        for peer in list(peers):
            self.send(peer, message)

    def forget(self, peers: Iterable[Peer]) -> None:
        """Listen to these no more."""
        for peer in list(peers):
            route = self._routes.pop(peer, b"")
            self._peers.pop(route, None)
            self.hub.unwatch(route)

    def hear(self, timeout_s: float, attempt: int) -> Iterator[Heard]:
        """What peers have said or done, or nothing after `timeout_s` or a beat. Tells them that rank 0 is there."""
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + self._beat_s
            for peer in list(self._routes):
                if not self.send(peer, Alive(attempt)):
                    yield Heard(peer, None, NO_CONNECTION)
        for event in self.hub.wait(min(timeout_s, self._beat_s)):
            match event:
                case Received(route, Hello() as hello) if route not in self._peers:
                    newcomer = self._register(route, hello)
                    if newcomer is not None:
                        yield Heard(newcomer, hello)
                case Received(route, Hello()):
                    _log.debug("ignored a second Hello of %s", self._peers[route])
                case Received(route, message) if route in self._peers:
                    yield Heard(self._peers[route], message)
                case Received(_, message):
                    _log.debug("ignored %s from nobody that is known", type(message).__name__)
                case Lost(route) if route in self._peers:
                    yield Heard(self._peers[route], None, "died")

    def wait_until(
        self,
        is_complete: Callable[[], bool],
        what: str,
        arrived: Arrived | None = None,
        patience_s: float | None = None,
        engines: Container[int] | None = None,
    ) -> None:
        """Outside of a refit: hand over what comes until `is_complete()`.

        Raises SyncError if a trainer, or a worker of `engines` (default: of all) fails or ends, and at the latest after
        `patience_s` (the deadline).
        """
        patience_s = self._deadline_s if patience_s is None else patience_s
        end = time.monotonic() + patience_s
        while not is_complete():
            left = end - time.monotonic()
            if left <= 0:
                raise DeadlineError(f"waited {patience_s:g} s for {what}", origin="trainer rank 0", phase="connect")
            for peer, message, how in self.hear(left, attempt=0):
                if peer.role == "worker" and engines is not None and peer.engine not in engines:
                    self.lost |= {peer: how} if message is None else {}
                    continue
                if message is None:
                    self.forget([peer])
                    kind = EngineGoneError if peer.role == "worker" else TrainerLostError
                    raise kind(f"{peer} {how} while engines connect", origin=str(peer), phase="connect")
                if isinstance(message, Failed) and message.attempt == 0:
                    raise raised(message.failure)
                if arrived is not None:
                    arrived(peer, message)

    def _register(self, route: bytes, hello: Hello) -> Peer | None:
        peer = Peer(hello.role, hello.index, hello.engine)
        if peer in self._routes or not self.expects(peer):
            _log.warning("ignored a Hello of %s, who is not waited for", peer)
            return None
        self._routes[peer], self._peers[route] = route, peer
        if hello.host == host_id():
            self.hub.watch(route, hello.pid)
        return peer
