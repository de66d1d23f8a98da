"""A peer's messages from rank 0, which may also be looked at while the peer waits for something else."""

from __future__ import annotations

from collections import deque

from .control import Link
from .errors import DeadlineError, raised
from .messages import Abort, AnyMessage


class Inbox:
    """Messages in the order in which they came. Used by one thread."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._held: deque[AnyMessage] = deque()

    def take(self, deadline_s: float, what: str) -> AnyMessage:
        """The next message. Raises as Link.recv does."""
        return self._held.popleft() if self._held else self._link.recv(deadline_s, what)

    def breathe(self, attempt: int) -> None:
        """In the middle of a transfer: raise if rank 0 has aborted `attempt`, or is gone. Nothing is lost."""
        while (message := self._waiting()) is not None:
            self._held.append(message)
            if isinstance(message, Abort) and message.attempt == attempt:
                raise raised(message.failure)

    def _waiting(self) -> AnyMessage | None:
        try:
            return self._link.recv(0.0, "what is there")
        except DeadlineError:
            return None
