"""A trainer rank other than 0, against a hub that the test plays."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from mbridge_rl.agreement import Offer
from mbridge_rl.control import Hub, Received
from mbridge_rl.errors import DeadlineError, ProtocolError, SyncError, TrainerLostError, VersionError
from mbridge_rl.follower import GRACE_S, Follower
from mbridge_rl.hosts import host_id
from mbridge_rl.messages import (
    Abort,
    Alive,
    AnyMessage,
    Connected,
    Done,
    Enter,
    Failed,
    Fill,
    Filled,
    Goodbye,
    Hello,
    Load,
    Next,
    Stats,
)
from mbridge_rl.source import Source

PATIENCE_S = 1.0
STATS = Stats("engines", 0.0, {}, 0.0, 0.0, 0, 2, 1, None)
DONE, DONE2 = Done(3, 7, STATS), Done(2, 7, STATS)


class Play:
    """A hub with one follower; `send` goes to it, `next` is what it says."""

    def __init__(self) -> None:
        self.hub = Hub()
        offer = Offer(pid=os.getpid(), host=host_id(), endpoint=self.hub.endpoint, token=self.hub.token)
        self.follower = Follower(offer, 1, PATIENCE_S - GRACE_S)
        self.peer = b""
        assert isinstance(self.next(), Hello)

    def next(self) -> AnyMessage:
        end = time.monotonic() + 5
        while time.monotonic() < end:
            for event in self.hub.wait(0.1):
                assert isinstance(event, Received)
                self.peer = event.peer
                return event.message
        raise AssertionError("the follower says nothing")

    def send(self, *messages: AnyMessage) -> None:
        for message in messages:
            self.hub.send(self.peer, message)


@pytest.fixture
def play() -> Iterator[Play]:
    made = Play()
    yield made
    made.follower.close()
    made.hub.close()


def nothing(*_: object) -> None:
    """Succeeds."""


def source(
    begin: Callable[[], None] = nothing,
    fill: Callable[[Fill, Callable[[], None]], None] = nothing,
    end: Callable[[bool], None] = nothing,
) -> Source:
    return Source(begin, fill, lambda _: {}, end)


def fails(*_: object) -> None:
    raise SyncError("no", tensor="w")


def test_alive_restarts_its_patience(play: Play) -> None:
    def beat() -> None:
        for _ in range(4):
            time.sleep(0.6)
            play.send(Alive(0))
        play.send(Connected(3))

    beating = threading.Thread(target=beat)
    beating.start()
    assert play.follower.connect().version == 3  # after 2.4 s
    beating.join()
    with pytest.raises(DeadlineError, match="the engine to connect"):
        play.follower.connect()


def test_messages_of_an_earlier_attempt_are_skipped(play: Play) -> None:
    filled: list[int] = []
    old = Abort(1, VersionError("old").failure)
    new = Abort(2, VersionError("new").failure)
    play.send(old, Fill(1, 7), Alive(2), Fill(2, 0), Fill(2, 1), new)
    with pytest.raises(VersionError, match="old"):
        play.follower.run(4, source())
    assert play.next() == Enter(1, 4)
    with pytest.raises(VersionError, match="new"):
        play.follower.run(5, source(fill=lambda message, _: filled.append(message.bucket)))
    assert filled == [0, 1]
    assert isinstance(play.next(), Failed)
    assert play.next() == Enter(2, 5)
    first = play.next()
    assert isinstance(first, Filled)
    assert (first.attempt, first.bucket) == (2, 0)


def test_its_own_failure_comes_back_as_rank_0_says_it(play: Play) -> None:
    said = Abort(1, SyncError("no", origin="trainer rank 1", phase="stream", tensor="w").failure)
    play.send(Fill(1, 0), said)
    with pytest.raises(SyncError, match="trainer rank 1, phase stream, tensor w"):
        play.follower.run(1, source(fill=fails))
    assert play.next() == Enter(1, 1)
    failed = play.next()
    assert isinstance(failed, Failed)
    assert (failed.failure.message, failed.failure.tensor) == ("no", "w")


def test_a_failed_begin_is_not_entered(play: Play) -> None:
    play.send(Abort(1, SyncError("no").failure))
    with pytest.raises(SyncError, match="no"):
        play.follower.run(1, source(begin=fails))
    assert isinstance(play.next(), Failed)


def test_interrupt_is_reported(play: Play) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    play.send(Fill(1, 0))
    with pytest.raises(KeyboardInterrupt):
        play.follower.run(1, source(fill=interrupt))
    assert isinstance(play.next(), Enter)
    failed = play.next()
    assert isinstance(failed, Failed)
    assert "KeyboardInterrupt" in failed.failure.message


def test_a_message_that_should_not_come(play: Play) -> None:
    play.send(Load(1, 0))
    with pytest.raises(ProtocolError, match="Load came"):
        play.follower.run(1, source())
    play.send(Load(0, 0))
    with pytest.raises(ProtocolError, match="expected Connected"):
        play.follower.connect()


def test_rank_0_that_leaves_is_lost_for_good(play: Play) -> None:
    play.send(Goodbye())
    for version in (1, 2):
        with pytest.raises(TrainerLostError, match="closed"):
            play.follower.run(version, source())


def test_it_enters_every_attempt_of_a_refit(play: Play) -> None:
    """The first fails for an engine, the second succeeds and is not the last, the third is."""
    ended: list[bool] = []
    filled: list[tuple[int, int]] = []
    failure = SyncError("engine 1 is moody").failure
    play.send(Fill(1, 0), Abort(1, failure, is_final=False), Fill(1, 1), Next(1), Fill(2, 0), Next(2), Fill(3, 0), DONE)
    done = play.follower.run(7, source(fill=lambda m, _: filled.append((m.attempt, m.bucket)), end=ended.append))
    assert done == DONE
    assert ended == [False, True]
    assert filled == [(1, 0), (2, 0), (3, 0)]
    said = [play.next() for _ in range(6)]
    assert [m for m in said if isinstance(m, Enter)] == [Enter(1, 7), Enter(2, 7), Enter(3, 7)]


def test_an_abort_ends_a_transfer_that_waits(play: Play) -> None:
    """What came meanwhile is not lost, and the refit's outcome is still rank 0's to say."""
    failure = SyncError("engine 1 is moody").failure

    def waits(message: Fill, breathe: Callable[[], None]) -> None:
        if message.attempt == 1:
            play.send(Fill(1, 1), Abort(1, failure, is_final=False), Next(1), Fill(2, 0), DONE2)
            while True:
                breathe()
                time.sleep(0.01)

    play.send(Fill(1, 0))
    assert play.follower.run(7, source(fill=waits)) == DONE2
