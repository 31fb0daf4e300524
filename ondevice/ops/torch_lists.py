"""Selections as lists on a GPU: of fixed length with a count, as Triton's kernels take them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from cuda_kernels.lists import RowList, lists_of_mask, mask_of_lists


@dataclass(frozen=True, slots=True)
class Lists:
    """What `Selection.mask` holds in the table of backend cuda.

    Args:
        rows: of units, a list for each token or one for all.
        units: that there are.
        block: neurons or inputs of a unit.
        kept: units of each list, where the host knows; else None.
    """

    rows: RowList
    units: int
    block: int = 1
    kept: int | None = None

    def expanded(self, block: int) -> Lists:
        """The same with each unit standing for `block` times as many."""
        return replace(self, block=self.block * block)

    def mask(self) -> torch.Tensor:
        """bool [N or 1, units * block]."""
        return mask_of_lists(self.rows, self.units).repeat_interleave(self.block, 1)

    def union(self) -> Lists:
        """One list of all units that any token has."""
        return of_mask(mask_of_lists(self.rows, self.units).any(0, keepdim=True), self.block)


def of_mask(mask: torch.Tensor, block: int = 1) -> Lists:
    """Lists of a mask [N, units]."""
    return Lists(lists_of_mask(mask), mask.shape[1], block)


def everything(units: int, block: int, device: torch.device) -> Lists:
    """One list of all units."""
    index = torch.arange(units, dtype=torch.int32, device=device)[None]
    return Lists(RowList(index, torch.full((1,), units, dtype=torch.int32, device=device)), units, block, units)
