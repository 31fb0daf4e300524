"""An FFN whose neurons are named by lists: one for each token, or one for the batch.

What it must move: the listed rows of gate, up and down, once for each token, or once for TOKENS tokens of one list. At
d 2048, 4 bits in groups of 64 and 1024 of 8192 neurons that is 3.5 MB: 2 * 1024 * (1024 + 128) bytes of gate and up,
and 1024 * 1024 of down, whose scales lie by groups of neurons, so a group that has any neuron listed costs 4 bytes for
each output. h and the partial sums stay in the caches.

Grid: hidden, a simdgroup for ROWS neurons, as many as keep sixteen-byte loads of all of them in flight; inputs are
read once for all of these rows, and gate and up together. Lanes go along a row, so loads of a simdgroup are 512 bytes
side by side whatever the list says. down, a threadgroup for 256 outputs and CHUNK list entries: without chunks there
would be out / 256 threadgroups, too few for any GPU. Its simdgroups share a chunk's entries, ask for four rows at a
time and add what they found in threadgroup memory (8 KB), then `sum` adds chunks: always in order, without atomics, so
the bits are the same each time. Chunks are of one length whatever the batch. Threadgroups beyond a list's count end
after one load.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from metal_kernels.activation import activate_mlx
from metal_kernels.launch import KINDS, absent, launch, need_float, need_gpu, need_kind, tiles
from metal_kernels.lists import RowList, mask_of_lists
from metal_kernels.pack import Matrix, PackedFfn, unpacked

CHUNK = 256
"""List entries of a partial sum of down."""
TOKENS = 4
"""Tokens for which a row is read once; a batch of more reads it again, mostly from the cache."""
HIDDEN_SIMDGROUPS = 2
DOWN_SIMDGROUPS = 8
OUTPUTS = 256
"""Outputs of a threadgroup of down: eight for each lane."""


def sparse_ffn_rows(
    x: mx.array,
    ffn: PackedFfn,
    rows: RowList,
    activation: str,
    values: mx.array | None = None,
    residual: mx.array | None = None,
) -> mx.array:
    """down h (+ bias, + residual), where h is 0 for neurons that no list names. Nothing else is read.

    h is act(gate x) * (up x), act(up x) without a gate, value * act(up x) if valued. Sums and h are in float32.

    Args:
        x: [N, in].
        ffn: of `pack_ffn`.
        rows: of units of `ffn.block` neurons; each at most once in a list. N lists, or one for all.
        activation: "silu", "gelu", "gelu_tanh", "relu", "abs" or "none".
        values: [N, D] of a valued FFN.
        residual: [N, out].

    Returns:
        [N, out] in x's type.

    Raises:
        ValueError: shapes or types that do not fit.
        RuntimeError: there is no Apple GPU.

    Source: selective GEMM, Polar Sparsity (Shrestha et al. 2025), algorithm 3; LTE (Zheng et al. 2024), section 5.3.
    """
    _need(x, ffn, rows, activation, values, residual)
    need_gpu()
    tokens, out = len(x), ffn.shape[2]
    if not tokens:
        return mx.zeros((0, out), x.dtype)
    shared = len(rows.count) == 1
    length, together = rows.indices.shape[1] * ffn.block, min(tokens, TOKENS) if shared else 1
    chunks, groups = tiles(length, CHUNK), tiles(tokens, together)
    if length:
        h = _hidden(x, ffn, rows, activation, values, (shared and tokens > 0, together, groups, length))
        (parts,) = launch(
            "sparse_ffn_down",
            {"h": h, **matrix_inputs("down", ffn.down, x), "indices": rows.indices, "counts": rows.count,
             "outputs": out},
            {"parts": ((chunks, tokens, out), mx.float32)},
            (tiles(out, OUTPUTS), chunks, groups),
            32 * DOWN_SIMDGROUPS,
            {"BITS": ffn.bits, "GROUP": ffn.group, "BLOCK": ffn.block, "SHARED": shared, "TOKENS": together,
             "CHUNK": CHUNK, "SIMDGROUPS": DOWN_SIMDGROUPS},
            ("outputs",),
        )  # fmt: skip
    else:
        parts = mx.zeros((1, tokens, out), mx.float32)
    (y,) = launch(
        "sparse_ffn_sum",
        {"parts": parts, "counts": rows.count, "bias": absent(ffn.down_bias, parts),
         "residual": absent(residual, parts), "chunks": chunks},
        {"y": ((tokens, out), x.dtype)},
        (tiles(out, 256), tokens, 1),
        256,
        {"T": x.dtype, "SHARED": shared, "BLOCK": ffn.block, "CHUNK": CHUNK, "BIAS": ffn.down_bias is not None,
         "RESIDUAL": residual is not None},
    )  # fmt: skip
    return y


def _hidden(
    x: mx.array,
    ffn: PackedFfn,
    rows: RowList,
    activation: str,
    values: mx.array | None,
    sizes: tuple[bool, int, int, int],
) -> mx.array:
    shared, together, groups, length = sizes
    per_simdgroup = rows_of(together)
    (h,) = launch(
        "sparse_ffn_hidden",
        {"x": x, **hidden_inputs(ffn, x), "values": absent(values, x), "indices": rows.indices, "counts": rows.count},
        {"h": ((len(x), length), mx.float32)},
        (tiles(length, per_simdgroup * HIDDEN_SIMDGROUPS), groups, 1),
        32 * HIDDEN_SIMDGROUPS,
        {**hidden_template(ffn, activation), "VALUED": ffn.valued, "SHARED": shared, "TOKENS": together,
         "ROWS": per_simdgroup},
        ("activation", "rows"),
    )  # fmt: skip
    return h


def rows_of(together: int) -> int:
    """Rows of a simdgroup: more tokens take the registers of more rows."""
    return 4 if together == 1 else 2


def matrix_inputs(name: str, matrix: Matrix, other: mx.array) -> dict[str, mx.array]:
    """A matrix as a kernel takes it."""
    scales, biases = ("scales", "biases") if name == "down" else (f"{name}_scales", f"{name}_biases")
    return {name: matrix.weight, scales: absent(matrix.scales, other), biases: absent(matrix.biases, other)}


def hidden_inputs(ffn: PackedFfn, x: mx.array) -> dict[str, mx.array]:
    """Gate, up and their biases as kernels take them; up stands for a gate that is not there."""
    return {
        **matrix_inputs("gate", ffn.gate or ffn.up, x),
        "gate_bias": absent(ffn.gate_bias, x),
        **matrix_inputs("up", ffn.up, x),
        "up_bias": absent(ffn.up_bias, x),
    }


def hidden_template(ffn: PackedFfn, activation: str) -> dict[str, Any]:
    """Constants of kernels that compute h."""
    return {
        "BITS": ffn.bits,
        "GROUP": ffn.group,
        # Values of a row in sixteen bytes.
        "N": 128 // ffn.bits if ffn.bits else 16 // ffn.up.weight.dtype.size,
        "BLOCK": ffn.block,
        "KIND": KINDS.index(activation),
        "GATED": ffn.gate is not None,
        "GATE_BIAS": ffn.gate_bias is not None,
        "UP_BIAS": ffn.up_bias is not None,
    }


def _need(
    x: mx.array,
    ffn: PackedFfn,
    rows: RowList,
    activation: str,
    values: mx.array | None,
    residual: mx.array | None,
) -> None:
    need_kind(activation)
    need_float("x", x)
    inputs, neurons, out = ffn.shape
    if x.ndim != 2 or x.shape[1] != inputs:
        raise ValueError(f"x is {list(x.shape)}; this FFN takes [N, {inputs}]")
    if len(rows.count) not in (1, len(x)) or len(rows.indices) != len(rows.count):
        raise ValueError(f"{len(rows.indices)} lists with {len(rows.count)} counts; there must be 1 or {len(x)}")
    if (values is not None) != ffn.valued or (values is not None and values.shape != (len(x), neurons)):
        raise ValueError(f"values must be [{len(x)}, {neurons}] for a valued FFN, and None for another")
    if residual is not None and residual.shape != (len(x), out):
        raise ValueError(f"residual is {list(residual.shape)}; it must be [{len(x)}, {out}]")


def sparse_ffn_rows_mlx(
    x: mx.array,
    ffn: PackedFfn,
    rows: RowList,
    activation: str,
    values: mx.array | None = None,
    residual: mx.array | None = None,
) -> mx.array:
    """`sparse_ffn_rows` in plain MLX, on any device: everything is computed in float32, then masked."""
    _need(x, ffn, rows, activation, values, residual)
    gate, up, down = unpacked(ffn)
    inputs = x.astype(mx.float32)

    def product(weight: mx.array, bias: mx.array | None) -> mx.array:
        y = inputs @ weight.T
        return y if bias is None else y + bias.astype(mx.float32)

    h = product(up, ffn.up_bias)
    h = activate_mlx(h, activation) if gate is None else activate_mlx(product(gate, ffn.gate_bias), activation) * h
    if values is not None:
        h = h * values.astype(mx.float32)
    run = mx.repeat(mask_of_lists(rows, ffn.shape[1] // ffn.block), ffn.block, axis=1)
    y = mx.where(run, h, 0) @ down
    for part in (ffn.down_bias, residual):
        y = y if part is None else y + part.astype(mx.float32)
    return y.astype(x.dtype)
