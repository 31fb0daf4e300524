"""Dot products of small codes with signed bytes, by the instructions that each CPU has for them.

Lane i of a result gains the sum of the 4 products of its bytes. All ways give the same integers.
"""

from __future__ import annotations

import functools
import re

from llvmlite import binding, ir
from numba.core.registry import cpu_target

from cpu_kernels.simd import I8, I16, I32, B, I, call, features, ints, is_arm

_PROBE = """
define i32 @probe(<16 x i8> %a, <16 x i8> %b) {{
  %x = {} <16 x i8> %a to <16 x i32>
  %y = sext <16 x i8> %b to <16 x i32>
  %products = mul <16 x i32> %x, %y
  %sum = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %products)
  ret i32 %sum
}}
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
"""


def _arm_instruction_set(codegen) -> str:
    """Asks LLVM itself: lists of Arm's features are empty or lack names, and the CPU's own name implies many."""

    def emits(instruction, extension):
        module = binding.parse_assembly(_PROBE.format(extension))
        return re.search(rf"\b{instruction}\b", codegen._tm.emit_assembly(module)) is not None

    if not emits("sdot", "sext"):
        return "generic"
    return "neon_i8mm" if emits("usdot", "zext") else "neon_dot"


@functools.cache
def instruction_set() -> str:
    """The dot-product instructions that Numba compiles for, which NUMBA_CPU_* may restrict.

    Returns:
        On x86-64 "vnni512", "vnni256" or "avx2"; on Arm "neon_i8mm", or "neon_dot" if both sides must have the same
        sign; "generic" elsewhere.
    """
    codegen = cpu_target.target_context.codegen()
    if is_arm(codegen):
        return _arm_instruction_set(codegen)
    if {"avx512vnni", "avx512f"} <= features():
        return "vnni512"
    if "avxvnni" in features() or {"avx512vnni", "avx512vl"} <= features():
        return "vnni256"
    return "avx2" if "avx2" in features() else "generic"


def _split(b, v, kind):
    """The bits of v as vectors of an LLVM type."""
    parts = 512 // (kind.count * kind.element.width)
    v = b.bitcast(v, ir.VectorType(kind.element, kind.count * parts))
    starts = range(0, kind.count * parts, kind.count)
    indices = (ir.Constant(ir.VectorType(I32, kind.count), list(range(at, at + kind.count))) for at in starts)
    return [b.shuffle_vector(v, v, index) for index in indices]


def _join(b, parts):
    """One vector of 1, 2 or 4 equal ones."""
    while len(parts) > 1:
        n = 2 * parts[0].type.count
        index = ir.Constant(ir.VectorType(I32, n), list(range(n)))
        parts = [b.shuffle_vector(x, y, index) for x, y in zip(parts[::2], parts[1::2])]
    return parts[0]


def _instruction(name, argument, lanes):
    """A dot product by an LLVM intrinsic (sums, x, y) over fewer lanes than ours; x and y consist of `argument`."""
    total, part = ir.VectorType(I32, lanes), ir.VectorType(argument, 32 * lanes // argument.width)

    def dot(b, acc, x, y):
        pieces = zip(_split(b, acc, total), _split(b, x, part), _split(b, y, part))
        return _join(b, [call(b, name, total, piece) for piece in pieces])

    return dot


def _dot_generic(b, acc, u, s):
    """Any CPU: byte by byte in 32-bit lanes."""
    u, s = b.bitcast(u, I.llvm), b.bitcast(s, I.llvm)
    for k in range(4):
        byte = b.and_(b.lshr(u, ints(8 * k)), ints(255))
        signed = b.ashr(b.shl(s, ints(24 - 8 * k)), ints(24))
        acc = b.add(acc, b.mul(byte, signed))
    return acc


_WIDE = ir.VectorType(I16, 32)


def _shorts_avx2(b, acc, x, y):
    """acc + sums of two products of 16-bit lanes."""
    halves = zip(_split(b, x, ir.VectorType(I16, 16)), _split(b, y, ir.VectorType(I16, 16)))
    return b.add(acc, _join(b, [call(b, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), both) for both in halves]))


def _bytes_avx2(b, u, s):
    """16-bit sums of two products of bytes; saturates where they do not fit."""
    halves = zip(_split(b, u, ir.VectorType(I8, 32)), _split(b, s, ir.VectorType(I8, 32)))
    return _join(b, [call(b, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), both) for both in halves])


def _dot_avx2(b, acc, u, s):
    """Through 16-bit products, even and odd bytes apart, since sums of two products may not fit into 16 bits."""
    u, s = b.bitcast(u, _WIDE), b.bitcast(s, _WIDE)
    eight, mask = ir.Constant(_WIDE, [8] * 32), ir.Constant(_WIDE, [255] * 32)
    acc = _shorts_avx2(b, acc, b.and_(u, mask), b.ashr(b.shl(s, eight), eight))
    return _shorts_avx2(b, acc, b.lshr(u, eight), b.ashr(s, eight))


def _few_bits_avx2(b, acc, us, ss, bits):
    """For codes of up to 6 bits: as many vectors are summed in 16 bits as cannot overflow."""
    together = 2**15 // (2 * 128 * (2**bits - 1))
    for first in range(0, len(us), together):
        pairs = [_bytes_avx2(b, u, s) for u, s in zip(us[first : first + together], ss[first : first + together])]
        acc = _shorts_avx2(b, acc, functools.reduce(b.add, pairs), ir.Constant(_WIDE, [1] * 32))
    return acc


_dot_signed = _instruction("llvm.aarch64.neon.sdot.v4i32.v16i8", I8, 4)
_DOTS = {
    "vnni512": _instruction("llvm.x86.avx512.vpdpbusd.512", I32, 16),
    "vnni256": _instruction("llvm.x86.avx512.vpdpbusd.256", I32, 8),
    "avx2": _dot_avx2,
    "neon_i8mm": _instruction("llvm.aarch64.neon.usdot.v4i32.v16i8", I8, 4),
    "neon_dot": _dot_signed,
    "generic": _dot_generic,
}


def _centred(b, acc, us, ss):
    """Codes of 8 bits less 128, which are signed, and acc with 128 times the sums of the other side."""
    sums = ints(0)
    for s in ss:
        # The bytes of a linear repeat every 4, so LLVM does this once, not for each 16 bytes of a vector.
        sums = _dot_signed(b, sums, ir.Constant(B.llvm, [1] * 64), s)
    return b.add(acc, b.shl(sums, ints(7))), [b.xor(u, ir.Constant(B.llvm, [-128] * 64)) for u in us]


def integer_dots(b, acc, us, ss, bits):
    """Builds acc + the dot products of codes with signed bytes.

    Args:
        b: LLVM IR builder.
        acc: i32x16.
        us: vectors i8x64 of codes of 0 to 2**bits - 1.
        ss: as many vectors i8x64 of any signed bytes.
        bits: 2, 4, 5, 6 or 8.
    """
    known = instruction_set()
    if known == "avx2" and bits <= 6:
        return _few_bits_avx2(b, acc, us, ss, bits)
    if known == "neon_dot" and bits == 8:
        acc, us = _centred(b, acc, us, ss)
    # Two chains, so that one dot product need not wait for the other.
    chains = [acc, ints(0)]
    for i, (u, s) in enumerate(zip(us, ss)):
        chains[i % 2] = _DOTS[known](b, chains[i % 2], u, s)
    return b.add(*chains)
