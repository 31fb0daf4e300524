"""Another program that keeps a core busy while something is measured."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NICEST = 19
KINDS = ("python", "nice", "numpy")
"""A loop in Python, the same at the lowest priority, and NumPy walking through 64 MB of memory."""


@contextmanager
def disturbed(kind: str) -> Iterator[None]:
    """Keeps one core busy meanwhile.

    Args:
        kind: one of KINDS; "" for none.
    """
    if not kind:
        yield
        return
    busy = subprocess.Popen([sys.executable, "-m", "ondevice_bench.disturb", kind], stdout=subprocess.PIPE)
    try:
        assert busy.stdout is not None
        busy.stdout.readline()  # it works from now on
        yield
    finally:
        busy.kill()
        busy.communicate()


def _work(kind: str) -> Callable[[], object]:
    """A piece of work of some milliseconds."""
    if kind == "numpy":
        import numpy as np

        values = np.ones(1 << 24, np.float32)
        return lambda: np.add(values, 1, out=values)
    if kind == "nice":
        os.nice(NICEST)
    return lambda: sum(range(100_000))


def main() -> None:
    """Works until the process that started this one is gone."""
    parent, work = os.getppid(), _work(sys.argv[1])
    print("busy", flush=True)
    while os.getppid() == parent:
        work()


if __name__ == "__main__":
    main()
