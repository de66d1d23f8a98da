"""What a refit did and how fast: one readable line, or JSON."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One refit that was committed. Equal on every trainer rank."""

    version: int
    engine: str
    total_s: float  # from rank 0's sync() until the engine serves again
    phases: dict[str, float]  # seconds in enter (until every rank had called), pause, stream, commit, resume
    fill_s: float  # within stream: copying into buckets, the slowest trainer rank
    load_s: float  # within stream: the engine's own loading, the slowest worker; overlaps fill_s
    num_bytes: int
    num_tensors: int
    num_buckets: int
    num_trainers: int
    num_workers: int
    paths: dict[str, str]  # fusion group (by its first HF name) -> the path it took
    trainer_extra_bytes: int  # beside the model: the buckets, shared by all processes of the host
    engine_extra_bytes: int  # beside the model and the buckets, in the worker that held most
    copy_limit_gb_s: float | None = None  # one thread's memcpy on this machine, measured when the syncer was built

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
        )

    def to_json(self) -> str:
        """All fields, and the derived rates."""
        fields = msgspec.to_builtins(self) | {"gb_per_s": self.gb_per_s, "share_of_limit": self.share_of_limit}
        return msgspec.json.encode(fields).decode()
