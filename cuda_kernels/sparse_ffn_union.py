"""`sparse_ffn_rows` for one list of a batch: two matrix products whose weights are rows that the list names.

What it must move: the listed rows of gate, up and down once, for all tokens. At OPT-66B's shape (d 9216, 64 tokens) and
a tenth of 36,864 neurons that is 136 MB. Inputs are read again by each tile of neurons, from L2: 64 * d * 2 bytes for
BS * d * 2 bytes of weights, so tiles are as wide as the batch. Then 3,686 neurons are only 58 tiles, fewer than an H100
has processors; hence a product is also cut along its inputs.

Grid: up (tokens, tiles of BS neurons, cuts of the inputs) leaves partial sums, which `activate_union` adds, biases and
activates into h. down (tokens, tiles of BO outputs, cuts of the list) leaves partial sums for `add_chunks`. Tokens come
first, so that programs which share weights run side by side. How often is cut depends on the layer alone, never on the
batch. Loads of rows are of consecutive values, 16 bytes a thread; indices are read once before the loop over inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cuda_kernels.activation import activate
from cuda_kernels.affine import add_products, down_tile, inside_of, outputs_of
from cuda_kernels.sparse_ffn_one import neurons_at


@triton.jit
def up_union(
    x, gate, gate_scales, gate_biases, up, up_scales, up_biases, indices, counts, parts, tokens, width, length,
    x_stride, cut, cuts, GATED: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    BN: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    count = tl.load(counts) * BLOCK
    piece = tl.program_id(2)
    if tl.program_id(1) * BS < count:
        entry = tl.program_id(1) * BS + tl.arange(0, BS)
        live = entry < count
        rows = neurons_at(indices, entry, live, BLOCK)
        token = tl.program_id(0) * BN + tl.arange(0, BN)
        there = token < tokens
        x_rows = token.to(tl.int64) * x_stride
        start = piece * cut
        end = tl.minimum(width, start + cut)
        place = (piece * tokens + token).to(tl.int64)[:, None] * length + entry[None, :]
        mask = there[:, None] & live[None, :]
        acc = tl.zeros([BN, BS], tl.float32)
        acc = add_products(
            acc, x, x_rows, there, up, up_scales, up_biases, rows, live, width, start, end, BITS, GROUP, BK
        )
        tl.store(parts + place, acc, mask=mask)
        if GATED:
            acc = tl.zeros([BN, BS], tl.float32)
            acc = add_products(
                acc, x, x_rows, there, gate, gate_scales, gate_biases, rows, live, width, start, end, BITS, GROUP, BK
            )
            tl.store(parts + tl.cast(cuts, tl.int64) * tokens * length + place, acc, mask=mask)


@triton.jit
def activate_union(
    parts, gate_bias, up_bias, values, indices, counts, h, tokens, length, h_stride, value_stride, cuts,
    GATED: tl.constexpr, VALUED: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, BLOCK: tl.constexpr,
    KIND: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """h of a batch's neurons from the partial sums of their products; 0 in what is left of a tile of BS entries."""
    token = tl.program_id(1).to(tl.int64)
    count = tl.load(counts) * BLOCK
    if tl.program_id(0) * BS < count:
        entry = tl.program_id(0) * BS + tl.arange(0, BS)
        live = entry < count
        rows = neurons_at(indices, entry, live, BLOCK)
        y = tl.zeros([BS], tl.float32)
        for i in range(cuts):
            y += tl.load(parts + (i * tokens + token) * length + entry, mask=live, other=0.0)
        if UP_BIAS:
            y += tl.load(up_bias + rows, mask=live, other=0.0).to(tl.float32)
        if GATED:
            g = tl.zeros([BS], tl.float32)
            for i in range(cuts, 2 * cuts):
                g += tl.load(parts + (i * tokens + token) * length + entry, mask=live, other=0.0)
            if GATE_BIAS:
                g += tl.load(gate_bias + rows, mask=live, other=0.0).to(tl.float32)
            y *= activate(g, KIND)
        else:
            y = activate(y, KIND)
        if VALUED:
            y *= tl.load(values + token * value_stride + rows, mask=live, other=0.0).to(tl.float32)
        tl.store(h + token * h_stride + entry, tl.where(live, y, 0.0).to(h.dtype.element_ty))


@triton.jit
def down_union(
    h, down, scales, biases, indices, counts, parts, tokens, out, words, h_stride, cut,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    BO: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    piece = tl.program_id(2)
    count = tl.load(counts) * BLOCK
    if piece * cut < count:
        token = tl.program_id(0) * BN + tl.arange(0, BN)
        there = token < tokens
        acc = tl.zeros([BN, BO], tl.float32)
        for start in range(piece * cut, tl.minimum(count, (piece + 1) * cut), BR):
            entry = start + tl.arange(0, BR)
            live = entry < count
            rows = neurons_at(indices, entry, live, BLOCK)
            # Not masked by the count, which would make loads of single values of it; h is 0 up to there.
            place = token.to(tl.int64)[:, None] * h_stride + entry[None, :]
            v = tl.load(h + place, mask=there[:, None], other=0.0)
            w = down_tile(down, scales, biases, rows, live, tile, out, words, BITS, GROUP, BR, BO)
            acc = tl.dot(v, w.to(v.dtype), acc, input_precision="ieee")
        at = outputs_of(tile, words, BITS, BO)
        inside = inside_of(tile, at, words, out, BITS, BO)
        place = (piece * tokens + token).to(tl.int64)[:, None] * out + at[None, :]
        tl.store(parts + place, acc, mask=there[:, None] & inside[None, :])
