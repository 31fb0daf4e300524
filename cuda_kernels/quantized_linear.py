"""A linear whose weights stay in their affine groups of 4 or 8 bits, and become floats in registers.

What it must move: bits / 8 + 2 * scale bytes / group of each weight, once for each tile of BN tokens, of which all but
the first come from L2. Grid: (tiles of BS outputs, tiles of tokens). One token takes products along rows, as rows of an
FFN do (`row_dots`), eight outputs a program, so that 4096 outputs are 512 programs; more tokens take tensor cores
(`add_products`). A row's inputs are never cut between programs: one sum, the same whatever the batch of its kind.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cuda_kernels.affine import add_products, row_dots
from cuda_kernels.launch import absent, along_last, empty, need_device, need_float, up_to_power
from cuda_kernels.pack import Matrix


@triton.jit
def linear_one(
    x, weight, scales, biases, bias, y, width, out, BIAS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BS + tl.arange(0, BS)
    live = at < out
    acc = row_dots(x, weight, scales, biases, at.to(tl.int64), live, width, BITS, GROUP, BS, BK)
    if BIAS:
        acc += tl.load(bias + at, mask=live, other=0.0).to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=live)


@triton.jit
def linear_many(
    x, weight, scales, biases, bias, y, tokens, width, out, x_stride, BIAS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BS + tl.arange(0, BS)
    live = at < out
    token = tl.program_id(1) * BN + tl.arange(0, BN)
    there = token < tokens
    wide = token.to(tl.int64)
    acc = tl.zeros([BN, BS], tl.float32)
    acc = add_products(
        acc, x, wide * x_stride, there, weight, scales, biases, at.to(tl.int64), live, width, 0, width, BITS, GROUP, BK
    )
    if BIAS:
        acc += tl.load(bias + at, mask=live, other=0.0).to(tl.float32)[None, :]
    place = wide[:, None] * out + at[None, :]
    tl.store(y + place, acc.to(y.dtype.element_ty), mask=there[:, None] & live[None, :])


def quantized_linear(
    x: torch.Tensor, matrix: Matrix, bits: int, group: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T (+ bias), with sums in float32.

    Args:
        x: [N, in].
        matrix: int32 words [out, in * bits / 32] and scales and biases [out, in / group], as `pack_ffn` has them of up.
        bits: 4 or 8.
        group: values of a scale: 32, 64 or 128.
        bias: [out].

    Returns:
        [N, out] in x's type.

    Raises:
        ValueError: shapes or types that do not fit, or tensors that are not on a GPU.
    """
    width, out = _need(x, matrix, bits, group, bias)
    need_device(x.device)
    x, tokens = along_last(x), len(x)
    y = empty(tokens, out, dtype=x.dtype, device=x.device)
    words = (x, matrix.weight, matrix.scales, matrix.biases, absent(bias, x), y)
    if tokens == 1:
        bs = 8
        linear_one[(triton.cdiv(out, bs),)](
            *words, width, out, BIAS=bias is not None, BITS=bits, GROUP=group, BS=bs, BK=up_to_power(width, 64, 512)
        )
    elif tokens:
        bn, bs = up_to_power(tokens, 16, 64), 64
        linear_many[(triton.cdiv(out, bs), triton.cdiv(tokens, bn))](
            *words, tokens, width, out, x.stride(0), BIAS=bias is not None, BITS=bits, GROUP=group, BN=bn, BS=bs,
            BK=512 // bits,
        )  # fmt: skip
    return y


def _need(x: torch.Tensor, matrix: Matrix, bits: int, group: int, bias: torch.Tensor | None) -> tuple[int, int]:
    need_float("x", x)
    if bits not in (4, 8) or matrix.scales is None or matrix.biases is None:
        raise ValueError(f"bits is {bits}; quantized linears have 4 or 8, and scales and biases")
    out, width = matrix.weight.shape[0], matrix.weight.shape[1] * 32 // bits
    if x.ndim != 2 or x.shape[1] != width or matrix.scales.shape != (out, width // group):
        raise ValueError(
            f"x {list(x.shape)} and scales {list(matrix.scales.shape)} do not fit a matrix [{out}, {width}] in groups "
            f"of {group}"
        )
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias is {list(bias.shape)}; it must be [{out}]")
    return width, out


def float_rows(matrix: Matrix, bits: int, group: int, index: torch.Tensor) -> torch.Tensor:
    """Rows of a quantized matrix [out, in] in float32: [N, in]."""
    assert matrix.scales is not None and matrix.biases is not None
    shifts = torch.arange(32 // bits, device=index.device, dtype=torch.int32) * bits
    codes = ((matrix.weight[index][:, :, None] >> shifts) & (2**bits - 1)).flatten(1).float()
    scales, biases = (part[index].float().repeat_interleave(group, 1) for part in (matrix.scales, matrix.biases))
    return codes * scales + biases


def quantized_linear_torch(
    x: torch.Tensor, matrix: Matrix, bits: int, group: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`quantized_linear` in plain torch, on any device."""
    _, out = _need(x, matrix, bits, group, bias)
    y = x.float() @ float_rows(matrix, bits, group, torch.arange(out, device=x.device)).t()
    return (y if bias is None else y + bias.float()).to(x.dtype)
