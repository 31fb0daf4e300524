"""Every op of the CPU table against the float64 reference, at odd sizes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ondevice.checkpoint.quantization import Quantized, dequantize, quantize
from ondevice.generation.kv_cache import KVCache
from ondevice.ops.base import Ops, Step
from ondevice.ops.cpu import CpuOps
from ondevice.ops.cpu_program import Program
from ondevice.ops.cpu_recording import Recording
from ondevice.ops.reference import ReferenceOps
from tests.kernels.recorded import put
from tests.kernels.rounding import rounded
from tests.kernels.tables import run_rows
from tests.tiny import tiny_spec

REFERENCE = ReferenceOps()


@pytest.fixture(scope="module", params=[1, 2], ids=["one-thread", "two-threads"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return CpuOps(request.param)


def rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal((n, d)).astype(np.float32)


def compare(ops: Ops, x: np.ndarray, body: Any, tolerance: float, codes: bool = False) -> np.ndarray:
    """Asserts that a table agrees with the reference, relative to results of size 1 or more; returns its result.

    Args:
        codes: the table rounds x to int8 first.
    """
    got, expected = run_rows(ops, x, body), run_rows(REFERENCE, rounded(x) if codes else x, body)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max(initial=0) <= tolerance * np.abs(expected).max(initial=1)
    return got


def weight(out: int, inputs: int, kind: str) -> Any:
    w = rows(out, inputs, seed=out) / np.float32(np.sqrt(inputs))
    if kind in ("f32", "f16", "bf16"):
        return w.astype({"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[kind])
    bits, group, style = kind.split("/")
    q = quantize(w, int(bits), int(group), np.float32 if style == "f32" else np.float16)
    if style == "bf16":
        q = Quantized(
            q.packed,
            q.scales.astype(ml_dtypes.bfloat16),
            q.biases.astype(ml_dtypes.bfloat16),
            q.bits,
            q.group_size,
        )
    if style == "symmetric":
        q = Quantized(q.packed, q.scales, q.scales * np.float16(-(2 ** (q.bits - 1))), q.bits, q.group_size)
    return q


KINDS = [
    "f32",
    "f16",
    "bf16",
    "4/32/f16",
    "4/64/f32",
    "4/128/bf16",
    "4/32/symmetric",
    "8/32/symmetric",
    "8/64/f16",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 3, 4, 7, 33, 130])
@pytest.mark.parametrize("shape", [(16, 128), (33, 128), (1, 384), (100, 256)])
def test_linear(ops: Ops, kind: str, n: int, shape: tuple[int, int]) -> None:
    w = weight(*shape, kind)

    def body(table: Ops, x: Any, step: Step) -> Any:
        return table.linear(x, table.pack_linear([w], [None]))

    x = rows(n, shape[1])
    x[:, 5] *= 20
    compare(ops, x, body, 3e-6, codes="/" in kind)


@pytest.mark.parametrize("kinds", [("4/32/f16", "8/32/symmetric", "f32"), ("f16", "f16", "f16")])
def test_joined_linears_with_bias_and_residual(ops: Ops, kinds: tuple[str, ...]) -> None:
    widths = (24, 16, 41)
    parts = [weight(width, 128, kind) for width, kind in zip(widths, kinds)]
    biases = [rows(1, widths[0])[0], None, rows(1, widths[2])[0]]
    residual = rows(9, sum(widths), seed=5)

    def body(table: Ops, x: Any, step: Step) -> Any:
        y = table.embed(table.pack_embedding(residual), step.tokens)
        return table.linear(x, table.pack_linear(parts, biases), residual=y)

    x = rounded(rows(9, 128)).astype(np.float32)
    compare(ops, x, body, 3e-6, codes=True)


@pytest.mark.parametrize("kind", ["4/32/f16", "8/32/symmetric", "f16"])
def test_a_row_of_a_batch_equals_the_row_alone(ops: Ops, kind: str) -> None:
    handle = ops.pack_linear([weight(96, 128, kind)], [None])

    def body(table: Ops, x: Any, step: Step) -> Any:
        return table.linear(x, handle)

    x = rows(39, 128)
    together = run_rows(ops, x, body)
    for i in (0, 3, 35, 38):
        assert np.array_equal(together[i], run_rows(ops, x[i : i + 1], body)[0])


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20, 0.0])
def test_quantized_activations_at_extreme_sizes(ops: Ops, scale: float) -> None:
    w = weight(32, 128, "8/32/symmetric")
    x = rows(5, 128) * np.float32(scale)
    x[1, :32] = 0
    x[2, 7] = 1000 * scale

    def body(table: Ops, y: Any, step: Step) -> Any:
        return table.linear(y, table.pack_linear([w], [None]))

    got, expected = run_rows(ops, x, body), run_rows(REFERENCE, x, body)
    largest = np.abs(x).max(axis=1, keepdims=True)
    # A part in 254 of the largest at most, in a random direction for each of 128 inputs.
    assert (np.abs(got - expected) <= 1e-2 * largest).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rounding_to_int8_keeps_nan_and_infinity(ops: Ops, bad: float) -> None:
    x = rows(3, 64)
    x[1, 40] = bad
    handle = ops.pack_linear([weight(16, 64, "4/32/f16")], [None])
    got = run_rows(ops, x, lambda table, y, step: table.linear(y, handle))
    assert not np.isfinite(got[1]).any()
    assert np.isfinite(got[[0, 2]]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_embedding_rows_are_exact(ops: Ops, kind: str) -> None:
    table = weight(50, 128, kind)
    index = np.array([0, 49, 16, 15, 16, 33], np.int32)
    step = Step(index, index, index * 0, index[:0])
    cache = KVCache(ops, tiny_spec(), 1, 64)
    handle = ops.pack_embedding(table)
    got = ops.run(step, cache, lambda s: ops.embed(handle, s.tokens, 2.0))
    assert np.allclose(got, 2 * dequantize(table)[index], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("d", [16, 40, 96, 577])
def test_norm(ops: Ops, kind: str, d: int) -> None:
    gain, shift = rows(1, d, 1)[0], rows(1, d, 2)[0] if kind == "layer" else None

    def body(table: Ops, x: Any, step: Step) -> Any:
        return table.norm(x, table.pack_norm(gain, shift, kind, 1e-5, 1.0))

    compare(ops, rows(7, d) + 3, body, 3e-6)


def test_norm_of_heads(ops: Ops) -> None:
    gain = rows(1, 24, 1)[0]

    def body(table: Ops, x: Any, step: Step) -> Any:
        _, right = table.split(x, (48, 72))
        return table.norm(right, table.pack_norm(gain, None, "rms", 1e-6, 0.0), heads=3)

    compare(ops, rows(7, 120), body, 3e-6)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("d", [8, 96, 200])
def test_activation(ops: Ops, kind: str, gated: bool, d: int) -> None:
    x = rows(5, 2 * d if gated else d) * 5
    compare(ops, x, lambda table, y, step: table.activation(y, kind, gated), 2e-6)


def test_add_take_and_softcap(ops: Ops) -> None:
    def body(table: Ops, x: Any, step: Step) -> Any:
        return table.softcap(table.take(table.add(x, x), step.outputs), 3.0)

    compare(ops, rows(9, 40) * 10, body, 2e-6)


@pytest.mark.parametrize(("head_dim", "rotated"), [(16, 16), (64, 64), (80, 32), (24, 20)])
def test_rope(ops: Ops, head_dim: int, rotated: int) -> None:
    frequencies = 1000.0 ** (-np.arange(0, rotated, 2) / rotated)

    def body(table: Ops, x: Any, step: Step) -> Any:
        return table.rope(x, 3, step.positions, table.pack_rope(frequencies, 1.3, 64))

    compare(ops, rows(40, 3 * head_dim), body, 2e-6)


ATTENTION = [
    # heads, KV heads, head dim, tokens before, tokens, window, softcap
    (4, 2, 16, 0, 1, 0, 0.0),
    (3, 3, 24, 0, 7, 0, 0.0),
    (6, 2, 64, 0, 40, 0, 5.0),
    (9, 3, 64, 300, 1, 0, 0.0),
    (8, 1, 32, 255, 3, 0, 0.0),
    (14, 2, 64, 511, 2, 100, 0.0),
    (4, 4, 128, 600, 1, 257, 0.0),
    (4, 2, 96, 63, 70, 33, 0.0),
    (5, 1, 80, 256, 20, 1, 0.0),
]


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention(ops: Ops, case: tuple[Any, ...]) -> None:
    """Two slots whose pages lie interleaved; keys rounded to float16 as the cache holds them."""
    heads, kv_heads, dh, before, n, window, softcap = case
    spec = tiny_spec(
        n_layers=2, n_heads=heads, n_kv_heads=kv_heads, head_dim=dh, windows=(0, window), context_length=1024
    )
    total, width = before + n, kv_heads * dh
    keys, values = (rows(2 * total, width, i).astype(np.float16).astype(np.float32) for i in (1, 2))
    queries = rows(2 * total, heads * dh, 3)
    results = []
    for table in (ops, REFERENCE):
        handles = [table.pack_embedding(a) for a in (queries, keys, values)]
        cache = KVCache(table, spec, 2, total + 5)
        for start, end in [(0, before), (before, total)]:
            index = np.arange(start, end, dtype=np.int32)
            both = np.concatenate([index, index])
            slots = np.repeat(np.array([1, 0], np.int32), len(index))
            if not len(index):
                continue
            for slot in (0, 1):
                cache.reserve(slot, len(index))

            def body(s: Step, table: Ops = table, handles: Any = handles, cache: KVCache = cache) -> Any:
                q, k, v = (table.embed(h, s.tokens) for h in handles)
                table.append(cache, 1, k, v, s)
                return table.attention(q, cache, 1, s, dh**-0.5, window, softcap)

            got = table.run(Step(both + slots * total, both, slots, both), cache, body)
            cache.lengths[:] = end
        results.append(got)
    assert np.abs(results[0] - results[1]).max() < 3e-6 * max(1, np.abs(results[1]).max())


@pytest.mark.parametrize("widths", [(512, 128), (128, 512)])
def test_no_thread_writes_where_another_has_made_codes(widths: tuple[int, int]) -> None:
    recording = Recording(Program(), 2, {})
    pieces = []
    for width in widths:
        memory, each = recording.own_codes(put(recording, np.ones((1, width), np.float32)))
        pieces += [(thread, memory.ctypes.data + thread * each, each) for thread in range(2)]
    for thread, start, each in pieces:
        for other, first, size in pieces:
            assert thread == other or start + each <= first or first + size <= start
