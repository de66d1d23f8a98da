"""The engines of a syncer, as rank 0 keeps them: attached, told what comes, let go."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .engines._thread import EngineThread
from .engines.base import Engine, as_engine
from .errors import EngineBusyError, EngineError, EngineMismatchError, EngineStaleError, Failure, raised
from .hosts import host_id
from .messages import AnyMessage, Attached, Goodbye, Hello, Invitation, SetUp
from .protocol import EngineState, Peer
from .switchboard import Arrived, Switchboard

ATTACH_GRACE_S = 5.0  # how long a worker's answer may take after the engine's own call has returned
DETACH_S = 5.0


@dataclass(eq=False)
class Member:
    """One engine of the fleet. `number` is never given again, so that messages of an earlier connection are told."""

    given: object  # what the user passed
    engine: Engine
    number: int
    calls: EngineThread
    lane: int = 0
    num_workers: int = 0
    is_attached: bool = False
    quarantine: Failure | None = None  # why refits leave it behind
    version: int = 0  # that it last committed, or had when it was attached
    refit_s: float | None = None  # seconds of the last one
    hellos: dict[Peer, Hello] = field(default_factory=dict)
    attached: dict[Peer, Attached] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.engine.name

    @property
    def hosts(self) -> set[str]:
        return {hello.host for hello in self.hellos.values()}

    def check_serving(self) -> None:
        """Raises EngineStaleError if it may not serve."""
        if self.quarantine is not None:
            raise EngineStaleError(f"{self.name} was left behind: {self.quarantine.message}", origin=self.name)
        self.engine.check_serving()


class Fleet:
    """Engines by number. Used by one thread; each engine's own calls are made in a thread of its own."""

    def __init__(self, board: Switchboard, deadline_s: float) -> None:
        self.members: dict[int, Member] = {}
        self._board, self._deadline_s = board, deadline_s
        self._next_number = 0
        self._unfinished: list[tuple[object, EngineThread]] = []  # engines that left, and their calls that hang

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members.values())

    def member_of(self, engine: object) -> Member | None:
        """The member that `engine` (as the user passed it) became."""
        return next((m for m in self if m.given is engine or m.engine is engine or m.given == engine), None)

    def invite(self, engines: Iterable[object]) -> list[Member]:
        """Have the workers of new engines connect. They then wait for `set_up`. Raises SyncError; then none joined."""
        hub = self._board.hub
        hub.show_endpoint()
        joining = []
        for given in engines:
            self._check_free(given)
            joining.append(Member(given, as_engine(given), self._next_number, EngineThread(hub.wake)))
            self._next_number += 1
        try:
            self._call_all(joining, lambda member: member.engine.num_workers, "the engine to answer")
            for member in joining:
                member.num_workers = int(self._taken(member))
                if member.num_workers < 1:
                    raise EngineError(f"{member.name} has no workers", phase="connect")
                self.members[member.number] = member
            for member in joining:
                invitation = Invitation(
                    hub.endpoint,
                    hub.token,
                    os.getpid(),
                    host_id(),
                    self._deadline_s,
                    engine=member.number,
                    server_key=hub.server_key,
                )
                member.calls.start(lambda member=member, invitation=invitation: member.engine.attach(invitation))  # type: ignore[misc]
            self._board.wait_until(
                lambda: all(len(m.hellos) == m.num_workers or self._has_failed(m) for m in joining),
                f"{sum(m.num_workers for m in joining)} engine workers to attach",
                self._arrived,
                engines={m.number for m in joining},
            )
            for member in joining:
                if len(member.hellos) < member.num_workers:
                    self._wait_for_answers([member])
        except BaseException:
            for member in joining:
                self.dismiss(member)
            raise
        return joining

    def set_up(self, joining: Iterable[Member], set_ups: Mapping[int, SetUp], arrived: Arrived | None = None) -> None:
        """Tell the workers what will come on their lane, and wait until they are ready. Raises SyncError."""
        joining = list(joining)
        for member in joining:
            for peer in member.hellos:
                self._board.send(peer, set_ups[member.lane])
        self._wait_for_answers(joining, arrived)
        for member in joining:
            set_up = set_ups[member.lane]
            # A worker that holds a part of the layers has a place for their tensors only.
            nowhere = set.intersection(*(set(a.unused) for a in member.attached.values())) - set(set_up.optional_names)
            if nowhere:
                first = min(nowhere)
                raise EngineMismatchError(
                    f"{member.name} has no place for {len(nowhere)} of the trainer's {len(set_up.tensors)} tensors, "
                    f"such as {first}. Is it the same model?",
                    phase="connect",
                    tensor=first,
                )
            if any(hello.session_open for hello in member.hellos.values()):
                self._call_all(
                    [member],
                    lambda member: member.engine.close_session,
                    "the engine to close the session of a dead trainer",
                )
                self._taken(member)
            is_stale = any(hello.is_stale for hello in member.hellos.values())
            member.engine.state = EngineState.STALE if is_stale else EngineState.SERVING
            member.engine.failure = None

    def leave_behind(self, member: Member, failure: Failure) -> None:
        """Refits go on without this engine. Its workers let go of the trainer, so that they can be attached again."""
        member.quarantine = member.engine.failure = failure
        if member.engine.state is not EngineState.GONE:
            member.engine.state = EngineState.STALE
        self._say_goodbye(member)

    def dismiss(self, member: Member) -> None:
        """This engine leaves the fleet. It goes on serving, if it does."""
        self.members.pop(member.number, None)
        self._say_goodbye(member)
        if member.engine.state is not EngineState.GONE:
            member.calls.join(DETACH_S)  # a call under way must not meet those of the next connection
            if member.calls.is_returned:
                member.calls.take()
            if member.is_attached and not member.calls.is_busy:
                member.calls.start(member.engine.detach)
                member.calls.join(DETACH_S)
        if member.calls.is_busy:
            self._unfinished.append((member.given, member.calls))
        member.calls.close()

    def _check_free(self, given: object) -> None:
        """Raise EngineBusyError if a call from before, to a worker that hung, has not come back."""
        for known, calls in self._unfinished:
            if known is given and calls.is_busy:
                calls.join(DETACH_S)
                if calls.is_busy:
                    raise EngineBusyError(
                        f"{as_engine(given).name} has not come back from a call of an earlier refit; try again later, "
                        "or start a new engine",
                        phase="connect",
                    )
        self._unfinished = [(known, calls) for known, calls in self._unfinished if calls.is_busy]

    def _say_goodbye(self, member: Member) -> None:
        workers = self._board.workers_of(member.number)
        self._board.send_all(workers, Goodbye())
        self._board.forget(workers)

    def _arrived(self, peer: Peer, message: AnyMessage) -> None:
        member = self.members.get(peer.engine) if peer.role == "worker" else None
        if member is not None and isinstance(message, Hello):
            member.hellos[peer] = message
            member.version = max(member.version, message.version)
        elif member is not None and isinstance(message, Attached):
            member.is_attached = True
            member.attached[peer] = message

    def _wait_for_answers(self, joining: list[Member], arrived: Arrived | None = None) -> None:
        """Until `attach` has returned and all workers have answered."""
        what = f"{sum(m.num_workers for m in joining)} engine workers to attach"

        def both(peer: Peer, message: AnyMessage) -> None:
            self._arrived(peer, message)
            if arrived is not None:
                arrived(peer, message)

        numbers = {m.number for m in joining}
        self._board.wait_until(lambda: not any(m.calls.is_busy for m in joining), what, both, engines=numbers)
        for member in joining:
            self._taken(member)
        self._board.wait_until(
            lambda: all(len(m.attached) == m.num_workers for m in joining),
            what,
            both,
            min(self._deadline_s, ATTACH_GRACE_S),
            numbers,
        )

    def _call_all(self, members: list[Member], call: Any, what: str) -> None:
        for member in members:
            member.calls.start(call(member))
        numbers = {m.number for m in members}
        self._board.wait_until(lambda: not any(m.calls.is_busy for m in members), what, engines=numbers)

    @staticmethod
    def _has_failed(member: Member) -> bool:
        return member.calls.is_returned

    @staticmethod
    def _taken(member: Member) -> Any:
        """What the engine's call returned. Raises what it raised."""
        returned = member.calls.take()
        if returned.failure is not None:
            raise raised(returned.failure)
        return returned.value
