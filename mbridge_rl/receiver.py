"""What runs inside an engine worker, whatever the engine: map the trainer's memory, load, check, commit.

Knows no engine: it drives a `Target`, the few things that an engine's adapter does with its model, along one of three
paths (`Path`). It knows no RPC either: `attach`, `run` and `close_session` are called by the
engine's own entry points, one at a time, and they never raise for a failed refit. A failure travels to trainer rank 0
through the control channel. (An exception through vLLM's multi-worker RPC would leave answers of other workers in its
queues.)
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import msgspec

from .broadcast_slots import BroadcastSlots
from .bucket_path import BucketPath
from .buckets import read_set_up
from .checker import Checker
from .control import Link
from .direct_path import DirectPath
from .errors import (
    EngineBusyError,
    EngineLoadError,
    EngineMismatchError,
    EngineStaleError,
    ProtocolError,
    SyncError,
    as_failure,
)
from .hosts import host_id
from .inbox import Inbox
from .loading import guarded
from .messages import (
    Abort,
    Alive,
    Applied,
    Attached,
    Check,
    Commit,
    Committed,
    Failed,
    Hello,
    Invitation,
    Load,
    Loaded,
    Message,
    Settled,
    SetUp,
)
from .observe import phase_range
from .protocol import Peer
from .shard_path import ShardPath
from .target import Target
from .transports.base import COLLECTIVE, transport_class

RELEASE_PATIENCE_S = 0.2  # a Goodbye that was sent arrives within this
GRACE_S = 5.0  # peers wait this much longer than rank 0, so that its message, which knows more, arrives first
_log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)


class Path(Protocol):
    """How weights come into this worker: bucket_path.py, direct_path.py or shard_path.py."""

    num_buckets: int
    reloaded: list[str]
    changed: dict[str, str] | None

    @property
    def reasons(self) -> dict[str, str]: ...

    @property
    def extra_bytes(self) -> int: ...

    def begin(self) -> None: ...

    def forget(self) -> None: ...

    def apply(self, message: Load) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Session:
    """Connection to one trainer."""

    link: Link
    inbox: Inbox
    invitation: Invitation
    path: Path
    arrivals: BroadcastSlots | None  # on a collective lane: the path's slots
    checker: Checker
    attached: Attached


@dataclass(slots=True)
class _Running:
    """One refit, from the engine's "update" call to its "finish update"."""

    session: _Session
    attempt: int
    version: int
    moves: bool
    is_checked: bool = False
    seconds: float = 0.0


class Receiver:
    """One per engine worker, for the worker's whole life. Remembers what the engine serves."""

    def __init__(self, target: Target, index: int) -> None:
        self.version = 0  # of the last commit; 0 is what the engine started with
        self.is_stale = False
        self._target, self._index = target, index
        self._session: _Session | None = None
        self._session_open = False  # the engine's own update session: between open_session and close_session
        self._running: _Running | None = None  # between run and close_session
        self._settling: threading.Thread | None = None  # tells rank 0 when the device has copied

    # --- called by the engine's entry points -------------------------------------------------------------------------

    def attach(self, invitation: Invitation) -> None:
        """Connect to the trainer that sent `invitation`: map its slots and examine its tensors.

        If a living trainer is connected, the new one is told EngineBusyError; the place of a dead one is taken over.
        """
        link = Link(
            invitation.endpoint,
            invitation.token,
            hub_pid=invitation.pid,
            hub_host=invitation.host,
            server_key=invitation.server_key,
        )
        try:
            link.send(
                Hello(
                    "worker",
                    self._index,
                    os.getpid(),
                    host_id(),
                    engine=invitation.engine,
                    version=self.version,
                    is_stale=self.is_stale,
                    session_open=self._session_open,
                )
            )
            self._release_previous()
            self._session = guarded(partial(self._set_up, link, invitation), "connect")
        except SyncError as error:
            link.send(Failed(0, as_failure(error, self._name(invitation), "connect")))
            link.close()
            return
        link.send(self._session.attached)

    def open_session(self) -> None:
        """The engine's "start update" call."""
        self._session_open = True

    def run(self, attempt: int, version: int, moves: bool) -> None:
        """The engine's "update" call: start all that writes weights. If nothing moves, there is nothing to do."""
        session = self._session
        if session is None:
            raise ProtocolError("no trainer is connected to this engine; attach one first")
        running = self._running = _Running(session, attempt, version, moves)
        try:
            self._join_settling()
            if moves:
                self.is_stale = True  # until close_session finds a commit
                guarded(partial(self._stream, running), "take new weights")
        except SyncError as error:
            self._fail(running, error)

    def close_session(self) -> None:
        """The engine's "finish update" call: what was started is finished, checked and committed."""
        self._session_open = False
        running, self._running = self._running, None
        if running is None:
            return
        try:
            guarded(partial(self._finish, running), "finish a refit")
        except SyncError as error:
            self._fail(running, error)
            return
        if running.moves:
            self.version, self.is_stale = running.version, False

    def detach(self) -> None:
        """Let go of the trainer, if there is one."""
        running, self._running = self._running, None
        if running is not None and running.moves:
            self._abandon(running.session)
        session, self._session = self._session, None
        if session is None:
            return
        try:
            self._join_settling(session)
        except EngineLoadError as error:
            _log.error("%s; its memory stays mapped", error)
            return
        session.link.close()
        session.path.close()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _name(self, invitation: Invitation) -> str:
        return f"{Peer('worker', self._index, invitation.engine)} (process {os.getpid()})"

    def _release_previous(self) -> None:
        if self._session is None:
            return
        self._join_settling()
        if not self._session.link.is_released(RELEASE_PATIENCE_S):
            raise EngineBusyError(
                f"this engine is connected to a living trainer (process {self._session.invitation.pid}); close its "
                "WeightSyncer first"
            )
        self.detach()

    def _set_up(self, link: Link, invitation: Invitation) -> _Session:
        message = link.recv(invitation.deadline_s, "the plan")
        while isinstance(message, Alive):  # rank 0 waits for others
            message = link.recv(invitation.deadline_s, "the plan")
        if not isinstance(message, SetUp):
            raise ProtocolError(f"expected SetUp, got {type(message).__name__}")
        layout = read_set_up(message)
        examined = guarded(lambda: self._target.examine(layout.tensors), "examine the tensors")
        found = examined.found
        twice = [pair for pair in found.twice if not layout.optional_names.intersection(pair)]
        if twice:
            pairs = ", ".join(f"{a} and {b}" for a, b in twice[:5])
            raise EngineMismatchError(
                f"the engine's loader writes two HF tensors to one place: {pairs}", tensor=twice[0][0]
            )
        transport = transport_class(message.transport)
        path: Path
        arrivals = None
        if message.transport == COLLECTIVE:
            me, token = (invitation.engine, self._index), str(message.address["token"])
            arrivals = BroadcastSlots(layout, message.senders, me, self._target.device, token)
            kind = ShardPath if message.is_sharded else BucketPath
            path = kind(layout, self._target, examined, arrivals)
        elif message.lends:
            path = DirectPath(layout, self._target, examined, message.lends, transport)
        else:
            path = BucketPath(layout, self._target, examined, transport.open(message.address))
        unused = [spec.name for spec in layout.tensors if spec.name not in found.consumed]
        attached = Attached(unused, examined.placement.unwritten())
        checker = Checker(layout, self._target, examined.placement)
        return _Session(link, Inbox(link), invitation, path, arrivals, checker, attached)

    def _stream(self, running: _Running) -> None:
        path, attempt = running.session.path, running.attempt
        started = time.perf_counter()
        path.begin()
        running.seconds = time.perf_counter() - started
        for bucket in range(path.num_buckets):
            message = self._expect(running, Load, f"bucket {bucket}", bucket)
            self._await_bucket(running, message)
            started = time.perf_counter()
            with phase_range("load"):
                path.apply(message)
            running.session.link.send(Loaded(attempt, bucket, time.perf_counter() - started))
            running.is_checked = message.is_checked

    @staticmethod
    def _await_bucket(running: _Running, message: Load) -> None:
        """On a collective lane: take part in the transfer of the bucket."""
        session = running.session
        if session.arrivals is None:
            return

        def breathe() -> None:
            session.inbox.breathe(running.attempt)

        if message.grouping is not None:
            session.arrivals.join(message.grouping, breathe)
        with phase_range("receive"):
            session.arrivals.receive(message.bucket, breathe)

    def _finish(self, running: _Running) -> None:
        """Finish the refit, send checksums if they are asked for, and wait for Commit."""
        session, path, attempt = running.session, running.session.path, running.attempt
        if running.moves:
            started = time.perf_counter()
            with phase_range("finish"):
                path.finish()
            running.seconds += time.perf_counter() - started
            if running.is_checked and path.changed is not None:
                session.checker.record(path.changed)
            else:
                session.checker.forget()
            applied = Applied(attempt, running.seconds, path.extra_bytes, path.reloaded, path.reasons)
            if session.arrivals is not None:
                came = session.arrivals
                applied = msgspec.structs.replace(applied, wire_bytes=came.wire_bytes, needs=came.news)
            session.link.send(applied)
        else:
            session.link.send(Applied(attempt, 0.0, 0))
        message = self._expect(running, (Check, Commit), "Commit", None)
        if isinstance(message, Check):
            session.link.send(session.checker.check(message, attempt, path.changed))
            self._expect(running, Commit, "Commit", None)
        wait = self._target.pending() if running.moves else None
        session.link.send(Committed(attempt, is_settled=wait is None))
        if wait is not None:
            # The link is this thread's until it ends; whoever needs it next joins it first.
            self._settling = threading.Thread(
                target=_settle, args=(wait, session.link, attempt), name="mbridge-settle", daemon=True
            )
            self._settling.start()

    def _join_settling(self, session: _Session | None = None) -> None:
        """Raises EngineLoadError if the device is still at it after the deadline: it hangs."""
        session = session or self._session
        if self._settling is not None and session is not None:
            patience_s = session.invitation.deadline_s + GRACE_S
            self._settling.join(patience_s)
            if self._settling.is_alive():
                raise EngineLoadError(f"the device has not finished the last refit's copies after {patience_s:g} s")
            self._settling = None

    def _fail(self, running: _Running, error: SyncError) -> None:
        """Give up, and let rank 0 know. The engine's own calls go on as if nothing had happened."""
        self._running = None
        if running.moves:
            _log.error("refit %d failed, the engine is stale: %s", running.attempt, error)
            self._abandon(running.session)
        phase = "stream" if running.moves else "check"
        failure = as_failure(error, self._name(running.session.invitation), phase)
        running.session.link.send(Failed(running.attempt, failure))

    def _abandon(self, session: _Session) -> None:
        session.path.forget()
        if session.arrivals is not None:
            session.arrivals.abandon()
        try:
            guarded(self._target.abandon, "abandon the update")
        except SyncError as error:
            _log.error("%s", error)  # the refit's own error is the one to report

    def _expect(self, running: _Running, kind: type[M] | tuple[type[M], ...], what: str, bucket: int | None) -> M:
        session = running.session
        while True:
            message = session.inbox.take(session.invitation.deadline_s + GRACE_S, what)
            if isinstance(message, Alive) or getattr(message, "attempt", running.attempt) < running.attempt:
                continue  # rank 0 waits for others; or left over from a refit that failed
            if isinstance(message, Abort):
                failure = message.failure
                raise EngineStaleError(
                    f"aborted by trainer rank 0: {failure.message}", origin=failure.origin, phase=failure.phase
                )
            if isinstance(message, kind) and getattr(message, "bucket", None) == bucket:
                return message
            raise ProtocolError(f"expected {what}, got {message!r}")


def _settle(wait: Callable[[], None], link: Link, attempt: int) -> None:
    """Tell rank 0 when the device has read what it reads of the trainers' memory. In a thread of its own."""
    try:
        wait()
    except RuntimeError as error:  # a device that failed: the engine will find out too
        link.send(Failed(attempt, as_failure(error, f"engine worker (process {os.getpid()})", "settle")))
        return
    link.send(Settled(attempt))
