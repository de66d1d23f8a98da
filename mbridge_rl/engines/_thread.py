"""A thread for an engine's blocking calls."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple

from ..errors import EngineError, Failure, SyncError

_log = logging.getLogger(__name__)


class Returned(NamedTuple):
    """How an engine call ended."""

    value: Any = None
    failure: Failure | None = None
    seconds: float = 0.0


class EngineThread:
    """Makes one blocking engine call at a time, so that the conductor can keep its deadlines meanwhile.

    One thread for all calls: to start one takes a good part of what a call takes. It is a daemon: a call into a dead
    engine may never return, and must not keep the process alive.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._returned: Returned | None = None
        self._is_called = False
        self._idle = threading.Event()
        self._idle.set()
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """A call has been made and has not returned."""
        return self._is_called and self._returned is None

    @property
    def is_returned(self) -> bool:
        """A call has returned and its result was not taken."""
        return self._returned is not None

    def start(self, call: Callable[[], Any]) -> None:
        if self._is_called:
            raise EngineError("the engine's previous call has not come back")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mbridge-engine-calls", daemon=True)
            self._thread.start()
        self._is_called = True
        self._idle.clear()
        self._calls.put(call)

    def take(self) -> Returned:
        """The result of the call that has returned; the next call can start."""
        assert self._returned is not None
        returned, self._returned, self._is_called = self._returned, None, False
        return returned

    def join(self, timeout_s: float) -> None:
        """Wait for the current call, if there is one."""
        self._idle.wait(timeout_s)

    def close(self) -> None:
        """No more calls."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            returned = _outcome(call)
            self._idle.set()  # first: once the result is there, the next call may start
            self._returned = returned
            self._wake()


def _outcome(call: Callable[[], Any]) -> Returned:
    started = time.perf_counter()
    try:
        return Returned(call(), None, time.perf_counter() - started)
    except SyncError as error:
        return Returned(failure=error.failure)
    except Exception as error:  # noqa: BLE001  an engine of a third party; it becomes one typed error
        _log.exception("an engine call failed")
        return Returned(failure=Failure("EngineLoadError", f"{type(error).__name__}: {error}", "engine"))
