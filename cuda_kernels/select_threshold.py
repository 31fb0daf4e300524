"""Units whose score is above a threshold, compacted on the device into a list of fixed length.

What it must move: a row of scores once, or twice where the threshold is relative to the largest, and 4 bytes for each
unit that is listed. Grid: a program for each row, since a list is written in order; a scan over a block of units says
where each of them goes. Rows are a few hundred units (LTE, D2DMoE) to some ten thousand: microseconds for a
program. And nothing is read by the host: the list is as long as there are units, and its count stays on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cuda_kernels.launch import empty, need_device, need_float, up_to_power
from cuda_kernels.lists import RowList, append


@triton.jit
def _threshold(
    scores, indices, counts, units, border, row_stride, unit_stride, RELATIVE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    row = scores + number * row_stride
    largest = tl.full((), -float("inf"), tl.float32)
    if RELATIVE:
        most = tl.full([BLOCK], -float("inf"), tl.float32)
        for start in range(0, units, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(row + at * unit_stride, mask=at < units, other=-float("inf")).to(tl.float32)
            most = tl.maximum(most, x)
        largest = tl.max(most, 0)
    listed = 0
    for start in range(0, units, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < units
        x = tl.load(row + at * unit_stride, mask=inside, other=0.0).to(tl.float32)
        if RELATIVE:
            take = (x >= border * largest) | (x == largest)
        else:
            take = x > border
        listed = append(take & inside, at, listed, indices + number * units)
    tl.store(counts + number, listed)


def select_threshold(scores: torch.Tensor, threshold: float, relative: bool = False) -> RowList:
    """Each token's units with score > threshold.

    Args:
        scores: [N, M], of any strides, without NaN.
        threshold: in the units of the scores.
        relative: score >= threshold * the token's largest instead, and always the largest itself.

    Returns:
        Ascending lists of length M: [N, M].

    Raises:
        ValueError: not such scores, or tensors that are not on a GPU.

    Source: LTE (Zheng et al. 2024), section 3; relative: D2DMoE (Szatkowski et al. 2024), section 3.
    """
    _need(scores)
    need_device(scores.device)
    n, units = scores.shape
    indices = empty(n, units, dtype=torch.int32, device=scores.device)
    count = empty(n, dtype=torch.int32, device=scores.device)
    if n:
        block = up_to_power(units, 16, 4096)
        _threshold[(n,)](
            scores, indices, count, units, float(threshold), *scores.stride(), RELATIVE=relative, BLOCK=block,
            num_warps=8 if block == 4096 else 4,
        )  # fmt: skip
    return RowList(indices, count)


def _need(scores: torch.Tensor) -> None:
    need_float("scores", scores)
    if scores.ndim != 2 or not scores.shape[1]:
        raise ValueError(f"scores are {list(scores.shape)}; they must be [N, M] with at least one unit")


def select_threshold_torch(scores: torch.Tensor, threshold: float, relative: bool = False) -> RowList:
    """`select_threshold` in plain torch, on any device."""
    _need(scores)
    values = scores.float()
    # A kernel's argument is float32; a threshold that lies between two of them must round alike.
    border = torch.tensor(threshold, dtype=torch.float32, device=scores.device)
    if not relative:
        return list_mask_torch(values > border)
    largest = values.amax(1, keepdim=True)
    return list_mask_torch((values >= border * largest) | (values == largest))


def list_mask_torch(mask: torch.Tensor) -> RowList:
    """`lists_of_mask` in plain torch: entries beyond the count are the units that are not listed."""
    order = torch.sort((~mask).to(torch.int8), dim=1, stable=True).indices
    return RowList(order.to(torch.int32), mask.sum(1).to(torch.int32))
