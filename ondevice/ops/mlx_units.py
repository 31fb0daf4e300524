"""A selection in both forms: lists of blocks, which Metal kernels take, and masks of units, which MLX itself takes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from metal_kernels.lists import RowList, lists_of_mask, mask_of_lists


class Units:
    """Blocks of units of each token, or of all; either form is made of the other when it is first asked for.

    Args:
        blocks: to choose from.
        rows: lists of them.
        mask: bool [N or 1, blocks]; where there are no lists.
        block: units of a block.
    """

    __slots__ = ("_mask", "_rows", "block", "blocks")

    def __init__(self, blocks: int, rows: RowList | None = None, mask: Any = None, block: int = 1) -> None:
        self.blocks, self.block = blocks, block
        self._rows, self._mask = rows, mask

    @property
    def block_mask(self) -> Any:
        """bool [N or 1, blocks]."""
        if self._mask is None:
            self._mask = mask_of_lists(self._rows, self.blocks)
        return self._mask

    def mask(self) -> Any:
        """bool [N or 1, units]."""
        return self.block_mask if self.block == 1 else mx.repeat(self.block_mask, self.block, axis=1)

    def lists(self, block: int) -> RowList:
        """Lists of blocks of so many units: as they are, or of single units."""
        if block == self.block:
            if self._rows is None:
                self._rows = lists_of_mask(self._mask)
            return self._rows
        if block != 1:
            raise ValueError(f"blocks of {self.block} units are selected, and lists of blocks of {block} asked for")
        return lists_of_mask(self.mask())

    def expanded(self, block: int) -> Units:
        """Each unit as so many."""
        return Units(self.blocks, self._rows, self._mask, self.block * block)

    def __len__(self) -> int:
        """Tokens with a list of their own; 1 where all have the same."""
        return len(self._mask) if self._rows is None else len(self._rows.count)
