"""Weights read by kernels: floats, or affine groups that are turned into floats in registers.

BITS is 0 for floats, 4 or 8; GROUP the values of a scale; PER = 32 / BITS the values of a word. In rows of gate and up
value PER * w + i is field i of word w; in rows of down it is value i * words + w (see `pack.py`). Rows are 64-bit, so
that products with a width do not overflow.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fields(words, lane, BITS: tl.constexpr):
    """Codes of words as float32; the two have shapes that broadcast."""
    return ((words >> (lane * BITS)) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def row_dots(
    x, weight, scales, biases, rows, live, width, BITS: tl.constexpr, GROUP: tl.constexpr, BS: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Products of rows [BS] with one vector of `width` values, in float32; 0 for rows that are not live."""
    if BITS == 0:
        acc = tl.zeros([BS, BK], tl.float32)
        for k in range(0, width, BK):
            at = k + tl.arange(0, BK)
            inside = at < width
            w = tl.load(weight + rows[:, None] * width + at[None, :], mask=live[:, None] & inside[None, :], other=0.0)
            v = tl.load(x + at, mask=inside, other=0.0)
            acc += w.to(tl.float32) * v.to(tl.float32)[None, :]
        total = tl.sum(acc, 1)
    else:
        PER: tl.constexpr = 32 // BITS
        BW: tl.constexpr = BK // PER
        lane = tl.arange(0, PER)
        words = width // PER
        sums = tl.zeros([BS, BW], tl.float32)
        for k in range(0, words, BW):
            at = k + tl.arange(0, BW)
            inside = at < words
            mask = live[:, None] & inside[None, :]
            packed = tl.load(weight + rows[:, None] * words + at[None, :], mask=mask, other=0)
            v = tl.load(x + at[:, None] * PER + lane[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
            dots = tl.sum(fields(packed[:, :, None], lane[None, None, :], BITS) * v[None, :, :], 2)
            place = rows[:, None] * (width // GROUP) + (at * PER // GROUP)[None, :]
            scale = tl.load(scales + place, mask=mask, other=0.0).to(tl.float32)
            bias = tl.load(biases + place, mask=mask, other=0.0).to(tl.float32)
            sums += scale * dots + bias * tl.sum(v, 1)[None, :]
        total = tl.sum(sums, 1)
    return total


@triton.jit
def add_products(
    acc, x, x_rows, x_live, weight, scales, biases, rows, live, width, start, end, BITS: tl.constexpr,
    GROUP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc [BN, BS] += x [BN, start..end] times rows [BS]; start is a multiple of BK.

    Args:
        x_rows: int64 [BN], where each token's inputs begin.
        x_live: [BN], tokens that there are.
    """
    if BITS == 0:
        for k in range(start, end, BK):
            at = k + tl.arange(0, BK)
            inside = at < end
            v = tl.load(x + x_rows[:, None] + at[None, :], mask=x_live[:, None] & inside[None, :], other=0.0)
            w = tl.load(weight + rows[None, :] * width + at[:, None], mask=live[None, :] & inside[:, None], other=0.0)
            acc = tl.dot(v, w.to(v.dtype), acc, input_precision="ieee")
    else:
        PER: tl.constexpr = 32 // BITS
        BW: tl.constexpr = BK // PER
        words = width // PER
        for k in range(start // PER, end // PER, BW):
            at = k + tl.arange(0, BW)
            inside = at < end // PER
            mask = live[None, :] & inside[:, None]
            packed = tl.load(weight + rows[None, :] * words + at[:, None], mask=mask, other=0)
            place = rows[None, :] * (width // GROUP) + (at * PER // GROUP)[:, None]
            scale = tl.load(scales + place, mask=mask, other=0.0).to(tl.float32)
            bias = tl.load(biases + place, mask=mask, other=0.0).to(tl.float32)
            for lane in tl.static_range(PER):
                v = tl.load(
                    x + x_rows[:, None] + (at * PER + lane)[None, :], mask=x_live[:, None] & inside[None, :], other=0.0
                )
                w = fields(packed, lane, BITS) * scale + bias
                acc = tl.dot(v, w.to(v.dtype), acc, input_precision="ieee")
    return acc


@triton.jit
def down_tile(
    weight, scales, biases, rows, live, tile, out, words, BITS: tl.constexpr, GROUP: tl.constexpr, BR: tl.constexpr,
    BO: tl.constexpr,
):  # fmt: skip
    """Rows [BR] of down for outputs of a tile: [BR, BO], float32 where quantized; `outputs_of` says which they are."""
    if BITS == 0:
        at = tile * BO + tl.arange(0, BO)
        w = tl.load(weight + rows[:, None] * out + at[None, :], mask=live[:, None] & (at < out)[None, :], other=0.0)
    else:
        PER: tl.constexpr = 32 // BITS
        BW: tl.constexpr = BO // PER
        at = tile * BW + tl.arange(0, BW)
        lane = tl.arange(0, PER)
        mask = live[:, None] & (at < words)[None, :]
        packed = tl.load(weight + rows[:, None] * words + at[None, :], mask=mask, other=0)
        place = lane[None, :, None] * words + at[None, None, :] + (rows // GROUP)[:, None, None] * (PER * words)
        scale = tl.load(scales + place, mask=mask[:, None, :], other=0.0).to(tl.float32)
        bias = tl.load(biases + place, mask=mask[:, None, :], other=0.0).to(tl.float32)
        w = tl.reshape(fields(packed[:, None, :], lane[None, :, None], BITS) * scale + bias, [BR, BO])
    return w


@triton.jit
def outputs_of(tile, words, BITS: tl.constexpr, BO: tl.constexpr):
    """Outputs [BO] of a tile of down; those of missing words lie beyond the last output, by `inside_of`."""
    column = tl.arange(0, BO)
    if BITS == 0:
        at = tile * BO + column
    else:
        BW: tl.constexpr = BO // (32 // BITS)
        at = (column // BW) * words + tile * BW + column % BW
    return at


@triton.jit
def inside_of(tile, at, words, out, BITS: tl.constexpr, BO: tl.constexpr):
    """Which columns of a tile of down are outputs."""
    inside = at < out
    if BITS != 0:
        BW: tl.constexpr = BO // (32 // BITS)
        inside = inside & (tile * BW + tl.arange(0, BO) % BW < words)
    return inside
