"""Where a step's time goes, part by part."""

from __future__ import annotations

from dataclasses import dataclass

from cpu_kernels.threads import ThreadPool
from ondevice.ops.cpu_program import Program


@dataclass(slots=True)
class PartTime:
    """Sums over the measured steps, for one part of the model.

    Args:
        busy: seconds that threads worked, averaged over threads.
        waiting: seconds that threads waited for each other, averaged over threads.
        steps: measured.
        bytes: of weights that one step reads.
    """

    busy: float = 0.0
    waiting: float = 0.0
    steps: int = 0
    bytes: int = 0


def add_times(profile: dict[str, PartTime], program: Program, pool: ThreadPool) -> None:
    """Runs a program and adds what its parts took."""
    times = program.measure(pool).mean(axis=1) / 1e9
    for part, nbytes in program.bytes_of_parts().items():
        entry = profile.setdefault(part, PartTime())
        entry.bytes = nbytes
        entry.steps += 1
    for part, (busy, waiting) in zip(program.parts, times.tolist()):
        profile[part].busy += busy
        profile[part].waiting += waiting
