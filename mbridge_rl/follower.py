"""The side of a syncer on trainer ranks other than 0: fill buckets when rank 0 says so, and end as rank 0 says."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from .agreement import Offer
from .control import Link
from .errors import Failure, ProtocolError, SyncError, TrainerLostError, as_failure, raised
from .hosts import host_id
from .inbox import Inbox
from .messages import (
    Abort,
    Alive,
    AnyMessage,
    Check,
    Checked,
    Connected,
    Done,
    Enter,
    Failed,
    Fill,
    Filled,
    Goodbye,
    Hello,
    Lends,
    Next,
    Offered,
)
from .observe import phase_range
from .source import Source

GRACE_S = 5.0  # rank 0's deadline comes first: its message knows more


class Follower:
    """Connection to rank 0. Used by one thread."""

    def __init__(self, hub: Offer, rank: int, deadline_s: float) -> None:
        self._me, self._patience_s = f"trainer rank {rank}", deadline_s + GRACE_S
        self._link = Link(hub.endpoint, hub.token, hub_pid=hub.pid, hub_host=hub.host, server_key=hub.server_key)
        self._link.send(Hello("trainer", rank, os.getpid(), host_id()))
        self._broken: Failure | None = None  # why no later refit can succeed
        self._attempt = 0
        self.version = 0  # the highest that an engine may serve, of refits that failed
        self._inbox = Inbox(self._link)

    def lend(self, lends: Lends) -> None:
        """Tell rank 0, for the engine's workers, what this rank lends on the direct path."""
        self._link.send(Offered(lends))

    def report(self, error: SyncError, attempt: int = 0) -> None:
        """Tell rank 0 that this rank failed: it aborts for everyone."""
        self._link.send(Failed(attempt, as_failure(error, self._me)))

    def connect(self) -> Connected:
        """Wait until the engine is connected. Raises what rank 0 raises."""
        message = self._next(0, "the engine to connect")
        if isinstance(message, Connected):
            return message
        if isinstance(message, Abort):
            raise raised(message.failure)
        raise ProtocolError(f"expected Connected, got {type(message).__name__}", origin=self._me)

    def run(self, version: int, source: Source) -> Done:
        """One refit with this rank's weights, in as many attempts as rank 0 makes. Raises what rank 0 raises."""
        self._attempt += 1
        if self._broken is not None:
            raise raised(self._broken)
        try:
            while True:
                if self._succeeds(source.begin, self._attempt):
                    self._link.send(Enter(self._attempt, version))
                done, succeeded = self._until_over(source)
                if done is not None:
                    return done
                source.end(succeeded)
                self._attempt += 1
        except TrainerLostError as error:
            self._broken = error.failure
            raise
        except BaseException as error:  # also Ctrl-C: rank 0 learns why this rank leaves, if it does not know
            failure = as_failure(error, self._me)
            if not isinstance(error, SyncError):
                failure = replace(failure, message=f"{self._me} left the refit: {failure.message}")
            self._link.send(Failed(self._attempt, failure))
            raise

    def close(self) -> None:
        """Leave."""
        self._link.send(Goodbye())
        self._link.close()

    def _until_over(self, source: Source) -> tuple[Done | None, bool]:
        """Take part in the current attempt: (Done, or None if another attempt follows; whether it succeeded)."""
        attempt, aborted = self._attempt, False
        while True:
            match message := self._next(attempt, "the next step of the refit"):
                case Fill() | Check():
                    if not aborted:
                        self._succeeds(partial(self._answer, message, source), attempt)
                case Done():
                    return message, True
                case Next():
                    return None, not aborted
                case Abort(failure=failure, is_final=True):
                    self.version = max(self.version, message.version)
                    raise raised(failure)
                case Abort():
                    aborted = True  # rank 0 says what comes of it when the engines are done
                case _:
                    raise ProtocolError(f"{type(message).__name__} came during a refit", origin=self._me)

    def _answer(self, message: Fill | Check, source: Source) -> None:
        if isinstance(message, Check):
            self._link.send(Checked(message.attempt, source.totals(message)))
            return
        started = time.perf_counter()
        with phase_range("fill"):
            loan = source.fill(message, lambda: self._inbox.breathe(message.attempt))
        self._link.send(Filled(message.attempt, message.bucket, time.perf_counter() - started, loan, message.lane))

    def _next(self, attempt: int, what: str) -> AnyMessage:
        """The next message that is not left over from a refit that failed.

        Rank 0 says Alive while it waits for others.
        """
        while True:
            message = self._inbox.take(self._patience_s, what)
            if not isinstance(message, Alive) and getattr(message, "attempt", attempt) >= attempt:
                return message

    def _succeeds(self, step: Callable[[], None], attempt: int) -> bool:
        """Whether `step` succeeds. If not, rank 0 is told, and its Abort comes back to this rank as to all others."""
        try:
            step()
        except SyncError as error:
            self.report(error, attempt)
            return False
        return True
