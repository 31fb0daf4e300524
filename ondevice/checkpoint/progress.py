"""How functions that take long say how far they are."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

Progress = Callable[[int, int, str], None]
"""Called with what is done, what there is in all (0: unknown), and a label."""

INTERVAL = 0.2  # seconds between two looks at a folder


def silent(done: int, total: int, label: str) -> None:
    """Says nothing."""


@contextmanager
def watch_folder(folder: Path, total: int, label: str, progress: Progress | None) -> Iterator[None]:
    """Reports the growth of a folder that another library fills, from a thread, while the block runs.

    Args:
        folder: to measure.
        total: bytes expected.
        label: for the reports.
        progress: receives bytes there, bytes expected, label; None: no reports.
    """
    if progress is None:
        yield
        return
    done = threading.Event()

    def look() -> None:
        while not done.wait(INTERVAL):
            progress(min(folder_size(folder), total), total, label)

    thread = threading.Thread(target=look, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    progress(total, total, label)


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder, which may change meanwhile; links are not followed."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total
