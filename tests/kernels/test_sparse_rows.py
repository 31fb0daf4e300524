"""Gate and up of picked neurons against float64, against the dense kernels, and unpacked."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cpu_kernels.compile import kernel, unpack
from cpu_kernels.threads import shared_pool
from cpu_kernels.unpack_rows import unpack_rows
from cpu_kernels.unpacked import group_bytes, unpack_tile
from ondevice.checkpoint.quantization import Quantized, quantize
from ondevice.errors import OptionError
from ondevice.ops.cpu import ACTIVATIONS
from ondevice.ops.cpu_memory import WeightMemory
from ondevice.ops.cpu_products import record_linear
from ondevice.ops.cpu_program import Program
from ondevice.ops.cpu_recording import Recording
from ondevice.ops.cpu_sparse_rows import NeuronRows, pack_neuron_rows, record_rows
from ondevice.ops.cpu_weights import pack_rows
from tests.kernels.cases_sparse_rows import LISTS, dense_ffn
from tests.kernels.rounding import rounded
from tests.kernels.tables_of_neurons import listed, make_table

FORMATS = {
    "4/32/symmetric": 992,
    "4/32/f16": 96,
    "4/64/f32": 1088,
    "4/128/bf16": 640,
    "8/32/symmetric": 544,
    "8/64/f16": 512,
    "f32": 40,
    "f16": 96,
    "bf16": 17,
}
"""Formats of weights, each with a width that cuts rows into other segments."""


def weight(rows: int, kind: str, seed: int) -> Any:
    inputs = FORMATS[kind]
    w = np.random.RandomState(seed).standard_normal((rows, inputs)).astype(np.float32) / np.float32(np.sqrt(inputs))
    if "/" not in kind:
        return w.astype({"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[kind])
    bits, group, style = kind.split("/")
    dtype: Any = {"f32": np.float32, "bf16": ml_dtypes.bfloat16}.get(style, np.float16)
    q = quantize(w, int(bits), int(group), dtype)
    return Quantized(q.packed, q.scales, None if style == "symmetric" else q.biases, q.bits, q.group_size)


def token(kind: str, seed: int = 0) -> np.ndarray:
    x = np.random.RandomState(seed).standard_normal((1, FORMATS[kind])).astype(np.float32)
    x[:, [5, -3]] *= 30
    return x


def packed(gate: Any, up: Any, **biases: Any) -> NeuronRows:
    return pack_neuron_rows(shared_pool(1), WeightMemory(), gate, up, **biases)


def run(
    rows: NeuronRows, x: np.ndarray, neurons: Any, activation: str = "silu", values: Any = None, threads: int = 2
) -> np.ndarray:
    """[entries, 32] activations; asserts that nothing else was written."""
    program = Program()
    recording = Recording(program, threads, {})
    buffers = []
    for array in (x,) if values is None else (x, values):
        # What lies behind a row in memory must not matter.
        buffer = recording.new(*array.shape)
        floats = buffer.block.array.view(np.float32)
        floats[:] = np.nan
        floats[: array.size] = array[0]
        buffers.append(buffer)
    out = record_rows(
        recording, buffers[0], rows, make_table(neurons, rows.neurons), ACTIVATIONS[activation], *buffers[1:]
    )
    memory = out.block.array.view(np.float32)
    memory[:] = 12345
    program.seal()
    program.run(shared_pool(threads))
    used = listed(neurons, rows.neurons).size
    assert (memory[used:] == 12345).all()
    return memory[:used].reshape(-1, 32).copy()


def check(got: np.ndarray, dense: np.ndarray, neurons: Any, tolerance: float = 3e-6) -> None:
    """Compares with the dense results [1, neurons] of listed neurons; exact zeros behind them."""
    places = listed(neurons, dense.shape[1])
    assert (got[places < 0] == 0).all()
    expected = dense[0][places[places >= 0]]
    assert np.abs(got[places >= 0] - expected).max(initial=0) <= tolerance * np.abs(dense).max(initial=1)


def seen(x: np.ndarray, kind: str) -> np.ndarray:
    """The token as products see it."""
    return rounded(x) if "/" in kind else x


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("kind", FORMATS)
def test_picked_neurons(kind: str, name: str) -> None:
    total, neurons = LISTS[name]
    gate, up, x = weight(total, kind, 1), weight(total, kind, 2), token(kind)
    got = run(packed(gate, up), x, neurons, "relu")
    check(got, dense_ffn(seen(x, kind), gate, up, "relu"), neurons)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["4/32/symmetric", "f32"])
@pytest.mark.parametrize("mode", ["gated", "plain", "valued"])
def test_modes_with_biases(mode: str, kind: str, activation: str) -> None:
    total, neurons = LISTS["a third"]
    random = np.random.RandomState(4)
    gate = weight(total, kind, 1) if mode == "gated" else None
    up, x = weight(total, kind, 2), token(kind)
    biases = random.standard_normal((3, total)).astype(np.float32)
    given = {"up_bias": biases[0]} | ({"gate_bias": biases[1]} if mode == "gated" else {})
    values = biases[2:] if mode == "valued" else None
    got = run(packed(gate, up, **given), x, neurons, activation, values)
    check(got, dense_ffn(seen(x, kind), gate, up, activation, values=values, **given), neurons)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if "/" in kind])
def test_one_row_a_neuron(kind: str) -> None:
    total, neurons = LISTS["seven"]
    up, x = weight(total, kind, 2), token(kind)
    check(run(packed(None, up), x, neurons, "gelu"), dense_ffn(seen(x, kind), None, up, "gelu"), neurons)


@pytest.mark.parametrize("outliers", [0, 1, 5])
@pytest.mark.parametrize("kind", ["4/32/symmetric", "4/64/f32", "8/64/f16"])
def test_sums_are_those_of_the_dense_kernel(kind: str, outliers: int) -> None:
    total = 70
    up, x = weight(total, kind, 2), token(kind, 7) / 30
    x[:, 40 : 40 + 100 * outliers : 100] += 50
    program, pool = Program(), shared_pool(1)
    recording = Recording(program, 1, {})
    source = recording.new(*x.shape)
    source.block.array.view(np.float32)[: x.size] = x[0]
    out = record_linear(recording, source, pack_rows(pool, WeightMemory(), [up], [None]), None)
    program.seal()
    program.run(pool)
    dense = out.block.array.view(np.float32)[:total]
    ones = np.ones((1, total), np.float32)
    got = run(packed(None, up), x, range(total), "none", values=ones).ravel()[:total]
    assert np.abs(got - dense).max() <= 1e-6 * np.abs(dense).max()


@pytest.mark.parametrize("kind", ["4/32/symmetric", "f16"])
def test_a_neuron_is_the_same_in_any_company_and_by_any_threads(kind: str) -> None:
    total, neurons = LISTS["a third"]
    rows, x = packed(weight(total, kind, 1), weight(total, kind, 2)), token(kind)
    everything = run(rows, x, range(total)).ravel()
    for some, threads in ((neurons, 1), (neurons, 2), (neurons[:5], 2), ([77], 1)):
        places = listed(some, total)
        got = run(rows, x, some, threads=threads)
        assert np.array_equal(got[places >= 0], everything[places[places >= 0]])


@pytest.mark.parametrize("scale", [1e-20, 1e15, 0.0])
def test_extreme_activations(scale: float) -> None:
    kind, total = "8/32/symmetric", 33
    up, x = weight(total, kind, 2), token(kind) * np.float32(scale)
    ones = np.ones((1, total), np.float32)
    got = run(packed(None, up), x, range(total), "none", values=ones)
    dense = dense_ffn(rounded(x), None, up, "none", values=ones)
    assert np.abs(got.ravel()[:total] - dense[0]).max() <= 3e-6 * np.abs(dense).max()


@pytest.mark.parametrize("kind", ["4/32/symmetric", "4/32/f16", "f16"])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_not_lost(kind: str, place: int, bad: float) -> None:
    x = token(kind)
    x[0, place] = bad
    rows = packed(weight(33, kind, 1), weight(33, kind, 2))
    assert not np.isfinite(run(rows, x, [0, 3, 32])[[0, 0, 1], [0, 1, 0]]).any()


def test_what_rows_by_neuron_cannot_hold_is_refused() -> None:
    four, wide, eight = (weight(16, kind, 1) for kind in ("4/32/f16", "4/32/symmetric", "8/32/symmetric"))
    six = quantize(np.ones((16, 96), np.float32), 6, 32)
    k = Quantized(four.packed, four.scales.astype(np.uint8), None, 4, 32, np.ones((16, 1), np.float16))
    for gate, up, word in ((wide, eight, "gate"), (four, six, "6"), (None, six, "6"), (None, k, "two steps")):
        with pytest.raises(OptionError, match=word):
            packed(gate, up)


def test_gate_and_up_of_different_kinds() -> None:
    total, x = 70, token("4/32/f16")
    symmetric = weight(total, "4/32/f16", 1)
    symmetric = Quantized(symmetric.packed, symmetric.scales, None, 4, 32)
    for gate, up in (
        (symmetric, weight(total, "4/32/f16", 2)),
        (weight(total, "f16", 1), weight(total, "f16", 2).astype(np.float32)),
    ):
        view = rounded(x) if isinstance(gate, Quantized) else x
        check(run(packed(gate, up), x, [1, 2, 69]), dense_ffn(view, gate, up, "silu"), [1, 2, 69])


def _tile_of_rows(rows: NeuronRows, part: int, neurons: np.ndarray, count: int) -> np.ndarray:
    intrinsic, layout = unpack_rows(rows.layout, part), rows.layout

    @kernel(f"test unpack rows {layout.label} {part}")
    def unpack_some(arguments, tile, thread):
        out, weights, listed, n = unpack(arguments, "iiii")
        intrinsic(out, weights, listed, n)

    out = np.full(layout.inputs // 32 * group_bytes(layout.tiles) + 64, 77, np.uint8)
    _run_once(unpack_some, (out, rows.data, neurons, count))
    assert (out[-64:] == 77).all()
    return out[:-64]


def _tile_of_tile(tensor: Quantized) -> np.ndarray:
    (tiles,) = pack_rows(shared_pool(1), WeightMemory(), [tensor], [None])
    layout, groups = tiles.format.layout, tiles.format.inputs // 32
    intrinsic = unpack_tile(layout)

    @kernel(f"test unpack tile {layout.label}")
    def unpack_one(arguments, tile, thread):
        out, weights, n = unpack(arguments, "iii")
        intrinsic(out, weights, n)

    out = np.zeros(groups * group_bytes(layout), np.uint8)
    _run_once(unpack_one, (out, tiles.data, groups))
    return out


def _run_once(item: Any, arguments: tuple[Any, ...]) -> None:
    program = Program()
    program.add(item, 1, arguments)
    program.seal()
    program.run(shared_pool(1))


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if "/" in kind])
@pytest.mark.parametrize("parts", [1, 2])
def test_unpacked_rows_are_unpacked_tiles(kind: str, parts: int) -> None:
    tensors = [weight(50, kind, seed) for seed in range(parts)]
    rows = packed(None if parts == 1 else tensors[0], tensors[-1])
    neurons = np.random.RandomState(5).permutation(50)[:16].astype(np.int32)
    for part, tensor in enumerate(tensors):
        for count in (16, 5, 1):
            taken = neurons[np.minimum(np.arange(16), count - 1)]
            mine = np.where(np.arange(16) < count, neurons, -(10**6)).astype(np.int32)
            assert np.array_equal(_tile_of_rows(rows, part, mine, count), _tile_of_tile(tensor.rows(taken)))
