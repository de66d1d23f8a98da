"""Tables and progress for people: rich where it is installed and a terminal is there, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to stdout. Cells may have several lines."""
    rich = _rich(sys.stdout.isatty())
    if rich is not None:
        from rich.table import Table

        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        rich.print(table, markup=False)
        return
    lines = [list(columns)]
    for row in rows:
        cells = [cell.split("\n") for cell in row]
        height = max(map(len, cells))
        lines += [[cell[n] if n < len(cell) else "" for cell in cells] for n in range(height)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


class Progress:
    """Progress of named phases, on stderr. A context manager."""

    def __init__(self) -> None:
        self._tasks: dict[str, Any] = {}
        self._said: dict[str, int] = {}
        self._bar: Any = None
        rich = _rich(sys.stderr.isatty())
        if rich is not None:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description:10}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                console=rich,
                transient=True,
            )

    def update(self, phase: str, done: int, total: int) -> None:
        """`done` of `total` steps of a phase are over; plain lines come at its beginning, its end and every tenth."""
        if self._bar is not None:
            if phase not in self._tasks:
                self._tasks[phase] = self._bar.add_task(phase, total=total)
            self._bar.update(self._tasks[phase], completed=done, total=total)
            return
        tenth = 10 * done // max(total, 1)
        if self._said.get(phase, -1) < tenth:
            self._said[phase] = tenth
            print(f"{phase}: {done} of {total}", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def readable_bytes(num_bytes: int) -> str:
    """As 1.23 GB, in powers of ten."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB" if size < 1000 else f"{size / 1000:,.3g} TB"


def _rich(wanted: bool) -> Any:
    """A console on the stream in question, None without rich or without a terminal."""
    if not wanted:
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(stderr=not sys.stdout.isatty())
