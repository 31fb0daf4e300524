"""Weights of an FFN as the kernels want them, from canonical arrays.

Gate and up stay as they are, MLX's affine layout, a neuron a row. Down is turned, so that a neuron's outputs are a row
too. Where it is quantized its codes are kept and only moved: a row is packed as gate's are, padded with 0 to whole
eights of outputs, and scales lie by groups of neurons, [D / group, outputs]. Nothing is rounded again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

BITS = (4, 8)
GROUPS = (32, 64, 128)
EIGHT = 8
"""Outputs of a lane, to which rows of down are padded."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of one kind.

    Args:
        weight: [rows, width] floats, or uint32 words [rows, words].
        scales, biases: of quantized ones; of gate and up [rows, width / group], of down [groups, outputs].
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None


@dataclass(frozen=True, slots=True)
class PackedFfn:
    """An FFN of `neurons` that any of may be left out.

    Args:
        gate, up: a neuron's inputs a row.
        down: a neuron's outputs a row.
        gate_bias, up_bias: [neurons].
        down_bias: [out].
        shape: inputs, neurons, outputs.
        bits: 4 or 8; 0 for floats.
        group: of a scale.
        block: neurons of a unit of the lists.
        valued: neurons are value * act(up x + bias), with values that the caller brings.
    """

    gate: Matrix | None
    up: Matrix
    down: Matrix
    gate_bias: mx.array | None
    up_bias: mx.array | None
    down_bias: mx.array | None
    shape: tuple[int, int, int]
    bits: int
    group: int
    block: int
    valued: bool


def pack_ffn(
    gate: Any,
    up: Any,
    down: Any,
    gate_bias: Any = None,
    up_bias: Any = None,
    down_bias: Any = None,
    block: int = 1,
    valued: bool = False,
) -> PackedFfn:
    """Brings an FFN into the layout of this file.

    Args:
        gate, up: [D, in], floats (NumPy or MLX), or affine groups: anything with `packed`, `scales`, `biases`, `bits`,
            `group_size` and `affine()` as `ondevice.checkpoint.quantization.Quantized` has them. gate is None where
            there is none.
        down: [out, D].
        gate_bias, up_bias, down_bias: floats or None.
        block: neurons of a unit of the lists; divides D.
        valued: see PackedFfn; takes no gate.

    Raises:
        ValueError: bits or groups without a kernel, floats beside quantized ones, or shapes that do not fit.
    """
    matrices = [m for m in (gate, up, down) if m is not None]
    kinds = {(m.bits, m.group_size) if _quantized(m) else (0, 1) for m in matrices}
    if len(kinds) > 1:
        raise ValueError(f"gate, up and down have (bits, group) {sorted(kinds)}; all three must have the same")
    bits, group = kinds.pop()
    if bits and (bits not in BITS or group not in GROUPS):
        raise ValueError(f"{bits} bits in groups of {group} have no kernel: take bits of {BITS}, groups of {GROUPS}")
    neurons, inputs = up.shape
    out = down.shape[0]
    if down.shape[1] != neurons or neurons % block or (gate is not None and tuple(gate.shape) != (neurons, inputs)):
        shapes = [tuple(m.shape) for m in matrices]
        raise ValueError(
            f"shapes {shapes} and blocks of {block} are not those of one FFN: gate and up [D, in], "
            "down [out, D], blocks that divide D"
        )
    if valued and gate is not None:
        raise ValueError("valued neurons bring their gate with them: leave `gate` out")
    return PackedFfn(
        gate=None if gate is None else _rows(gate),
        up=_rows(up),
        down=_turned(down, bits),
        gate_bias=None if gate_bias is None else to_mlx(gate_bias),
        up_bias=None if up_bias is None else to_mlx(up_bias),
        down_bias=None if down_bias is None else to_mlx(down_bias),
        shape=(inputs, neurons, out),
        bits=bits,
        group=group,
        block=block,
        valued=valued,
    )


def to_mlx(array: Any) -> mx.array:
    """An array of MLX with the same type and values."""
    if isinstance(array, mx.array):
        return array
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def _quantized(matrix: Any) -> bool:
    return hasattr(matrix, "packed")


def _affine(matrix: Any) -> tuple[Any, Any]:
    """Scales and biases as they are stored, or in float32 where that would lose something."""
    plain = matrix.super_scales is None and matrix.biases is not None
    return (matrix.scales, matrix.biases) if plain else matrix.affine()


def _rows(matrix: Any) -> Matrix:
    if not _quantized(matrix):
        return Matrix(mx.contiguous(to_mlx(matrix)))
    return Matrix(to_mlx(matrix.packed), *map(to_mlx, _affine(matrix)))


def _turned(down: Any, bits: int) -> Matrix:
    if not bits:
        return Matrix(mx.contiguous(to_mlx(down).T))
    out = down.shape[0]
    octets = np.ascontiguousarray(down.packed).view(np.uint8)
    codes = octets if bits == 8 else np.stack([octets & 15, octets >> 4], axis=-1).reshape(out, -1)
    pad = ((0, 0), (0, -out % EIGHT))
    turned = np.pad(codes.T, pad)
    packed = turned if bits == 8 else turned[:, ::2] | turned[:, 1::2] << 4
    parts = [to_mlx(np.pad(np.ascontiguousarray(part.T), pad)) for part in _affine(down)]
    return Matrix(mx.array(np.ascontiguousarray(packed).view(np.uint32)), *parts)


def unpacked(ffn: PackedFfn) -> tuple[mx.array | None, mx.array, mx.array]:
    """Gate, up [D, in] and down as [D, out] in float32, for the twins."""
    if not ffn.bits:
        gate = None if ffn.gate is None else ffn.gate.weight.astype(mx.float32)
        return gate, ffn.up.weight.astype(mx.float32), ffn.down.weight.astype(mx.float32)
    shifts = mx.arange(32 // ffn.bits, dtype=mx.uint32) * ffn.bits

    def whole(matrix: Matrix, axis: int) -> mx.array:
        assert matrix.scales is not None and matrix.biases is not None
        codes = (matrix.weight[:, :, None] >> shifts) & (2**ffn.bits - 1)
        scales, biases = (mx.repeat(p.astype(mx.float32), ffn.group, axis) for p in (matrix.scales, matrix.biases))
        return codes.flatten(1).astype(mx.float32) * scales + biases

    down = whole(ffn.down, 0)[:, : ffn.shape[2]]
    return (None if ffn.gate is None else whole(ffn.gate, 1)), whole(ffn.up, 1), down
