"""About k units of each row, by a normal distribution's quantile: no sort, three passes.

What it must move: a row of scores three times (mean, deviation, result), of which the L2 cache serves two, and 4 bytes
for each score of the result and for each listed unit. Grid: a program for each row, as the list is written in order.
13,824 scores are 55 KB. Sums are float32 lanes of BLOCK values, added at the end, and the deviation is taken from the
known mean, so that neither loses what a sum of squares would.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cuda_kernels.launch import empty, need_device, need_float, up_to_power
from cuda_kernels.lists import RowList, append
from cuda_kernels.select_threshold import list_mask_torch


@triton.jit
def _statistical(
    scores, values, indices, counts, units, c, row_stride, unit_stride, BLOCK: tl.constexpr
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    row = scores + number * row_stride
    lanes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, units, BLOCK):
        at = start + tl.arange(0, BLOCK)
        lanes += tl.load(row + at * unit_stride, mask=at < units, other=0.0).to(tl.float32)
    mean = tl.sum(lanes, 0) / units
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, units, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row + at * unit_stride, mask=at < units, other=0.0).to(tl.float32)
        away = tl.where(at < units, x - mean, 0.0)
        squares += away * away
    border = mean + c * tl.sqrt(tl.sum(squares, 0) / units)
    listed = 0
    for start in range(0, units, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < units
        x = tl.load(row + at * unit_stride, mask=inside, other=0.0).to(tl.float32)
        tl.store(values + number * units + at, tl.maximum(x - border, 0.0), mask=inside)
        listed = append(inside & (x > border), at, listed, indices + number * units)
    tl.store(counts + number, listed)


def statistical_topk(scores: torch.Tensor, c: float) -> tuple[torch.Tensor, RowList]:
    """max(score - border, 0), with border = mean + c * (population) standard deviation of the token's scores.

    Args:
        scores: [N, M], of any strides.
        c: the standard normal quantile of the part that is left out.

    Returns:
        Values [N, M] in float32, and ascending lists of the units above the border, of length M.

    Raises:
        ValueError: not such scores, or tensors that are not on a GPU.

    Source: Spark Transformer (You et al. 2025), statistical top-k.
    """
    _need(scores)
    need_device(scores.device)
    n, units = scores.shape
    values = empty(n, units, dtype=torch.float32, device=scores.device)
    indices = empty(n, units, dtype=torch.int32, device=scores.device)
    count = empty(n, dtype=torch.int32, device=scores.device)
    if n:
        block = up_to_power(units, 16, 4096)
        _statistical[(n,)](
            scores, values, indices, count, units, float(c), *scores.stride(), BLOCK=block,
            num_warps=8 if block == 4096 else 4,
        )  # fmt: skip
    return values, RowList(indices, count)


def _need(scores: torch.Tensor) -> None:
    need_float("scores", scores)
    if scores.ndim != 2 or not scores.shape[1]:
        raise ValueError(f"scores are {list(scores.shape)}; they must be [N, M] with at least one unit")


def statistical_topk_torch(scores: torch.Tensor, c: float) -> tuple[torch.Tensor, RowList]:
    """`statistical_topk` in plain torch, on any device."""
    _need(scores)
    values = scores.float()
    mean = values.mean(dim=1, keepdim=True)
    border = mean + c * (values - mean).square().mean(dim=1, keepdim=True).sqrt()
    return (values - border).relu(), list_mask_torch(values > border)
