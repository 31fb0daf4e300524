"""What larger groups of neurons would lose: a table for the report, and why a size was refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ondevice.checkpoint.base import Checkpoint
from ondevice_convert.cats_layer import BEST, CatsLayer
from ondevice_convert.granularity import Granularity, granularity, why_refused
from ondevice_convert.samples import Samples

Progress = Callable[[int, int, str], None]

LAYERS = 3
"""Layers that are looked at, spread evenly."""
DENSITIES = (0.7, 0.5)
WIDE = 4096
"""Neurons from which on only the model's own order is looked at: clustering would take minutes for each size."""


@dataclass(frozen=True, slots=True)
class BlocksTable:
    """rows: for each size and order. notes: sentences on sizes that even an oracle makes no use of."""

    rows: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]


def blocks_table(base: Checkpoint, samples: Samples, progress: Progress) -> BlocksTable:
    """Measures some layers.

    A size is refused where a perfect choice of groups loses more than single neurons do that are chosen by one of their
    factors (see `CatsLayer`), which cost no more bytes than a gate.

    Args:
        base: the dense model.
        samples: with the place "ffn".
        progress: called with (sizes done, sizes in all, label).
    """
    n_layers = base.spec.n_layers
    layers = sorted({round(i * (n_layers - 1) / max(1, LAYERS - 1)) for i in range(LAYERS)})
    orders = ("cofiring", "model") if base.spec.d_ff <= WIDE else ("model",)
    measured: list[Granularity] = []
    for layer in layers:
        measured += granularity(base, samples, layer, DENSITIES, orders=orders, progress=progress)
    rows: list[dict[str, Any]] = []
    for block, order in dict.fromkeys((one.block, one.order) for one in measured):
        mine = [one.oracle_lost for one in measured if (one.block, one.order) == (block, order)]
        means = np.mean(mine, axis=0)
        lost = {f"lost at {density:.0%}": float(mean) for density, mean in zip(DENSITIES, means)}
        rows.append({"neurons of a group": block, "order": order, **lost})
    if not base.spec.gated:
        return BlocksTable(tuple(rows), ())
    density = DENSITIES[0]
    most = float(np.mean([CatsLayer(base, samples, layer).lost(BEST, [density])[0] for layer in layers]))
    sizes = dict.fromkeys(one.block for one in measured if one.block > 1)
    refused = [why_refused(measured, block, density, most) for block in sizes]
    said = [
        f"{reason}, which is what single neurons lose that are chosen by one factor" for reason in refused if reason
    ]
    return BlocksTable(tuple(rows), tuple(said))
