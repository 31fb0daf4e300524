"""e**x of vectors."""

from __future__ import annotations

from cpu_kernels.simd import F, I, call, floats, fma, ints, op


@op(F(F))
def exp(b, x):
    """e**x to about 1e-7 relative, clamped to -87..88. Source: the Cephes polynomial of degree 5."""
    x = b.select(b.fcmp_ordered("<", x, floats(-87)), floats(-87), x)
    x = b.select(b.fcmp_ordered(">", x, floats(88)), floats(88), x)
    n = call(b, "llvm.nearbyint.v16f32", F.llvm, [b.fmul(x, floats(1.44269504))])
    r = fma.build(b, n, floats(-0.693359375), x)
    r = fma.build(b, n, floats(2.12194440e-4), r)
    p = floats(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma.build(b, p, r, floats(c))
    p = b.fadd(fma.build(b, p, b.fmul(r, r), r), floats(1))
    power = b.shl(b.fptosi(n, I.llvm), ints(23))
    return b.bitcast(b.add(b.bitcast(p, I.llvm), power), F.llvm)
