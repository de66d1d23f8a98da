"""Every error that mbridge_rl raises on purpose. The tree continues `mbridge.errors`.

    MBridgeError
    └── SyncError                   a refit, or the connection it needs; says where it began
        ├── PlanMismatchError           two trainer ranks with different plans
        ├── VersionError                a version that does not grow, or differs between ranks
        ├── DeadlineError               a wait without progress for longer than `deadline_s`
        ├── TrainerLostError            a trainer rank died or left
        ├── TransportError              no room for, or no way to, the bytes
        ├── ProtocolError               a message that should not have come
        ├── VerifyError                 the engine's memory is not what the trainer sent
        └── EngineError                 the engine, or one of its workers
            ├── EngineBusyError             a living trainer already refits it
            ├── EngineGoneError             it is dead, or cannot be reached
            ├── EngineStaleError            its last refit failed: it must not serve
            ├── EngineMismatchError         it holds another model than the trainer
            └── EngineLoadError             its own loader, or another of its calls, failed

An error crosses processes as a `Failure` (plain strings) and is raised on every rank as the same class with the same
words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mbridge.errors import MBridgeError


@dataclass(frozen=True, slots=True)
class Failure:
    """An error in plain strings: what the peers of a refit tell each other."""

    kind: str  # name of a SyncError class
    message: str
    origin: str = ""  # "trainer rank 1", "engine worker 0 (pid 123)"
    phase: str = ""
    tensor: str | None = None


class SyncError(MBridgeError):
    """A refit, or its connection, failed.

    `failure` says where it began: the rank or worker, the phase, the HF tensor.
    """

    def __init__(self, message: str, *, origin: str = "", phase: str = "", tensor: str | None = None) -> None:
        self.failure = Failure(type(self).__name__, message, origin, phase, tensor)
        where = [origin, f"phase {phase}" if phase else "", f"tensor {tensor}" if tensor else ""]
        place = ", ".join(part for part in where if part)
        super().__init__(f"{message} [{place}]" if place else message)


class PlanMismatchError(SyncError):
    """Two trainer ranks planned different movements."""


class VersionError(SyncError):
    """A version that does not grow, or that differs between trainer ranks."""


class DeadlineError(SyncError):
    """Nothing happened for `deadline_s` seconds."""


class TrainerLostError(SyncError):
    """A trainer rank died or left."""


class TransportError(SyncError):
    """The transport has no room for the buckets, or cannot reach a peer."""


class ProtocolError(SyncError):
    """A peer sent what it must not send at this point."""


class VerifyError(SyncError):
    """After a refit, checksums of the engine's own memory differ from the trainer's."""


class EngineError(SyncError):
    """The engine, or one of its workers, failed."""


class EngineBusyError(EngineError):
    """A living trainer is already connected to this engine."""


class EngineGoneError(EngineError):
    """The engine is dead or cannot be reached."""


class EngineStaleError(EngineError):
    """The engine's last refit failed, so its weights are torn; it serves again after a later sync commits."""


class EngineMismatchError(EngineError):
    """The engine holds another model than the trainer: names or shapes differ."""


class EngineLoadError(EngineError):
    """The engine's own loader, or another of its calls, failed."""


MAX_WORDS = 4000  # characters of a foreign error's text that are told to others


def raised(failure: Failure) -> SyncError:
    """The error that `failure` describes, to raise here. A class this side does not know becomes a SyncError."""
    classes = {cls.__name__: cls for cls in _tree(SyncError)}
    cls = classes.get(failure.kind, SyncError)
    return cls(failure.message, origin=failure.origin, phase=failure.phase, tensor=failure.tensor)


def as_failure(error: BaseException, origin: str, phase: str = "") -> Failure:
    """`error` in plain strings, to tell others. `origin` and `phase` fill in what it does not say itself."""
    if isinstance(error, SyncError):
        own = error.failure
        return Failure(own.kind, own.message, own.origin or origin, own.phase or phase, own.tensor)
    return Failure("SyncError", f"{type(error).__name__}: {error}"[:MAX_WORDS], origin, phase)


def _tree(cls: type[SyncError]) -> Iterator[type[SyncError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _tree(child)
