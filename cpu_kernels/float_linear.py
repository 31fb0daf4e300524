"""Float weights times tokens: a tile is [inputs][16 rows], sums stay in float32."""

from __future__ import annotations

import functools

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels import simd
from cpu_kernels.compile import Kernel, kernel, unpack
from cpu_kernels.finish import finish
from cpu_kernels.integer_dots import instruction_set
from cpu_kernels.simd import I64, load_f32, offset
from cpu_kernels.tiles import PREFETCH

CHAINS = 4
"""Partial sums of a row, joined in one order."""
LOADS = {"f32": (simd.load_f32, 4), "f16": (simd.load_f16, 2), "bf16": (simd.load_bf16, 2)}


def block_tokens() -> int:
    """Tokens that share one reading of the weights: as many as there are registers for."""
    return 6 if instruction_set() == "vnni512" else 2


@functools.cache
def float_product(tokens: int, kind: str):
    """Intrinsic: a tile times `tokens` rows of floats; stores 16 sums for each."""
    load_weight, size = LOADS[kind]

    @intrinsic
    def product(context, out, weight, x, x_stride, inputs):
        def codegen(ctx, b, signature, args):
            out, weight, x, x_stride, inputs = args
            sums = [[cgutils.alloca_once_value(b, simd.floats(0)) for _ in range(CHAINS)] for _ in range(tokens)]

            def column(k, chain):
                address = b.add(weight, b.mul(k, I64(16 * size)))
                simd.prefetch.build(b, offset(b, address, PREFETCH))
                w = load_weight.build(b, address)
                for t in range(tokens):
                    at = b.add(b.add(x, b.mul(x_stride, I64(t))), b.mul(k, I64(4)))
                    total = simd.fma.build(b, w, simd.splat_f32_at.build(b, at), b.load(sums[t][chain]))
                    b.store(total, sums[t][chain])

            whole = b.sdiv(inputs, I64(CHAINS))
            with cgutils.for_range(b, whole) as loop:
                for chain in range(CHAINS):
                    column(b.add(b.mul(loop.index, I64(CHAINS)), I64(chain)), chain)
            done = b.mul(whole, I64(CHAINS))
            with cgutils.for_range(b, b.sub(inputs, done)) as loop:
                column(b.add(done, loop.index), 0)
            for t, parts in enumerate(sums):
                p = [b.load(part) for part in parts]
                total = b.fadd(b.fadd(p[0], p[1]), b.fadd(p[2], p[3]))
                simd.store_f32.build(b, offset(b, out, 64 * t), total)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return product


@functools.cache
def float_linear(kind: str) -> Kernel:
    """Kernel: out = tokens x W^T (+ bias) (+ residual).

    Args:
        kind: of the weights: "f32", "f16" or "bf16".

    Its arguments: out and its stride, weight, bytes of a tile, number of tiles, tiles of one piece of work, x, its
    stride and the bytes between the rows of threads, number of tokens, tokens of one piece of work, inputs, bias,
    residual (0 for none) and its stride, scratch memory and bytes of it for each thread.
    """
    block = block_tokens()
    one, many = float_product(1, kind), float_product(block, kind)

    @kernel(f"linear {kind}")
    def linear(arguments, tile, thread):
        (out, out_stride, weight, tile_bytes, n_tiles, each, x, x_stride, x_each, n_tokens, tokens_each, inputs, bias,
         residual, residual_stride, scratch, scratch_each) = unpack(arguments, "iiiiiiiiiiiiiiiii")  # fmt: skip
        across = (n_tiles + each - 1) // each
        first, t = tile % across * each, tile // across * tokens_each
        end = min(t + tokens_each, n_tokens)
        sums, rows = scratch + thread * scratch_each, x + thread * x_each
        while t < end:
            count = block if t + block <= end else 1
            for row in range(first, min(first + each, n_tiles)):
                w = weight + row * tile_bytes
                if count == block:
                    many(sums, w, rows + t * x_stride, x_stride, inputs)
                else:
                    one(sums, w, rows + t * x_stride, x_stride, inputs)
                for i in range(count):
                    r = residual + (t + i) * residual_stride + row * 64 if residual != 0 else 0
                    y = load_f32(sums + 64 * i)
                    finish(y, out + (t + i) * out_stride + row * 64, bias + row * 64 if bias != 0 else 0, r)
            t += count

    return linear


def scratch_bytes() -> int:
    """Memory that each thread needs."""
    return 64 * block_tokens()
