"""A linear that leaves out inputs that no list names: its weights lie an input a row, as down's do in an FFN.

What it must move: for each listed input its row of outputs, 2 * out bytes of float16, or out * (bits / 8) and the
scales of its group where quantized. Grids and sums are those of down (`sparse_ffn_one.py`, `sparse_ffn_union.py`);
`listed_inputs` gathers what is multiplied with the rows, 4 bytes for each list entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from cuda_kernels.launch import absent, along_last, empty, need_device, need_float, up_to_power
from cuda_kernels.lists import RowList, mask_of_lists
from cuda_kernels.pack import Matrix, turned_matrix, unpacked_turned
from cuda_kernels.sparse_ffn_one import add_chunks, down_one
from cuda_kernels.sparse_ffn_rows import CHUNK
from cuda_kernels.sparse_ffn_union import down_union


@dataclass(frozen=True, slots=True)
class InputMajor:
    """A matrix [out, in] by rows of its inputs.

    Args:
        rows: as down of a PackedFfn.
        bias: [out].
        shape: inputs, outputs.
        bits, group: as of a PackedFfn.
    """

    rows: Matrix
    bias: torch.Tensor | None
    shape: tuple[int, int]
    bits: int
    group: int


def pack_inputs(weight: Any, bias: torch.Tensor | None, device: str | torch.device = "cuda") -> InputMajor:
    """Moves a matrix to the device.

    Args:
        weight: [out, in], as `pack_ffn` takes down.
        bias: [out], on the device, or None.

    Raises:
        ValueError: bits or groups without a kernel.
    """
    rows, bits, group = turned_matrix(weight, torch.device(device))
    return InputMajor(rows, bias, (weight.shape[1], weight.shape[0]), bits, group)


@triton.jit
def listed_inputs(
    x, indices, counts, h, x_stride, list_stride, count_stride, h_stride, BS: tl.constexpr
):  # fmt: skip
    """Inputs in the order of a list; 0 in what is left of a tile of BS entries."""
    token = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + token * count_stride)
    if tl.program_id(0) * BS < count:
        entry = tl.program_id(0) * BS + tl.arange(0, BS)
        live = entry < count
        at = tl.load(indices + token * list_stride + entry, mask=live, other=0)
        value = tl.load(x + token * x_stride + at, mask=live, other=0.0)
        tl.store(h + token * h_stride + entry, value)


def sparse_inputs(x: torch.Tensor, weight: InputMajor, rows: RowList) -> torch.Tensor:
    """x W^T (+ bias) with 0 for inputs that no list names, whose weights are not read. Sums are taken in float32.

    Args:
        x: [N, in].
        weight: of `pack_inputs`.
        rows: inputs, each at most once in a list. N lists, or one for all.

    Returns:
        [N, out] in x's type.

    Raises:
        ValueError: shapes or types that do not fit, or tensors that are not on a GPU.

    Source: TEAL (Liu et al. 2024), section 4.4.
    """
    _need(x, weight, rows)
    need_device(x.device)
    x, tokens, (_, out) = along_last(x), len(x), weight.shape
    y = empty(tokens, out, dtype=x.dtype, device=x.device)
    length = rows.indices.shape[1]
    count_stride = 1 if len(rows.count) > 1 else 0
    list_stride = rows.indices.stride(0) * count_stride
    if not tokens:
        return y
    h = empty(tokens, triton.cdiv(length, 256) * 256, dtype=x.dtype, device=x.device)
    parts, chunk = y, CHUNK
    if length:
        listed_inputs[(triton.cdiv(length, 256), tokens)](
            x, rows.indices, rows.count, h, x.stride(0), list_stride, count_stride, h.stride(0), BS=256
        )
        matrix = (weight.rows.weight, absent(weight.rows.scales, x), absent(weight.rows.biases, x))
        words, kinds = weight.rows.weight.shape[1], {"BITS": weight.bits, "GROUP": weight.group, "BLOCK": 1}
        bo = 64 if x.dtype == torch.float32 else 128
        tiles = triton.cdiv(words, bo * weight.bits // 32) if weight.bits else triton.cdiv(out, bo)
        if tokens > 1 and len(rows.count) == 1:
            chunk = triton.cdiv(length, 64) * 64
            parts = empty(1, tokens, out, dtype=torch.float32, device=x.device)
            bn = up_to_power(tokens, 16, 64)
            down_union[(triton.cdiv(tokens, bn), tiles, 1)](
                h, *matrix, rows.indices, rows.count, parts, tokens, out, words, h.stride(0), chunk, **kinds, BN=bn,
                BR=32, BO=bo,
            )  # fmt: skip
        else:
            chunks = triton.cdiv(length, CHUNK)
            parts = empty(chunks, tokens, out, dtype=torch.float32, device=x.device)
            down_one[(tiles, chunks, tokens)](
                h, *matrix, rows.indices, rows.count, parts, out, words, tokens, list_stride, count_stride,
                h.stride(0), **kinds, CHUNK=CHUNK, BR=16, BO=bo,
            )  # fmt: skip
    add_chunks[(triton.cdiv(out, 256), tokens)](
        parts, rows.count, absent(weight.bias, y), y, y, out, tokens, chunk, count_stride, 0,
        BIAS=weight.bias is not None, RESIDUAL=False, BLOCK=1, BO=256,
    )  # fmt: skip
    return y


def _need(x: torch.Tensor, weight: InputMajor, rows: RowList) -> None:
    need_float("x", x)
    if x.ndim != 2 or x.shape[1] != weight.shape[0]:
        raise ValueError(f"x is {list(x.shape)}; this linear takes [N, {weight.shape[0]}]")
    if len(rows.count) not in (1, len(x)) or len(rows.indices) != len(rows.count):
        raise ValueError(f"{len(rows.indices)} lists with {len(rows.count)} counts; there must be 1 or {len(x)}")


def sparse_inputs_torch(x: torch.Tensor, weight: InputMajor, rows: RowList) -> torch.Tensor:
    """`sparse_inputs` in plain torch, on any device."""
    _need(x, weight, rows)
    inputs, out = weight.shape
    kept = torch.where(mask_of_lists(rows, inputs), x.float(), 0)
    y = kept @ unpacked_turned(weight.rows, weight.bits, weight.group, out)
    return (y if weight.bias is None else y + weight.bias.float()).to(x.dtype)
