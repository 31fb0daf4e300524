"""An FFN whose neurons are named by lists: one for each token, or one for the batch.

`sparse_ffn_one.py` and `sparse_ffn_union.py` hold the kernels, with what they must move and why their grids are such.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from cuda_kernels.activation import activate_torch
from cuda_kernels.launch import absent, along_last, empty, need_device, need_float, need_kind, up_to_power
from cuda_kernels.lists import RowList, mask_of_lists
from cuda_kernels.pack import Matrix, PackedFfn, unpacked
from cuda_kernels.sparse_ffn_one import add_chunks, down_one, hidden_one
from cuda_kernels.sparse_ffn_union import activate_union, down_union, up_union
from cuda_kernels.tune import Choice, pick

CHUNK = 256
"""List entries of a partial sum of `down_one`."""
CUTS = 4
UP_TILES = ((64, 64, 4, 4), (32, 128, 4, 4), (128, 64, 8, 3))
"""Neurons and inputs of a tile, warps, stages. With the same K-step of an instruction the sums are the same."""
DOWN_TILES = ((64, 128, 4, 4), (64, 64, 4, 4), (64, 256, 8, 3))
"""Neurons and outputs of a tile, warps, stages."""


def sparse_ffn_rows(
    x: torch.Tensor,
    ffn: PackedFfn,
    rows: RowList,
    activation: str,
    values: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """down h (+ bias, + residual), where h is 0 for neurons that no list names. Nothing else is read.

    h is act(gate x) * (up x), act(up x) without a gate, value * act(up x) if valued. Sums are taken in float32; h is
    kept in float32, but for a batch with one list, where it is kept in x's type.

    Args:
        x: [N, in].
        ffn: of `pack_ffn`.
        rows: of units of `ffn.block` neurons; each at most once in a list. N lists, or one for all.
        activation: "silu", "gelu", "gelu_tanh", "relu", "abs" or "none".
        values: [N, D] of a valued FFN.
        residual: [N, out].

    Returns:
        [N, out] in x's type.

    Raises:
        ValueError: shapes or types that do not fit, or tensors that are not on a GPU.

    Source: selective GEMM, Polar Sparsity (Shrestha et al. 2025), algorithm 3; LTE (Zheng et al. 2024), section 5.3.
    """
    _need(x, ffn, rows, activation, values, residual)
    need_device(x.device)
    x, tokens = along_last(x), len(x)
    values, residual = (None if t is None else along_last(t) for t in (values, residual))
    y = empty(tokens, ffn.shape[2], dtype=x.dtype, device=x.device)
    length = rows.indices.shape[1] * ffn.block
    shared = len(rows.count) == 1
    if tokens and shared and tokens > 1 and length:
        parts, chunk = _batch(x, ffn, rows, activation, values, length)
    elif tokens and length:
        parts, chunk = _one(x, ffn, rows, activation, values, length), CHUNK
    else:
        parts, chunk = y, CHUNK
    if tokens:
        stride = 0 if residual is None else residual.stride(0)
        add_chunks[(triton.cdiv(ffn.shape[2], 256), tokens)](
            parts, rows.count, absent(ffn.down_bias, y), absent(residual, y), y, ffn.shape[2], tokens, chunk,
            0 if shared else 1, stride, BIAS=ffn.down_bias is not None, RESIDUAL=residual is not None,
            BLOCK=ffn.block, BO=256,
        )  # fmt: skip
    return y


def _need(
    x: torch.Tensor,
    ffn: PackedFfn,
    rows: RowList,
    activation: str,
    values: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> None:
    need_kind(activation)
    need_float("x", x)
    inputs, neurons, out = ffn.shape
    if x.ndim != 2 or x.shape[1] != inputs:
        raise ValueError(f"x is {list(x.shape)}; this FFN takes [N, {inputs}]")
    if len(rows.count) not in (1, len(x)) or len(rows.indices) != len(rows.count):
        raise ValueError(f"{len(rows.indices)} lists with {len(rows.count)} counts; there must be 1 or {len(x)}")
    if (values is not None) != ffn.valued or (values is not None and values.shape != (len(x), neurons)):
        raise ValueError(f"values must be [{len(x)}, {neurons}] for a valued FFN, and None for another")
    if residual is not None and residual.shape != (len(x), out):
        raise ValueError(f"residual is {list(residual.shape)}; it must be [{len(x)}, {out}]")


def _matrix(matrix: Matrix | None, other: torch.Tensor) -> tuple[Any, Any, Any]:
    if matrix is None:
        return other, other, other
    return matrix.weight, absent(matrix.scales, other), absent(matrix.biases, other)


def _flags(ffn: PackedFfn, activation: str) -> dict[str, Any]:
    return {
        "GATED": ffn.gate is not None,
        "VALUED": ffn.valued,
        "GATE_BIAS": ffn.gate_bias is not None,
        "UP_BIAS": ffn.up_bias is not None,
        "BLOCK": ffn.block,
        "KIND": activation,
    }


def _one(
    x: torch.Tensor, ffn: PackedFfn, rows: RowList, activation: str, values: torch.Tensor | None, length: int
) -> torch.Tensor:
    tokens, (width, _, out) = len(x), ffn.shape
    count_stride = 1 if len(rows.count) > 1 else 0
    list_stride = rows.indices.stride(0) * count_stride
    h = empty(tokens, length, dtype=torch.float32, device=x.device)
    bs, bk = 8, up_to_power(width, 64, 512)
    hidden_one[(triton.cdiv(length, bs), tokens)](
        x, *_matrix(ffn.gate, x), absent(ffn.gate_bias, x), *_matrix(ffn.up, x), absent(ffn.up_bias, x),
        absent(values, x), rows.indices, rows.count, h, width, x.stride(0), 0 if values is None else values.stride(0),
        list_stride, count_stride, length, **_flags(ffn, activation), BITS=ffn.bits, GROUP=ffn.group, BS=bs, BK=bk,
    )  # fmt: skip
    chunks, words = triton.cdiv(length, CHUNK), ffn.down.weight.shape[1]
    parts = empty(chunks, tokens, out, dtype=torch.float32, device=x.device)
    bo = 128
    down_one[(_tiles(ffn, bo), chunks, tokens)](
        h, *_matrix(ffn.down, x), rows.indices, rows.count, parts, out, words, tokens, list_stride, count_stride,
        length, BITS=ffn.bits, GROUP=ffn.group, BLOCK=ffn.block, CHUNK=CHUNK, BR=16, BO=bo,
    )  # fmt: skip
    return parts


def _tiles(ffn: PackedFfn, bo: int) -> int:
    """Tiles of down's outputs."""
    if not ffn.bits:
        return int(triton.cdiv(ffn.shape[2], bo))
    return int(triton.cdiv(ffn.down.weight.shape[1], bo * ffn.bits // 32))


def cuts_of(width: int, length: int) -> tuple[int, int]:
    """In how many pieces the inputs of a layer, and its list, are cut: by its shape, not by its batch."""
    enough = length > 16384
    return (1 if width < 1024 or enough else CUTS), (1 if length < 1024 else CUTS)


def _batch(
    x: torch.Tensor, ffn: PackedFfn, rows: RowList, activation: str, values: torch.Tensor | None, length: int
) -> tuple[torch.Tensor, int]:
    """Partial sums of down, and list entries of each."""
    tokens, (width, _, out) = len(x), ffn.shape
    bn = up_to_power(tokens, 16, 64)
    key = (bn, ffn.shape, length, ffn.bits, str(x.dtype), str(ffn.up.weight.dtype), ffn.gate is not None)
    cuts, pieces = cuts_of(width, length)
    cut = triton.cdiv(triton.cdiv(width, cuts), 256) * 256
    sums = empty(2 if ffn.gate is not None else 1, cuts, tokens, length, dtype=torch.float32, device=x.device)
    h = empty(tokens, triton.cdiv(length, 256) * 256, dtype=x.dtype, device=x.device)

    def up(tile: Choice) -> None:
        up_union[(triton.cdiv(tokens, bn), triton.cdiv(length, tile["BS"]), cuts)](
            x, *_matrix(ffn.gate, x), *_matrix(ffn.up, x), rows.indices, rows.count, sums, tokens, width, length,
            x.stride(0), cut, cuts, GATED=ffn.gate is not None, BITS=ffn.bits, GROUP=ffn.group, BLOCK=ffn.block,
            BN=bn, **tile,
        )  # fmt: skip

    up(pick("up_union", key, [_tile(ffn, x, bs=bs, bk=bk, w=w, s=s) for bs, bk, w, s in UP_TILES], up))
    activate_union[(triton.cdiv(length, 256), tokens)](
        sums, absent(ffn.gate_bias, x), absent(ffn.up_bias, x), absent(values, x), rows.indices, rows.count, h,
        tokens, length, h.stride(0), 0 if values is None else values.stride(0), cuts, **_flags(ffn, activation),
        BS=256,
    )  # fmt: skip
    chunk = triton.cdiv(triton.cdiv(length, pieces), 64) * 64
    parts = empty(pieces, tokens, out, dtype=torch.float32, device=x.device)

    def down(tile: Choice) -> None:
        down_union[(triton.cdiv(tokens, bn), _tiles(ffn, tile["BO"]), pieces)](
            h, *_matrix(ffn.down, x), rows.indices, rows.count, parts, tokens, out, ffn.down.weight.shape[1],
            h.stride(0), chunk, BITS=ffn.bits, GROUP=ffn.group, BLOCK=ffn.block, BN=bn, **tile,
        )  # fmt: skip

    down(pick("down_union", key, [_tile(ffn, x, br=br, bo=bo, w=w, s=s) for br, bo, w, s in DOWN_TILES], down))
    return parts, chunk


def _tile(ffn: PackedFfn, x: torch.Tensor, w: int, s: int, **sizes: int) -> Choice:
    """A choice as the kernels take it: float32 takes half of what is read at a time, words at least 16."""
    if ffn.bits:
        sizes = {name: max(size, 512 // ffn.bits) if name == "bk" else size for name, size in sizes.items()}
    elif x.dtype == torch.float32:
        sizes = {name: size // 2 for name, size in sizes.items()}
    return {**{name.upper(): size for name, size in sizes.items()}, "num_warps": w, "num_stages": s}


def sparse_ffn_rows_torch(
    x: torch.Tensor,
    ffn: PackedFfn,
    rows: RowList,
    activation: str,
    values: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sparse_ffn_rows` in plain torch, on any device: everything is computed in float32, then masked."""
    _need(x, ffn, rows, activation, values, residual)
    gate, up, down = unpacked(ffn)
    inputs = x.float()

    def product(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = inputs @ weight.t()
        return y if bias is None else y + bias.float()

    h = product(up, ffn.up_bias)
    h = activate_torch(h, activation) if gate is None else activate_torch(product(gate, ffn.gate_bias), activation) * h
    if values is not None:
        h = h * values.float()
    units = ffn.shape[1] // ffn.block
    h = torch.where(mask_of_lists(rows, units).repeat_interleave(ffn.block, 1), h, 0)
    y = h @ down
    for part in (ffn.down_bias, residual):
        y = y if part is None else y + part.float()
    return y.to(x.dtype)
