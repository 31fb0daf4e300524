"""Triton's kernels in its interpreter, beyond the case table of all homes (`test_parity`)."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest

from tests.kernels.triton_home import MISSING, needs_triton

pytestmark = needs_triton
if not MISSING:
    import torch

    from cuda_kernels.lists import RowList
    from cuda_kernels.pack import pack_ffn, unpacked
    from cuda_kernels.select_topk import select_topk
    from cuda_kernels.selective_attention import selective_attention
    from cuda_kernels.sparse_ffn_rows import sparse_ffn_rows
    from ondevice.checkpoint.quantization import dequantize, quantize
    from ondevice_bench import gpu_cases_far
    from ondevice_bench.gpu_parity import CASES
    from ondevice_parity.cases import run_case
    from ondevice_parity.cases_attention import AttentionCase
    from ondevice_parity.check import numbers, row_list
    from ondevice_parity.torch_home import TorchHome

    HOME = TorchHome(torch.device("cpu"))
    FAR = [(kernel, name) for kernel, cases in gpu_cases_far.CASES.items() for name in cases]
else:
    FAR = []


@pytest.mark.parametrize(("kernel", "name"), FAR)
def test_offsets_beyond_32_bits(kernel: str, name: str) -> None:
    """What only Triton's homes can hold, as memory that is never touched costs nothing; no twin, which touches all."""
    outcome = run_case(HOME, kernel, name, zlib.crc32(name.encode()), cases=CASES)
    assert outcome.passed, outcome


def test_a_row_does_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(3)
    ffn = pack_ffn(*(numbers(rng, "float32", 40, 40) for _ in range(3)), device="cpu")
    x = torch.from_numpy(numbers(rng, "float32", 3, 40))
    chosen = [[3, 1, 39], [], [7, 8]]
    together = sparse_ffn_rows(x, ffn, row_list(chosen, 9, HOME), "silu")
    for i, mine in enumerate(chosen):
        alone = sparse_ffn_rows(x[i : i + 1], ffn, row_list([mine], 4, HOME), "silu")
        assert torch.equal(alone[0], together[i])
    scores = torch.from_numpy(numbers(rng, "float32", 3, 40))
    assert torch.equal(select_topk(scores, 5, False).indices[1], select_topk(scores[1:2], 5, False).indices[0])


def test_keys_of_skipped_heads_are_not_read() -> None:
    """Where lists differ, what one sequence skips may be NaN for it alone; the cases poison just that."""
    case = AttentionCase((4, 4, 16), (33,), (1,))
    rng = np.random.default_rng(1)
    run = case.run_heads([[2]])
    _, query = case.queries(rng, HOME)
    _, view = case.cached(rng, HOME, run)
    rows = row_list([[2]], 3, HOME)
    before = selective_attention(query, view, rows, 0.25)
    assert torch.isfinite(before).all() and not before[0, [0, 1, 3]].any() and before[0, 2].any()
    view.keys[:, :, 2] = float("nan")
    assert torch.isnan(selective_attention(query, view, rows, 0.25)[0, 2]).all()


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 64)])
def test_packing_loses_nothing(bits: int, group: int) -> None:
    rng = np.random.default_rng(0)
    gate, up, down = (
        quantize(numbers(rng, "float32", *shape), bits, group) for shape in ((128, 256), (128, 256), (37, 128))
    )
    ffn = pack_ffn(gate, up, down, device="cpu")
    for got, of in zip(unpacked(ffn), (gate, up, down)):
        assert got is not None
        expected = dequantize(of, np.float32)
        assert np.array_equal(got.numpy(), expected.T if of is down else expected)


def _refusals() -> dict[str, tuple[Any, str]]:
    if MISSING:
        return {}
    x, scores = torch.zeros(2, 8), torch.zeros(2, 9)
    ffn = pack_ffn(None, torch.zeros(4, 8), torch.zeros(8, 4), device="cpu")
    rows = RowList(torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    q = torch.zeros(1, 4, 16)
    view = AttentionCase((4, 4, 16), (3,)).cached(np.random.default_rng(0), HOME, np.ones((1, 4), bool))[1]
    three = numbers(np.random.default_rng(0), "float32", 32, 32)
    return {
        "activation": (lambda: sparse_ffn_rows(x, ffn, rows, "swish"), "activation 'swish' is none of silu"),
        "width": (lambda: sparse_ffn_rows(x[:, :7], ffn, rows, "relu"), r"x is \[2, 7\]; this FFN takes \[N, 8\]"),
        "lists": (lambda: sparse_ffn_rows(torch.zeros(3, 8), ffn, rows, "relu"), "2 lists with 2 counts.*1 or 3"),
        "values": (lambda: sparse_ffn_rows(x, ffn, rows, "relu", values=x), "values must be"),
        "type": (lambda: sparse_ffn_rows(x.double(), ffn, rows, "relu"), "x is torch.float64; convert it"),
        "k": (lambda: select_topk(scores, 10, False), "k is 10; choose from 1 to 9"),
        "group": (lambda: select_topk(scores, 1, False, group=2), "in groups of 2"),
        "unit": (lambda: selective_attention(q, view, None, 1.0, "layer"), "unit 'layer' is neither"),
        "heads": (lambda: selective_attention(q[:, :3], view, None, 1.0), r"q is \[1, 3, 16\]"),
        "bits": (lambda: pack_ffn(None, quantize(three, 6, 32), quantize(three, 6, 32)), "6 bits in groups of 32"),
        "mixed": (lambda: pack_ffn(None, quantize(three, 4, 32), three), "all three must have the same"),
        "blocks": (lambda: pack_ffn(None, three, three, block=5), "blocks of 5 are not those of one FFN"),
    }


@pytest.mark.parametrize("name", _refusals())
def test_refusals(name: str) -> None:
    call, message = _refusals()[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuda_kernels.launch.interpreted", lambda: False)
    with pytest.raises(ValueError, match="these tensors are on cpu: move them to 'cuda', set TRITON_INTERPRET=1"):
        select_topk(torch.zeros(1, 4), 1, False)
