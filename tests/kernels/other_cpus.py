"""Runs tests in a process whose kernels are compiled for another CPU, perhaps by another interpreter."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
SIMD, OPS, THREADS, ATTENTION = (f"tests/kernels/test_{name}.py" for name in ("simd", "ops", "threads", "attention"))
PICKED, UNPACKED = (
    f"tests/kernels/test_sparse_rows.py::test_{name}" for name in ("picked_neurons", "unpacked_rows_are_unpacked_tiles")
)


@contextmanager
def running(
    python: str, cpu: str, features: str, instruction_set: str, *arguments: str
) -> Iterator[subprocess.Popen[str]]:
    """A pytest process, ended with the block.

    Args:
        python: the interpreter.
        cpu, features: what Numba is to compile for.
        instruction_set: what `cpu_kernels.integer_dots` must find there.
        arguments: of pytest.
    """
    environment = os.environ | {
        "NUMBA_CPU_NAME": cpu,
        "NUMBA_CPU_FEATURES": features,
        "ONDEVICE_TEST_INSTRUCTION_SET": instruction_set,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tools", ROOT / "apps"))),
    }
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def must_pass(process: subprocess.Popen[str], timeout: int) -> None:
    """Waits for a pytest process and fails with the end of what it printed."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"not done after {timeout} s:\n{output[-6000:]}") from None
    assert process.returncode == 0, f"pytest ended with {process.returncode}:\n{output[-6000:]}"
    assert " passed" in output, f"nothing ran:\n{output[-3000:]}"
