"""Compiled kernels are never stale and never mixed up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba

import cpu_kernels
from cpu_kernels import attention
from cpu_kernels.float_linear import float_linear
from cpu_kernels.gemm import gemm
from cpu_kernels.gemv import gemv
from cpu_kernels.simd import add, load_f32, store_f32
from cpu_kernels.tiles import Layout

ADD_TWO = """
import ctypes, numpy as np
from cpu_kernels import rows
x, out = np.full(16, 5, np.float32), np.empty(16, np.float32)
words = np.array([out.ctypes.data, 64, x.ctypes.data, 64, x.ctypes.data, 64, 16], np.int64)
ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(rows.add_rows.address)(words.ctypes.data, 0, 0)
print(out[0])
"""


def test_an_edited_intrinsic_is_compiled_anew(tmp_path: Path) -> None:
    """Numba alone would not notice: the kernel's own file stays as it is."""
    package = Path(cpu_kernels.__file__).parent
    shutil.copytree(package, tmp_path / "cpu_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run() -> str:
        command = [sys.executable, "-c", ADD_TWO]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=100
        )
        return done.stdout.strip()

    assert [run(), run()] == ["10.0", "10.0"]
    simd = tmp_path / "cpu_kernels" / "simd.py"
    edited = simd.read_text().replace("return b.fadd(x, y)\n", "return b.fmul(x, y)\n")
    assert edited != simd.read_text()
    simd.write_text(edited)
    assert run() == "25.0"


def test_shapes_of_a_kernel_have_names_of_their_own() -> None:
    """Their machine code is found by label across processes, so one must not stand for two shapes."""
    makers = (attention.attention_tokens, attention.attention_chunks)
    made = [maker(*shape) for maker in makers for shape in ((1, 16), (2, 16), (1, 32))]
    forms = ((4, 32, "f16", False), (4, 32, "f16", True), (4, 64, "f16", True), (8, 32, "f16", True))
    made += [maker(Layout(*form)) for maker in (gemm, gemv) for form in forms]
    made += [float_linear(kind) for kind in ("f32", "f16")]
    for names in ([kernel.function.__qualname__ for kernel in made], [kernel.label for kernel in made]):
        assert len(set(names)) == len(names)
    chunks = [attention.chunk(*shape).py_func.__qualname__ for shape in ((1, 16), (2, 16), (1, 32))]
    assert len(set(chunks)) == 3


def test_callers_get_functions_as_they_were_before_machine_code_was_made() -> None:
    """Making it rewrites loops (LLVM's names then have "lsr") and addresses, which lost sums of attention on AVX2."""

    @numba.njit(error_model="numpy")
    def add_all(out, x, n):
        total = load_f32(out)
        for i in range(n):
            total = add(total, load_f32(x + 320 * i))
        store_f32(out, total)

    add_all.compile((numba.int64,) * 3)
    (compiled,) = add_all.overloads.values()
    assert "lsr." in str(compiled.library._final_module)
    assert "lsr." not in str(compiled.library._get_module_for_linking())
