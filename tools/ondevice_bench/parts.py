"""Where the time of a decode step goes, part by part, as an op table accounts for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ondevice.errors import OptionError

if TYPE_CHECKING:
    from ondevice.ops.base import Ops


class PartTime(Protocol):
    """What a table keeps of one part.

    Attributes:
        busy: seconds that threads worked, the mean over threads.
        waiting: seconds that threads waited for others, the mean over threads.
        steps: times that the part was run through.
        bytes: of weights read per step, 0 where there are none.
    """

    busy: float
    waiting: float
    steps: int
    bytes: int


def profile_table(ops: Ops) -> Callable[[], AbstractContextManager[Mapping[str, PartTime]]]:
    """The table's own account.

    Raises:
        OptionError: it keeps none.
    """
    profiled: Any = getattr(ops, "profiled", None)
    if profiled is None:
        raise OptionError(
            f"--profile: the {ops.name} backend keeps no account of its parts; take --backend cpu or leave it out"
        )
    return profiled


@dataclass(frozen=True, slots=True)
class Profile:
    """Account of one repetition.

    Args:
        parts: by name.
        seconds: of the repetition.
        steps: decode steps in it.
        batch: tokens of a step.
    """

    parts: Mapping[str, PartTime]
    seconds: float
    steps: int
    batch: int

    def rows(self) -> list[dict[str, Any]]:
        """One row per part, then "waiting" of all parts, and "other", which is what no thread has accounted for.

        That is Python between the steps, and threads that were not running yet when others were.

        Returns:
            Keys "part", "us_per_token", "share" (of all time) and "gbs" (None where no weights are read).
        """
        rows = [self._row(name, part.busy, part.bytes * part.steps) for name, part in self.parts.items()]
        waiting = sum(part.waiting for part in self.parts.values())
        busy = sum(part.busy for part in self.parts.values())
        return [*rows, self._row("waiting", waiting), self._row("other", self.seconds - busy - waiting)]

    def _row(self, name: str, seconds: float, nbytes: int = 0) -> dict[str, Any]:
        return {
            "part": name,
            "us_per_token": 1e6 * seconds / (self.steps * self.batch),
            "share": seconds / self.seconds,
            "gbs": nbytes / seconds / 1e9 if nbytes and seconds else None,
        }
