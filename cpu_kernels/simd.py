"""Vectors of 16 lanes as Numba types, and operations on them by meaning.

LLVM turns the generic ones into whatever the host has; only integer dot products differ per instruction set
(`integer_dots`). Addresses are int64. `op` makes a function over an LLVM IR builder callable from Numba code; `.build`
stays for kernels that write their own unrolled IR.
"""

from __future__ import annotations

import functools
import inspect

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
HALF, SINGLE = ir.HalfType(), ir.FloatType()
LANES = 16


class VectorType(types.Type):
    """A Numba type for one LLVM vector."""

    def __init__(self, name, llvm):
        self.llvm = llvm
        super().__init__(name=name)


@register_model(VectorType)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, fe_type.llvm)


F = VectorType("f32x16", ir.VectorType(SINGLE, LANES))
I = VectorType("i32x16", ir.VectorType(I32, LANES))  # noqa: E741
B = VectorType("i8x64", ir.VectorType(I8, 4 * LANES))
A, S, VOID = types.int64, types.float32, types.void


def op(signature):
    """Decorator: `build(builder, *values)` of the signature becomes a Numba intrinsic with `.build`."""

    def wrap(build):
        def codegen(context, builder, sig, args):
            value = build(builder, *args)
            return context.get_dummy_value() if sig.return_type == VOID else value

        names = [f"a{i}" for i in range(len(signature.args))]
        scope = {"signature": signature, "codegen": codegen}
        # Numba's @intrinsic inspects the argument count, so each arity needs a function of its own.
        exec(f"def typer(context{''.join(', ' + n for n in names)}):\n    return signature, codegen", scope)
        made = intrinsic(scope["typer"])
        made.build = build
        made.__doc__ = inspect.getdoc(build)
        return made

    return wrap


def is_arm(codegen) -> bool:
    """Whether Numba compiles for 64-bit Arm."""
    return codegen._llvm_module.triple.startswith(("aarch64", "arm64"))


@functools.cache
def features() -> frozenset[str]:
    """Names of the CPU features that Numba compiles for: not what the machine has, if NUMBA_CPU_* says otherwise."""
    codegen = cpu_target.target_context.codegen()
    named = {f[1:] for f in codegen._tm_features.split(",") if f.startswith("+")}
    if is_arm(codegen):
        # Part of every 64-bit Arm, and therefore not listed.
        named |= {"fma", "f16c"}
    return frozenset(named)


# Builder helpers


def call(b, name, result, args):
    """Calls an LLVM intrinsic or C function by name."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), args)


def pointer(b, address, kind):
    return b.inttoptr(address, kind.as_pointer())


def splat(b, x, lanes=LANES):
    one = b.insert_element(ir.Constant(ir.VectorType(x.type, lanes), ir.Undefined), x, I32(0))
    return b.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def floats(x):
    return ir.Constant(F.llvm, [float(x)] * LANES)


def ints(x):
    return ir.Constant(I.llvm, [int(x)] * LANES)


def offset(b, address, n):
    return b.add(address, I64(n))


def _widen(b, raw):
    """float32 of 16 float16 bit patterns [i16]."""
    if "f16c" in features():
        return b.fpext(b.bitcast(raw, ir.VectorType(HALF, LANES)), F.llvm)
    bits = b.zext(raw, I.llvm)
    sign = b.shl(b.and_(bits, ints(0x8000)), ints(16))
    size = b.and_(bits, ints(0x7FFF))
    # As a float32 exponent the float16 one is 112 too low, for subnormals too.
    value = b.bitcast(b.fmul(b.bitcast(b.shl(size, ints(13)), F.llvm), floats(2.0**112)), I.llvm)
    special = b.icmp_unsigned(">=", size, ints(0x7C00))
    value = b.select(special, b.or_(value, ints(0x7F800000)), value)
    return b.bitcast(b.or_(value, sign), F.llvm)


def _narrow(b, v):
    """Bit patterns [i16] of 16 float32 rounded to float16, ties to even."""
    kind = ir.VectorType(I16, LANES)
    if "f16c" in features():
        return b.bitcast(b.fptrunc(v, ir.VectorType(HALF, LANES)), kind)
    bits = b.bitcast(v, I.llvm)
    sign = b.and_(b.lshr(bits, ints(16)), ints(0x8000))
    size = b.and_(bits, ints(0x7FFFFFFF))
    odd = b.and_(b.lshr(size, ints(13)), ints(1))
    normal = b.lshr(b.add(b.sub(size, ints((112 << 23) - 0xFFF)), odd), ints(13))
    # Adding 0.5 shifts a value below 2**-14 so that the hardware rounds it to float16's last place.
    shifted = b.bitcast(b.fadd(b.bitcast(size, F.llvm), floats(0.5)), I.llvm)
    tiny = b.sub(shifted, ints(0x3F000000))
    result = b.select(b.icmp_unsigned("<", size, ints(113 << 23)), tiny, normal)
    result = b.select(b.icmp_unsigned(">=", size, ints(0x477FF000)), ints(0x7C00), result)
    result = b.select(b.icmp_unsigned(">", size, ints(0x7F800000)), ints(0x7E00), result)
    return b.trunc(b.or_(result, sign), kind)


# Memory


@op(S(A))
def f32_at(b, a):
    return b.load(pointer(b, a, SINGLE), align=4)


@op(A(A))
def i32_at(b, a):
    return b.sext(b.load(pointer(b, a, I32), align=4), I64)


@op(A(A))
def i64_at(b, a):
    return b.load(pointer(b, a, I64), align=8)


@op(A(A))
def u8_at(b, a):
    return b.zext(b.load(pointer(b, a, I8)), I64)


@op(S(A))
def f16_at(b, a):
    raw = b.load(pointer(b, a, I16), align=2)
    return b.extract_element(_widen(b, splat(b, raw)), I32(0))


@op(S(A))
def bf16_at(b, a):
    return b.bitcast(b.shl(b.zext(b.load(pointer(b, a, I16), align=2), I32), I32(16)), SINGLE)


@op(VOID(A, S))
def set_f32(b, a, x):
    b.store(x, pointer(b, a, SINGLE), align=4)


@op(VOID(A, S))
def set_f16(b, a, x):
    b.store(b.extract_element(_narrow(b, splat(b, x)), I32(0)), pointer(b, a, I16), align=2)


@op(VOID(A, A))
def set_i32(b, a, x):
    b.store(b.trunc(x, I32), pointer(b, a, I32), align=4)


@op(VOID(A, A))
def set_i64(b, a, x):
    b.store(x, pointer(b, a, I64), align=8)


@op(VOID(A, A))
def set_u8(b, a, x):
    b.store(b.trunc(x, I8), pointer(b, a, I8))


@op(S(A))
def i8_at(b, a):
    return b.sitofp(b.load(pointer(b, a, I8)), SINGLE)


@op(F(A))
def load_f32(b, a):
    return b.load(pointer(b, a, F.llvm), align=4)


@op(VOID(A, F))
def store_f32(b, a, v):
    b.store(v, pointer(b, a, F.llvm), align=4)


@op(F(A))
def load_f16(b, a):
    return _widen(b, b.load(pointer(b, a, ir.VectorType(I16, LANES)), align=2))


@op(VOID(A, F))
def store_f16(b, a, v):
    b.store(_narrow(b, v), pointer(b, a, ir.VectorType(I16, LANES)), align=2)


@op(VOID(A, F))
def spread_f16(b, a, v):
    """Stores 16 lanes as float16, 32 bytes apart."""
    halves = _narrow(b, v)
    for i in range(LANES):
        b.store(b.extract_element(halves, I32(i)), pointer(b, offset(b, a, 32 * i), I16), align=2)


@op(F(A))
def load_bf16(b, a):
    raw = b.load(pointer(b, a, ir.VectorType(I16, LANES)), align=2)
    return b.bitcast(b.shl(b.zext(raw, I.llvm), ints(16)), F.llvm)


@op(F(A))
def load_u8(b, a):
    """16 unsigned bytes as floats."""
    raw = b.load(pointer(b, a, ir.VectorType(I8, LANES)), align=1)
    return b.uitofp(b.zext(raw, I.llvm), F.llvm)


@op(F(A))
def load_i8(b, a):
    """16 signed bytes as floats."""
    raw = b.load(pointer(b, a, ir.VectorType(I8, LANES)), align=1)
    return b.sitofp(b.sext(raw, I.llvm), F.llvm)


@op(B(A))
def load_bytes(b, a):
    return b.load(pointer(b, a, B.llvm), align=1)


@op(VOID(A, I))
def store_i8(b, a, v):
    """Stores 16 lanes as bytes; each must lie in -128..127."""
    small = ir.VectorType(I8, LANES)
    b.store(b.trunc(v, small), pointer(b, a, small), align=1)


@op(VOID(A, A, I))
def store_quads(b, a, stride, v):
    """Stores 16 lanes as bytes, four to a quad, quads `stride` bytes apart; each must lie in -128..127."""
    quads = b.bitcast(b.trunc(v, ir.VectorType(I8, LANES)), ir.VectorType(I32, 4))
    for i in range(4):
        at = b.add(a, b.mul(stride, I64(i)))
        b.store(b.extract_element(quads, I32(i)), pointer(b, at, I32), align=1)


@op(VOID(A, A, A))
def store_folded_nibbles(b, a, stride, source):
    """Of 32 codes of 4 bits in order, byte i gets code i in its low and 16 + i in its high half; 4 quads as above."""
    eight = ir.VectorType(I8, 8)
    order = ir.Constant(ir.VectorType(I32, 16), [i // 2 + i % 2 * 8 for i in range(16)])
    halves = []
    for at in (source, offset(b, source, 8)):
        packed = b.load(pointer(b, at, eight), align=1)
        low = b.and_(packed, ir.Constant(eight, [15] * 8))
        halves.append(b.shuffle_vector(low, b.lshr(packed, ir.Constant(eight, [4] * 8)), order))
    high = b.shl(halves[1], ir.Constant(ir.VectorType(I8, 16), [4] * 16))
    quads = b.bitcast(b.or_(halves[0], high), ir.VectorType(I32, 4))
    for i in range(4):
        b.store(b.extract_element(quads, I32(i)), pointer(b, b.add(a, b.mul(stride, I64(i))), I32), align=1)


@op(F(A))
def splat_f32_at(b, a):
    return splat(b, b.load(pointer(b, a, SINGLE), align=4))


@op(I(A))
def splat_i32_at(b, a):
    return splat(b, b.load(pointer(b, a, I32), align=4))


@op(B(A))
def splat_quad(b, a):
    """Four bytes, repeated in every lane."""
    return b.bitcast(splat(b, b.load(pointer(b, a, I32), align=1)), B.llvm)


@op(VOID(A))
def prefetch(b, a):
    """Fetches a cache line that will be read soon."""
    target = b.inttoptr(a, I8.as_pointer())
    call(b, "llvm.prefetch.p0", ir.VoidType(), [target, I32(0), I32(3), I32(1)])


@op(VOID(A))
def prefetch_l2(b, a):
    """Fetches a cache line that will be read later to the second level, which waits for more lines at once."""
    target = b.inttoptr(a, I8.as_pointer())
    call(b, "llvm.prefetch.p0", ir.VoidType(), [target, I32(0), I32(2), I32(1)])


# Arithmetic


@op(F())
def zeros(b):
    return floats(0)


@op(F(S))
def splat_f32(b, x):
    return splat(b, x)


@op(F(F, F, F))
def fma(b, x, y, z):
    """x * y + z, in one rounding where the CPU can."""
    if "fma" in features():
        return call(b, "llvm.fma.v16f32", F.llvm, [x, y, z])
    return b.fadd(b.fmul(x, y), z)


@op(F(F, F))
def add(b, x, y):
    return b.fadd(x, y)


@op(F(F, F))
def sub(b, x, y):
    return b.fsub(x, y)


@op(F(F, F))
def mul(b, x, y):
    return b.fmul(x, y)


@op(F(F, F))
def div(b, x, y):
    return b.fdiv(x, y)


@op(F(F, F))
def maximum(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@op(F(F))
def absolute(b, x):
    return call(b, "llvm.fabs.v16f32", F.llvm, [x])


def _halves(b, v, combine):
    """Reduces 16 lanes by halving: one fixed order on every instruction set."""
    n = LANES
    while n > 1:
        n //= 2
        kind = ir.VectorType(I32, n)
        low = b.shuffle_vector(v, v, ir.Constant(kind, list(range(n))))
        high = b.shuffle_vector(v, v, ir.Constant(kind, list(range(n, 2 * n))))
        v = combine(low, high)
    return b.extract_element(v, I32(0))


@op(F(F))
def not_zero(b, v):
    """1 where a lane is not 0, 0 where it is."""
    return b.select(b.fcmp_unordered("!=", v, floats(0)), floats(1), floats(0))


@op(S(F))
def total(b, v):
    return _halves(b, v, b.fadd)


@op(S(F))
def largest(b, v):
    return _halves(b, v, lambda x, y: b.select(b.fcmp_ordered(">", x, y), x, y))


@op(A(I, I))
def total_of_each(b, x, y):
    """The sum of x in the low 32 bits, that of y in the high ones."""
    halves = [list(range(8)) + list(range(16, 24)), list(range(8, 16)) + list(range(24, 32))]
    v = b.add(*(b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, 16), half)) for half in halves))
    for n in (4, 2, 1):
        # Lanes of a half are added to those n further on; what wraps around is added twice in lanes that nobody reads.
        moved = ir.Constant(ir.VectorType(I32, 16), [8 * (i // 8) + (i + n) % 8 for i in range(16)])
        v = b.add(v, b.shuffle_vector(v, v, moved))
    low, high = (b.extract_element(v, I32(lane)) for lane in (0, 8))
    return b.or_(b.zext(low, I64), b.shl(b.zext(high, I64), I64(32)))


@op(I(F))
def round_to_i32(b, v):
    return b.fptosi(call(b, "llvm.nearbyint.v16f32", F.llvm, [v]), I.llvm)


@op(F(I))
def to_float(b, v):
    return b.sitofp(v, F.llvm)


@op(F(F, A, A))
def keep_lanes(b, v, first, end):
    """Lanes first..end-1 of v, the others -1e30 (a score that no softmax sees)."""
    lane = ir.Constant(I.llvm, list(range(LANES)))
    above = b.icmp_signed(">=", lane, splat(b, b.trunc(first, I32)))
    below = b.icmp_signed("<", lane, splat(b, b.trunc(end, I32)))
    return b.select(b.and_(above, below), v, floats(-1e30))


# Bytes


@op(B(B))
def low_nibbles(b, v):
    return b.and_(v, ir.Constant(B.llvm, [15] * 64))


@op(B(B))
def high_nibbles(b, v):
    return b.lshr(v, ir.Constant(B.llvm, [4] * 64))
