"""`sparse_ffn_rows` for lists of one token each: two products of a vector with rows that a list names.

What it must move: for each listed neuron its rows of gate, up and down, that is 3 * d * 2 bytes of float16, and
3 * d * (bits / 8 + 4 / group) where quantized, but down's scales: they lie by groups of neurons, so a group that has
any of its neurons listed costs 4 bytes for each output. Inputs, h and partial sums stay in the L2 cache.

Grid: hidden (tiles of BS neurons, tokens) reads a row in pieces of BK values, consecutive along the row, so each warp's
loads are whole sectors whatever the list; sums are taken once, at the end of a row. down (tiles of BO outputs, chunks
of CHUNK list entries, tokens) would have only out / BO programs without chunks, too few to fill a GPU. Chunks are of
one length whatever the batch, and `add_chunks` adds them in order: no atomics, the same bits each time. Programs beyond
a list's count end at once, after one load.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cuda_kernels.activation import activate
from cuda_kernels.affine import down_tile, inside_of, outputs_of, row_dots


@triton.jit
def neurons_at(indices, entry, live, BLOCK: tl.constexpr):
    """Neurons that the entries of a list of units stand for, 64-bit."""
    unit = tl.load(indices + entry // BLOCK, mask=live, other=0).to(tl.int64)
    return unit * BLOCK + entry % BLOCK


@triton.jit
def hidden_one(
    x, gate, gate_scales, gate_biases, gate_bias, up, up_scales, up_biases, up_bias, values, indices, counts, h,
    width, x_stride, value_stride, list_stride, count_stride, h_stride,
    GATED: tl.constexpr, VALUED: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + token * count_stride) * BLOCK
    if tl.program_id(0) * BS < count:
        entry = tl.program_id(0) * BS + tl.arange(0, BS)
        live = entry < count
        rows = neurons_at(indices + token * list_stride, entry, live, BLOCK)
        mine = x + token * x_stride
        y = row_dots(mine, up, up_scales, up_biases, rows, live, width, BITS, GROUP, BS, BK)
        if UP_BIAS:
            y += tl.load(up_bias + rows, mask=live, other=0.0).to(tl.float32)
        if GATED:
            g = row_dots(mine, gate, gate_scales, gate_biases, rows, live, width, BITS, GROUP, BS, BK)
            if GATE_BIAS:
                g += tl.load(gate_bias + rows, mask=live, other=0.0).to(tl.float32)
            y *= activate(g, KIND)
        else:
            y = activate(y, KIND)
        if VALUED:
            y *= tl.load(values + token * value_stride + rows, mask=live, other=0.0).to(tl.float32)
        tl.store(h + token * h_stride + entry, y, mask=live)


@triton.jit
def down_one(
    h, down, scales, biases, indices, counts, parts, out, words, tokens, list_stride, count_stride, h_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, BR: tl.constexpr,
    BO: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    chunk = tl.program_id(1)
    token = tl.program_id(2).to(tl.int64)
    count = tl.load(counts + token * count_stride) * BLOCK
    if chunk * CHUNK < count:
        acc = tl.zeros([BR, BO], tl.float32)
        for start in range(chunk * CHUNK, tl.minimum(count, (chunk + 1) * CHUNK), BR):
            entry = start + tl.arange(0, BR)
            live = entry < count
            rows = neurons_at(indices + token * list_stride, entry, live, BLOCK)
            factor = tl.load(h + token * h_stride + entry, mask=live, other=0.0).to(tl.float32)
            w = down_tile(down, scales, biases, rows, live, tile, out, words, BITS, GROUP, BR, BO)
            acc += factor[:, None] * w.to(tl.float32)
        at = outputs_of(tile, words, BITS, BO)
        inside = inside_of(tile, at, words, out, BITS, BO)
        tl.store(parts + (chunk * tokens + token) * out + at, tl.sum(acc, 0), mask=inside)


@triton.jit
def add_chunks(
    parts, counts, bias, residual, y, out, tokens, chunk, count_stride, residual_stride,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """y = the sum of the chunks that a list fills, in order, plus bias and residual."""
    token = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BO + tl.arange(0, BO)
    inside = at < out
    count = tl.load(counts + token * count_stride) * BLOCK
    acc = tl.zeros([BO], tl.float32)
    for i in range(tl.cdiv(count, chunk)):
        acc += tl.load(parts + (i * tokens + token) * out + at, mask=inside, other=0.0)
    if BIAS:
        acc += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        acc += tl.load(residual + token * residual_stride + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * out + at, acc.to(y.dtype.element_ty), mask=inside)
