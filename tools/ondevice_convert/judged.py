"""How good a selection is: beside the oracle's, and beside chance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ondevice_convert.fitted import LayerFit

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

ALL = 0.99
"""Part above which a threshold of 0 keeps all: what else is 0 was rounded to it."""
ROWS = 256
"""Samples whose outputs are computed together."""


def part_lost(x: Floats, weight: Floats, kept: Mask) -> float:
    """Part of the square of x W' that is lost where only some inputs are kept.

    Args:
        x: [n, inputs].
        weight: [out, inputs].
        kept: [n, inputs].
    """
    whole = missing = 0.0
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        whole += float(np.square(x[rows] @ weight.T).sum(dtype=np.float64))
        missing += float(np.square(np.where(kept[rows], 0, x[rows]) @ weight.T).sum(dtype=np.float64))
    return missing / whole if whole else 0.0


def judge(
    layer: int,
    kept: Mask,
    sizes: Floats,
    lost: Callable[[Mask], float],
    *,
    by_row: bool = False,
    unit: int = 1,
    what: str = "ffn",
) -> LayerFit:
    """Compares a selection with the oracle's, which keeps the largest contributions, and with a random one.

    Args:
        layer: its number.
        kept: [n, units], the selection.
        sizes: [n, units] of the contributions; 0 is never wanted.
        lost: part of the output's square that a selection loses.
        by_row: the others keep as many of each sample as the selection does, which are the same of all samples; else as
            many in all.
        unit, what: as of `LayerFit`.
    """
    wanted, other = _largest(sizes, kept, by_row), _random(layer, kept, by_row)
    # Where fewer than are kept give anything at all, only those are wanted.
    wanted &= sizes > 0
    recall = float((kept & wanted).sum() / wanted.sum()) if wanted.any() else 1.0
    parts = (lost(kept), lost(wanted), lost(other))
    return LayerFit(layer, float(kept.mean()), recall, *parts, unit=unit, what=what)


def _largest(sizes: Floats, kept: Mask, by_row: bool) -> Mask:
    rows = sizes if by_row else sizes.reshape(1, -1)
    count = int(kept[0].sum()) if by_row else int(kept.sum())
    mask = np.zeros(rows.shape, bool)
    if count:
        chosen = np.argpartition(rows, rows.shape[1] - count, axis=1)[:, rows.shape[1] - count :]
        np.put_along_axis(mask, chosen, True, axis=1)
    return mask.reshape(sizes.shape)


def _random(seed: int, kept: Mask, by_row: bool) -> Mask:
    random = np.random.default_rng(seed)
    if by_row:
        return random.permuted(kept, axis=1)
    return random.permutation(kept.ravel()).reshape(kept.shape)


def cut_off(layer: int, kept: Mask, sizes: Floats, x: Floats, weight: Floats, threshold: float, what: str) -> LayerFit:
    """Of a threshold on magnitudes.

    Args:
        layer, kept, sizes, what: as of `judge`.
        x, weight: as of `part_lost`.
        threshold: 0 leaves out zeros only; but for those of relu there are none to speak of.
    """
    if not threshold and kept.mean() > ALL:
        return LayerFit(layer, 1.0, 1.0, 0.0, 0.0, 0.0, what=what)
    return judge(layer, kept, sizes, lambda mask: part_lost(x, weight, mask), what=what)
