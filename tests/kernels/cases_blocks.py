"""Feed-forward layers of which tokens skip blocks of neurons: cases and a float64 reference for every home."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.quantization import Quantized, Tensor, dequantize, quantize

SIZES = {
    "one-block": (16, 32, 32),
    "few": (48, 96, 32),
    "whole-last": (80, 224, 32),
    "blocks-of-96": (96, 384, 96),
    "short-last-block": (64, 224, 64),
    "many-groups": (144, 1056, 32),
}
"""Hidden size (its weights' inputs padded to 128), neurons, neurons of a block."""

FORMATS = ("4/32/symmetric", "4/32/f16", "4/64/f32", "4/128/f16", "8/32/symmetric", "8/64/f16", "6/32/f32")


def selection(name: str, rows: int, blocks: int, seed: int = 0) -> NDArray[np.bool_]:
    """A mask [rows, blocks] by name: "none", "all", "first", "last", "ends", "half", "few", "own"."""
    mask = np.zeros((rows, blocks), bool)
    random = np.random.RandomState(seed)
    if name == "all":
        mask[:] = True
    elif name == "first":
        mask[:, 0] = True
    elif name == "last":
        mask[:, -1] = True
    elif name == "ends":
        mask[:, [0, -1]] = True
    elif name == "half":
        mask[:] = random.rand(blocks) < 0.5
    elif name == "few":
        mask[:, random.permutation(blocks)[: max(1, blocks // 8)]] = True
    elif name == "own":
        # Each row its own; the first has none.
        mask = random.rand(rows, blocks) < 0.4
        mask[0] = False
    return mask


SELECTIONS = ("none", "all", "first", "last", "ends", "half", "few")


def spread(mask: NDArray[np.bool_], block: int, neurons: int) -> NDArray[np.bool_]:
    """A mask of blocks as one of neurons; the last block may be smaller."""
    return np.repeat(mask, block, axis=1)[:, :neurons]


@dataclass(frozen=True, slots=True)
class Layer:
    """Canonical weights of a layer.

    Args:
        gate, up: [D, d]; down: [d, D].
        biases: of gate, up and down.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    biases: tuple[NDArray[np.float32] | None, ...]


def weight(rows: int, inputs: int, form: str, seed: int) -> Quantized:
    """Random weights; form: bits/group/kind of scales."""
    bits, group, kind = form.split("/")
    w = np.random.RandomState(seed).standard_normal((rows, inputs)) / math.sqrt(inputs)
    q = quantize(w, int(bits), int(group), np.float32 if kind == "f32" else np.float16)
    return Quantized(q.packed, q.scales, None, q.bits, q.group_size) if kind == "symmetric" else q


def layer(d: int, neurons: int, mode: str, form: str, biases: bool) -> Layer:
    """A random layer; mode: "gated", "plain" or "valued". Inputs of 128k, so that every group size fits gate and up.

    down falls back to groups of 32 where its inputs are no multiple of the group.
    """
    inputs = -(-d // 128) * 128
    bits, group, kind = form.split("/")
    down_form = form if neurons % int(group) == 0 else f"{bits}/32/{kind}"
    random = np.random.RandomState(7)
    given = [random.standard_normal(n).astype(np.float32) if biases else None for n in (neurons, neurons, d)]
    gate = weight(neurons, inputs, form, 1) if mode == "gated" else None
    return Layer(gate, weight(neurons, inputs, form, 2), weight(d, neurons, down_form, 3), tuple(given))


def activate(v: NDArray[np.float64], kind: str) -> NDArray[np.float64]:
    """An activation function in float64."""
    if kind == "none":
        return v
    if kind == "relu":
        return np.maximum(v, 0)
    if kind == "silu":
        return v / (1 + np.exp(-v))
    if kind == "gelu":
        return v * 0.5 * (1 + np.vectorize(math.erf)(v / math.sqrt(2)))
    return v * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def hidden(
    ffn: Layer, x: NDArray[Any], mask: NDArray[np.bool_], kind: str, values: NDArray[Any] | None = None
) -> NDArray[np.float64]:
    """float64 [N, D] activations of the neurons, 0 where the mask [N, D] says so."""

    def product(w: Tensor, bias: NDArray[Any] | None) -> NDArray[np.float64]:
        y: NDArray[np.float64] = x.astype(np.float64) @ dequantize(w, np.float64).T
        return y if bias is None else y + bias

    up = product(ffn.up, ffn.biases[1])
    if ffn.gate is not None:
        h = activate(product(ffn.gate, ffn.biases[0]), kind) * up
    else:
        h = activate(up, kind) * (1 if values is None else values)
    return np.where(mask, h, 0.0)


def result(ffn: Layer, h: NDArray[Any], residual: NDArray[Any] | None) -> NDArray[np.float64]:
    """float64 [N, d] from activations [N, D]."""
    y: NDArray[np.float64] = h.astype(np.float64) @ dequantize(ffn.down, np.float64).T
    for extra in (ffn.biases[2], residual):
        y = y if extra is None else y + extra
    return y
