"""Runs the case table in homes, and says what came of it: for each kernel and home the largest error, or why not."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ondevice_parity.cases import CASES, run_case
from ondevice_parity.check import Home, Table, Unsupported
from ondevice_parity.homes import HOMES

Progress = Callable[[int, int, str], None]


@dataclass
class Cell:
    """A kernel in a home.

    Args:
        cases: that ran.
        error: the largest, relative to the largest value; of selectors, lists that are wrong.
        of_tolerance: the largest error as a part of what its case may have.
        failed: cases that are wrong, with their errors or what they raised.
        not_run: reasons, with the number of cases.
    """

    cases: int = 0
    error: float = 0.0
    of_tolerance: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    not_run: dict[str, int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """For a table: the error, or what failed."""
        if self.failed:
            name, problem = next(iter(self.failed.items()))
            return f"FAILED {len(self.failed)} of {self.cases}: {name}, {problem}"
        return f"{self.error:.1e} ({self.cases})" if self.cases else "-"


@dataclass(frozen=True)
class Report:
    """What a run came to.

    Args:
        cells: by home and kernel, of homes that ran.
        obstacles: of those that did not, why.
        seed: of the random inputs.
    """

    cells: dict[str, dict[str, Cell]]
    obstacles: dict[str, str]
    seed: int

    @property
    def passed(self) -> bool:
        return not any(cell.failed for kernels in self.cells.values() for cell in kernels.values())

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        homes = {home: {name: asdict(cell) for name, cell in kernels.items()} for home, kernels in self.cells.items()}
        return {"passed": self.passed, "seed": self.seed, "homes": homes, "not_run": self.obstacles}


def kernel_cell(home: Home, kernel: str, seed: int, cases: Table = CASES) -> Cell:
    """All cases of a kernel. One that raises has failed, and the others go on."""
    cell, reasons = Cell(), Counter[str]()
    for name in cases[kernel]:
        try:
            with warnings.catch_warnings():
                # Arithmetic with NaN, of what nobody may read.
                warnings.simplefilter("ignore", RuntimeWarning)
                outcome = run_case(home, kernel, name, seed, cases=cases)
        except Unsupported as e:
            reasons[str(e)] += 1
            continue
        except Exception as e:
            cell.cases += 1
            cell.failed[name] = f"{type(e).__name__}: {e}"[:300]
            continue
        cell.cases += 1
        cell.error = max(cell.error, outcome.error)
        if outcome.tolerance:
            cell.of_tolerance = max(cell.of_tolerance, outcome.error / outcome.tolerance)
        if not outcome.passed:
            cell.failed[name] = f"error {outcome.error:.1e}, at most {outcome.tolerance:.1e}"
    cell.not_run = dict(reasons)
    return cell


def run(homes: Iterable[str] = HOMES, seed: int = 0, progress: Progress | None = None) -> Report:
    """Runs the table in some homes, those that can run here."""
    cells: dict[str, dict[str, Cell]] = {}
    obstacles: dict[str, str] = {}
    names = list(homes)
    for i, name in enumerate(names):
        problem = HOMES[name].obstacle()
        if problem is not None:
            obstacles[name] = problem
            continue
        try:
            home = HOMES[name].open()
        except Exception as e:
            # That is no reason not to run, and not one for other homes.
            reason = f"the home did not open: {type(e).__name__}: {e}"[:300]
            cells[name] = {kernel: Cell(cases=1, failed={"all": reason}) for kernel in CASES}
            continue
        cells[name] = {}
        for j, kernel in enumerate(CASES):
            if progress:
                progress(i * len(CASES) + j, len(names) * len(CASES), f"{kernel} in {name}")
            cells[name][kernel] = kernel_cell(home, kernel, seed)
    if progress:
        progress(len(names) * len(CASES), len(names) * len(CASES), "")
    return Report(cells, obstacles, seed)


def lines(report: Report, homes: Sequence[str] = tuple(HOMES)) -> list[str]:
    """The report in Markdown: a table, then what did not run and why."""
    rows = [["kernel", *homes], ["---"] * (1 + len(homes))]
    for kernel in CASES:
        rows.append([f"`{kernel}`", *(_cell(report, home, kernel) for home in homes)])
    text = [f"| {' | '.join(row)} |" for row in rows]
    notes = [f"{home}: {reason}" for home, reason in report.obstacles.items() if home in homes]
    for home, kernels in report.cells.items():
        reasons = Counter[str]()
        for cell in kernels.values():
            reasons.update(cell.not_run)
        notes += [f"{home}: {count} case{'s' * (count > 1)}, {reason}" for reason, count in reasons.items()]
    if notes:
        text += ["", "Not run:", "", *(f"- {note}" for note in notes)]
    return text


def _cell(report: Report, home: str, kernel: str) -> str:
    return report.cells[home][kernel].text if home in report.cells else "not run"
