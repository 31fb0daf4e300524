"""Layers that skip blocks, for one token, against the whole layer with zeros and against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels import rows
from cpu_kernels.threads import shared_pool
from ondevice.checkpoint.quantization import Quantized, quantize
from ondevice.errors import OptionError
from ondevice.ops.cpu import ACTIVATIONS
from ondevice.ops.cpu_memory import WeightMemory
from ondevice.ops.cpu_products import record_linear
from ondevice.ops.cpu_recording import Buffer, Recording
from ondevice.ops.cpu_sparse_tiles import Chosen, SparseTiles, band_of, pack_tiles, record_tiles
from ondevice.ops.cpu_weights import pack_rows
from tests.kernels import cases_blocks as cases
from tests.kernels.recorded import chosen_table, put, recorded
from tests.kernels.rounding import rounded

THREADS = (1, 2)


def packed(ffn: cases.Layer, valued: bool = False) -> SparseTiles:
    return pack_tiles(shared_pool(1), WeightMemory(), ffn.gate, ffn.up, ffn.down, ffn.biases, valued)  # type: ignore[arg-type]


def sparse(
    ffn: SparseTiles,
    x: NDArray[Any],
    mask: NDArray[np.bool_],
    kind: str,
    threads: int = 2,
    residual: NDArray[Any] | None = None,
    values: NDArray[Any] | None = None,
) -> NDArray[np.float32]:
    def body(recording: Recording) -> Buffer:
        table = chosen_table(mask)
        recording.program.keep(table)
        extra = None if residual is None else put(recording, residual)
        chosen = Chosen(table.ctypes.data, None if values is None else put(recording, values))
        return record_tiles(recording, put(recording, x), ffn, chosen, ACTIVATIONS[kind], extra)

    return recorded(threads, body)


def dense(ffn: cases.Layer, x: NDArray[Any], mask: NDArray[np.bool_], kind: str) -> NDArray[np.float32]:
    """The whole layer by the dense kernels, with zeros for the activations that the mask leaves out."""
    pool, memory = shared_pool(2), WeightMemory()
    gated, width = ffn.gate is not None, mask.shape[1]
    both = [ffn.gate, ffn.up] if gated else [ffn.up]
    tiles = pack_rows(pool, memory, both, ffn.biases[:2] if gated else ffn.biases[1:2])  # type: ignore[arg-type]

    def first(recording: Recording) -> Buffer:
        y = record_linear(recording, put(recording, x), tiles, None)
        arguments = (y.address, y.stride_bytes, width, ACTIVATIONS[kind], gated)
        return recording.later(len(x), width, rows.activation, y, arguments)

    h = np.where(mask, recorded(2, first), 0)
    down = pack_rows(pool, memory, [ffn.down], [ffn.biases[2]])
    return recorded(2, lambda recording: record_linear(recording, put(recording, h), down, None))


def inputs(ffn: cases.Layer, n: int = 1) -> NDArray[np.float32]:
    x = np.random.RandomState(11).standard_normal((n, ffn.up.shape[1])).astype(np.float32)
    # A group with an outlier, which has a second plane.
    x[:, 5] *= 20
    return x


@pytest.mark.parametrize("name", cases.SELECTIONS)
@pytest.mark.parametrize("size", cases.SIZES)
def test_blocks_equal_the_whole_layer_with_zeros(size: str, name: str) -> None:
    d, neurons, block = cases.SIZES[size]
    ffn = cases.layer(d, neurons, "gated", "4/32/symmetric", biases=True)
    mask = cases.spread(cases.selection(name, 1, -(-neurons // block)), block, neurons)
    x = inputs(ffn)
    got = [sparse(packed(ffn), x, mask, "silu", threads) for threads in THREADS]
    assert np.array_equal(got[0], got[1])
    assert np.array_equal(got[0], dense(ffn, x, mask, "silu"))


@pytest.mark.parametrize("form", cases.FORMATS)
@pytest.mark.parametrize("mode", ["gated", "plain"])
def test_formats(form: str, mode: str) -> None:
    ffn = cases.layer(48, 256, mode, form, biases=False)
    mask = cases.spread(cases.selection("half", 1, 8, seed=4), 32, 256)
    assert 0 < mask.sum() < 256
    x = inputs(ffn)
    assert np.array_equal(sparse(packed(ffn), x, mask, "relu"), dense(ffn, x, mask, "relu"))


@pytest.mark.parametrize(
    ("mode", "kind"), [("gated", "silu"), ("plain", "gelu"), ("gated", "gelu_tanh"), ("valued", "silu")]
)
def test_blocks_against_float64(mode: str, kind: str) -> None:
    ffn = cases.layer(80, 224, mode, "8/32/symmetric", biases=True)
    mask = cases.spread(cases.selection("half", 1, 7), 32, 224)
    x = rounded(inputs(ffn)).astype(np.float32)
    random = np.random.RandomState(3)
    values = random.standard_normal((1, 224)).astype(np.float32) if mode == "valued" else None
    residual = random.standard_normal((1, 80)).astype(np.float32)
    got = sparse(packed(ffn, mode == "valued"), x, mask, kind, residual=residual, values=values)
    h = rounded(cases.hidden(ffn, x, mask, kind, values))
    expected = cases.result(ffn, h, residual)
    # An activation that lies between two int8 steps may be rounded the other way: one of 96, by a part in 254.
    assert np.abs(got - expected).max() <= 2e-4 * np.abs(expected).max()


def test_super_blocks() -> None:
    """Scales of 256 inputs that share a float, of which some groups of 32 are read."""
    random = np.random.RandomState(5)

    def k_weight(out: int, width: int) -> Quantized:
        q = quantize(random.standard_normal((out, width)).astype(np.float32), 4, 32)
        scales = random.randint(1, 64, (out, width // 32)).astype(np.uint8)
        biases = random.randint(1, 64, (out, width // 32)).astype(np.uint8)
        factor = np.full((out, width // 256), 1e-3, np.float16)
        return Quantized(q.packed, scales, biases, 4, 32, factor, -factor)

    ffn = cases.Layer(k_weight(512, 256), k_weight(512, 256), k_weight(48, 512), (None, None, None))
    mask = cases.spread(cases.selection("half", 1, 16), 32, 512)
    x = inputs(ffn)
    assert np.array_equal(sparse(packed(ffn), x, mask, "silu"), dense(ffn, x, mask, "silu"))


def test_a_nan_in_a_chosen_neuron_is_not_lost_and_one_outside_is_not_read() -> None:
    ffn = cases.layer(48, 96, "plain", "4/32/f16", biases=True)
    bias = ffn.biases[1]
    assert bias is not None
    bias[40] = np.nan
    mask = np.zeros((1, 96), bool)
    mask[:, :32] = True
    assert np.isfinite(sparse(packed(ffn), inputs(ffn), mask, "silu")).all()
    mask[:, 32:64] = True
    assert np.isnan(sparse(packed(ffn), inputs(ffn), mask, "silu")).all()


@pytest.mark.parametrize(("tiles", "band"), [(36, 9), (48, 8), (128, 8), (1, 1), (7, 7), (37, 1), (26, 13), (40, 8)])
def test_bands_divide_the_tiles(tiles: int, band: int) -> None:
    assert band_of(tiles) == band


def test_what_cannot_be_packed_is_refused() -> None:
    ffn = cases.layer(48, 96, "gated", "4/32/f16", biases=False)
    pool, memory = shared_pool(1), WeightMemory()
    with pytest.raises(OptionError, match=r"down of float32: .*quantized"):
        pack_tiles(pool, memory, ffn.gate, ffn.up, np.zeros((48, 96), np.float32))
    with pytest.raises(OptionError, match="both in one format"):
        pack_tiles(pool, memory, cases.weight(96, 128, "8/32/f16", 1), ffn.up, ffn.down)
    with pytest.raises(OptionError, match="32k neurons"):
        pack_tiles(pool, memory, None, cases.weight(80, 128, "4/32/f16", 1), ffn.down)
    with pytest.raises(OptionError, match="leave one of them out"):
        pack_tiles(pool, memory, ffn.gate, ffn.up, ffn.down, valued=True)
