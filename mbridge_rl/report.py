"""What a refit did and how fast: one readable line, or JSON."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from .messages import Verification


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a comparison of the engine's own memory with the trainer's weights found. Equal on every trainer rank."""

    num_compared: int  # HF tensors whose checksums were compared
    num_tensors: int  # HF tensors in all
    wrong: dict[str, str]  # HF tensor (or a tensor of the engine's own) -> what is wrong
    unchecked: dict[str, str]  # HF tensor, or tensor of the engine -> why it could not be compared
    seconds: float

    @classmethod
    def of(cls, found: Verification, seconds: float) -> VerifyReport:
        return cls(found.num_compared, found.num_tensors, found.wrong, found.unchecked, seconds)

    @property
    def ok(self) -> bool:
        """Nothing is wrong of what was compared."""
        return not self.wrong

    def __str__(self) -> str:
        verdict = "all equal" if self.num_compared else "NOTHING could be compared"
        if self.wrong:
            verdict = f"{len(self.wrong)} WRONG: {', '.join(list(self.wrong)[:5])}"
        return (
            f"compared {self.num_compared} of {self.num_tensors} tensors in {self.seconds:.2f} s: {verdict}; "
            f"{len(self.unchecked)} could not be compared"
        )


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One refit that was committed. Equal on every trainer rank."""

    version: int
    engine: str
    total_s: float  # from rank 0's sync() until the engine serves again
    phases: dict[
        str, float
    ]  # seconds in enter (until every rank had called), pause, stream, check, commit, resume, settle
    fill_s: float  # within stream: copying into buckets, the slowest trainer rank
    load_s: float  # within stream: the engine's own loading, the slowest worker; overlaps fill_s
    num_bytes: int
    num_tensors: int
    num_buckets: int
    num_trainers: int
    num_workers: int
    paths: dict[str, str]  # fusion group (by its first HF name) -> "direct", "reload" (by the engine) or "bucket"
    trainer_extra_bytes: int  # beside the model: the buckets, shared by all processes of the host
    engine_extra_bytes: int  # beside the model and the buckets, in the worker that held most
    copy_limit_gb_s: float | None = None  # of a plain copy on the trainer's device, measured when the syncer was built
    reasons: dict[str, str] = field(default_factory=dict)  # engine module -> why it is not written directly
    verification: VerifyReport | None = None
    calls_s: dict[str, float] = field(default_factory=dict)  # the engine's own calls, by name; they span phases
    unwritten: dict[str, int] = field(
        default_factory=dict
    )  # engine tensor -> elements that no HF tensor goes to (padding)

    quarantined: dict[str, str] = field(default_factory=dict)  # engine that this refit left behind -> why
    mode: str = ""  # how a collective reached the workers: "broadcast", "sharded", or both with a "+"
    wire_bytes: int = 0  # that came by it to the worker to which most came

    @property
    def gb_per_s(self) -> float:
        """Model bytes over the whole time, in 1e9 bytes per second."""
        return self.num_bytes / self.total_s / 1e9

    @property
    def share_of_limit(self) -> float | None:
        """`gb_per_s` over the measured copy limit: 1 would be a single memcpy of the model."""
        return self.gb_per_s / self.copy_limit_gb_s if self.copy_limit_gb_s else None

    def __str__(self) -> str:
        count: dict[str, int] = {}
        for path in self.paths.values():
            count[path] = count.get(path, 0) + 1
        paths = ", ".join(f"{n} groups by {path}" for path, n in sorted(count.items()))
        share = f", {self.share_of_limit:.0%} of memcpy" if self.share_of_limit is not None else ""
        phases = " + ".join(f"{name} {1e3 * seconds:.0f}" for name, seconds in self.phases.items())
        return (
            f"refit v{self.version} of {self.engine}: {1e3 * self.total_s:.0f} ms ({phases}), "
            f"{self.num_bytes / 1e6:,.1f} MB at {self.gb_per_s:.2f} GB/s{share}; {paths}"
            + (f"; {self.mode}: {self.wire_bytes / 1e6:,.1f} MB to a worker" if self.mode else "")
            + "".join(f"; LEFT BEHIND: {name}: {why}" for name, why in self.quarantined.items())
        )

    def to_json(self) -> str:
        """All fields, and the derived rates."""
        fields = msgspec.to_builtins(self) | {"gb_per_s": self.gb_per_s, "share_of_limit": self.share_of_limit}
        return msgspec.json.encode(fields).decode()
