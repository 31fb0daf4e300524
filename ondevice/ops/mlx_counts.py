"""What a table counts of the work that it skips, without waiting for the device before somebody asks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ondevice.ops.base_skipping import Tally

KINDS = ("ffn", "inputs", "heads", "keys")
UNREAD = 256
"""Numbers of steps that are kept on the device before they are added up."""


class Counts:
    """Tallies by kind. What was kept and what was saved may be numbers of the device, read when the tallies are."""

    def __init__(self) -> None:
        self._tallies = {kind: Tally() for kind in KINDS}
        self._step: dict[tuple[str, str], list[Any]] = defaultdict(list)
        self._sums: dict[tuple[str, str], list[Any]] = defaultdict(list)

    def dense(self, kind: str) -> None:
        """A call that ran everything."""
        self._tallies[kind].calls += 1

    def sparse(self, kind: str, kept: Any, units: int, bytes_skipped: Any = 0) -> None:
        """A call that kept some of its units.

        Args:
            kept: units of all tokens; int, or an integer of the device.
            units: that all tokens had.
            bytes_skipped: that were not read; the same. What is computed and then masked saves none.
        """
        tally = self._tallies[kind]
        tally.calls += 1
        tally.sparse += 1
        tally.units += units
        for field, number in (("kept", kept), ("bytes_skipped", bytes_skipped)):
            if isinstance(number, int):
                setattr(tally, field, getattr(tally, field) + number)
            else:
                self._step[kind, field].append(number.astype(mx.int64))

    def end_step(self) -> list[Any]:
        """Numbers to be evaluated with the step: one for each kind."""
        ended = []
        for key, some in self._step.items():
            ended.append(mx.stack(some).sum())
            self._sums[key].append(ended[-1])
        self._step.clear()
        return ended

    def step_ended(self) -> None:
        """Adds numbers up where many have come together. Those of the last step have been computed."""
        if any(len(sums) > UNREAD for sums in self._sums.values()):
            self.read()

    def absorb(self, other: Counts) -> None:
        """Adds what was counted of a step that is not evaluated yet, and is part of this one's step now."""
        for kind, tally in other._tallies.items():
            mine = self._tallies[kind]
            for field in fields(tally):
                setattr(mine, field.name, getattr(mine, field.name) + getattr(tally, field.name))
        for key, some in other._step.items():
            self._step[key] += some

    def drop_step(self) -> None:
        """Forgets numbers of a step that did not end: nobody evaluates them."""
        self._step.clear()

    def read(self) -> dict[str, Tally]:
        """Copies of the tallies."""
        for (kind, field), sums in self._sums.items():
            tally = self._tallies[kind]
            setattr(tally, field, getattr(tally, field) + sum(int(np.array(number)) for number in sums))
        self._sums.clear()
        return {kind: replace(tally) for kind, tally in self._tallies.items()}
