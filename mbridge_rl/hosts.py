"""Which host a process runs on, and when another process of it ends."""

from __future__ import annotations

import os
from pathlib import Path


def host_id() -> str:
    """Equal in two processes exactly if they run on one boot of one host and see each other's process ids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"


def open_pidfd(pid: int) -> int | None:
    """A file descriptor that becomes readable when process `pid` ends; None where the kernel has none.

    Raises ProcessLookupError if there is no such process.
    """
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except (OSError, OverflowError):  # no such call here, or no process id (a peer may lie): deadlines still hold
        return None
