"""The case table: every kernel, by name, with what a home must get right. `home_check.py` says what a home is."""

from __future__ import annotations

from zlib import crc32

import numpy as np

from tests.kernels import home_cases_attention, home_cases_ffn, home_cases_select
from tests.kernels.home_check import Home, Outcome, Table

CASES: Table = {**home_cases_ffn.CASES, **home_cases_select.CASES, **home_cases_attention.CASES}
ALL = [(kernel, name) for kernel, cases in CASES.items() for name in cases]


def run_case(home: Home, kernel: str, name: str, seed: int, twin: bool = False) -> Outcome:
    """One case with random inputs of a seed."""
    rng = np.random.default_rng([seed, crc32(f"{kernel} {name}".encode())])
    return CASES[kernel][name](home.kernel(kernel, twin), rng, home)
