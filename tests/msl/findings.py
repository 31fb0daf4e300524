"""What the emulator can find in a kernel, and how it says so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """Kinds of findings; the values are for people."""

    COMPILE = "does not compile"
    LIMIT = "over a limit of the GPU"
    OUT_OF_BOUNDS = "out of bounds"
    RACE = "race"
    UNINITIALISED = "read of uninitialised memory"
    WRITE_TO_INPUT = "write to an input"
    DIVERGENT_BARRIER = "divergent threadgroup_barrier"
    DIVERGENT_SIMD = "divergent function of a simdgroup"
    FINISHED_LANES = "function of a simdgroup with finished lanes"
    INACTIVE_LANE = "read from a lane that is not there"
    UNDEFINED = "undefined behaviour"
    UNWRITTEN = "output never written"
    ENDLESS = "does not end"
    WRONG = "wrong result"  # what a comparison with a reference finds, not the emulator


@dataclass(frozen=True)
class Finding:
    """One finding: its kind, and where it happened to whom."""

    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.text}"


class KernelError(AssertionError):
    """A kernel is wrong. `findings` says in what."""

    def __init__(self, kernel: str, findings: Iterable[Finding]) -> None:
        self.kernel = kernel
        self.findings = tuple(findings)
        super().__init__(f"kernel {kernel}:\n  " + "\n  ".join(map(str, self.findings)))

    @property
    def kinds(self) -> set[Kind]:
        return {finding.kind for finding in self.findings}


class EmulatorError(RuntimeError):
    """The emulator lacks something or is broken; says nothing about the kernel."""
