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
    times = program.measure(pool) / 1e9
    busy = times[:, :, 0].mean(axis=1)
    # The calling thread takes part from the first to the last; others may have come late.
    waiting = times[:, 0].sum(axis=1) - busy
    for part, nbytes in program.bytes_of_parts().items():
        entry = profile.setdefault(part, PartTime())
        entry.bytes = nbytes
        entry.steps += 1
    for part, worked, waited in zip(program.parts, busy.tolist(), waiting.tolist()):
        profile[part].busy += worked
        profile[part].waiting += waited
