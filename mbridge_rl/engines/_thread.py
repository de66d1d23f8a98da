"""A thread for an engine's blocking calls."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import EngineError, Failure, SyncError

_log = logging.getLogger(__name__)


class Returned(NamedTuple):
    """How an engine call ended."""

    value: Any = None
    failure: Failure | None = None


class EngineThread:
    """Makes one blocking engine call at a time in a thread, so that the conductor can keep its deadlines meanwhile.

    Threads are daemons: a call into a dead engine may never return, and must not keep the process alive.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._thread: threading.Thread | None = None
        self._returned: Returned | None = None

    @property
    def is_busy(self) -> bool:
        """A call has been made and has not returned."""
        return self._thread is not None and self._returned is None

    @property
    def is_returned(self) -> bool:
        """A call has returned and its result was not taken."""
        return self._returned is not None

    def start(self, call: Callable[[], Any]) -> None:
        if self._thread is not None:
            raise EngineError("the engine's previous call has not come back")
        self._thread = threading.Thread(target=self._run, args=(call,), name="mbridge-engine-call", daemon=True)
        self._thread.start()

    def take(self) -> Returned:
        """The result of the call that has returned; the next call can start."""
        assert self._returned is not None
        returned, self._returned, self._thread = self._returned, None, None
        return returned

    def join(self, timeout_s: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self._returned = Returned(call())
        except SyncError as error:
            self._returned = Returned(failure=error.failure)
        except Exception as error:  # noqa: BLE001  an engine of a third party; it becomes one typed error
            _log.exception("an engine call failed")
            self._returned = Returned(failure=Failure("EngineLoadError", f"{type(error).__name__}: {error}", "engine"))
        self._wake()
