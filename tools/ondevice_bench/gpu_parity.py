"""Every kernel against float64 on a device, with fresh random inputs and poisoned memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from zlib import crc32

import numpy as np
import torch

from cuda_kernels import memory
from ondevice_bench import gpu_cases_attention, gpu_cases_ffn, gpu_cases_linear, gpu_cases_select
from ondevice_bench.gpu_check import Case, Outcome, Table

CASES: Table = {
    **gpu_cases_ffn.CASES,
    **gpu_cases_linear.CASES,
    **gpu_cases_select.CASES,
    **gpu_cases_attention.CASES,
}


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


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills memory that kernels write with NaN, or far indices, before each launch."""
    before, memory.POISON = memory.POISON, True
    try:
        yield
    finally:
        memory.POISON = before


def kernel_of(name: str, twin: bool = False) -> Callable[..., Any]:
    """A kernel's wrapper, or its twin in torch."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"cuda_kernels.{name}"), name + "_torch" * twin)
    return function


def run_case(fn: Callable[..., Any], kernel: str, name: str, device: torch.device, seed: int) -> Outcome:
    """One case with random inputs of a seed, in poisoned memory."""
    case: Case = CASES[kernel][name]
    rng = np.random.default_rng([seed, crc32(f"{kernel} {name}".encode())])
    with poisoned():
        return case(fn, rng, device)


def parity(device: torch.device, seed: int, wanted: Callable[[str, str], bool] | None = None) -> Iterator[Result]:
    """All cases, or some of them; one that raises has failed, and the others go on."""
    for kernel, cases in CASES.items():
        for name in cases:
            if wanted is not None and not wanted(kernel, name):
                continue
            try:
                outcome = run_case(kernel_of(kernel), kernel, name, device, seed)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"[:300]
                yield Result(kernel, name, float("inf"), 0.0, False, text)
            else:
                yield Result(kernel, name, outcome.error, outcome.tolerance, outcome.passed)
