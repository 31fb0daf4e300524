"""The k units of the largest scores, exactly, as an ascending list on the device.

What it must move: a row of scores once, and its keys (uint32 in the order of the scores) at most 17 times more: 16
passes that find the k-th largest key, two bits each, and the listing. A row of 36,864 keys is 147 KB, so all passes but
the first read the L1 cache of one processor; a row of one block stays in registers. Passes end as soon as exactly k
keys reach the border, which random float32 scores do after about 12.

Grid: a program for each row. A pass compares keys with three borders and counts in ten bits of one register each: nine
instructions a key with loads and loop, where a histogram of 256 bins takes some hundred. So 16,384 keys are 1,200
cycles of a processor's four schedulers, and the sum over the warps comes on top.
`votes` adds up the batch's scores first, a program for 256 units, tokens in order, and
leaves keys. Heads that are chosen by groups take the group's largest while loading.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cuda_kernels.launch import absent, empty, need_device, need_float, up_to_power
from cuda_kernels.lists import RowList

BLOCK = 4096
"""Keys that a program reads at a time: sixteen of each thread. The more warps, the longer their sum."""
MOST = (1 << 21) - 1
"""Units of a row: the counts of three borders are added as one number."""


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
    return tl.where(inside, key, 0)


@triton.jit
def _reaching(key, border, shift):
    """Which of three borders, 1, 2 and 3 << shift above another, a key reaches: a bit each, ten apart."""
    step = tl.full((), 1, tl.uint32) << shift
    few = tl.where(key >= border + 2 * step, 0x401, (key >= border + step).to(tl.int32))
    return tl.where(key >= border + 3 * step, 0x100401, few)


@triton.jit
def _topk(
    scores, keys, indices, counts, units, k, row_stride, unit_stride, KEYED: tl.constexpr, GROUP: tl.constexpr,
    ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    mine = keys + number * units
    lane = tl.arange(0, BLOCK)
    if not KEYED:
        row = scores + number * row_stride
        if ONE:
            key = _keys(row, lane, lane < units, unit_stride, GROUP)
        else:
            for start in range(0, units, BLOCK):
                at = start + lane
                tl.store(mine + at, _keys(row, at, at < units, unit_stride, GROUP), mask=at < units)
            # Other threads may read what this one wrote.
            tl.debug_barrier()
    elif ONE:
        key = tl.load(mine + lane, mask=lane < units, other=0)
    # The largest border, as far as its bits are known, that at least k keys reach: how many do, and how many reach
    # the next border that is known to be too high. A unit that does not exist has key 0, and reaches none.
    border = tl.full((), 0, tl.uint32)
    reach = tl.full((), 0, tl.int32) + units
    beyond = tl.full((), 0, tl.int32)
    shift = 30
    while (shift >= 0) & (reach > k):
        if ONE:
            found = _reaching(key, border, shift)
        else:
            found = tl.zeros([BLOCK], tl.int32)
            for start in range(0, units, BLOCK):
                some = tl.load(mine + start + lane, mask=start + lane < units, other=0)
                found += _reaching(some, border, shift)
        # Three counts of ten bits become three of 21 bits, in one sum.
        wide = found.to(tl.int64)
        wide = (wide & 0x3FF) + ((wide & 0xFFC00) << 11) + ((wide & 0x3FF00000) << 22)
        total = tl.sum(wide, 0)
        first = (total & 0x1FFFFF).to(tl.int32)
        second = ((total >> 21) & 0x1FFFFF).to(tl.int32)
        third = (total >> 42).to(tl.int32)
        digit = (first >= k).to(tl.int32) + (second >= k).to(tl.int32) + (third >= k).to(tl.int32)
        reach = tl.where(digit == 0, reach, tl.where(digit == 1, first, tl.where(digit == 2, second, third)))
        beyond = tl.where(digit == 0, first, tl.where(digit == 1, second, tl.where(digit == 2, third, beyond)))
        border += digit.to(tl.uint32) << shift
        shift -= 2
    # Of those equal to the border the first `rank` are listed. One scan of a block counts both: entries above it in the
    # upper 16 bits, equal ones in the lower.
    rank = k - beyond
    highers = tl.full((), 0, tl.int32)
    equals = tl.full((), 0, tl.int32)
    for start in range(0, units, BLOCK):
        at = start + lane
        inside = at < units
        if ONE:
            some = key
        else:
            some = tl.load(mine + at, mask=inside, other=0)
        above = inside & (some > border)
        equal = inside & (some == border)
        both = (above.to(tl.int32) << 16) + equal.to(tl.int32)
        order = tl.cumsum(both, 0)
        equal_order = equals + (order & 0xFFFF)
        place = highers + (order >> 16) + tl.minimum(equal_order, rank) - 1
        tl.store(indices + number * k + place, at, mask=above | (equal & (equal_order <= rank)))
        block = tl.sum(both, 0)
        highers += block >> 16
        equals += block & 0xFFFF
    tl.store(counts + number, highers + tl.minimum(equals, rank))


@triton.jit
def _votes(
    scores, active, keys, tokens, units, row_stride, unit_stride, ACTIVE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for n in range(tokens):
        mask = at < units
        if ACTIVE:
            mask = mask & (tl.load(active + n) != 0)
        row = scores + tl.cast(n, tl.int64) * row_stride
        acc += tl.maximum(tl.load(row + at * unit_stride, mask=mask, other=0.0).to(tl.float32), 0.0)
    tl.store(keys + at, sortable(acc), mask=at < units)


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
    n, units = 1 if shared else len(scores), scores.shape[1] // group
    indices = empty(n, k, dtype=torch.int32, device=scores.device)
    count = empty(n, dtype=torch.int32, device=scores.device)
    block = up_to_power(units, 16, BLOCK)
    kept = shared or units > block
    keys = empty(n, units, dtype=torch.uint32, device=scores.device) if kept else count
    if shared:
        flags = absent(None if active is None else active.contiguous().view(torch.uint8), scores)
        _votes[(triton.cdiv(units, 256),)](
            scores, flags, keys, *scores.shape, *scores.stride(), ACTIVE=active is not None, BLOCK=256
        )
    if n:
        _topk[(n,)](
            scores, keys, indices, count, units, k, *scores.stride(), KEYED=shared, GROUP=group, ONE=units <= block,
            BLOCK=block, num_warps=max(4, block // 512),
        )  # fmt: skip
    return RowList(indices, count)


def _need(scores: torch.Tensor, k: int, shared: bool, group: int, active: torch.Tensor | None) -> None:
    need_float("scores", scores)
    if scores.ndim != 2 or group < 1 or scores.shape[1] % group or (shared and group > 1):
        raise ValueError(
            f"scores {list(scores.shape)} in groups of {group}: groups divide the units of [N, M], and "
            "a shared choice is of single units"
        )
    if scores.shape[1] // group > MOST:
        raise ValueError(f"scores are of {scores.shape[1] // group} units; at most {MOST} can be counted")
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
