"""Matrix products with weights in tiles of 16 rows, for one token or many.

A lane of a vector is a row, so sums never cross lanes. Codes of 32 inputs are vectors of [16 rows][4 bytes]:

    8 bits: 8 vectors; byte i of vector j is input 4j+i
    4 bits: 4 vectors; byte i of vector j is input 4j+i in its low half, input 16+4j+i in its high half
    5 bits: those of 4 bits, then 1 vector; bit j of its byte i is the fifth of input 4j+i
    6 bits: those of 4 bits, then 2 vectors, of inputs 0-15 and 16-31; bits 2j, 2j+1 of byte i belong to input 4j+i

A tile is a run of groups. Where scales are floats ("f16", "f32"), a group holds the codes of its inputs, then 16
scales, then 16 biases (none if symmetric). Where scales are bytes under a float16 factor, a group is 256 inputs and
holds 16 factors (of the biases too, for "k32"), then for each 32 inputs their codes, 16 bytes of scales ("k16": two
times, for each half) and, for "k32", 16 bytes of biases. "k32" is Q4_K and Q5_K, "k16" is Q6_K, which is symmetric.

Activations are int8 with one scale per 32, in one plane, or in two (the second holds what rounding left, in 1/256)
where a model needs nearly exact inputs. A float tile is [in][16 rows].
"""

from __future__ import annotations

import functools

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels import simd
from cpu_kernels.compile import Kernel, kernel, unpack
from cpu_kernels.integer_dots import integer_dots
from cpu_kernels.simd import I64, F, add, load_f32, offset, store_f32

PREFETCH = 1024
"""Bytes ahead of their use at which weights are asked for."""
BLOCK = 4
"""Tokens that share one unpacking of the weights."""

_LOADS = {"f32": (simd.load_f32, 4), "f16": (simd.load_f16, 2), "bf16": (simd.load_bf16, 2)}


def tile_bytes(inputs: int, bits: int, group_size: int, kind: str, symmetric: bool) -> int:
    """Bytes of a tile of 16 quantized rows."""
    codes = inputs * bits * 2
    if kind == "k32":
        return codes + inputs // 256 * 64 + inputs // 32 * 32
    if kind == "k16":
        return codes + inputs // 256 * 32 + inputs // 16 * 16
    return codes + inputs // group_size * 16 * (4 if kind == "f32" else 2) * (1 if symmetric else 2)


def _stack_vector(b, kind, count):
    slots = [cgutils.alloca_once(b, kind) for _ in range(count)]
    for slot in slots:
        b.store(ir.Constant(kind, [0] * simd.LANES), slot)
    return slots


def _unpacked(b, address, bits):
    """The 8 code vectors of 32 inputs, in the order of their quads."""
    loaded = []
    for j in range(bits):
        simd.prefetch.build(b, offset(b, address, PREFETCH + 64 * j))
        loaded.append(simd.load_bytes.build(b, offset(b, address, 64 * j)))
    if bits == 8:
        return loaded
    nibbles, high = loaded[:4], loaded[4:]
    codes = [simd.low_nibbles.build(b, v) for v in nibbles] + [simd.high_nibbles.build(b, v) for v in nibbles]
    if bits == 5:
        return [b.or_(code, _moved(b, high[0], j, 16)) for j, code in enumerate(codes)]
    if bits == 6:
        return [b.or_(code, _moved(b, high[j // 4], j % 4 * 2, 48)) for j, code in enumerate(codes)]
    return codes


def _moved(b, v, position, mask):
    """The bits of each byte from `position` on, moved up to bit 4."""
    distance = ir.Constant(simd.B.llvm, [abs(4 - position)] * 64)
    v = b.shl(v, distance) if position < 4 else b.lshr(v, distance)
    return b.and_(v, ir.Constant(simd.B.llvm, [mask] * 64))


def _integer_dot(b, codes, q, start, bits):
    quads = [simd.splat_quad.build(b, offset(b, q, 4 * j)) for j in range(len(codes))]
    return integer_dots(b, start, codes, quads, bits)


def _group_dots(b, codes, q, low, meta, bits, planes, symmetric, parts):
    """Integer products of 32 inputs, in 1 or 2 parts, as floats still to be multiplied by the weights' scales."""
    zero = simd.ints(0)
    starts = [zero] * parts
    if symmetric:
        whole = simd.splat_i32_at.build(b, offset(b, meta, 8 if planes == 1 else 20))
        sums = [whole]
        if parts == 2:
            first = simd.splat_i32_at.build(b, offset(b, meta, 24 if planes == 1 else 28))
            sums = [first, b.sub(whole, first)]
        starts = [b.sub(zero, b.shl(total, simd.ints(bits - 1))) for total in sums]
    scale = simd.splat_f32_at.build(b, offset(b, meta, 0 if planes == 1 else 12))
    dots = []
    for part, start in enumerate(starts):
        some = codes[part * len(codes) // parts : (part + 1) * len(codes) // parts]
        at = 32 // parts * part
        if planes == 1:
            dot = _integer_dot(b, some, offset(b, q, at), start, bits)
        else:
            high = b.shl(_integer_dot(b, some, offset(b, q, at), zero, bits), simd.ints(8))
            dot = b.add(high, _integer_dot(b, some, offset(b, low, at), start, bits))
        dots.append(b.fmul(simd.to_float.build(b, dot), scale))
    return dots


class _PlainScales:
    """Scales and biases as floats behind the codes of a group."""

    def __init__(self, kind, bits, symmetric):
        self.load, self.size = _LOADS[kind]
        self.symmetric, self.bits, self.parts = symmetric, bits, 1

    def begin(self, b, at, subgroups):
        """Loads a group's numbers. Returns where its codes begin."""
        address = b.add(at, b.mul(subgroups, I64(64 * self.bits)))
        self.scale = self.load.build(b, address)
        self.bias = None if self.symmetric else self.load.build(b, offset(b, address, 16 * self.size))
        return at

    def inner(self, b, after_codes):
        """Scales of each part and bias of 32 inputs, and where the next codes begin."""
        return [self.scale], self.bias, after_codes

    def end(self, b, at):
        """Where the next group begins."""
        return offset(b, at, 16 * self.size * (1 if self.symmetric else 2))


class _ByteScales:
    """Scales as bytes behind the codes of every 32 inputs, under factors at the beginning of 256."""

    def __init__(self, kind):
        self.symmetric, self.parts = kind == "k16", 2 if kind == "k16" else 1

    def begin(self, b, at, subgroups):
        self.factor = simd.load_f16.build(b, at)
        if self.symmetric:
            return offset(b, at, 32)
        self.bias_factor = simd.load_f16.build(b, offset(b, at, 32))
        return offset(b, at, 64)

    def inner(self, b, after_codes):
        load = simd.load_i8 if self.symmetric else simd.load_u8
        scales = [b.fmul(self.factor, load.build(b, offset(b, after_codes, 16 * part))) for part in range(self.parts)]
        if self.symmetric:
            return scales, None, offset(b, after_codes, 32)
        bias = b.fmul(self.bias_factor, simd.load_u8.build(b, offset(b, after_codes, 16)))
        return scales, bias, offset(b, after_codes, 32)

    def end(self, b, at):
        return at


@functools.cache
def _quantized_product(tokens, bits, planes, kind, symmetric):
    """Intrinsic: one tile of rows times `tokens` rows of activations -> that many vectors."""
    result = types.UniTuple(F, tokens)

    @intrinsic
    def product(context, weight, q, q_stride, width, meta, meta_stride, groups, subgroups):
        def codegen(ctx, b, signature, args):
            weight, q, q_stride, width, meta, meta_stride, groups, subgroups = args
            form = _ByteScales(kind) if kind in ("k16", "k32") else _PlainScales(kind, bits, symmetric)
            sums, offsets = _stack_vector(b, F.llvm, tokens), _stack_vector(b, F.llvm, tokens)
            at, column = cgutils.alloca_once_value(b, weight), cgutils.alloca_once_value(b, I64(0))
            with cgutils.for_range(b, groups):
                b.store(form.begin(b, b.load(at), subgroups), at)
                with cgutils.for_range(b, subgroups):
                    codes = _unpacked(b, b.load(at), bits)
                    scales, bias, after = form.inner(b, offset(b, b.load(at), 64 * bits))
                    b.store(after, at)
                    here = b.load(column)
                    b.store(offset(b, here, 32), column)
                    for t in range(tokens):
                        row = b.add(b.add(q, b.mul(q_stride, I64(t))), here)
                        # 32 bytes of meta per 32 inputs: the offset of a group is that of its inputs.
                        numbers = b.add(b.add(meta, b.mul(meta_stride, I64(t))), here)
                        low = b.add(row, width)
                        dots = _group_dots(b, codes, row, low, numbers, bits, planes, symmetric, form.parts)
                        for dot, scale in zip(dots, scales):
                            b.store(simd.fma.build(b, dot, scale, b.load(sums[t])), sums[t])
                        if bias is not None:
                            total = simd.splat_f32_at.build(b, offset(b, numbers, 4 if planes == 1 else 16))
                            b.store(simd.fma.build(b, bias, total, b.load(offsets[t])), offsets[t])
                b.store(form.end(b, b.load(at)), at)
            values = [b.fadd(b.load(s), b.load(o)) for s, o in zip(sums, offsets)]
            return ctx.make_tuple(b, signature.return_type, values)

        return result(*[types.int64] * 8), codegen

    return product


@functools.cache
def _float_product(tokens, kind):
    """Intrinsic: a float tile times `tokens` float rows; four partial sums each, joined in one order."""
    load_weight, size = _LOADS[kind]
    result = types.UniTuple(F, tokens)
    chains = 4

    @intrinsic
    def product(context, weight, x, x_stride, inputs):
        def codegen(ctx, b, signature, args):
            weight, x, x_stride, inputs = args
            sums = [_stack_vector(b, F.llvm, chains) for _ in range(tokens)]

            def column(k, chain):
                address = b.add(weight, b.mul(k, I64(16 * size)))
                simd.prefetch.build(b, offset(b, address, PREFETCH))
                w = load_weight.build(b, address)
                for t in range(tokens):
                    at = b.add(b.add(x, b.mul(x_stride, I64(t))), b.mul(k, I64(4)))
                    total = simd.fma.build(b, w, simd.splat_f32_at.build(b, at), b.load(sums[t][chain]))
                    b.store(total, sums[t][chain])

            whole = b.sdiv(inputs, I64(chains))
            with cgutils.for_range(b, whole) as loop:
                for chain in range(chains):
                    column(b.add(b.mul(loop.index, I64(chains)), I64(chain)), chain)
            done = b.mul(whole, I64(chains))
            with cgutils.for_range(b, b.sub(inputs, done)) as loop:
                column(b.add(done, loop.index), 0)
            values = []
            for parts in sums:
                p = [b.load(part) for part in parts]
                values.append(b.fadd(b.fadd(p[0], p[1]), b.fadd(p[2], p[3])))
            return ctx.make_tuple(b, signature.return_type, values)

        return result(*[types.int64] * 4), codegen

    return product


@numba.njit(error_model="numpy")
def _finish(y, out, bias, residual):
    """Adds a row tile's bias and residual, where there are any, and stores it."""
    if bias != 0:
        y = add(y, load_f32(bias))
    if residual != 0:
        y = add(y, load_f32(residual))
    store_f32(out, y)


@numba.njit(error_model="numpy")
def _span(tile, n_rows, rows_each, n_tokens, tokens_each):
    """Row tiles and tokens that one tile of work covers; neighbours in `tile` share tokens."""
    across = (n_rows + rows_each - 1) // rows_each
    row, token = tile % across * rows_each, tile // across * tokens_each
    return row, min(row + rows_each, n_rows), token, min(token + tokens_each, n_tokens)


@functools.cache
def quantized_linear(bits: int, planes: int, kind: str, symmetric: bool) -> Kernel:
    """Kernel: out = activations x weights^T (+ bias) (+ residual).

    Args:
        bits: 4, 5, 6 or 8.
        planes: of the activations used, 1 or 2.
        kind: how scales are kept: "f16", "f32", "k32" or "k16".
        symmetric: codes are relative to the middle of their range, and there are no biases.
    """
    one = _quantized_product(1, bits, planes, kind, symmetric)
    many = _quantized_product(BLOCK, bits, planes, kind, symmetric)

    @kernel(f"linear {bits} bits x{planes} {kind}{' symmetric' if symmetric else ''}")
    def linear(arguments, tile, thread):
        (out, out_stride, weight, weight_stride, n_rows, rows_each, q, width, meta, n_tokens, tokens_each, groups,
         subgroups, bias, residual, residual_stride) = unpack(arguments, "iiiiiiiiiiiiiiii")  # fmt: skip
        first, last, token, end = _span(tile, n_rows, rows_each, n_tokens, tokens_each)
        for row in range(first, last):
            w = weight + row * weight_stride
            b = bias + row * 64 if bias != 0 else 0
            t = token
            while t < end:
                activations, numbers = q + t * 2 * width, meta + t * width
                o = out + t * out_stride + row * 64
                r = residual + t * residual_stride + row * 64 if residual != 0 else 0
                if t + BLOCK <= end:
                    y = many(w, activations, 2 * width, width, numbers, width, groups, subgroups)
                    _finish(y[0], o, b, r)
                    _finish(y[1], o + out_stride, b, r + residual_stride if r != 0 else 0)
                    _finish(y[2], o + 2 * out_stride, b, r + 2 * residual_stride if r != 0 else 0)
                    _finish(y[3], o + 3 * out_stride, b, r + 3 * residual_stride if r != 0 else 0)
                    t += BLOCK
                else:
                    single = one(w, activations, 2 * width, width, numbers, width, groups, subgroups)
                    _finish(single[0], o, b, r)
                    t += 1

    return linear


@functools.cache
def float_linear(kind: str) -> Kernel:
    """Kernel: out = x weights^T (+ bias) (+ residual) for weights of "f32", "f16" or "bf16"."""
    one, many = _float_product(1, kind), _float_product(BLOCK, kind)

    @kernel(f"linear {kind}")
    def linear(arguments, tile, thread):
        (out, out_stride, weight, weight_stride, n_rows, rows_each, x, x_stride, n_tokens, tokens_each, inputs, bias,
         residual, residual_stride) = unpack(arguments, "iiiiiiiiiiiiii")  # fmt: skip
        first, last, token, end = _span(tile, n_rows, rows_each, n_tokens, tokens_each)
        for row in range(first, last):
            w = weight + row * weight_stride
            b = bias + row * 64 if bias != 0 else 0
            t = token
            while t < end:
                o = out + t * out_stride + row * 64
                r = residual + t * residual_stride + row * 64 if residual != 0 else 0
                if t + BLOCK <= end:
                    y = many(w, x + t * x_stride, x_stride, inputs)
                    _finish(y[0], o, b, r)
                    _finish(y[1], o + out_stride, b, r + residual_stride if r != 0 else 0)
                    _finish(y[2], o + 2 * out_stride, b, r + 2 * residual_stride if r != 0 else 0)
                    _finish(y[3], o + 3 * out_stride, b, r + 3 * residual_stride if r != 0 else 0)
                    t += BLOCK
                else:
                    single = one(w, x + t * x_stride, x_stride, inputs)
                    _finish(single[0], o, b, r)
                    t += 1

    return linear
