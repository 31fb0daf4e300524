"""Products with weights by inputs against float64, the dense product and themselves on other threads."""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels import chosen_inputs, rows
from cpu_kernels.codes import panel_bytes
from cpu_kernels.compile import Kernel, kernel, unpack
from cpu_kernels.input_layout import InputLayout
from cpu_kernels.threads import shared_pool
from cpu_kernels.unpacked_inputs import unpack_inputs, unpacked_bytes
from ondevice.checkpoint import quantization
from ondevice.checkpoint.quantization import Quantized, dequantize, quantize
from ondevice.errors import OptionError
from ondevice.ops.cpu_memory import WeightMemory
from ondevice.ops.cpu_products import record_linear
from ondevice.ops.cpu_program import Program, aligned
from ondevice.ops.cpu_recording import Buffer, Recording
from ondevice.ops.cpu_sparse_inputs import InputMajor, input_layout_of, pack_input_major, record_inputs
from ondevice.ops.cpu_weights import pack_rows
from tests.kernels import cases_inputs as cases
from tests.kernels.chosen_tables import compact, table_of
from tests.kernels.rounding import rounded

KINDS = ["4/32/symmetric", "4/64/f16", "4/128/bf16", "8/32/symmetric", "8/64/f32", "f32", "f16", "bf16"]
FLOATS = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
SHAPES = [(1, 128), (33, 128), (96, 1152), (328, 640)]


def weight(out: int, inputs: int, kind: str) -> Any:
    w = (np.random.RandomState(out).standard_normal((out, inputs)) / np.sqrt(inputs)).astype(np.float32)
    if kind in FLOATS:
        return w.astype(FLOATS[kind])
    bits, group, style = kind.split("/")
    q = quantize(w, int(bits), int(group), np.float32 if style == "f32" else np.float16)
    if style == "bf16":
        scales, biases = (a.astype(ml_dtypes.bfloat16) for a in q.affine())
        return Quantized(q.packed, scales, biases, q.bits, q.group_size)
    return Quantized(q.packed, q.scales, None, q.bits, q.group_size) if style == "symmetric" else q


def packed(w: Any, bias: Any = None) -> InputMajor:
    return pack_input_major(shared_pool(1), WeightMemory(), w, bias)


class Run:
    """A program whose inputs and results can be looked at from outside."""

    def __init__(self, threads: int) -> None:
        self.program, self._threads = Program(), threads
        self.recording = Recording(self.program, threads, {})

    def row(self, x: NDArray[np.float32]) -> Buffer:
        memory = aligned(x.nbytes + 64)
        memory[: x.nbytes] = x.view(np.uint8)
        self.program.keep(memory)
        return Buffer(1, len(x), -(-len(x) // 16) * 16, object(), memory.ctypes.data)  # type: ignore[arg-type]

    def sparse(self, parts: list[InputMajor], x: Any, mask: Any, residual: Any, dense: bool = False) -> Buffer:
        table = table_of(mask)
        self.program.keep(table)
        h = self.row(x if dense else compact(x, mask))
        extra = None if residual is None else self.row(residual)
        return record_inputs(self.recording, h, table.ctypes.data, parts, extra, compact=not dense)

    def results(self, *buffers: Buffer) -> list[NDArray[np.float32]]:
        self.program.seal()
        # Twice: counters must be as they were.
        for _ in range(2):
            self.program.run(shared_pool(self._threads))
        return [b.block.array[: 4 * b.width].view(np.float32).copy() for b in buffers]  # type: ignore[union-attr]


def sparse_product(
    parts: list[InputMajor], x: Any, mask: Any, residual: Any, threads: int = 2, dense: bool = False
) -> NDArray[np.float32]:
    run = Run(threads)
    return run.results(run.sparse(parts, x, mask, residual, dense))[0]


def difference(got: Any, expected: Any) -> float:
    return float(np.abs(got - expected).max() / max(1, np.abs(expected).max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("selection", cases.SELECTIONS)
def test_product(kind: str, shape: tuple[int, int], selection: str) -> None:
    out, inputs = shape
    inputs -= 27 if kind in FLOATS else 0
    w, mask = weight(out, inputs, kind), cases.selected(selection, inputs)
    bias, residual = cases.row(out, 1), cases.row(out, 2)
    x = np.where(mask, cases.row(inputs), 0).astype(np.float32)
    got = sparse_product([packed(w, bias)], x, mask, residual)
    seen = x if kind in FLOATS else rounded(x[None])[0]
    assert difference(got, cases.product(dequantize(w, np.float64), seen, mask, bias, residual)) < 2e-6


@pytest.mark.parametrize("kind", ["4/32/symmetric", "8/64/f32", "f16"])
@pytest.mark.parametrize("selection", ["none", "few", "random", "all"])
def test_agrees_with_the_dense_product_of_the_masked_row(kind: str, selection: str) -> None:
    w, mask, bias = weight(328, 1152, kind), cases.selected(selection, 1152), cases.row(328, 1)
    x = np.where(mask, cases.row(1152), 0).astype(np.float32)
    run = Run(2)
    tiles = pack_rows(shared_pool(1), WeightMemory(), [w], [bias])
    dense = record_linear(run.recording, run.row(x), tiles, None)
    expected, got = run.results(dense, run.sparse([packed(w, bias)], x, mask, None))
    assert np.abs(got - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["4/64/f16", "f32"])
@pytest.mark.parametrize("selection", ["few", "all"])
def test_threads_do_not_change_a_result(kind: str, selection: str) -> None:
    """2600 outputs are two columns, the second one short."""
    part, mask, x = packed(weight(2600, 640, kind)), cases.selected(selection, 640), cases.row(640)
    one, *others = (sparse_product([part], x, mask, None, threads) for threads in (1, 2, 5))
    assert np.abs(one).max() > 0
    assert all(np.array_equal(one, other) for other in others)


@pytest.mark.parametrize("kind", ["4/32/symmetric", "bf16"])
@pytest.mark.parametrize("selection", ["none", "few", "all"])
def test_a_whole_row_gives_what_its_compact_one_gives(kind: str, selection: str) -> None:
    part, mask, x = packed(weight(96, 640, kind)), cases.selected(selection, 640), cases.row(640)
    run = Run(2)
    whole, few = run.results(*(run.sparse([part], x, mask, None, dense) for dense in (True, False)))
    assert np.array_equal(whole, few)


def test_parts_of_several_formats_follow_each_other() -> None:
    kinds, widths, mask, x = ("4/32/symmetric", "f16", "8/64/f32"), (24, 41, 130), cases.selected("random", 640), None
    weights = [weight(width, 640, kind) for width, kind in zip(widths, kinds)]
    biases = [cases.row(24, 1), None, cases.row(130, 3)]
    residual, x = cases.row(195, 5), rounded(cases.row(640)[None] * mask)[0].astype(np.float32)
    got = sparse_product([packed(w, b) for w, b in zip(weights, biases)], x, mask, residual)
    w = np.concatenate([dequantize(part, np.float64) for part in weights])
    bias = np.concatenate([np.zeros(41) if b is None else b for b in biases])
    assert difference(got, cases.product(w, x, mask, bias, residual)) < 3e-6


def test_nothing_selected_gives_bias_and_residual() -> None:
    bias, residual = cases.row(33, 1), cases.row(33, 2)
    got = sparse_product([packed(weight(33, 64, "4/32/symmetric"), bias)], cases.row(64), np.zeros(64, bool), residual)
    assert np.array_equal(got, bias + residual)


@pytest.mark.parametrize("kind", ["4/32/symmetric", "4/64/f16", "f32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_kept(kind: str, bad: float) -> None:
    x, mask = cases.row(128), cases.selected("all", 128)
    x[40] = bad
    assert not np.isfinite(sparse_product([packed(weight(48, 128, kind))], x, mask, None)).any()


def panel_of(x: NDArray[np.float32], inputs: int, table: NDArray[np.int32] | None) -> NDArray[np.uint8]:
    panel, row = aligned(panel_bytes(inputs, 1)), aligned(4 * inputs)
    panel[:] = 0
    program = Program()
    if table is None:
        program.add(rows.quantize, 1, (row, 0, 0, x, 4 * inputs, inputs, panel, 0, 1, 1, 1))
    else:
        arguments = (panel, 0, x, table, -(-inputs // 32), 0, 0)
        program.add(chosen_inputs.quantize_chosen, 1, arguments)
    program.seal()
    program.run(shared_pool(1))
    return panel


def test_codes_of_all_inputs_are_those_of_a_dense_row() -> None:
    x, mask = cases.row(640), cases.selected("all", 640)
    whole = panel_of(x, 640, None)
    assert whole.any()
    assert np.array_equal(whole, panel_of(compact(x, mask), 640, table_of(mask)))


def test_groups_are_fine_as_in_the_masked_row() -> None:
    """Zeros do not count: with them the peaks would be 5.1 and 11.9 times the root mean square, without 1.8 and 4.2."""
    for peak, count in ((3, 0), (10, 1)):
        x = np.zeros(256, np.float32)
        x[64:96] = np.r_[np.full(31, 1.6), peak] / 2
        mask = x != 0
        fine = panel_of(compact(x, mask), 256, table_of(mask))[48:].view(np.int64)[0]
        assert fine == panel_of(x, 256, None)[48 * 8 :].view(np.int64)[0] == count


@pytest.mark.parametrize("bits", [5, 6])
@pytest.mark.parametrize("symmetric", [False, True])
def test_odd_bits_are_kept_exactly(bits: int, symmetric: bool) -> None:
    q = quantize(np.random.RandomState(3).standard_normal((40, 64)).astype(np.float32), bits, 32)
    q = Quantized(q.packed, q.scales, None if symmetric else q.biases, bits, 32)
    layout = input_layout_of(q)
    assert (layout.bits, layout.symmetric) == (8, symmetric)
    x, mask = rounded(cases.row(64)[None])[0].astype(np.float32), cases.selected("all", 64)
    zeros = np.zeros(40)
    expected = cases.product(dequantize(q, np.float64), rounded(x[None])[0], mask, zeros, zeros)
    assert difference(sparse_product([packed(q)], x, mask, None), expected) < 2e-6


def test_byte_scales_become_floats() -> None:
    """As those of Q4_K."""
    rng = np.random.RandomState(5)
    codes = quantization.pack(rng.randint(0, 16, (48, 256)).astype(np.uint8), 4)
    scales, biases = (rng.randint(0, 64, (48, 8)).astype(np.uint8) for _ in range(2))
    factors = [rng.rand(48, 1).astype(np.float16) * np.float16(s) for s in (1e-2, -1e-2)]
    q = Quantized(codes, scales, biases, 4, 32, *factors)
    assert input_layout_of(q).kind == "f32"
    x, mask, zeros = cases.row(256), cases.selected("random", 256), np.zeros(48)
    x = np.where(mask, x, 0).astype(np.float32)
    expected = cases.product(dequantize(q, np.float64), rounded(x[None])[0], mask, zeros, zeros)
    assert difference(sparse_product([packed(q)], x, mask, None), expected) < 2e-6


def test_groups_of_16_are_refused() -> None:
    scales = np.ones((1, 16), np.int8)
    q = Quantized(np.zeros((1, 48), np.uint32), scales, None, 6, 16, np.ones((1, 1), np.float16))
    with pytest.raises(OptionError, match="a scale for 16 inputs"):
        packed(q)


@functools.cache
def unpacking(layout: InputLayout) -> Kernel:
    unpack_tile = unpack_inputs(layout)

    @kernel(f"test, unpack {layout.label}")
    def unpack_some(arguments, tile, thread):
        out, weight, wide, narrow, biases, rows, narrow_rows, group_bytes, which, table, groups = unpack(
            arguments, "iiiiiiiiiii"
        )
        unpack_tile(out, weight, (wide, narrow, biases, rows, narrow_rows, group_bytes), which, table, groups)

    return unpack_some


def unpacked(part: InputMajor, mask: NDArray[np.bool_], tile: int) -> NDArray[np.uint8]:
    table = table_of(mask)
    out = np.full((max(1, int(table[0])), unpacked_bytes(part.layout)), 255, np.uint8)
    program = Program()
    program.add(unpacking(part.layout), 1, (out, part.data, *part.places, tile, table, part.groups))
    program.seal()
    program.run(shared_pool(1))
    return out[: table[0]]


@pytest.mark.parametrize("kind", ["4/32/symmetric", "4/64/f16", "8/64/f32", "f16"])
@pytest.mark.parametrize("selection", ["none", "last", "few", "all"])
def test_unpacking(kind: str, selection: str) -> None:
    """Of each entry: what dequantizing its selected neurons gives, in order, and zero codes behind."""
    inputs = 250 if kind == "f16" else 256
    w, mask = weight(214, inputs, kind), cases.selected(selection, inputs)
    part, neurons = packed(w), np.flatnonzero(mask)
    full = np.zeros((224, inputs))
    full[:214] = dequantize(w, np.float64)
    for tile in (0, 5, 7, 9, 12, 13):
        groups = unpacked(part, mask, tile)
        for group, entry in zip(np.unique(neurons // 32), groups):
            some, expected = neurons[neurons // 32 == group], np.zeros((16, 32))
            expected[:, : len(some)] = full[16 * tile : 16 * tile + 16, some]
            if kind == "f16":
                assert np.array_equal(entry.view(np.float32).reshape(32, 16).T, expected)
                continue
            codes = entry[:512].reshape(8, 16, 4).transpose(1, 0, 2).reshape(16, 32)
            scale, *bias = entry[512:].view(np.float32).reshape(-1, 16).astype(np.float64)[:, :, None]
            offset = bias[0] if bias else -scale * 2 ** (part.layout.bits - 1)
            assert np.allclose((codes * scale + offset)[:, : len(some)], expected[:, : len(some)], atol=1e-12)
            assert not codes[:, -(-len(some) // 4) * 4 :].any()
