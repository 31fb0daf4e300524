"""What threads say to each other through 8-byte words in memory, as operations of kernels."""

from __future__ import annotations

from llvmlite import ir
from numba.core.registry import cpu_target

from cpu_kernels.simd import I32, I64, VOID, A, call, features, is_arm, op, pointer


@op(A(A, A))
def atomic_add(b, a, x):
    """Adds and returns the value before."""
    return b.atomic_rmw("add", pointer(b, a, I64), x, "seq_cst")


@op(A(A))
def atomic_load(b, a):
    return b.load_atomic(pointer(b, a, I64), "seq_cst", 8)


@op(VOID(A, A))
def atomic_store(b, a, x):
    b.store_atomic(x, pointer(b, a, I64), "seq_cst", 8)


@op(A(A, A, A))
def compare_and_swap(b, a, expected, x):
    """Stores x if the value is as expected. Returns the value before."""
    return b.extract_value(b.cmpxchg(pointer(b, a, I64), expected, x, "seq_cst", "seq_cst"), 0)


@op(VOID(A, A))
def plain_store(b, a, x):
    """A store that other threads see whole, in no particular order."""
    b.store_atomic(x, pointer(b, a, I64), "monotonic", 8)


@op(VOID())
def fence(b):
    """What was written before is seen before what is written after."""
    b.fence("seq_cst")


@op(VOID())
def pause(b):
    """Tells the core that this is a spin loop."""
    if "sse2" in features():
        call(b, "llvm.x86.sse2.pause", ir.VoidType(), [])
    elif is_arm(cpu_target.target_context.codegen()):
        # Arm's own hint, `yield`, is nothing on most cores; this barrier takes about as long as x86's pause.
        call(b, "llvm.aarch64.isb", ir.VoidType(), [I32(15)])
    else:
        b.fence("seq_cst")
