"""Every kernel against float64 on a device, a case at a time: the table of all homes, and what only a GPU can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ondevice_bench import gpu_cases_far
from ondevice_parity import cases
from ondevice_parity.check import Table
from ondevice_parity.torch_home import TorchHome

CASES: Table = {kernel: {**some, **gpu_cases_far.CASES.get(kernel, {})} for kernel, some in cases.CASES.items()}


@dataclass(frozen=True, slots=True)
class Result:
    """A case: its error, what it may be, and what was raised instead, if anything was."""

    kernel: str
    case: str
    error: float
    tolerance: float
    passed: bool
    raised: str = ""

    def document(self) -> dict[str, Any]:
        return asdict(self)


def parity(device: torch.device, seed: int, wanted: Callable[[str, str], bool] | None = None) -> Iterator[Result]:
    """All cases, or some of them; one that raises has failed, and the others go on."""
    home = TorchHome(device)
    for kernel, some in CASES.items():
        for name in some:
            if wanted is not None and not wanted(kernel, name):
                continue
            try:
                outcome = cases.run_case(home, kernel, name, seed, cases=CASES)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"[:300]
                yield Result(kernel, name, float("inf"), 0.0, False, text)
            else:
                yield Result(kernel, name, outcome.error, outcome.tolerance, outcome.passed)
