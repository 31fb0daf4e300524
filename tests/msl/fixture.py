"""The pytest fixture `metal`, and the list of mutants that is printed when tests end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.msl.emulator import Emulator, Gpu


@pytest.fixture
def metal() -> Iterator[Emulator | Gpu]:
    """What runs Metal kernels here in place of `mx.fast.metal_kernel`; see `tests.msl`."""
    from tests.msl.emulator import metal_kernels

    with metal_kernels() as kernels:
        yield kernels


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints how each mutant was caught, as `test_mutants` recorded it, in whichever process."""
    # Warnings are among these too, and have no properties.
    reports = [report for each in terminalreporter.stats.values() for report in each]
    noted = [pair for report in reports for pair in getattr(report, "user_properties", ())]
    lines = [str(value) for name, value in noted if name == "mutant"]
    if lines:
        terminalreporter.section("mutants of Metal kernels, and how each was caught")
        for line in sorted(set(lines)):
            terminalreporter.write_line(line)
