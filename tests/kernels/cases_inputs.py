"""Products with some inputs of a row: which inputs, and what comes out, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SELECTIONS = ("none", "first", "last", "one a group", "one group", "all but one", "random", "few", "all")


def selected(name: str, inputs: int) -> NDArray[np.bool_]:
    """Which of so many inputs a selection of that name takes."""
    index, rng = np.arange(inputs), np.random.RandomState(inputs)
    masks: dict[str, Any] = {
        "none": index < 0,
        "first": index == 0,
        "last": index == inputs - 1,
        "one a group": index % 32 == index // 32 % 32,
        "one group": index // 32 == (inputs - 1) // 64,
        "all but one": index != inputs // 2,
        "random": rng.rand(inputs) < 0.5,
        "few": rng.rand(inputs) < 0.08,
        "all": index >= 0,
    }
    return masks[name]


def row(inputs: int, seed: int = 0) -> NDArray[np.float32]:
    """Random inputs, some of them outliers."""
    rng = np.random.RandomState(seed)
    x = rng.standard_normal(inputs).astype(np.float32)
    x[rng.randint(0, inputs, max(1, inputs // 64))] *= 15
    return x


def product(
    w: NDArray[Any], x: NDArray[Any], mask: NDArray[np.bool_], bias: NDArray[Any], residual: NDArray[Any]
) -> NDArray[np.float64]:
    """W x + bias + residual, over the selected inputs."""
    return w[:, mask].astype(np.float64) @ x[mask].astype(np.float64) + bias + residual
