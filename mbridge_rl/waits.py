"""What an attempt at a refit waits for: in words, and which engines are to blame if it does not come."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from .flows import Flow
from .parties import EngineCall, Peer, Phase, Side


class Wait(NamedTuple):
    """Something that has to happen next. What waits for something else is not among them."""

    what: str
    peers: Collection[Peer] = ()  # who has to do it
    engines: Collection[int] = ()  # the engines to blame if nobody does


def waits(
    phase: Phase,
    sides: Mapping[int, Side],
    flows: Iterable[Flow],
    missing: Collection[Peer],
    settling: Collection[Peer],
) -> list[Wait]:
    """All that has to happen next. `missing` are the peers whose answer to the phase is due."""
    match phase:
        case Phase.ENTER:
            return _of(missing, "call sync()")
        case Phase.PAUSE:
            return [*_fills(flows), *_calls(sides, EngineCall.PAUSE)]
        case Phase.STREAM:
            return list(_of_stream(flows, missing))
        case Phase.CHECK:
            return _of(missing, "send checksums")
        case Phase.COMMIT:
            # An engine's CLOSE ends with its workers; it is waited for by itself once they have committed.
            behind = engines_of(missing)
            calls = [wait for wait in _calls(sides, *EngineCall) if not behind.issuperset(wait.engines)]
            return [*_of(missing, "commit"), *calls]
        case Phase.RESUME:
            return list(_calls(sides, EngineCall.RESUME))
        case Phase.SETTLE:
            return _of(settling, "finish")
        case _:
            return list(_calls(sides, *EngineCall))


def blamed(found: Iterable[Wait]) -> set[int]:
    """The engines to blame when none of `found` has happened in time: none if trainers are late too."""
    found = list(found)
    if any(peer.role == "trainer" for wait in found for peer in wait.peers):
        return set()
    return {engine for wait in found for engine in wait.engines}


def in_words(found: Iterable[Wait]) -> str:
    return ", ".join(wait.what for wait in found) or "the engine to finish"


def engines_of(peers: Iterable[Peer]) -> set[int]:
    return {peer.engine for peer in peers if peer.role == "worker"}


def _of_stream(flows: Iterable[Flow], missing: Collection[Peer]) -> Iterator[Wait]:
    """An engine's CLOSE cannot end before all engines have applied, so it is no reason to blame that engine."""
    flows = list(flows)
    yield from _fills(flows)
    for flow in flows:
        for bucket, peers in flow.loading.items():
            # In one transfer with others a worker may hang because another one does.
            is_told = not flow.lane.meets or len(engines_of(peers)) == 1
            yield from _of(peers, f"load bucket {bucket}", engines_of(peers) if is_told else ())
        if flow.is_over:
            yield from _of([peer for peer in flow.workers if peer in missing], "apply what it loaded")


def _fills(flows: Iterable[Flow]) -> Iterator[Wait]:
    for flow in flows:
        for bucket, peers in flow.filling.items():
            yield from _of(peers, f"fill bucket {bucket}")


def _of(peers: Collection[Peer], what: str, engines: Collection[int] | None = None) -> list[Wait]:
    names = ", ".join(str(peer) for peer in sorted(peers))
    return [Wait(f"{names} to {what}", peers, engines_of(peers) if engines is None else engines)] if peers else []


def _calls(sides: Mapping[int, Side], *calls: EngineCall) -> Iterator[Wait]:
    for number, side in sides.items():
        if side.busy in calls:
            yield Wait(f"the engine{f' {number}' if number else ''} to {side.busy}", engines=(number,))
