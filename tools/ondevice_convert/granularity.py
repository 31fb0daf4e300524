"""How large groups of neurons may be: what a perfect choice of groups loses in a layer, by size and by order.

A predictor can only be worse than the oracle, so a size whose oracle loses too much need not be tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ondevice.checkpoint.base import Checkpoint
from ondevice_convert.block_data import Progress
from ondevice_convert.blocks import block_norms, largest, lost_without
from ondevice_convert.neurons import Neurons
from ondevice_convert.orders import ORDERS, groups_in
from ondevice_convert.samples import Samples

BLOCKS = (1, 4, 16, 32, 64, 128)
MOST = 2048
"""Samples that are looked at: half to order by, half to measure."""


@dataclass(frozen=True, slots=True)
class Granularity:
    """One layer, one size, one order.

    Args:
        layer: its number.
        block: neurons of a group.
        order: of `ORDERS`.
        densities: parts of the groups that run.
        oracle_lost: part of the output's square that is lost at each of them, where the groups with the longest outputs
            run.
    """

    layer: int
    block: int
    order: str
    densities: tuple[float, ...]
    oracle_lost: tuple[float, ...]


def granularity(
    base: Checkpoint,
    samples: Samples,
    layer: int,
    densities: Sequence[float] = (0.5, 0.7),
    blocks: Sequence[int] = BLOCKS,
    orders: Sequence[str] = ORDERS,
    progress: Progress | None = None,
) -> list[Granularity]:
    """Measures a layer.

    Args:
        base: the dense model.
        samples: with the place "ffn".
        layer: its number.
        densities: parts of the groups that run, above 0.
        blocks: sizes; those that do not divide a layer's neurons are left out.
        orders: any of `ORDERS`. Single neurons have no order but the model's.
        progress: called with (sizes and orders done, in all, label).
    """
    x, neurons = samples.of("ffn", layer, MOST), Neurons.of(base, layer)
    # Co-firing neurons are found on other samples than those that show what the order is worth.
    seen, unseen = x[::2], x[1::2]
    sizes = [block for block in blocks if base.spec.d_ff % block == 0]
    cases = [(block, order) for block in sizes for order in orders if block > 1 or order == "model"]
    found = []
    for done, (block, order) in enumerate(cases):
        if progress:
            progress(done, len(cases), f"groups of layer {layer}")
        groups = groups_in(order, neurons, block, seen)
        norms = block_norms(neurons, unseen, groups)
        masks = [largest(norms, round(density * norms.size)) for density in densities]
        lost = lost_without(neurons, unseen, groups, masks)
        found.append(Granularity(layer, block, order, tuple(densities), tuple(lost)))
    if progress:
        progress(len(cases), len(cases), f"groups of layer {layer}")
    return found


def why_refused(measured: Sequence[Granularity], block: int, density: float, most: float) -> str | None:
    """A sentence for a report, if even a perfect choice of groups of some size loses too much.

    Args:
        measured: of any layers.
        block: the size.
        density: of those that were measured.
        most: part of the output's square that may be lost.

    Returns:
        None where the best order's mean over the layers is within the limit, or the size was not measured.
    """
    losses: dict[tuple[int, str], list[float]] = {}
    for one in measured:
        if density in one.densities:
            lost = one.oracle_lost[one.densities.index(density)]
            losses.setdefault((one.block, one.order), []).append(lost)
    means = {key: float(np.mean(values)) for key, values in losses.items()}
    own = {order: lost for (size, order), lost in means.items() if size == block}
    if not own or min(own.values()) <= most:
        return None
    best = min(own, key=lambda order: own[order])
    single = means.get((1, "model"))
    beside = "" if single is None else f", single neurons {single:.1%}"
    return (
        f"groups of {block}: a perfect choice of {density:.0%} of them loses {own[best]:.1%} of the output's square "
        f"({best} order{beside}), above the limit of {most:.1%}"
    )
