"""Lists of units on the device: fixed length, so that nothing waits for the host to learn how many there are."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cuda_kernels.launch import empty, need_device, up_to_power


class RowList(NamedTuple):
    """Units that each token runs, or all tokens alike.

    Args:
        indices: int32 [N or 1, length]; entries beyond the count are undefined and never read.
        count: int32 [N or 1], on the device as well.
    """

    indices: torch.Tensor
    count: torch.Tensor


@triton.jit
def append(take, at, base, out):
    """Writes the units `at` that are taken behind the `base` that a list has; returns how many it has then."""
    rank = tl.cumsum(take.to(tl.int32), 0)
    tl.store(out + base + rank - 1, at, mask=take)
    return base + tl.sum(take.to(tl.int32), 0)


@triton.jit
def _list_mask(mask, indices, counts, units, row_stride, unit_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    found = 0
    for start in range(0, units, BLOCK):
        at = start + tl.arange(0, BLOCK)
        bit = tl.load(mask + row * row_stride + at * unit_stride, mask=at < units, other=0)
        found = append(bit != 0, at, found, indices + row * units)
    tl.store(counts + row, found)


def lists_of_mask(mask: torch.Tensor) -> RowList:
    """The units of each row of a mask, ascending.

    Args:
        mask: bool or uint8 [R, M], of any strides.

    Returns:
        Lists of length M.
    """
    need_device(mask.device)
    rows, units = mask.shape
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    indices = empty(rows, units, dtype=torch.int32, device=mask.device)
    count = empty(rows, dtype=torch.int32, device=mask.device)
    if rows:
        block = up_to_power(units, 16, 2048)
        _list_mask[(rows,)](mask, indices, count, units, *mask.stride(), BLOCK=block)
    return RowList(indices, count)


def mask_of_lists(rows: RowList, units: int) -> torch.Tensor:
    """The same selection as a mask: bool [N or 1, units]. Runs on the device, without a copy to the host."""
    length = rows.indices.shape[1]
    live = torch.arange(length, device=rows.indices.device)[None, :] < rows.count[:, None]
    at = torch.where(live, rows.indices, units).long()
    mask = torch.zeros(len(at), units + 1, dtype=torch.bool, device=at.device)
    return mask.scatter_(1, at, True)[:, :units]
