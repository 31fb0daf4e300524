"""An FFN in the layout of our Metal kernels that runs whole: prompts, where all neurons are read by somebody anyway."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from metal_kernels.pack import Matrix, PackedFfn, unpacked
from ondevice.ops.mlx_activation import activate


def whole_hidden(x: Any, ffn: PackedFfn, activation: str, values: Any) -> Any:
    """What all neurons give [N, D], in x's type; a neuron that is valued with its values."""
    up = _product(x, ffn.up, ffn.up_bias, ffn)
    if ffn.gate is not None:
        return activate(_product(x, ffn.gate, ffn.gate_bias, ffn), activation) * up
    h = activate(up, activation)
    return h if values is None else (h * values).astype(x.dtype)


def whole_down(h: Any, ffn: PackedFfn) -> Any:
    """down h + bias of h [N, D]. Down is turned, which MLX's products do not take: it becomes floats for this call.

    That reads and writes it twice, little beside a product with hundreds of tokens, and saves a second copy for good.
    """
    y = h @ _turned(ffn, h.dtype)
    return y if ffn.down_bias is None else y + ffn.down_bias.astype(y.dtype)


def _product(x: Any, matrix: Matrix, bias: Any, ffn: PackedFfn) -> Any:
    if not ffn.bits:
        y = x @ matrix.weight.T.astype(x.dtype)
    else:
        assert matrix.scales is not None and matrix.biases is not None
        scales, biases = (part.astype(x.dtype) for part in (matrix.scales, matrix.biases))
        y = mx.quantized_matmul(x, matrix.weight, scales, biases, True, ffn.group, ffn.bits)
    return y if bias is None else y + bias.astype(y.dtype)


def _turned(ffn: PackedFfn, dtype: Any) -> Any:
    """Down as floats [D, out]."""
    _, neurons, out = ffn.shape
    down, width = ffn.down, 32
    if not ffn.bits:
        return down.weight.astype(dtype)
    assert down.scales is not None and down.biases is not None
    padded = down.scales.shape[1]
    if padded % width:
        return unpacked(ffn)[2].astype(dtype)
    # MLX's kernel gives the codes, which all types hold exactly, if scales are 1; groups here go the other way.
    ones, zeros = (make((neurons, padded // width), dtype) for make in (mx.ones, mx.zeros))
    codes = mx.dequantize(down.weight, ones, zeros, width, ffn.bits).reshape(-1, ffn.group, padded)
    values = codes * down.scales.astype(dtype)[:, None] + down.biases.astype(dtype)[:, None]
    return values.reshape(neurons, padded)[:, :out]
