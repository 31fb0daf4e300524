"""The kernel tests again, compiled for CPUs that this machine may not be."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

X86 = {
    "generic": ("x86-64", ""),
    "avx2": ("haswell", "+sse2,+sse4.2,+avx,+avx2,+fma,+f16c"),
}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these are instruction sets of x86-64")
@pytest.mark.parametrize("name", X86)
def test_kernels_compiled_for(name: str) -> None:
    cpu, features = X86[name]
    environment = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    check = "from cpu_kernels.simd import instruction_set as i; print(i())"
    chosen = subprocess.run(
        [sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert chosen.stdout.strip() == name
    folder = Path(__file__).parent
    files = [str(folder / "test_simd.py"), str(folder / "test_ops.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "not one-thread", *files]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
