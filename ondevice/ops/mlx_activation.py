"""Activations on MLX arrays. Each is one kernel on a GPU; on a CPU, MLX would start a compiler for each of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx


def activate(x: Any, kind: str) -> Any:
    """An activation, elementwise.

    Args:
        x: floats.
        kind: "silu", "gelu", "gelu_tanh", "relu", "abs" or "none".
    """
    match kind:
        case "silu":
            return x * mx.sigmoid(x)
        case "gelu_tanh":
            return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
        case "gelu":
            return 0.5 * x * (1 + mx.erf(x * math.sqrt(0.5)))
        case "relu":
            return mx.maximum(x, 0)
        case "abs":
            return mx.abs(x)
        case "none":
            return x
    raise ValueError(f"no activation {kind!r}")


def activate_gated(gate: Any, up: Any, kind: str) -> Any:
    """act(gate) * up."""
    return activate(gate, kind) * up


def soft_cap(x: Any, cap: float) -> Any:
    """cap * tanh(x / cap), in float32."""
    return cap * mx.tanh(x.astype(mx.float32) / cap)


@cache
def fused(function: Callable[..., Any], *settings: Any) -> Callable[..., Any]:
    """The function with these last arguments, as one kernel for arrays of all shapes. For GPUs."""
    # Compiled functions are kept by their identity: made once for each kind, never in a loop.
    return mx.compile(lambda *arrays: function(*arrays, *settings), shapeless=True)
