"""Kernels broken on purpose, and how each break is caught: `python -m tests.msl.mutants [KERNEL ...]` prints the table.

A file `mutants_<kernel>.py` beside this one has `SUBJECTS`: for each kernel a check, which runs the project's wrapper
and compares with a reference, and its mutants. What a mutant replaces must occur once in the text that the wrapper
hands to `mx.fast.metal_kernel`, in the body or the header.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

from tests.msl.emulator import emulated
from tests.msl.findings import KernelError, Kind
from tests.msl.kernel import is_kernel

SCHEDULES = (("forward", 0), ("reverse", 0), ("random", 0), ("random", 1))
"""Tried in this order until one shows the mutant."""


@dataclass(frozen=True)
class Mutant:
    """One break: what it is, `old` text, `new` text, and the kind of finding that must be among those it causes.

    `Kind.WRONG` says that the emulator finds nothing and the comparison fails.
    """

    name: str
    old: str
    new: str
    caught: Kind


@dataclass(frozen=True)
class Subject:
    """A kernel, a check that raises AssertionError where its result is wrong, and its mutants."""

    kernel: str
    check: Callable[[], None]
    mutants: tuple[Mutant, ...]


@dataclass(frozen=True)
class Outcome:
    """What a mutant caused: kinds of findings, none where nothing was wrong; the first finding; the schedule."""

    kinds: frozenset[Kind]
    text: str
    schedule: str


def subjects() -> list[Subject]:
    """Those of all files, by name."""
    files = sorted(Path(__file__).parent.glob("mutants_*.py"))
    found = [subject for path in files for subject in import_module(f"tests.msl.{path.stem}").SUBJECTS]
    return sorted(found, key=lambda subject: subject.kernel)


def outcome(subject: Subject, mutant: Mutant | None = None) -> Outcome:
    """Runs a subject's check on a mutant, or on the kernel as it is.

    Raises:
        LookupError: the text to replace is not there once, or the check does not run the kernel.
    """
    with emulated() as metal:
        made: list[str] = []
        metal.edit = partial(_edit, subject.kernel, mutant, made)
        for order, seed in metal.schedules(SCHEDULES):
            try:
                subject.check()
            except KernelError as error:
                return Outcome(frozenset(error.kinds), str(error.findings[0]), f"{order} {seed}")
            except AssertionError as error:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                return Outcome(frozenset({Kind.WRONG}), "; ".join(lines[:3]), f"{order} {seed}")
            if not made or not metal.ran(subject.kernel):
                raise LookupError(f"the check of {subject.kernel} does not run it")
    return Outcome(frozenset(), "", "")


def _edit(kernel: str, mutant: Mutant | None, made: list[str], name: str, source: str, header: str) -> tuple[str, str]:
    """The text of a mutant, where `name` is its kernel."""
    if not is_kernel(name, kernel):
        return source, header
    made.append(name)
    if mutant is None:
        return source, header
    count = source.count(mutant.old) + header.count(mutant.old)
    if count != 1 or mutant.old == mutant.new:
        raise LookupError(f"mutant {mutant.name!r} of {kernel}: its old text is there {count} times, not once")
    return source.replace(mutant.old, mutant.new), header.replace(mutant.old, mutant.new)


def _table(chosen: list[Subject]) -> Iterator[tuple[bool, str]]:
    """Lines, and whether each mutant was caught as it says."""
    for subject in chosen:
        kept = outcome(subject)
        yield not kept.kinds, f"\n{subject.kernel}: as it is, {kept.text or 'no findings'}"
        for mutant in subject.mutants:
            got = outcome(subject, mutant)
            caught = mutant.caught in got.kinds
            kinds = ", ".join(sorted(kind.value for kind in got.kinds)) or "NOT CAUGHT"
            also = "" if caught else f" (expected: {mutant.caught.value})"
            yield caught, f"  {mutant.name}: {kinds}{also} [{got.schedule}]\n      {got.text[:200]}"


def main(names: list[str]) -> int:
    """Prints the table; 1 where a mutant was not caught as it says."""
    chosen = [subject for subject in subjects() if not names or subject.kernel in names]
    if not chosen:
        print(f"no such kernel; there are {', '.join(subject.kernel for subject in subjects())}", file=sys.stderr)
        return 1
    all_caught = True
    for caught, line in _table(chosen):
        all_caught &= caught
        print(line, flush=True)
    return 0 if all_caught else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
