"""The k units of the largest scores, exactly, as an ascending list on the device.

What it must move: a row of scores five times (four digits of a radix select and the listing), of which all but the
first come from the L2 cache: 36,864 float32 are 147 KB. A sort would move them more often, and leave them in an order
that nobody needs.

Grid: a program for each row. A row's digits are counted in a histogram of 256 bins, from the top byte down, which
leaves the k-th largest score to the bit; then the row is listed in order. One list for a batch is one program: some
10 us that a graph can hide behind attention. `votes` adds up the batch's scores first, a program for 256 units, tokens
in order. Heads that are chosen by groups take the group's largest while loading.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cuda_kernels.launch import absent, empty, need_device, need_float, up_to_power
from cuda_kernels.lists import RowList, append


@triton.jit
def sortable(x):
    """float32 as uint32 in the same order; both zeros are equal, and NaN is below all."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    key = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(x == x, key, 0)


@triton.jit
def _keys(row, at, inside, unit_stride, GROUP: tl.constexpr):
    key = tl.zeros_like(at).to(tl.uint32)
    for g in tl.static_range(GROUP):
        x = tl.load(row + (at * GROUP + g) * unit_stride, mask=inside, other=0.0).to(tl.float32)
        key = tl.maximum(key, sortable(x))
    return key


@triton.jit
def _topk(
    scores, indices, counts, units, k, row_stride, unit_stride, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    row = scores + number * row_stride
    # The digits of the k-th largest key that are known, and its rank among keys that begin with them.
    known = tl.full((), 0, tl.uint32)
    rank = k
    bins = tl.arange(0, 256)
    for digit in tl.static_range(4):
        counted = tl.zeros([256], tl.int32)
        for start in range(0, units, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < units
            key = _keys(row, at, inside, unit_stride, GROUP)
            if digit > 0:
                inside = inside & ((key >> (32 - 8 * digit)) == known)
            counted += tl.histogram(((key >> (24 - 8 * digit)) & 255).to(tl.int32), 256, mask=inside)
        above = tl.sum(counted, 0) - tl.cumsum(counted, 0)
        found = (above < rank) & (rank <= above + counted)
        rank -= tl.sum(tl.where(found, above, 0), 0)
        known = (known << 8) | tl.sum(tl.where(found, bins, 0), 0).to(tl.uint32)
    listed = 0
    equals = 0
    for start in range(0, units, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < units
        key = _keys(row, at, inside, unit_stride, GROUP)
        equal = inside & (key == known)
        order = equals + tl.cumsum(equal.to(tl.int32), 0)
        take = inside & ((key > known) | (equal & (order <= rank)))
        listed = append(take, at, listed, indices + number * k)
        equals += tl.sum(equal.to(tl.int32), 0)
    tl.store(counts + number, listed)


@triton.jit
def _votes(
    scores, active, sums, tokens, units, row_stride, unit_stride, ACTIVE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for n in range(tokens):
        mask = at < units
        if ACTIVE:
            mask = mask & (tl.load(active + n) != 0)
        row = scores + tl.cast(n, tl.int64) * row_stride
        acc += tl.maximum(tl.load(row + at * unit_stride, mask=mask, other=0.0).to(tl.float32), 0.0)
    tl.store(sums + at, acc, mask=at < units)


def select_topk(
    scores: torch.Tensor, k: int, shared: bool, group: int = 1, active: torch.Tensor | None = None
) -> RowList:
    """The k units of the largest scores; of equal ones the first.

    Args:
        scores: [N, M], of any strides; NaN counts as the smallest.
        k: from 1 to M / group.
        shared: one choice for all tokens, by the sums over tokens of relu(score); else one for each.
        group: neighbours that are one unit, by the largest of their scores.
        active: bool [N], tokens that vote; others are finished or padding.

    Returns:
        Ascending lists of length k: [N or 1, k].

    Raises:
        ValueError: no such k or group, or tensors that are not on a GPU.

    Source: Polar Sparsity (Shrestha et al. 2025), sections 4.1 and 4.2.
    """
    _need(scores, k, shared, group, active)
    need_device(scores.device)
    if shared:
        sums = empty(1, scores.shape[1], dtype=torch.float32, device=scores.device)
        flags = absent(None if active is None else active.contiguous().view(torch.uint8), scores)
        _votes[(triton.cdiv(scores.shape[1], 256),)](
            scores, flags, sums, *scores.shape, *scores.stride(), ACTIVE=active is not None, BLOCK=256
        )
        scores = sums
    n, units = len(scores), scores.shape[1] // group
    indices = empty(n, k, dtype=torch.int32, device=scores.device)
    count = empty(n, dtype=torch.int32, device=scores.device)
    if n:
        block = up_to_power(units, 16, 4096)
        warps = 32 if block == 4096 else 4
        _topk[(n,)](scores, indices, count, units, k, *scores.stride(), GROUP=group, BLOCK=block, num_warps=warps)
    return RowList(indices, count)


def _need(scores: torch.Tensor, k: int, shared: bool, group: int, active: torch.Tensor | None) -> None:
    need_float("scores", scores)
    if scores.ndim != 2 or group < 1 or scores.shape[1] % group or (shared and group > 1):
        raise ValueError(
            f"scores {list(scores.shape)} in groups of {group}: groups divide the units of [N, M], and "
            "a shared choice is of single units"
        )
    if not 1 <= k <= scores.shape[1] // group:
        raise ValueError(f"k is {k}; choose from 1 to {scores.shape[1] // group}")
    if active is not None and (not shared or active.dtype != torch.bool or active.shape != scores.shape[:1]):
        raise ValueError(f"active must be bool [{len(scores)}], and belongs to a shared choice")


def select_topk_torch(
    scores: torch.Tensor, k: int, shared: bool, group: int = 1, active: torch.Tensor | None = None
) -> RowList:
    """`select_topk` in plain torch, on any device."""
    _need(scores, k, shared, group, active)
    values = scores.float()
    if shared:
        votes = values.relu() if active is None else torch.where(active[:, None], values.relu(), 0)
        values = votes.sum(0, keepdim=True)
    values = values.nan_to_num(nan=-float("inf"), posinf=float("inf"), neginf=-float("inf"))
    values = values.unflatten(1, (-1, group)).amax(2)
    order = torch.sort(values, dim=1, descending=True, stable=True).indices
    indices = order[:, :k].sort(dim=1).values.to(torch.int32)
    return RowList(indices, torch.full((len(indices),), k, dtype=torch.int32, device=scores.device))
