"""What the CPU table's rounding of activations does, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def rounded(x: NDArray[Any]) -> NDArray[np.float64]:
    """Activations as int8 codes hold them: a scale per group of 32, groups with an outlier in two planes."""
    # In float32 as the kernels, so that nothing near a half is rounded the other way.
    groups = x.astype(np.float32).reshape(len(x), -1, 32)
    peak = np.abs(groups).max(axis=-1, keepdims=True)
    some = peak > 1e-30
    high = np.rint(groups * np.where(some, np.float32(127) / np.where(some, peak, 1), 0).astype(np.float32))
    step = np.where(some, peak.astype(np.float64) / 127, 1)
    low = np.minimum(np.rint((groups - high * step) / (step / 256)), 127)
    count = np.maximum(np.count_nonzero(groups, axis=(1, 2), keepdims=True), 1)
    fine = peak > 4 * np.sqrt((groups.astype(np.float64) ** 2).sum(axis=(1, 2), keepdims=True) / count)
    return np.where(some, (high + np.where(fine, low / 256, 0)) * step, 0).reshape(x.shape)
