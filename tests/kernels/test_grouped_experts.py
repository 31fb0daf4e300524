"""Layers of experts of which each token needs its own, against each token alone and against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels.threads import shared_pool
from ondevice.errors import OptionError
from ondevice.ops.cpu import ACTIVATIONS
from ondevice.ops.cpu_grouped import Experts, record_grouped
from ondevice.ops.cpu_memory import WeightMemory
from ondevice.ops.cpu_recording import Buffer, Recording
from ondevice.ops.cpu_sparse_tiles import Chosen, SparseTiles, pack_tiles, record_tiles
from tests.kernels import cases_blocks as cases
from tests.kernels.recorded import chosen_table, mask_words, put, recorded
from tests.kernels.rounding import rounded


def packed(ffn: cases.Layer) -> SparseTiles:
    return pack_tiles(shared_pool(1), WeightMemory(), ffn.gate, ffn.up, ffn.down, ffn.biases)  # type: ignore[arg-type]


def grouped(
    ffn: SparseTiles,
    x: NDArray[Any],
    mask: NDArray[np.bool_],
    kind: str,
    threads: int = 2,
    residual: NDArray[Any] | None = None,
    shared: bool = False,
) -> NDArray[np.float32]:
    def body(recording: Recording) -> Buffer:
        words = mask_words(mask)
        recording.program.keep(words)
        experts = Experts(words.ctypes.data, 0 if shared else words.strides[0], mask.shape[1])
        extra = None if residual is None else put(recording, residual)
        return record_grouped(recording, put(recording, x), ffn, experts, ACTIVATIONS[kind], extra)

    return recorded(threads, body)


def alone(ffn: SparseTiles, x: NDArray[Any], mask: NDArray[np.bool_], kind: str) -> NDArray[np.float32]:
    """One token, with the neurons of its experts."""

    def body(recording: Recording) -> Buffer:
        table = chosen_table(np.repeat(mask, ffn.neurons // mask.shape[1], axis=1))
        recording.program.keep(table)
        return record_tiles(recording, put(recording, x), ffn, Chosen(table.ctypes.data), ACTIVATIONS[kind], None)

    return recorded(1, body)


def inputs(n: int, width: int = 128) -> NDArray[np.float32]:
    x = np.random.RandomState(n).standard_normal((n, width)).astype(np.float32)
    # Some groups have outliers, and with them second planes.
    x[::2, 5] *= 20
    return x


@pytest.mark.parametrize("mode", ["gated", "plain"])
@pytest.mark.parametrize("n", [1, 2, 5, 12, 13, 33, 130])
def test_a_token_of_many_equals_the_token_alone(mode: str, n: int) -> None:
    ffn = packed(cases.layer(80, 384, mode, "4/32/symmetric", biases=True))
    x, mask = inputs(n), cases.selection("own", n, 6)
    got = [grouped(ffn, x, mask, "silu", threads) for threads in (1, 2)]
    assert np.array_equal(got[0], got[1])
    for i in {0, n // 2, n - 1}:
        assert np.array_equal(got[0][i], alone(ffn, x[i : i + 1], mask[i : i + 1], "silu")[0])


@pytest.mark.parametrize("name", ["none", "all", "first", "last", "ends"])
def test_experts_that_all_or_none_need(name: str) -> None:
    ffn = packed(cases.layer(48, 192, "plain", "8/64/f16", biases=True))
    x, mask = inputs(17), cases.selection(name, 17, 6)
    got = grouped(ffn, x, mask, "gelu")
    assert np.array_equal(got, grouped(ffn, x, mask[:1], "gelu", shared=True))
    for i in (0, 16):
        assert np.array_equal(got[i], alone(ffn, x[i : i + 1], mask[i : i + 1], "gelu")[0])


def test_more_experts_than_bits_of_a_word() -> None:
    ffn = packed(cases.layer(32, 32 * 130, "plain", "4/32/f16", biases=False))
    x, mask = inputs(9), cases.selection("own", 9, 130)
    mask[3] = True
    got = grouped(ffn, x, mask, "relu")
    for i in (0, 3, 8):
        assert np.array_equal(got[i], alone(ffn, x[i : i + 1], mask[i : i + 1], "relu")[0])


@pytest.mark.parametrize(
    ("mode", "kind", "groups"), [("plain", "gelu", 4), ("gated", "silu", 2), ("gated", "gelu_tanh", 1)]
)
def test_experts_against_float64(mode: str, kind: str, groups: int) -> None:
    neurons = 5 * groups * 32
    layer = cases.layer(64, neurons, mode, "8/32/symmetric", biases=True)
    n = 40
    x = rounded(inputs(n)).astype(np.float32)
    mask = cases.selection("own", n, 5)
    residual = np.random.RandomState(3).standard_normal((n, 64)).astype(np.float32)
    got = grouped(packed(layer), x, mask, kind, residual=residual)
    h = rounded(cases.hidden(layer, x, cases.spread(mask, groups * 32, neurons), kind))
    expected = cases.result(layer, h, residual)
    # An activation that lies between two int8 steps may be rounded the other way.
    assert np.abs(got - expected).max() <= 2e-3 * np.abs(expected).max()
    assert np.abs(got - expected).mean() <= 1e-5 * np.abs(expected).max()


def test_a_nan_stays_with_its_token() -> None:
    ffn = packed(cases.layer(32, 96, "plain", "4/32/f16", biases=False))
    x = inputs(20)
    x[7, 3] = np.nan
    mask = np.ones((20, 3), bool)
    got = grouped(ffn, x, mask, "silu")
    assert np.isnan(got[7]).all()
    assert np.isfinite(np.delete(got, 7, axis=0)).all()


def test_layers_that_are_no_experts_are_refused() -> None:
    layer = cases.layer(32, 96, "plain", "4/32/f16", biases=False)
    with pytest.raises(OptionError, match="96 neurons, plain, as 2 experts"):
        grouped(packed(layer), inputs(2), np.ones((2, 2), bool), "silu")
