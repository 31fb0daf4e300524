"""Decoding end to end with CUDA graphs: the shape of OPT-6.7B with random weights, dense and with Polar's selections.

A compact step, written against the kernels for this one shape: the engine has no op table on torch yet. Weights and
scores are random, so this is speed alone. Keys and values of some layers share memory where all of it does not fit;
each layer's are far more than the L2 cache holds at the batch sizes where that happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from cuda_kernels.cache import KvView
from cuda_kernels.pack import Matrix, PackedFfn
from cuda_kernels.select_topk import select_topk
from cuda_kernels.selective_attention import selective_attention
from cuda_kernels.sparse_ffn_rows import sparse_ffn_rows
from ondevice_bench.gpu_shapes import KEPT_HEADS, KEPT_ROWS, Shape
from ondevice_bench.gpu_time import timed

HALF = torch.float16
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of a layer and of its routers."""

    qkv: torch.Tensor
    qkv_bias: torch.Tensor
    out: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    down: torch.Tensor
    heads: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    vector: torch.Tensor
    """Stands for the layer's biases of width d, and the norms' weights."""

    def ffn(self, shape: Shape) -> PackedFfn:
        sizes = (shape.d, shape.ffn, shape.d)
        up, down = Matrix(self.up), Matrix(self.down)
        return PackedFfn(None, up, down, None, self.up_bias, self.vector, sizes, 0, 1, 1, False)


class Model:
    """Random weights of a shape."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        def random(*size: int, scale: float = 0.02) -> torch.Tensor:
            return torch.randn(*size, dtype=HALF, device=device) * scale

        d, ffn = shape.d, shape.ffn
        self.embedding = random(shape.vocab, d)
        self.layers = [
            Layer(
                random(3 * d, d), random(3 * d), random(d, d), random(ffn, d), random(ffn), random(ffn, d),
                random(shape.heads, d), random(shape.rank, d), random(ffn, shape.rank), random(d, scale=0.1) + 1,
            )
            for _ in range(shape.layers)
        ]  # fmt: skip


class Step:
    """One token of each sequence of a batch.

    Args:
        kept: heads and neurons that run; None for a dense model.
        ours: attention of a dense model by our kernel, without lists, instead of torch's.
    """

    def __init__(
        self, model: Model, shape: Shape, caches: list[torch.Tensor], kept: tuple[int, int] | None, ours: bool
    ) -> None:
        self.model, self.shape, self.caches, self.kept, self.ours = model, shape, caches, kept, ours
        device = model.embedding.device
        lengths = torch.full((shape.batch,), shape.seen, dtype=torch.int32, device=device)
        self.tokens = torch.arange(shape.batch, device=device) % shape.vocab
        self.views = [KvView(cache[0], cache[1], lengths) for cache in caches]
        self.ffns = [layer.ffn(shape) for layer in model.layers]
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self) -> torch.Tensor:
        """Logits [batch, vocab]."""
        x = self.model.embedding[self.tokens]
        for i, layer in enumerate(self.model.layers):
            x = self._layer(x, layer, i)
        return linear(layer_norm(x, (self.shape.d,)), self.model.embedding)

    def _layer(self, x: torch.Tensor, layer: Layer, i: int) -> torch.Tensor:
        shape, (b, d) = self.shape, x.shape
        inputs = layer_norm(x, (d,), layer.vector, layer.vector)
        heads = rows = None
        if self.kept is not None:
            # The first layer's attention is dense, as published.
            with self._beside():
                heads = select_topk(linear(inputs, layer.heads), self.kept[0], False) if i else None
                chosen = None if self.side is None or heads is None else self.side.record_event()
                rows = select_topk(linear(linear(inputs, layer.first), layer.second), self.kept[1], True)
        q, k, v = linear(inputs, layer.qkv, layer.qkv_bias).view(b, 3, shape.heads, shape.dh).unbind(1)
        cache, view = self.caches[i % len(self.caches)], self.views[i % len(self.caches)]
        cache[0, :, shape.seen - 1] = k
        cache[1, :, shape.seen - 1] = v
        if self.kept is not None and chosen is not None:
            torch.cuda.current_stream().wait_event(chosen)
        if self.ours or self.kept is not None:
            seen = selective_attention(q, view, heads, shape.dh**-0.5)
        else:
            seen = scaled_dot_product_attention(q[:, :, None], cache[0].transpose(1, 2), cache[1].transpose(1, 2))
        x = x + linear(seen.reshape(b, d), layer.out, layer.vector)
        inputs = layer_norm(x, (d,), layer.vector, layer.vector)
        if rows is not None:
            if self.side is not None:
                torch.cuda.current_stream().wait_stream(self.side)
            return sparse_ffn_rows(inputs, self.ffns[i], rows, "relu", residual=x)
        hidden = torch.relu(linear(inputs, layer.up, layer.up_bias))
        return torch.addmm(layer.vector, hidden, layer.down) + x

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Lets selectors run while the attention does, which does not wait for what the FFN selects."""
        if self.side is None:
            yield
            return
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            yield


def _caches(shape: Shape, device: torch.device) -> list[torch.Tensor]:
    """Keys and values of as many layers as fit into half of the memory that is free."""
    size = 2 * 2 * shape.batch * shape.seen * shape.d
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else size * shape.layers * 2
    count = max(1, min(shape.layers, int(free * 0.5 / size)))
    sizes = (2, shape.batch, shape.seen, shape.heads, shape.dh)
    return [torch.empty(sizes, dtype=HALF, device=device).normal_() for _ in range(count)]


def moved(shape: Shape, kept: tuple[int, int] | None) -> int:
    """Bytes of weights, keys and values that a step reads: of all layers and the head."""
    heads, neurons = kept or (shape.heads, shape.ffn)
    d, rank = shape.d, shape.rank
    routers = (rank * (d + shape.ffn) + shape.heads * d) if kept else 0
    weights = shape.layers * (4 * d * d + 2 * neurons * d + routers) + shape.vocab * d
    # The first layer's attention is dense.
    units = heads * (shape.layers - 1) + shape.heads
    return 2 * (weights + 2 * shape.batch * shape.seen * shape.dh * units)


def decode(
    shape: Shape, batches: tuple[int, ...], bandwidth: float, device: torch.device, smoke: bool
) -> Iterator[Record]:
    """Tokens per second by batch size: dense with torch's attention and with ours, and Polar."""
    model = Model(shape, device)
    for batch in batches:
        now = shape.with_batch(batch)
        caches = _caches(now, device)
        kept = (max(1, int(KEPT_HEADS * now.heads)), max(1, round(KEPT_ROWS[batch] * now.ffn / 128) * 128))
        kept = (kept[0], min(kept[1], now.ffn // 2)) if smoke else kept
        # Everything selected must give what a dense model does.
        dense, full = (Step(model, now, caches, k, False)() for k in (None, (now.heads, now.ffn)))
        error = float((dense - full).float().abs().max() / dense.float().abs().max())
        record: Record = {
            "batch": batch, "heads": kept[0] / now.heads, "rows": kept[1] / now.ffn, "error": error,
            "layers_with_own_cache": len(caches), "layers": now.layers,
        }  # fmt: skip
        del dense, full
        steps = {"dense_torch": (None, False), "dense_ours": (None, True), "polar": (kept, True)}
        for name, (what, ours) in steps.items():
            time = timed(Step(model, now, caches, what, ours), device, calls=1, repeats=3 if smoke else 7)
            size = moved(now, what)
            speed = {"tokens_per_s": 1e3 * batch / time.ms, "bytes": size}
            speed["of_copy"] = size / (time.ms * 1e-3) / bandwidth
            record[name] = {"ms": time.ms, "low": time.low, "high": time.high, **speed}
        best = min(record["dense_torch"]["ms"], record["dense_ours"]["ms"])
        record["speedup"] = best / record["polar"]["ms"]
        yield record
        del caches
        if device.type == "cuda":
            torch.cuda.empty_cache()
