"""The kernel tests on 64-bit Arm: aarch64 Python under qemu, kernels compiled for Apple's first and second M CPU.

Compiling is slow there, so each test gives the few cases that show all its kernels. The processes run side by side.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.arm64.prepare import UnavailableError, interpreter
from tests.kernels.other_cpus import OPS, SIMD, THREADS, must_pass, running

M1, M2 = ("apple-m1", "", "neon_dot"), ("apple-m2", "", "neon_i8mm")
"""No features, as on macOS: the CPU's name says all."""
MODEL = "tests/models/test_cpu.py"
ATTENTION = "test_attention or test_every_tile or test_operations or test_idle or test_logits_over_the_same_cache"
RUNS = {
    "operations on m1": (*M1, "--spread", "9", "-k", "not test_attention", SIMD, OPS),
    "attention, threads and a model on m1": (*M1, "--spread", "3", "-k", ATTENTION, THREADS, OPS, MODEL),
    "dot products on m2": (*M2, SIMD),
}

pytestmark = pytest.mark.arm64


@pytest.fixture(scope="module")
def python() -> str:
    try:
        return str(interpreter())
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def processes(python: str) -> Iterator[dict[str, subprocess.Popen[str]]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(running(python, *arguments)) for name, arguments in RUNS.items()}


@pytest.mark.parametrize("name", RUNS)
def test_kernels(processes: dict[str, subprocess.Popen[str]], name: str) -> None:
    must_pass(processes[name], 900)
