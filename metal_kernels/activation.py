"""Activations in MLX operations; `activation.metal` has those of the kernels."""

from __future__ import annotations

import mlx.core as mx


def activate_mlx(x: mx.array, kind: str) -> mx.array:
    """An activation of float32 values."""
    match kind:
        case "silu":
            return x * mx.sigmoid(x)
        case "gelu":
            return 0.5 * x * (1 + mx.erf(x * 0.7071067811865476))
        case "gelu_tanh":
            return 0.5 * x * (1 + mx.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
        case "relu":
            return mx.maximum(x, 0)
        case "abs":
            return mx.abs(x)
    return x
