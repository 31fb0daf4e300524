"""Attention, FFNs and selectors of one layer at several densities, beside dense torch and beside the floor.

The floor is the bytes that must be read, over the bandwidth of a copy within the device. A copy writes as much as it
reads, so a kernel that only reads may come out a little below it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from cuda_kernels.cache import KvView
from cuda_kernels.lists import RowList
from cuda_kernels.pack import Matrix, PackedFfn
from cuda_kernels.select_topk import select_topk
from cuda_kernels.selective_attention import selective_attention
from cuda_kernels.sparse_ffn_rows import sparse_ffn_rows
from ondevice_bench.gpu_shapes import DENSITIES, Shape
from ondevice_bench.gpu_time import Time, timed

HALF = torch.float16
GROUP = 32
Record = dict[str, Any]


def random_lists(n: int, units: int, kept: int, device: torch.device) -> RowList:
    """n ascending lists of `kept` random units."""
    chosen = torch.rand(n, units, device=device).argsort(1)[:, :kept].sort(1).values
    return RowList(chosen.to(torch.int32).contiguous(), torch.full((n,), kept, dtype=torch.int32, device=device))


def _record(what: str, density: float, time: Time, dense: Time, size: int, bandwidth: float, error: float) -> Record:
    return {
        "what": what, "density": density, "ms": time.ms, "low": time.low, "high": time.high, "dense_ms": dense.ms,
        "speedup": dense.ms / time.ms, "bytes": size, "floor_ms": 1e3 * size / bandwidth,
        "of_copy": size / (time.ms * 1e-3) / bandwidth, "error": error,
    }  # fmt: skip


def _off(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max())


def _attention_by_head(query: torch.Tensor, as_stored: list[torch.Tensor], device: torch.device) -> Time:
    """Torch's attention with the keys of a head in one piece, as a cache might keep them as well."""
    by_head = [x.contiguous() for x in as_stored]
    return timed(lambda: scaled_dot_product_attention(query, *by_head), device, calls=3)


def attention(shape: Shape, bandwidth: float, device: torch.device, densities: Sequence[float]) -> Iterator[Record]:
    """`selective_attention` over densities beside torch's scaled_dot_product_attention, the faster of two layouts."""
    b, n, h, dh = shape.batch, shape.seen, shape.heads, shape.dh
    q = torch.randn(b, h, dh, dtype=HALF, device=device)
    keys, values = (torch.randn(b, n, h, dh, dtype=HALF, device=device) for _ in range(2))
    view = KvView(keys, values, torch.full((b,), n, dtype=torch.int32, device=device))
    scale, query = dh**-0.5, q[:, :, None]
    as_stored = [x.transpose(1, 2) for x in (keys, values)]
    dense = [timed(lambda: scaled_dot_product_attention(query, *as_stored), device, calls=3)]
    expected = scaled_dot_product_attention(query, *as_stored)[:, :, 0]
    dense.append(_attention_by_head(query, as_stored, device))
    best = min(dense, key=lambda time: time.ms)
    layout = "by position" if best is dense[0] else "by head"
    yield {"what": "attention, torch", "ms": best.ms, "low": best.low, "high": best.high, "layout": layout}
    for density in (*densities, None):
        kept = h if density is None else max(1, round(density * h))
        rows = None if density is None else random_lists(b, h, kept, device)
        got = selective_attention(q, view, rows, scale)
        wanted = expected
        if rows is not None:
            run = torch.zeros(b, h, dtype=torch.bool, device=device).scatter_(1, rows.indices.long(), True)
            wanted = torch.where(run[:, :, None], expected, 0)
            if got[~run].any():
                yield {"what": "attention", "failed": f"skipped heads are not 0 at density {density}"}
        error = _off(got, wanted)
        size = 2 * 2 * b * kept * n * dh
        time = timed(lambda rows=rows: selective_attention(q, view, rows, scale), device, calls=3)  # type: ignore[misc]
        name = "attention, no lists" if density is None else "attention"
        yield _record(name, kept / h, time, best, size, bandwidth, error)


def union_rows(shape: Shape, bandwidth: float, device: torch.device, densities: Sequence[float]) -> Iterator[Record]:
    """Both products of an FFN without a gate, of a batch with one list, beside two dense ones of torch."""
    x = torch.randn(shape.batch, shape.d, dtype=HALF, device=device)
    up, down = (torch.randn(shape.ffn, shape.d, dtype=HALF, device=device) * shape.d**-0.5 for _ in range(2))
    none = (None, None, None)
    ffn = PackedFfn(None, Matrix(up), Matrix(down), *none, (shape.d, shape.ffn, shape.d), 0, 1, 1, False)
    dense = timed(lambda: torch.relu(x @ up.t()) @ down, device, calls=4)
    first = timed(lambda: x @ up.t(), device, calls=4)
    yield {"what": "rows, torch", "ms": dense.ms, "low": dense.low, "high": dense.high, "first_product_ms": first.ms}
    hidden = torch.relu(x.float() @ up.float().t())
    for density in densities:
        kept = max(1, round(density * shape.ffn))
        rows = random_lists(1, shape.ffn, kept, device)
        chosen = rows.indices[0].long()
        error = _off(sparse_ffn_rows(x, ffn, rows, "relu"), hidden[:, chosen] @ down[chosen].float())
        time = timed(lambda rows=rows: sparse_ffn_rows(x, ffn, rows, "relu"), device, calls=8)  # type: ignore[misc]
        yield _record("rows of a batch", kept / shape.ffn, time, dense, 2 * 2 * kept * shape.d, bandwidth, error)


def _token_ffn(shape: Shape, bits: int, device: torch.device) -> tuple[list[torch.Tensor], PackedFfn]:
    """Random gate, up and turned down in float16, and an FFN of them; of other random codes where quantized."""
    d, ffn, group = shape.d, shape.ffn, GROUP
    plain = [torch.randn(ffn, d, dtype=HALF, device=device) * d**-0.5 for _ in range(3)]
    matrices = [Matrix(m) for m in plain]
    if bits:
        sizes = [(ffn, d // group), (ffn, d // group), (ffn // group, d)]
        matrices = []
        for size in sizes:
            words = torch.randint(-(2**31), 2**31 - 1, (ffn, d * bits // 32), dtype=torch.int32, device=device)
            matrices.append(Matrix(words, *(torch.randn(*size, dtype=HALF, device=device) * 0.01 for _ in range(2))))
    return plain, PackedFfn(*matrices, None, None, None, (d, ffn, d), bits, group if bits else 1, 1, False)


def token_rows(
    shape: Shape, bits: int, bandwidth: float, device: torch.device, densities: Sequence[float], copies: int
) -> Iterator[Record]:
    """The three products of a gated FFN for one token, beside dense float16 ones of torch.

    Layers take turns, each with a list of its own: a tenth of one would stay in the L2 cache.
    """
    d, ffn, silu = shape.d, shape.ffn, torch.nn.functional.silu
    x = torch.randn(1, d, dtype=HALF, device=device)
    layers = [_token_ffn(shape, bits, device) for _ in range(copies)]
    turn = cycle(plain for plain, _ in layers)

    def dense_call() -> torch.Tensor:
        gate, up, down = next(turn)
        return (silu(x @ gate.t()) * (x @ up.t())) @ down

    dense = timed(dense_call, device, calls=copies)
    name = f"rows of a token, {bits} bits" if bits else "rows of a token"
    yield {"what": f"{name}, torch", "ms": dense.ms, "low": dense.low, "high": dense.high}
    for density in densities:
        kept = max(1, round(density * ffn))
        lists = [random_lists(1, ffn, kept, device) for _ in layers]
        error, size = float("nan"), 3 * 2 * kept * d
        if bits:
            groups = len(torch.unique(lists[0].indices // GROUP))
            size = 3 * kept * d * bits // 8 + 2 * kept * d // GROUP * 4 + groups * d * 4
        else:
            gate, up, down = (m[lists[0].indices[0].long()].float() for m in layers[0][0])
            expected = (silu(x.float() @ gate.t()) * (x.float() @ up.t())) @ down
            error = _off(sparse_ffn_rows(x, layers[0][1], lists[0], "silu"), expected)
        turns = cycle(zip((packed for _, packed in layers), lists))
        time = timed(lambda turns=turns: sparse_ffn_rows(x, *next(turns), "silu"), device, calls=copies)  # type: ignore[misc]
        yield _record(name, kept / ffn, time, dense, size, bandwidth, error)


def selectors(shape: Shape, bandwidth: float, device: torch.device) -> Iterator[Record]:
    """`select_topk` of neurons for a batch, and of heads for each sequence, beside torch.topk."""
    neurons = torch.randn(shape.batch, shape.ffn, dtype=HALF, device=device)
    heads = torch.randn(shape.batch, shape.heads, dtype=HALF, device=device)
    for name, scores, shared in (("topk of neurons", neurons, True), ("topk of heads", heads, False)):
        k = max(1, scores.shape[1] * 3 // 10)
        time = timed(lambda s=scores, k=k, shared=shared: select_topk(s, k, shared), device, calls=16)  # type: ignore[misc]

        def by_torch(s: torch.Tensor = scores, k: int = k, shared: bool = shared) -> Any:
            return torch.topk(s.relu().sum(0, keepdim=True, dtype=torch.float32) if shared else s, k, sorted=False)

        dense = timed(by_torch, device, calls=16)
        yield _record(name, k / scores.shape[1], time, dense, 2 * scores.numel(), bandwidth, float("nan"))


def layers(shapes: tuple[Shape, Shape], bandwidth: float, device: torch.device, smoke: bool) -> Iterator[Record]:
    """All of them, memory of each given back before the next."""
    batch, token = shapes
    densities = (0.3, 1.0) if smoke else DENSITIES
    yield from attention(batch, bandwidth, device, densities)
    yield from union_rows(batch, bandwidth, device, densities)
    few = densities if smoke else (0.1, 0.25, 0.5, 1.0)
    for bits in (0, 4):
        yield from token_rows(token, bits, bandwidth, device, few, copies=2 if smoke else 12)
    yield from selectors(batch, bandwidth, device)
