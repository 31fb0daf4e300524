"""Many tokens times the neurons, or inputs, that any of them needs: against float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels.threads import shared_pool
from ondevice.ops.cpu import ACTIVATIONS
from ondevice.ops.cpu_chosen_gemm import Union, many_of_neurons, many_of_tiles, record_many, record_many_inputs
from ondevice.ops.cpu_memory import WeightMemory
from ondevice.ops.cpu_program import Program
from ondevice.ops.cpu_recording import Buffer, Recording
from ondevice.ops.cpu_sparse_inputs import pack_input_major
from ondevice.ops.cpu_sparse_rows import pack_neuron_rows
from ondevice.ops.cpu_sparse_tiles import pack_tiles
from tests.kernels.cases_blocks import FORMATS, Layer, hidden, result, weight
from tests.kernels.recorded import chosen_table, mask_words, put, recorded
from tests.kernels.rounding import rounded

FLOATS: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
TOKENS = (1, 2, 7, 17, 33)
MASKS = ("none", "all", "few", "own", "one", "last")


def masks(name: str, tokens: int, units: int) -> NDArray[np.bool_]:
    """What each token needs of so many neurons or inputs."""
    random = np.random.RandomState(units)
    mask = np.zeros((tokens, units), bool)
    if name == "all":
        mask[:] = True
    elif name == "few":
        mask[:] = random.rand(units) < 0.1
    elif name == "own":
        mask[:] = random.rand(tokens, units) < 0.3
        mask[0] = False
    elif name == "one":
        mask[-1, 0] = True
    elif name == "last":
        mask[:, -1] = True
    return mask


def numbers(rows: int, width: int, seed: int) -> NDArray[np.float32]:
    x = np.random.RandomState(seed).standard_normal((rows, width)).astype(np.float32)
    x[:, [5, -3]] *= 20
    return x


def matrix(rows: int, inputs: int, form: str, seed: int) -> Any:
    if form in FLOATS:
        w = np.random.RandomState(seed).standard_normal((rows, inputs)) / np.sqrt(inputs)
        return w.astype(FLOATS[form])
    return weight(rows, inputs, form, seed)


def seen(x: NDArray[Any], form: str) -> NDArray[Any]:
    """Rows as products with weights of a form see them."""
    if form in FLOATS:
        return x
    return rounded(np.pad(x, ((0, 0), (0, -x.shape[1] % 32))))[:, : x.shape[1]]


def union_of(recording: Recording, mask: NDArray[np.bool_], values: Buffer | None = None) -> Union:
    table, words = chosen_table(mask), mask_words(mask)
    recording.program.keep(table)
    recording.program.keep(words)
    return Union(table.ctypes.data, words.ctypes.data, words.shape[1] * 8, values)


def close(got: NDArray[Any], expected: NDArray[Any], form: str) -> None:
    """Codes of activations may round to the other side of a half, which is a step of 1/127 of a group's largest."""
    step = 1e-5 if form in FLOATS else 2e-3
    assert got.shape == expected.shape and np.isfinite(got).all()
    assert np.abs(got - expected).max(initial=0) <= step * max(1.0, np.abs(expected).max(initial=1))


def make(neurons: int, d: int, mode: str, form: str) -> Layer:
    random = np.random.RandomState(7)
    biases = [random.standard_normal(n).astype(np.float32) for n in (neurons, neurons, d)]
    gate = matrix(neurons, 128, form, 1) if mode == "gated" else None
    down = form if form in FLOATS or neurons % 128 == 0 else "4/32/symmetric"
    given = (biases[0] if gate is not None else None, *biases[1:])
    return Layer(gate, matrix(neurons, 128, form, 2), matrix(d, neurons, down, 3), given)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("mode", ["gated", "plain", "valued"])
@pytest.mark.parametrize("form", ["4/32/symmetric", "8/64/f16", "f32"])
def test_an_ffn_by_neuron(form: str, mode: str, tokens: int, name: str) -> None:
    run_ffn(form, mode, tokens, name, 256, 80)


@pytest.mark.parametrize("form", [f for f in FORMATS if not f.startswith("6")] + [*FLOATS])
@pytest.mark.parametrize(("neurons", "d"), [(32, 16), (1056, 144)])
def test_shapes_and_formats(form: str, neurons: int, d: int) -> None:
    run_ffn(form, "gated", 19, "own", neurons, d)


@pytest.mark.parametrize("form", ["f32", "bf16"])
def test_a_broken_last_group(form: str) -> None:
    run_ffn(form, "plain", 19, "own", 70, 33)


def run_ffn(form: str, mode: str, tokens: int, name: str, neurons: int, d: int) -> None:
    ffn, x, mask = make(neurons, d, mode, form), numbers(tokens, 128, 1), masks(name, tokens, neurons)
    residual, values = numbers(tokens, d, 2), numbers(tokens, neurons, 3) if mode == "valued" else None
    pool, memory, biases = shared_pool(2), WeightMemory(), ffn.biases
    up = pack_neuron_rows(pool, memory, ffn.gate, ffn.up, *biases[:2])
    many = many_of_neurons(up, pack_input_major(pool, memory, ffn.down, biases[2]), mode == "valued")

    def body(r: Recording) -> Buffer:
        own = None if values is None else put(r, values)
        return record_many(r, put(r, x), many, union_of(r, mask, own), ACTIVATIONS["silu"], put(r, residual))

    h = hidden(ffn, seen(x, form), mask, "silu", values)
    close(recorded(2, body), result(ffn, seen(h, form), residual), form)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("form", ["4/32/symmetric", "4/128/f16", "6/32/f32"])
def test_blocks_with_values(form: str, tokens: int, name: str) -> None:
    neurons, d = 384, 80
    ffn, x, mask = make(neurons, d, "valued", form), numbers(tokens, 128, 1), masks(name, tokens, neurons // 32)
    mask = np.repeat(mask, 32, axis=1)
    residual, values = numbers(tokens, d, 2), numbers(tokens, neurons, 3)
    biases = (None, *ffn.biases[1:])
    many = many_of_tiles(pack_tiles(shared_pool(2), WeightMemory(), None, ffn.up, ffn.down, biases, True))

    def body(r: Recording) -> Buffer:
        union = union_of(r, mask, put(r, values))
        return record_many(r, put(r, x), many, union, ACTIVATIONS["relu"], put(r, residual))

    h = hidden(ffn, seen(x, form), mask, "relu", values)
    close(recorded(2, body), result(ffn, seen(h, form), residual), form)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("forms", [("4/32/symmetric", "8/64/f16"), ("f16", "f32"), ("4/128/f16", "f32")])
def test_linears_by_inputs(forms: tuple[str, str], tokens: int, name: str) -> None:
    """Two matrices of other formats, whose outputs follow each other."""
    x, mask, pool, memory = numbers(tokens, 384, 1), masks(name, tokens, 384), shared_pool(2), WeightMemory()
    weights, sizes = [matrix(n, 384, f, n) for n, f in zip((80, 48), forms)], (80, 48)
    biases = [numbers(1, n, 5)[0] for n in sizes]
    parts = [pack_input_major(pool, memory, w, b) for w, b in zip(weights, biases)]
    residual = numbers(tokens, 128, 2)
    x0 = np.where(mask, x, 0).astype(np.float32)
    expected = [
        result(Layer(None, w, w, (None, None, b)), seen(x0, f), None) for w, f, b in zip(weights, forms, biases)
    ]

    def body(r: Recording) -> Buffer:
        return record_many_inputs(r, put(r, x), parts, union_of(r, mask), put(r, residual))

    got, end = recorded(2, body), np.concatenate(expected, axis=1) + residual
    close(got[:, :80], end[:, :80], forms[0])
    close(got[:, 80:], end[:, 80:], forms[1])


def test_a_shared_selection_needs_no_masks() -> None:
    form, mask = "4/32/symmetric", masks("few", 1, 256)
    ffn, x, pool, memory = make(256, 80, "gated", form), numbers(19, 128, 1), shared_pool(1), WeightMemory()
    up = pack_neuron_rows(pool, memory, ffn.gate, ffn.up, *ffn.biases[:2])
    many = many_of_neurons(up, pack_input_major(pool, memory, ffn.down, ffn.biases[2]), False)
    table = chosen_table(mask)

    def body(r: Recording) -> Buffer:
        return record_many(r, put(r, x), many, Union(table.ctypes.data), ACTIVATIONS["gelu"], None)

    h = hidden(ffn, seen(x, form), np.repeat(mask, 19, axis=0), "gelu")
    close(recorded(1, body), result(ffn, seen(h, form), None), form)


def test_no_tokens_at_all() -> None:
    pool, memory, ffn = shared_pool(1), WeightMemory(), make(256, 80, "gated", "f32")
    up = pack_neuron_rows(pool, memory, ffn.gate, ffn.up)
    many = many_of_neurons(up, pack_input_major(pool, memory, ffn.down, None), False)
    recording = Recording(Program(), 1, {})
    out = record_many(recording, recording.new(0, 128), many, Union(0), 0, None)
    assert (out.rows, out.width) == (0, 80)
