"""Matrix products with weights in tiles of 16 rows, for one token or many.

A lane of a vector is a row, so sums never cross lanes. A quantized tile is a run of groups; a group of `group_size`
inputs holds its codes, then 16 scales, then 16 biases (none if symmetric):

    4 bits, per 32 inputs:  4 x [16 rows][4 bytes]; byte i of quad j is input 4j+i low, input 16+4j+i high
    8 bits, per 32 inputs:  8 x [16 rows][4 bytes]; byte i of quad j is input 4j+i

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
from cpu_kernels.simd import I64, F, add, load_f32, offset, store_f32

PREFETCH = 1024
"""Bytes ahead of their use at which weights are asked for."""
BLOCK = 4
"""Tokens that share one unpacking of the weights."""
META = 32
"""Bytes of one activation group's numbers, see `rows.quantize_row`."""

_LOADS = {"f32": (simd.load_f32, 4), "f16": (simd.load_f16, 2), "bf16": (simd.load_bf16, 2)}


def tile_bytes(inputs: int, bits: int, group_size: int, scale_bytes: int, symmetric: bool) -> int:
    """Bytes of a tile of 16 quantized rows."""
    group = group_size * bits * 2 + 16 * scale_bytes * (1 if symmetric else 2)
    return inputs // group_size * group


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
    return [simd.low_nibbles.build(b, v) for v in loaded] + [simd.high_nibbles.build(b, v) for v in loaded]


def _integer_dot(b, codes, q, start):
    """Two chains, so that one dot product need not wait for the other."""
    chains = [start, simd.ints(0)]
    for j, code in enumerate(codes):
        quad = simd.splat_quad.build(b, offset(b, q, 4 * j))
        chains[j % 2] = simd.dot_u8_s8.build(b, chains[j % 2], code, quad)
    return b.add(*chains)


def _group_dot(b, codes, q, low, meta, bits, planes, symmetric):
    """Integer products of 32 inputs as floats, still to be multiplied by the weights' scale."""
    zero = simd.ints(0)
    start = zero
    if symmetric:
        total = simd.splat_i32_at.build(b, offset(b, meta, 8 if planes == 1 else 20))
        start = b.sub(zero, b.shl(total, simd.ints(bits - 1)))
    if planes == 1:
        dot = _integer_dot(b, codes, q, start)
    else:
        high = b.shl(_integer_dot(b, codes, q, zero), simd.ints(8))
        dot = b.add(high, _integer_dot(b, codes, low, start))
    scale = simd.splat_f32_at.build(b, offset(b, meta, 0 if planes == 1 else 12))
    return b.fmul(simd.to_float.build(b, dot), scale)


@functools.cache
def _quantized_product(tokens, bits, planes, scale_kind, symmetric):
    """Intrinsic: one tile of rows times `tokens` rows of activations -> that many vectors."""
    load_scale, scale_size = _LOADS[scale_kind]
    result = types.UniTuple(F, tokens)

    @intrinsic
    def product(context, weight, q, q_stride, width, meta, meta_stride, groups, subgroups):
        def codegen(ctx, b, signature, args):
            weight, q, q_stride, width, meta, meta_stride, groups, subgroups = args
            sums, offsets = _stack_vector(b, F.llvm, tokens), _stack_vector(b, F.llvm, tokens)
            at, column = cgutils.alloca_once_value(b, weight), cgutils.alloca_once_value(b, I64(0))
            code_bytes = b.mul(subgroups, I64(64 * bits))
            with cgutils.for_range(b, groups):
                scales = b.add(b.load(at), code_bytes)
                scale = load_scale.build(b, scales)
                bias = None if symmetric else load_scale.build(b, offset(b, scales, 16 * scale_size))
                with cgutils.for_range(b, subgroups):
                    codes = _unpacked(b, b.load(at), bits)
                    here = b.load(column)
                    for t in range(tokens):
                        row = b.add(b.add(q, b.mul(q_stride, I64(t))), here)
                        # 32 bytes of meta per 32 inputs: the offset of a group is that of its inputs.
                        numbers = b.add(b.add(meta, b.mul(meta_stride, I64(t))), here)
                        low = b.add(row, width)
                        dot = _group_dot(b, codes, row, low, numbers, bits, planes, symmetric)
                        b.store(simd.fma.build(b, dot, scale, b.load(sums[t])), sums[t])
                        if not symmetric:
                            total = simd.splat_f32_at.build(b, offset(b, numbers, 4 if planes == 1 else 16))
                            b.store(simd.fma.build(b, bias, total, b.load(offsets[t])), offsets[t])
                    b.store(offset(b, b.load(at), 64 * bits), at)
                    b.store(offset(b, here, 32), column)
                b.store(offset(b, b.load(at), 16 * scale_size * (1 if symmetric else 2)), at)
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
def quantized_linear(bits: int, planes: int, scale_kind: str, symmetric: bool) -> Kernel:
    """Kernel: out = activations x weights^T (+ bias) (+ residual).

    Args:
        bits: 4 or 8.
        planes: of the activations used, 1 or 2.
        scale_kind: "f16" or "f32", of scales and biases.
        symmetric: codes are relative to the middle of their range, and there are no biases.
    """
    one = _quantized_product(1, bits, planes, scale_kind, symmetric)
    many = _quantized_product(BLOCK, bits, planes, scale_kind, symmetric)

    @kernel(f"linear {bits} bits x{planes} {scale_kind}{' symmetric' if symmetric else ''}")
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
