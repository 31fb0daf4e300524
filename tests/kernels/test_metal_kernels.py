"""What holds for Metal's kernels beyond the case table (test_parity), emulated or on a Mac's GPU."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import launch
from metal_kernels.cache import KvView
from metal_kernels.grouped_experts import grouped_experts
from metal_kernels.lists import RowList, lists_of_mask, lists_of_mask_mlx, mask_of_lists
from metal_kernels.pack import pack_ffn, unpacked
from metal_kernels.select_topk import select_topk
from metal_kernels.selective_attention import selective_attention, selective_attention_mlx
from metal_kernels.sparse_ffn_rows import sparse_ffn_rows
from metal_kernels.topk_attention import topk_attention
from ondevice.checkpoint.quantization import dequantize, quantize
from ondevice_parity.cases_attention import AttentionCase
from ondevice_parity.cases_ffn import FfnCase
from ondevice_parity.check import numbers, row_list
from ondevice_parity.metal_home import MetalHome
from tests.kernels.metal_home import HOME
from tests.kernels.metal_home import home as home


@pytest.mark.parametrize("length", [0, 1, 7, 8, 70])
@pytest.mark.parametrize("bits", [0, 4])
def test_lists_of_every_length(length: int, bits: int, home: MetalHome) -> None:
    """MLX puts arrays of less than 8 numbers in another address space, for which the text is compiled anew."""
    rng = np.random.default_rng(length)
    neurons, width, out = 96, 64, 40
    arrays = [numbers(rng, "float32", *s) for s in ((neurons, width), (neurons, width), (out, neurons))]
    gate, up, down = (quantize(a, bits, 32) if bits else a for a in arrays)
    chosen = [neurons - 1 - i for i in range(length)]
    x = numbers(rng, "float32", 1, width)
    rows = home.rows(np.array([chosen], np.int32).reshape(1, length), np.array([length], np.int32))
    got = sparse_ffn_rows(mx.array(x), pack_ffn(gate, up, down), rows, "relu")
    g, u, d = (dequantize(w, np.float64) for w in (gate, up, down))
    expected = (np.maximum(x @ g[chosen].T, 0) * (x @ u[chosen].T)) @ d[:, chosen].T
    assert np.abs(home.numpy(got) - expected).max() <= 2e-5 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("sequences", [1, 7, 8])
@pytest.mark.parametrize("spark", [False, True])
def test_sequences_of_every_number(sequences: int, spark: bool, home: MetalHome) -> None:
    """Lengths and tables of less than 8 numbers, and of more; some sequences skip all heads, or see nothing."""
    rng = np.random.default_rng(sequences)
    case = AttentionCase((4, 2, 16), tuple((33, 0, 1, 16, 5, 31, 64, 48)[:sequences]), page=16)
    chosen = [[], [0, 3], [3], [], [1, 0, 2, 3], [2], [0], []][:sequences]
    run = np.ones((sequences, 4), bool) if spark else case.run_heads(chosen)
    query = case.queries(rng, home)[1]
    view = case.cached(rng, home, run)[1]
    if spark:
        got, twin = (home.kernel("topk_attention", t)(query, view, 0.25, 8, 6) for t in (False, True))
    else:
        rows = row_list(chosen, 4, home, padding=0)
        got, twin = (home.kernel("selective_attention", t)(query, view, rows, 0.25) for t in (False, True))
    assert np.abs(home.numpy(got) - home.numpy(twin)).max() < 2e-5
    lengths = np.array(case.lengths)
    assert not home.numpy(got)[~run | (lengths == 0)[:, None]].any()


def test_a_row_does_not_depend_on_the_batch(home: MetalHome) -> None:
    rng = np.random.default_rng(3)
    ffn = pack_ffn(*(quantize(numbers(rng, "float32", 64, 64), 4, 32) for _ in range(3)))
    x = mx.array(numbers(rng, "float32", 6, 64))
    chosen: list[list[int]] = [[3, 1, 63], [], [7, 8], [0], [5, 4, 3, 2], [9]]
    together = sparse_ffn_rows(x, ffn, row_list(chosen, 9, home), "silu")
    shared = sparse_ffn_rows(x, ffn, row_list(chosen[4:5], 9, home), "silu")
    for i, mine in enumerate(chosen):
        alone = sparse_ffn_rows(x[i : i + 1], ffn, row_list([mine], 4, home), "silu")
        assert mx.array_equal(alone[0], together[i])
        alone = sparse_ffn_rows(x[i : i + 1], ffn, row_list(chosen[4:5], 4, home), "silu")
        assert mx.array_equal(alone[0], shared[i])
    case = AttentionCase((4, 2, 32), (130, 7, 300), None)
    query, view = case.queries(rng, home)[1], case.cached(rng, home, case.run_heads(None))[1]
    attended = selective_attention(query, view, None, 0.25)
    assert view.block_table is not None
    one = KvView(view.keys, view.values, view.lengths[2:], view.block_table[2:])
    assert mx.array_equal(selective_attention(query[2:], one, None, 0.25)[0], attended[2])


def test_keys_of_skipped_heads_are_not_read(home: MetalHome) -> None:
    case, rng = AttentionCase((4, 4, 16), (33,), (1,)), np.random.default_rng(1)
    query, view = case.queries(rng, home)[1], case.cached(rng, home, case.run_heads([[2]]))[1]
    rows = row_list([[2]], 3, home)
    before = home.numpy(selective_attention(query, view, rows, 0.25))
    assert np.isfinite(before).all() and not before[0, [0, 1, 3]].any() and before[0, 2].any()
    spoiled = KvView(view.keys.at[:, :, 2].add(mx.nan), view.values, view.lengths, view.block_table)
    assert np.isnan(home.numpy(selective_attention(query, spoiled, rows, 0.25))[0, 2]).all()


def test_a_cache_is_read_where_it_lies(home: MetalHome, metal: Any) -> None:
    """[B, heads, positions, dh] in the middle of a larger buffer, as MLX's caches keep it: no copy, by its strides."""
    rng = np.random.default_rng(2)
    buffers = [mx.array(numbers(rng, "float16", 2, 3, 50, 40)) for _ in range(2)]
    keys, values = (b[:, 1:, 3:43, 8:].transpose(0, 2, 1, 3) for b in buffers)
    q = mx.array(numbers(rng, "float16", 2, 4, 32))
    view = KvView(keys, values, mx.array([40, 9], dtype=mx.int32))
    for args in ((selective_attention, (None, 0.2)), (topk_attention, (0.2, 8, 5))):
        function, more = args
        got = function(q, view, *more)
        whole = KvView(mx.contiguous(keys), mx.contiguous(values), view.lengths)
        assert mx.array_equal(got, function(q, whole, *more))


def test_lists_and_masks(home: MetalHome) -> None:
    rng = np.random.default_rng(4)
    mask = mx.array(rng.random((3, 70)) < 0.4)
    for made in (lists_of_mask(mask.T), lists_of_mask_mlx(mask.T), lists_of_mask(mask), lists_of_mask_mlx(mask)):
        units = 3 if len(made.count) == 70 else 70
        assert mx.array_equal(mask_of_lists(made, units), mask.T if units == 3 else mask)
        for row, count in zip(made.indices.tolist(), made.count.tolist()):
            assert sorted(row[:count]) == row[:count]


def test_kernels_are_made_once(home: MetalHome) -> None:
    scores = mx.array(numbers(np.random.default_rng(0), "float32", 2, 40))
    for k in (3, 4):
        select_topk(scores, k, False)
    info = launch._made.cache_info()
    assert (info.misses, info.hits) == (1, 1)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 64)])
def test_packing_loses_nothing(bits: int, group: int) -> None:
    rng = np.random.default_rng(0)
    gate, up, down = (
        quantize(numbers(rng, "float32", *shape), bits, group) for shape in ((128, 256), (128, 256), (37, 128))
    )
    for got, of in zip(unpacked(pack_ffn(gate, up, down)), (gate, up, down)):
        assert got is not None
        expected = dequantize(of, np.float32)
        assert np.array_equal(np.array(got), expected.T if of is down else expected)


def test_up_is_packed_as_mlx_packs() -> None:
    """So that a dense product may be MLX's own, with the same weights."""
    rng = np.random.default_rng(0)
    up = quantize(numbers(rng, "float32", 64, 128), 4, 64)
    packed = pack_ffn(None, up, quantize(numbers(rng, "float32", 32, 64), 4, 64)).up
    x = mx.array(numbers(rng, "float32", 3, 128))
    got = mx.quantized_matmul(x, packed.weight, packed.scales, packed.biases, group_size=64, bits=4)
    np.testing.assert_allclose(np.array(got), np.array(x) @ dequantize(up, np.float32).T, rtol=1e-4, atol=1e-5)


def _refusals() -> dict[str, tuple[Any, str]]:
    x, scores = mx.zeros((2, 8)), mx.zeros((2, 9))
    ffn = pack_ffn(None, np.zeros((4, 8), np.float32), np.zeros((8, 4), np.float32))
    rows = RowList(mx.zeros((2, 1), mx.int32), mx.zeros((2,), mx.int32))
    q = mx.zeros((1, 4, 16))
    view = AttentionCase((4, 4, 16), (3,)).cached(np.random.default_rng(0), HOME, np.ones((1, 4), bool))[1]
    three = numbers(np.random.default_rng(0), "float32", 32, 32)
    odd = KvView(mx.zeros((2, 24, 4, 16)), mx.zeros((2, 24, 4, 16)), mx.array([3]), mx.array([[0]]))
    return {
        "activation": (lambda: sparse_ffn_rows(x, ffn, rows, "swish"), "activation 'swish' is none of silu"),
        "width": (lambda: sparse_ffn_rows(x[:, :7], ffn, rows, "relu"), r"x is \[2, 7\]; this FFN takes \[N, 8\]"),
        "lists": (lambda: sparse_ffn_rows(mx.zeros((3, 8)), ffn, rows, "relu"), "2 lists with 2 counts.*1 or 3"),
        "values": (lambda: sparse_ffn_rows(x, ffn, rows, "relu", values=x), "values must be"),
        "residual": (lambda: grouped_experts(x, ffn, rows, "relu", x[:, :7]), r"residual is \[2, 7\]"),
        "type": (lambda: sparse_ffn_rows(x.astype(mx.int32), ffn, rows, "relu"), "x is mlx.core.int32; convert it"),
        "k": (lambda: select_topk(scores, 10, False), "k is 10; choose from 1 to 9"),
        "group": (lambda: select_topk(scores, 1, False, group=2), "in groups of 2"),
        "unit": (lambda: selective_attention(q, view, None, 1.0, "layer"), "unit 'layer' is neither"),
        "heads": (lambda: selective_attention(q[:, :3], view, None, 1.0), r"q is \[1, 3, 16\]"),
        "pages": (lambda: selective_attention_mlx(q, odd, None, 1.0), "pages have 24 positions"),
        "r": (lambda: topk_attention(q, view, 1.0, 16, 1), "r must be from 1 to 15"),
        "bits": (lambda: pack_ffn(None, quantize(three, 6, 32), quantize(three, 6, 32)), "6 bits in groups of 32"),
        "mixed": (lambda: pack_ffn(None, quantize(three, 4, 32), three), "all three must have the same"),
        "blocks": (lambda: pack_ffn(None, three, three, block=5), "blocks of 5 are not those of one FFN"),
    }


@pytest.mark.parametrize("name", _refusals())
def test_refusals(name: str) -> None:
    call, message = _refusals()[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has an Apple GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(RuntimeError, match=r"run on an Apple GPU, and MLX's default device is .*cpu.* take the twin"):
        select_topk(mx.zeros((1, 4)), 1, False)


def test_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Mac, where MLX's device was not set to the CPU. Only a Mac can show that Metal then takes the text."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert not launch.runs_here() or mx.default_device().type == mx.gpu
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    assert launch.runs_here()
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert not launch.runs_here()


def test_cases_can_fail(home: MetalHome) -> None:
    """The table is worth something only where a wrong result is seen."""

    def wrong(*args: Any, **more: Any) -> mx.array:
        return sparse_ffn_rows(*args, **more) * 1.001

    assert not FfnCase(2, (33, 70, 37), (7, -2))(wrong, np.random.default_rng(0), home).passed
