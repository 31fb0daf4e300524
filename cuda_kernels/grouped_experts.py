"""An FFN of experts for many tokens, each of which asks for some: the tokens of an expert are multiplied together.

What it must move: each expert that anybody asked for once, d * block * 2 bytes of float16 a matrix, from memory, and
again for each tile of BM tokens, from L2. With hundreds of tokens this is bound by arithmetic, which grouping leaves
out in proportion for gate and up.

Grid: `lists_of_mask` makes each expert's list of tokens. `grouped_hidden` (tiles of an expert's neurons, tiles of its
tokens) gathers inputs by that list; programs beyond its count end at once. `grouped_down` (tiles of tokens, tiles of
outputs) goes over the experts that any token of its tile asked for, and takes h of the others as 0. So an output is one
sum in a register: no atomics, which would add in any order, and no [experts, tokens, out] to merge, which moves 8 bytes
for each 2 * block operations (a block of 128 would wait for memory four times as long as for arithmetic). The price is
that down is left out only where no token of a tile asked for an expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cuda_kernels.activation import activate
from cuda_kernels.affine import add_products, down_tile, inside_of, outputs_of
from cuda_kernels.launch import absent, along_last, empty, need_device, need_float, need_kind, up_to_power
from cuda_kernels.lists import RowList, lists_of_mask, mask_of_lists
from cuda_kernels.pack import PackedFfn
from cuda_kernels.sparse_ffn_rows import _matrix, sparse_ffn_rows_torch


@triton.jit
def grouped_hidden(
    x, gate, gate_scales, gate_biases, gate_bias, up, up_scales, up_biases, up_bias, lists, counts, h,
    tokens, width, neurons, x_stride, tiles,
    GATED: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    expert = (tl.program_id(0) // tiles).to(tl.int64)
    count = tl.load(counts + expert)
    if tl.program_id(1) * BM < count:
        entry = tl.program_id(1) * BM + tl.arange(0, BM)
        there = entry < count
        token = tl.load(lists + expert * tokens + entry, mask=there, other=0).to(tl.int64)
        own = tl.program_id(0) % tiles * BS + tl.arange(0, BS)
        live = own < BLOCK
        rows = expert * BLOCK + own
        y = tl.zeros([BM, BS], tl.float32)
        y = add_products(
            y, x, token * x_stride, there, up, up_scales, up_biases, rows, live, width, 0, width, BITS, GROUP, BK
        )
        if UP_BIAS:
            y += tl.load(up_bias + rows, mask=live, other=0.0).to(tl.float32)[None, :]
        if GATED:
            g = tl.zeros([BM, BS], tl.float32)
            g = add_products(
                g, x, token * x_stride, there, gate, gate_scales, gate_biases, rows, live, width, 0, width, BITS,
                GROUP, BK,
            )  # fmt: skip
            if GATE_BIAS:
                g += tl.load(gate_bias + rows, mask=live, other=0.0).to(tl.float32)[None, :]
            y *= activate(g, KIND)
        else:
            y = activate(y, KIND)
        place = token[:, None] * neurons + rows[None, :]
        tl.store(h + place, y.to(h.dtype.element_ty), mask=there[:, None] & live[None, :])


@triton.jit
def grouped_down(
    h, down, scales, biases, bias, residual, mask, lists, counts, y, tokens, experts, neurons, out, words,
    residual_stride, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    there = token < tokens
    wide = token.to(tl.int64)
    count = tl.load(counts + tl.program_id(0))
    steps: tl.constexpr = (BLOCK + BR - 1) // BR
    acc = tl.zeros([BM, BO], tl.float32)
    for step in range(count * steps):
        expert = tl.load(lists + tl.program_id(0) * experts + step // steps).to(tl.int64)
        own = step % steps * BR + tl.arange(0, BR)
        live = own < BLOCK
        rows = expert * BLOCK + own
        asked = tl.load(mask + wide * experts + expert, mask=there, other=0) != 0
        place = wide[:, None] * neurons + rows[None, :]
        v = tl.load(h + place, mask=asked[:, None] & live[None, :], other=0.0)
        w = down_tile(down, scales, biases, rows, live, tile, out, words, BITS, GROUP, BR, BO)
        acc = tl.dot(v, w.to(v.dtype), acc, input_precision="ieee")
    at = outputs_of(tile, words, BITS, BO)
    inside = inside_of(tile, at, words, out, BITS, BO)
    if BIAS:
        acc += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    both = there[:, None] & inside[None, :]
    if RESIDUAL:
        place = wide[:, None] * residual_stride + at[None, :]
        acc += tl.load(residual + place, mask=both, other=0.0).to(tl.float32)
    tl.store(y + wide[:, None] * out + at[None, :], acc.to(y.dtype.element_ty), mask=both)


def grouped_experts(
    x: torch.Tensor, ffn: PackedFfn, experts: RowList, activation: str, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """down h (+ bias, + residual), where h is 0 for experts that a token did not ask for.

    h is kept in x's type, sums are taken in float32.

    Args:
        x: [N, in].
        ffn: of `pack_ffn`; an expert is its `block` neurons. Not valued.
        experts: N lists, each expert at most once in a list, or one for all.
        activation: "silu", "gelu", "gelu_tanh", "relu", "abs" or "none".
        residual: [N, out].

    Returns:
        [N, out] in x's type.

    Raises:
        ValueError: shapes or types that do not fit, or tensors that are not on a GPU.

    Source: D2DMoE (Szatkowski et al. 2024), section 3 and appendix on the implementation.
    """
    _need(x, ffn, experts, activation)
    need_device(x.device)
    x, (width, neurons, out) = along_last(x), ffn.shape
    tokens, units = len(x), neurons // ffn.block
    if residual is not None and residual.shape != (tokens, out):
        raise ValueError(f"residual is {list(residual.shape)}; it must be [{tokens}, {out}]")
    residual = None if residual is None else along_last(residual)
    y = empty(tokens, out, dtype=x.dtype, device=x.device)
    if not tokens:
        return y
    bm = up_to_power(tokens, 16, 64)
    tiles = triton.cdiv(tokens, bm)
    mask = torch.zeros(tiles * bm, units, dtype=torch.bool, device=x.device)
    mask[:tokens] = mask_of_lists(experts, units)
    by_expert, by_tile = lists_of_mask(mask[:tokens].t()), lists_of_mask(mask.view(tiles, bm, units).any(1))
    h = empty(tokens, neurons, dtype=x.dtype, device=x.device)
    half = 2 if x.dtype == torch.float32 else 1
    bs, bk = up_to_power(ffn.block, 16, 64), 512 // ffn.bits if ffn.bits else 64 // half
    across = triton.cdiv(ffn.block, bs)
    grouped_hidden[(units * across, tiles)](
        x, *_matrix(ffn.gate, x), absent(ffn.gate_bias, x), *_matrix(ffn.up, x), absent(ffn.up_bias, x),
        by_expert.indices, by_expert.count, h, tokens, width, neurons, x.stride(0), across,
        GATED=ffn.gate is not None, GATE_BIAS=ffn.gate_bias is not None, UP_BIAS=ffn.up_bias is not None,
        BITS=ffn.bits, GROUP=ffn.group, BLOCK=ffn.block, KIND=activation, BM=bm, BS=bs, BK=bk,
    )  # fmt: skip
    words, bo = ffn.down.weight.shape[1], 128 // half
    wide = triton.cdiv(words, bo * ffn.bits // 32) if ffn.bits else triton.cdiv(out, bo)
    grouped_down[(tiles, wide)](
        h, *_matrix(ffn.down, x), absent(ffn.down_bias, x), absent(residual, x), mask.view(torch.uint8),
        by_tile.indices, by_tile.count, y, tokens, units, neurons, out, words,
        0 if residual is None else residual.stride(0), BIAS=ffn.down_bias is not None, RESIDUAL=residual is not None,
        BITS=ffn.bits, GROUP=ffn.group, BLOCK=ffn.block, BM=bm, BR=up_to_power(ffn.block, 16, 64), BO=bo,
    )  # fmt: skip
    return y


def _need(x: torch.Tensor, ffn: PackedFfn, experts: RowList, activation: str) -> None:
    need_kind(activation)
    need_float("x", x)
    if ffn.valued:
        raise ValueError("grouped experts take no values: run a valued FFN by sparse_ffn_rows")
    if x.ndim != 2 or x.shape[1] != ffn.shape[0]:
        raise ValueError(f"x is {list(x.shape)}; this FFN takes [N, {ffn.shape[0]}]")
    if len(experts.indices) not in (1, len(x)) or len(experts.indices) != len(experts.count):
        raise ValueError(f"{len(experts.indices)} lists with {len(experts.count)} counts; there must be 1 or {len(x)}")


def grouped_experts_torch(
    x: torch.Tensor, ffn: PackedFfn, experts: RowList, activation: str, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """`grouped_experts` in plain torch, on any device."""
    _need(x, ffn, experts, activation)
    return sparse_ffn_rows_torch(x, ffn, experts, activation, residual=residual)
