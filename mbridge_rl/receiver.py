"""What runs inside an engine worker, whatever the engine: open the slots, load bucket after bucket, check, commit.

Knows no engine: it drives a `Target`, the few things that an engine's adapter does with its model. It knows no RPC
either: `attach`, `run` and `close_session` are called by the engine's own entry points, one at a time, and they never
raise for a failed refit. A failure travels to trainer rank 0 through the control channel. (An exception through vLLM's
multi-worker RPC would leave answers of other workers in its queues.)
"""

from __future__ import annotations

import logging
import os
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from mbridge.pieces import TensorSpec

from .buckets import Layout, Part, aligned, part_view, read_set_up
from .control import Link, host_id
from .errors import (
    EngineBusyError,
    EngineLoadError,
    EngineMismatchError,
    EngineStaleError,
    ProtocolError,
    SyncError,
    as_failure,
)
from .messages import (
    Abort,
    Alive,
    Applied,
    Attached,
    Commit,
    Committed,
    Failed,
    Hello,
    Invitation,
    Load,
    Loaded,
    SetUp,
)
from .recorder import DryRun

RELEASE_PATIENCE_S = 0.2  # a Goodbye that was sent arrives within this
GRACE_S = 5.0  # peers wait this much longer than rank 0, so that its message, which knows more, arrives first
_log = logging.getLogger(__name__)
T = TypeVar("T")


class Target(ABC):
    """An engine worker's model, as the receiver sees it. All calls come from one thread and block until done."""

    kept_bytes: int = 0  # that the last refit held beside the model and the buckets

    @abstractmethod
    def examine(self, tensors: tuple[TensorSpec, ...]) -> DryRun:
        """Find out, without changing anything, what the loader does with `tensors`. Raises EngineMismatchError."""

    @abstractmethod
    def begin(self) -> None:
        """A refit starts: from here until `finish` or `abandon` the model may be torn."""

    @abstractmethod
    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Write HF tensors into the model; return the engine's names that were written.

        The tensors are views that are overwritten after the call: whatever is kept must be copied, and a device
        must have read them.
        """

    @abstractmethod
    def finish(self) -> None:
        """All tensors came: post-process what the engine post-processes. After it the model can serve."""

    @abstractmethod
    def abandon(self) -> None:
        """The refit failed: bring the model back into a state in which `begin` works. Its values may be anything."""


class Slots(Protocol):
    """The part of a transport that a receiver uses."""

    def slot(self, index: int) -> torch.Tensor: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Session:
    """Connection to one trainer."""

    link: Link
    invitation: Invitation
    slots: Slots
    layout: Layout
    program: list[list[tuple[Part, torch.Tensor]]]  # per bucket: each part and its view of the slot
    assembly: Assembly
    examined: DryRun


class Receiver:
    """One per engine worker, for the worker's whole life. Remembers what the engine serves."""

    def __init__(self, target: Target, index: int, open_slots: Callable[[str, dict[str, str | int]], Slots]) -> None:
        self.version = 0  # of the last commit; 0 is what the engine started with
        self.is_stale = False
        self._target, self._index, self._open_slots = target, index, open_slots
        self._me = f"engine worker {index} (process {os.getpid()})"
        self._session: _Session | None = None
        self._session_open = False  # the engine's own update session: between open_session and close_session
        self._pending: int | None = None  # version that close_session will make the engine's

    # --- called by the engine's entry points -------------------------------------------------------------------------

    def attach(self, invitation: Invitation) -> None:
        """Connect to the trainer that sent `invitation`: map its slots and examine its tensors.

        If a living trainer is connected, the new one is told EngineBusyError; the place of a dead one is taken over.
        """
        link = Link(invitation.endpoint, invitation.token, hub_pid=invitation.pid, hub_host=invitation.host)
        try:
            self._release_previous()
            link.send(
                Hello("worker", self._index, os.getpid(), host_id(), self.version, self.is_stale, self._session_open)
            )
            self._session = self._set_up(link, invitation)
        except SyncError as error:
            link.send(Failed(0, as_failure(error, self._me, "connect")))
            link.close()
            return
        unused = [t.name for t in self._session.layout.tensors if t.name not in self._session.examined.consumed]
        link.send(Attached(unused))

    def open_session(self) -> None:
        """The engine's "start update" call."""
        self._session_open = True

    def run(self, attempt: int, version: int) -> None:
        """The engine's "update" call: one refit, from the first bucket until Commit or failure."""
        session = self._session
        if session is None:
            raise ProtocolError("no trainer is connected to this engine; attach one first")
        self._pending = None
        self.is_stale = True  # until close_session finds a commit
        try:
            self._refit(session, attempt)
        except SyncError as error:
            _log.error("refit %d failed, the engine is stale: %s", attempt, error)
            self._abandon()
            session.link.send(Failed(attempt, as_failure(error, self._me, "stream")))
            return
        self._pending = version

    def close_session(self) -> None:
        """The engine's "finish update" call: what was committed is now what the engine serves."""
        self._session_open = False
        if self._pending is not None:
            self.version, self.is_stale, self._pending = self._pending, False, None

    def detach(self) -> None:
        """Let go of the trainer, if there is one."""
        if self._session is not None:
            session, self._session = self._session, None
            session.link.close()
            session.program.clear()
            session.slots.close()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _release_previous(self) -> None:
        if self._session is None:
            return
        if not self._session.link.is_released(RELEASE_PATIENCE_S):
            raise EngineBusyError(
                f"this engine is connected to a living trainer (process {self._session.invitation.pid}); close its "
                "WeightSyncer first"
            )
        self.detach()

    def _set_up(self, link: Link, invitation: Invitation) -> _Session:
        message = link.recv(invitation.deadline_s, "the plan")
        if not isinstance(message, SetUp):
            raise ProtocolError(f"expected SetUp, got {type(message).__name__}")
        layout = read_set_up(message)
        examined = self._guard(lambda: self._target.examine(layout.tensors), "examine the tensors")
        twice = [pair for pair in examined.twice if not layout.optional_names.intersection(pair)]
        if twice:
            pairs = ", ".join(f"{a} and {b}" for a, b in twice[:5])
            raise EngineMismatchError(
                f"the engine's loader writes two HF tensors to one place: {pairs}", tensor=twice[0][0]
            )
        slots = self._open_slots(message.transport, message.address)
        views = [slots.slot(0), slots.slot(1)]
        program = [
            [(part, part_view(views[part.bucket % len(views)], layout.tensors[part.tensor], part)) for part in bucket]
            for bucket in layout.by_bucket()
        ]
        return _Session(link, invitation, slots, layout, program, Assembly(layout), examined)

    def _refit(self, session: _Session, attempt: int) -> None:
        assembly = session.assembly
        assembly.restart()
        started = time.perf_counter()
        self._guard(self._target.begin, "begin the update")
        begin_s = time.perf_counter() - started
        loaded: set[str] = set()
        for bucket in range(session.layout.num_buckets):
            self._expect(session, attempt, Load, f"bucket {bucket}", bucket)
            started = time.perf_counter()
            loaded |= self._load(assembly.ready(session.program[bucket]))
            session.link.send(Loaded(attempt, bucket, time.perf_counter() - started))
        started = time.perf_counter()
        expected = session.examined.loaded
        if expected is not None and loaded != expected:
            missing, extra = sorted(expected - loaded), sorted(loaded - expected)
            raise EngineLoadError(
                f"the engine's loader wrote other parameters than planned: missing {missing[:5]}, extra {extra[:5]}"
            )
        self._guard(self._target.finish, "finish the update")
        seconds = begin_s + time.perf_counter() - started
        session.link.send(Applied(attempt, seconds, assembly.num_bytes + self._target.kept_bytes))
        self._expect(session, attempt, Commit, "Commit", None)
        session.link.send(Committed(attempt))

    def _abandon(self) -> None:
        try:
            self._guard(self._target.abandon, "abandon the update")
        except SyncError as error:
            _log.error("%s", error)  # the refit's own error is the one to report

    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        current: list[str | None] = [None]  # the tensor that the loader has in hand
        exhausted = False

        def named() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal exhausted
            for name, tensor in tensors:
                current[0] = name
                yield name, tensor
            current[0], exhausted = None, True

        loaded = self._guard(lambda: self._target.load(named()), "load", current)
        if not exhausted:
            raise EngineLoadError("the engine's loader stopped before the last tensor", tensor=current[0])
        return loaded

    def _guard(self, call: Callable[[], T], what: str, current: Sequence[str | None] = (None,)) -> T:
        """Make a call into the engine's code. It may raise anything; that becomes one typed error."""
        try:
            return call()
        except SyncError:
            raise
        except Exception as error:
            message = f"the engine failed to {what}: {type(error).__name__}: {error}"
            raise EngineLoadError(message, tensor=current[0]) from error

    def _expect(
        self, session: _Session, attempt: int, kind: type[Load] | type[Commit], what: str, bucket: int | None
    ) -> None:
        while True:
            message = session.link.recv(session.invitation.deadline_s + GRACE_S, what)
            if isinstance(message, Alive) or getattr(message, "attempt", attempt) < attempt:
                continue  # rank 0 waits for others; or left over from a refit that failed
            if isinstance(message, Abort):
                failure = message.failure
                raise EngineStaleError(
                    f"aborted by trainer rank 0: {failure.message}", origin=failure.origin, phase=failure.phase
                )
            if isinstance(message, kind) and getattr(message, "bucket", None) == bucket:
                return
            raise ProtocolError(f"expected {kind.__name__} ({what}), got {message!r}")


class Assembly:
    """Puts the tensors of fusion groups that lie in several buckets together again; whole groups pass as they are.

    Groups come one after the other, so one buffer of the largest such group serves them all, refit after refit.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._group_of = {t: group for group in layout.split_groups for t in group}
        self._num_parts = Counter(self._group_of[p.tensor] for p in layout.parts if p.tensor in self._group_of)
        self._left = dict(self._num_parts)
        self._tensors: dict[int, torch.Tensor] = {}
        self.num_bytes = 0
        for group in layout.split_groups:
            self.num_bytes = max(self.num_bytes, sum(aligned(layout.tensors[t].num_bytes) for t in group))
        buffer = torch.zeros(self.num_bytes, dtype=torch.uint8)  # zeros: its pages are there before the first refit
        for group in layout.split_groups:
            offset = 0
            for t in group:
                spec = layout.tensors[t]
                self._tensors[t] = buffer[offset : offset + spec.num_bytes].view(spec.dtype).view(spec.shape)
                offset += aligned(spec.num_bytes)

    def restart(self) -> None:
        """A refit begins; the last one may have been left in the middle."""
        self._left = dict(self._num_parts)

    def ready(self, bucket: list[tuple[Part, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Every (HF name, whole tensor) that is complete with the parts of this bucket. Valid until the next call."""
        for part, view in bucket:
            spec = self._layout.tensors[part.tensor]
            group = self._group_of.get(part.tensor)
            if group is None:
                yield spec.name, view
                continue
            whole = self._tensors[part.tensor]
            (whole[part.start : part.stop] if spec.shape else whole).copy_(view)
            self._left[group] -= 1
            if self._left[group] == 0:
                for t in group:
                    yield self._layout.tensors[t].name, self._tensors[t]
