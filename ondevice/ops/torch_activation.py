"""Activations on torch tensors, without Triton."""

from __future__ import annotations

import torch
from torch.nn import functional


def activate(x: torch.Tensor, kind: str) -> torch.Tensor:
    """An activation, elementwise.

    Args:
        x: floats.
        kind: "silu", "gelu", "gelu_tanh", "relu", "abs" or "none".
    """
    match kind:
        case "silu":
            return functional.silu(x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu":
            return functional.relu(x)
        case "abs":
            return x.abs()
        case "none":
            return x
    raise ValueError(f"no activation {kind!r}")
