"""The case table: every kernel, by name, with what a home must get right. `check.py` says what a home is."""

from __future__ import annotations

from zlib import crc32

import numpy as np

from ondevice_parity import cases_attention, cases_ffn, cases_linear, cases_select
from ondevice_parity.check import Home, Outcome, Table

CASES: Table = {**cases_ffn.CASES, **cases_linear.CASES, **cases_select.CASES, **cases_attention.CASES}
ALL = [(kernel, name) for kernel, cases in CASES.items() for name in cases]


def run_case(home: Home, kernel: str, name: str, seed: int, twin: bool = False, cases: Table = CASES) -> Outcome:
    """One case with random inputs of a seed.

    Raises:
        Unsupported: the home has no way to run it.
    """
    rng = np.random.default_rng([seed, crc32(f"{kernel} {name}".encode())])
    return cases[kernel][name](home.kernel(kernel, twin), rng, home)
