"""Kernels leave the processor's rounding and its treatment of subnormal numbers as they are, and have subnormals."""

from __future__ import annotations

import ctypes
import platform

import numpy as np
import pytest
from llvmlite import ir

from cpu_kernels import rows
from cpu_kernels.compile import kernel, unpack
from cpu_kernels.simd import VOID, A, op, set_i64
from cpu_kernels.threads import FIELDS, shared_pool

I8P = ir.IntType(8).as_pointer()
FLAGS = 0x3F
"""Bits of MXCSR that only say what has happened."""
USUAL = 0x1F80
"""All exceptions masked, rounding to nearest, subnormals neither flushed nor taken for zero."""


@op(VOID(A))
def store_mxcsr(b, address):
    function = b.module.declare_intrinsic("llvm.x86.sse.stmxcsr", (), ir.FunctionType(ir.VoidType(), [I8P]))
    b.call(function, [b.inttoptr(address, I8P)])


@kernel("float state")
def state(arguments, tile, thread):
    """Each thread writes its MXCSR, and waits for nobody."""
    (out,) = unpack(arguments, "i")
    set_i64(out + 8 * thread, 0)
    store_mxcsr(out + 8 * thread)


def states(threads: int) -> list[int]:
    """MXCSR of the threads of a pool; of those that came to work at all."""
    out = np.full(threads, -1, np.int64)
    words = np.array([out.ctypes.data], np.int64)
    program = np.zeros((20, FIELDS), np.int64)
    program[:, :3] = state.address, words.ctypes.data, 500
    shared_pool(threads).run(program)
    return [int(value) & ~FLAGS for value in out if value >= 0]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="MXCSR is a register of x86")
def test_threads_have_the_usual_state_before_and_after(tiny_cpu):
    assert set(states(2)) == {USUAL}
    tiny_cpu.generate("Hello", max_tokens=8)
    assert set(states(2)) == {USUAL}


def test_subnormal_numbers_stay(tiny_cpu):
    tiny = np.array([1e-40, -1e-45, 1.17e-38, 0] * 4, np.float32)
    assert (tiny[:3] != 0).all()
    zeros, out = np.zeros(16, np.float32), np.ones(16, np.float32)
    words = np.array([out.ctypes.data, 64, tiny.ctypes.data, 64, zeros.ctypes.data, 64, 16], np.int64)
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(rows.add_rows.address)
    for _ in range(2):
        call(words.ctypes.data, 0, 0)
        assert out.tobytes() == tiny.tobytes()
        tiny_cpu.generate("Hello", max_tokens=8)
    assert np.float32(1e-40) * np.float32(0.5) != 0, "this thread's state"
