"""Quantized weights in tiles of 16 rows, and how kernels read them.

A lane of a vector is a row, so sums never cross lanes. Codes of 32 inputs are vectors of [16 rows][4 bytes]:

    8 bits: 8 vectors; byte i of vector j is input 4j+i
    4 bits: 4 vectors; byte i of vector j is input 4j+i in its low half, input 16+4j+i in its high half
    5 bits: those of 4 bits, then 1 vector; bit j of its byte i is the fifth of input 4j+i
    6 bits: those of 4 bits, then 2 vectors, of inputs 0-15 and 16-31; bits 2j, 2j+1 of byte i belong to input 4j+i
    2 bits: the last 2 vectors of 6 bits

A tile is a run of groups. Where scales are floats ("f16", "f32"), a group holds the codes of its inputs, then 16
scales, then 16 biases (none if symmetric). Where scales are bytes under a float16 factor, a group is 256 inputs and
holds 16 factors (of the biases too, for "k32"), then for each 32 inputs their codes, 16 bytes of scales ("k16": two
times, for each half) and, for "k32", 16 bytes of biases. "k32" is Q4_K and Q5_K, "k16" is Q6_K, which is symmetric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from cpu_kernels import simd
from cpu_kernels.integer_dots import integer_dots
from cpu_kernels.simd import I64, offset

PREFETCH = 1024
"""Bytes ahead of their use at which weights are asked."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the tiles of a quantized matrix are written.

    Args:
        bits: 2, 4, 5, 6 or 8.
        group_size: inputs with a common float: a power of two from 32 on, 256 where scales are bytes under factors.
        kind: of the scales: "f32", "f16", "k32" or "k16".
        symmetric: no biases, codes relative to the middle of their range.
        band: tiles whose groups take turns; the next tile of a band begins `group_bytes` on.
    """

    bits: int
    group_size: int
    kind: str
    symmetric: bool
    band: int = 1

    @property
    def label(self) -> str:
        """A name for kernels and cache files."""
        name = f"{self.bits}-bit {self.kind}/{self.group_size}{' symmetric' if self.symmetric else ''}"
        return name if self.band == 1 else f"{name} bands of {self.band}"

    @property
    def scale_bytes(self) -> int:
        """Bytes of a float scale or factor."""
        return 4 if self.kind == "f32" else 2

    @property
    def parts(self) -> int:
        """Scales of 32 inputs."""
        return 2 if self.kind == "k16" else 1

    @property
    def group_bytes(self) -> int:
        """Bytes of a group of 16 rows."""
        codes = self.group_size * self.bits * 2
        if self.kind in ("k16", "k32"):
            return codes + 8 * 32 + (32 if self.symmetric else 64)
        return codes + 16 * self.scale_bytes * (1 if self.symmetric else 2)

    def tile_bytes(self, inputs: int) -> int:
        """Bytes of a tile of 16 rows."""
        return inputs // self.group_size * self.group_bytes

    # What follows writes LLVM IR.

    def group(self, b: Any, tile: Any, index: Any) -> tuple[Any, list[Any], Any]:
        """Address of the codes of the 32 inputs from 32 * index on, their scales by part, and their bias or None."""
        subgroups = self.group_size // 32
        base = b.add(tile, b.mul(b.lshr(index, I64(subgroups.bit_length() - 1)), I64(self.band * self.group_bytes)))
        inner = b.and_(index, I64(subgroups - 1))
        if self.kind in ("f16", "f32"):
            return self._float_scales(b, base, inner)
        factors = 32 if self.symmetric else 64
        codes = b.add(offset(b, base, factors), b.mul(inner, I64(64 * self.bits + 32)))
        numbers, factor = offset(b, codes, 64 * self.bits), simd.load_f16.build(b, base)
        if self.symmetric:
            return codes, [b.fmul(factor, simd.load_i8.build(b, offset(b, numbers, 16 * i))) for i in range(2)], None
        bias = b.fmul(simd.load_f16.build(b, offset(b, base, 32)), simd.load_u8.build(b, offset(b, numbers, 16)))
        return codes, [b.fmul(factor, simd.load_u8.build(b, numbers))], bias

    def _float_scales(self, b: Any, base: Any, inner: Any) -> tuple[Any, list[Any], Any]:
        load = simd.load_f16 if self.kind == "f16" else simd.load_f32
        numbers = offset(b, base, self.group_size * self.bits * 2)
        bias = None if self.symmetric else load.build(b, offset(b, numbers, 16 * self.scale_bytes))
        return b.add(base, b.mul(inner, I64(64 * self.bits))), [load.build(b, numbers)], bias

    def codes(self, b: Any, address: Any, ahead: int = PREFETCH) -> list[Any]:
        """The 8 code vectors of 32 inputs, in the order of their quads. ahead: fetches what is so far on, if not 0."""
        loaded = []
        for j in range(self.bits):
            if ahead:
                simd.prefetch.build(b, offset(b, address, ahead + 64 * j))
            loaded.append(simd.load_bytes.build(b, offset(b, address, 64 * j)))
        if self.bits == 8:
            return loaded
        if self.bits == 2:
            return [_pair(b, loaded[j // 4], j % 4 * 2) for j in range(8)]
        nibbles, high = loaded[:4], loaded[4:]
        codes = [simd.low_nibbles.build(b, v) for v in nibbles] + [simd.high_nibbles.build(b, v) for v in nibbles]
        if self.bits == 5:
            return [b.or_(code, _moved(b, high[0], j, 16)) for j, code in enumerate(codes)]
        if self.bits == 6:
            return [b.or_(code, _moved(b, high[j // 4], j % 4 * 2, 48)) for j, code in enumerate(codes)]
        return codes


def _pair(b: Any, v: Any, position: int) -> Any:
    """The two bits of each byte from `position` on."""
    shifted = b.lshr(v, ir.Constant(simd.B.llvm, [position] * 64))
    return b.and_(shifted, ir.Constant(simd.B.llvm, [3] * 64))


def _moved(b: Any, v: Any, position: int, mask: int) -> Any:
    """The bits of each byte from `position` on, moved up to bit 4."""
    distance = ir.Constant(simd.B.llvm, [abs(4 - position)] * 64)
    v = b.shl(v, distance) if position < 4 else b.lshr(v, distance)
    return b.and_(v, ir.Constant(simd.B.llvm, [mask] * 64))


def dots(b: Any, layout: Layout, codes: list[Any], quads: Any, quad_stride: int, starts: list[Any]) -> list[Any]:
    """Integer products of 32 inputs of one token with 16 rows, by part, less the middle of symmetric codes.

    Args:
        codes: 8 vectors.
        quads: address of the token's first 4 bytes; the next are `quad_stride` bytes on.
        starts: what `starting` gave.
    """
    results = []
    for part, start in enumerate(starts):
        some = range(part * 8 // len(starts), (part + 1) * 8 // len(starts))
        signed = [simd.splat_quad.build(b, offset(b, quads, quad_stride * j)) for j in some]
        results.append(integer_dots(b, start, [codes[j] for j in some], signed, layout.bits))
    return results


def starting(b: Any, layout: Layout, total_at: Any, half_at: Any) -> list[Any]:
    """Where the sums of `dots` start: 0, or the middle code times the negative sum of the activations."""
    if not layout.symmetric:
        return [simd.ints(0)]
    whole = simd.splat_i32_at.build(b, total_at)
    sums = [whole]
    if layout.parts == 2:
        half = simd.splat_i32_at.build(b, half_at)
        sums = [half, b.sub(whole, half)]
    return [b.shl(s, simd.ints(layout.bits - 1)) for s in sums]


def gained(b: Any, total: Any, products: list[Any], scale: Any, scales: list[Any]) -> Any:
    """total + the sum over parts of product * the token's scale * the rows' scales."""
    for product, rows in zip(products, scales):
        total = simd.fma.build(b, b.fmul(simd.to_float.build(b, product), scale), rows, total)
    return total
