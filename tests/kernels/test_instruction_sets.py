"""The kernel tests again, compiled for CPUs of x86-64 that this machine may not be. Those of Arm: tests/arm64."""

from __future__ import annotations

import platform
import sys

import pytest
from llvmlite import binding

from tests.kernels.other_cpus import ATTENTION, OPS, PICKED, SIMD, UNPACKED, must_pass, running

AVX2 = "+sse2,+sse4.2,+avx,+avx2,+fma,+f16c"
X86 = {
    "generic": ("x86-64", ""),
    "avx2": ("haswell", AVX2),
    "vnni256": ("haswell", AVX2 + ",+avx512vl,+avx512vnni"),
}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these are instruction sets of x86-64")
@pytest.mark.parametrize("name", X86)
def test_kernels_compiled_for(name: str) -> None:
    cpu, features = X86[name]
    has = binding.get_host_cpu_features()
    missing = [word for word in features.replace("+", "").split(",") if word and not has.get(word)]
    if missing:
        pytest.skip(f"this CPU has no {', '.join(missing)}")
    # Each shape of attention is compiled for seconds.
    few = ("--spread", "12", "--spread", "test_attention=3", "--spread", "test_odd_shapes_against_the_reference=3")
    arguments = ("-x", *few, "-k", "not one-thread", SIMD, OPS, ATTENTION, PICKED, UNPACKED)
    with running(sys.executable, cpu, features, name, *arguments) as process:
        must_pass(process, 600)
