"""Weights of an FFN as the kernels want them, from canonical arrays.

Gate and up stay as they are, a neuron a row. Down is turned, so that a neuron's outputs are a row too. Where it is
quantized its codes are kept and only moved: field i of word w of a row is output i * W + w, W being the words of a row,
and scales lie by groups of neurons, [D / group, PER * W]. So a tile of words has its scales, and its outputs, in pieces
of consecutive ones. Nothing is rounded again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

BITS = (4, 8)
GROUPS = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of one kind.

    Args:
        weight: [rows, width] floats, or int32 words [rows, words].
        scales, biases: of quantized ones; of gate and up [rows, width / group], of down [groups, PER * words].
    """

    weight: torch.Tensor
    scales: torch.Tensor | None = None
    biases: torch.Tensor | None = None


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
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    shape: tuple[int, int, int]
    bits: int
    group: int
    block: int
    valued: bool

    @property
    def device(self) -> torch.device:
        return self.up.weight.device


def pack_ffn(
    gate: Any,
    up: Any,
    down: Any,
    gate_bias: Any = None,
    up_bias: Any = None,
    down_bias: Any = None,
    block: int = 1,
    valued: bool = False,
    device: str | torch.device = "cuda",
) -> PackedFfn:
    """Moves an FFN to the device, in the layout of this file.

    Args:
        gate, up: [D, in], float arrays or tensors, or affine groups: anything with `packed`, `scales`, `biases`,
            `bits`, `group_size` and `affine()` as `ondevice.checkpoint.quantization.Quantized` has them. gate is None
            where there is none.
        down: [out, D].
        gate_bias, up_bias, down_bias: floats or None.
        block: neurons of a unit of the lists; divides D.
        valued: see PackedFfn; takes no gate.
        device: where to.

    Raises:
        ValueError: bits or groups without a kernel, floats beside quantized ones, or shapes that do not fit.
    """
    matrices = [m for m in (gate, up, down) if m is not None]
    kinds = {(m.bits, m.group_size) if _quantized(m) else (0, 1) for m in matrices}
    if len(kinds) > 1:
        raise ValueError(f"gate, up and down have (bits, group) {sorted(kinds)}; all three must have the same")
    bits, group = format_of(up)
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
    where = torch.device(device)
    rows = [None if m is None else _rows(m, where) for m in (gate, up)]
    assert rows[1] is not None
    turned = _turned(down, bits, group, where)
    vectors = [None if b is None else _tensor(b, where) for b in (gate_bias, up_bias, down_bias)]
    return PackedFfn(rows[0], rows[1], turned, *vectors, (inputs, neurons, out), bits, group, block, valued)


def turned_matrix(matrix: Any, device: torch.device) -> tuple[Matrix, int, int]:
    """A matrix [out, in] as rows of its inputs, laid as down is; its bits, and the values of a scale.

    Raises:
        ValueError: bits or groups without a kernel.
    """
    bits, group = format_of(matrix)
    return _turned(matrix, bits, group, device), bits, group


def row_matrix(matrix: Any, device: torch.device) -> tuple[Matrix, int, int]:
    """A matrix [out, in] as it is; its bits, and the values of a scale.

    Raises:
        ValueError: bits or groups without a kernel.
    """
    bits, group = format_of(matrix)
    return _rows(matrix, device), bits, group


def format_of(matrix: Any) -> tuple[int, int]:
    """Bits and values of a scale: 0 and 1 for floats.

    Raises:
        ValueError: they have no kernel.
    """
    if not _quantized(matrix):
        return 0, 1
    bits, group = matrix.bits, matrix.group_size
    if bits not in BITS or group not in GROUPS:
        raise ValueError(f"{bits} bits in groups of {group} have no kernel: take bits of {BITS}, groups of {GROUPS}")
    return bits, group


def has_kernel(matrix: Any) -> bool:
    """Whether a matrix can stay as it is."""
    return not _quantized(matrix) or (matrix.bits in BITS and matrix.group_size in GROUPS)


def _quantized(matrix: Any) -> bool:
    return hasattr(matrix, "packed")


def _tensor(array: Any, device: torch.device) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array.to(device)
    array = np.ascontiguousarray(array)
    if not array.flags.writeable:
        # Memory of a file, which may be closed before the tensor is gone.
        array = array.copy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def _affine(matrix: Any) -> tuple[Any, Any]:
    """Scales and biases as they are stored, or in float32 where that would lose something."""
    plain = matrix.super_scales is None and matrix.biases is not None
    return (matrix.scales, matrix.biases) if plain else matrix.affine()


def _rows(matrix: Any, device: torch.device) -> Matrix:
    if not _quantized(matrix):
        return Matrix(_tensor(matrix, device).contiguous())
    words = _tensor(np.ascontiguousarray(matrix.packed).view(np.int32), device)
    return Matrix(words, *(_tensor(part, device).contiguous() for part in _affine(matrix)))


def _turned(down: Any, bits: int, group: int, device: torch.device) -> Matrix:
    if not bits:
        return Matrix(_tensor(down, device).t().contiguous())
    per, out = 32 // bits, down.shape[0]
    words = -(-out // per)
    octets = np.ascontiguousarray(down.packed).view(np.uint8)
    codes = octets if bits == 8 else np.stack([octets & 15, octets >> 4], axis=-1).reshape(out, -1)
    # Outputs are padded to whole words: their codes and scales are 0, and nothing stores them.
    fields = np.pad(codes, ((0, per * words - out), (0, 0))).T.reshape(-1, per, words).astype(np.uint32)
    joined = np.zeros((len(fields), words), np.uint32)
    for i in range(per):
        joined |= fields[:, i] << np.uint32(i * bits)
    parts = [np.pad(np.ascontiguousarray(part.T), ((0, 0), (0, per * words - out))) for part in _affine(down)]
    return Matrix(_tensor(joined.view(np.int32), device), *(_tensor(part, device) for part in parts))


def unpacked(ffn: PackedFfn) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Gate, up [D, in] and down as [D, out] in float32, for the twins."""
    if not ffn.bits:
        gate = None if ffn.gate is None else ffn.gate.weight.float()
        return gate, ffn.up.weight.float(), ffn.down.weight.float()
    per = 32 // ffn.bits
    shifts = torch.arange(per, device=ffn.device, dtype=torch.int32) * ffn.bits

    def rows(matrix: Matrix) -> torch.Tensor:
        assert matrix.scales is not None and matrix.biases is not None
        codes = (matrix.weight[:, :, None] >> shifts) & (2**ffn.bits - 1)
        scales, biases = (part.float().repeat_interleave(ffn.group, 1) for part in (matrix.scales, matrix.biases))
        return codes.flatten(1).float() * scales + biases

    turned = unpacked_turned(ffn.down, ffn.bits, ffn.group, ffn.shape[2])
    return (None if ffn.gate is None else rows(ffn.gate)), rows(ffn.up), turned


def unpacked_turned(matrix: Matrix, bits: int, group: int, out: int) -> torch.Tensor:
    """Rows that lie as down's do, in float32: [rows, out]."""
    if not bits:
        return matrix.weight.float()
    assert matrix.scales is not None and matrix.biases is not None
    shifts = torch.arange(32 // bits, device=matrix.weight.device, dtype=torch.int32) * bits
    codes = ((matrix.weight[:, None, :] >> shifts[:, None]) & (2**bits - 1)).flatten(1).float()
    scales, biases = (part.float().repeat_interleave(group, 0) for part in (matrix.scales, matrix.biases))
    return (codes * scales + biases)[:, :out]
