"""Shows how far something is, on stderr: a bar on a terminal, single lines elsewhere, nothing if it is soon over."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

BAR_AFTER = 0.5
"""Seconds that nobody needs to be told about; the bar goes away again."""
LINE_AFTER = 1.0
"""The same of one topic where lines stay."""
BYTES_FROM = 100_000
"""Totals from here on count bytes: no model has as many tensors or kernels."""


class Reporter:
    """Receives (done, total, label) and shows what takes its time. Call `close` at the end."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._bar: RichProgress | None = None
        self._task: Any = None
        self._made = time.monotonic()
        self._topic, self._since, self._said = "", self._made, ""

    def __call__(self, done: int, total: int, label: str) -> None:
        """Takes a report; a total of 0 means that it is unknown."""
        if not label:
            return
        if not self._terminal:
            self._say(done, total, label)
        elif self._bar is not None or time.monotonic() - self._made >= BAR_AFTER:
            self._draw(done, total, label)

    def _say(self, done: int, total: int, label: str) -> None:
        # "compiling norm" and "compiling rope" are one topic, which gets one line.
        topic = label.split(" ", 1)[0]
        if topic != self._topic:
            self._topic, self._since = topic, time.monotonic()
        if topic != self._said and time.monotonic() - self._since >= LINE_AFTER:
            self._said = topic
            of = f"{done} of {total}" if total < BYTES_FROM else size(total)
            click.echo(f"{label}{f' ({of})' if total else ''} ...", err=True)

    def _draw(self, done: int, total: int, label: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[amount]}")
            self._bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(label, total=None, amount="")
            self._bar.start()
        amount = f"{_amount(done)} / {_amount(total)}" if total else ""
        self._bar.update(self._task, description=label, completed=done, total=total or None, amount=amount)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def reporting() -> Iterator[Reporter]:
    """A Reporter for one stretch of work."""
    reporter = Reporter()
    try:
        yield reporter
    finally:
        reporter.close()


def _amount(n: int) -> str:
    return size(n) if n >= BYTES_FROM else str(n)


def size(nbytes: int) -> str:
    """A number of bytes as people read it: powers of 1000, three digits."""
    value, units = float(nbytes), iter(("B", "kB", "MB", "GB"))
    for unit in units:
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
