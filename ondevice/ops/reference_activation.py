"""Activations in the reference table."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def activate(x: Any, kind: str) -> Any:
    """An activation, elementwise.

    Args:
        x: floats.
        kind: "silu", "gelu", "gelu_tanh", "relu", "abs" or "none".
    """
    match kind:
        case "silu":
            return x / (1 + np.exp(-x))
        case "gelu_tanh":
            return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        case "gelu":
            # NumPy has no erf, and exactness matters more here than speed.
            return 0.5 * x * (1 + np.vectorize(math.erf, otypes=[x.dtype])(x / np.sqrt(2)))
        case "relu":
            return np.maximum(x, 0)
        case "abs":
            return np.abs(x)
        case "none":
            return x
    raise ValueError(f"no activation {kind!r}")
