"""Cases beyond 2**31 values, for GPUs that have the memory: offsets of 32 bits would miss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cuda_kernels.cache import KvView
from cuda_kernels.pack import Matrix, PackedFfn
from ondevice_parity.check import Home, Outcome, Table, close, numbers, row_list
from ondevice_parity.torch_home import TorchHome


@dataclass(frozen=True)
class FarRows:
    """Rows that begin beyond 2**31 values; only those are ever touched."""

    shared: bool

    def __call__(self, fn: Callable[..., Any], rng: np.random.Generator, home: Home) -> Outcome:
        assert isinstance(home, TorchHome)
        width, neurons, tokens = 64, 2**25 + 64, 2 if self.shared else 1
        up, down = (torch.empty(neurons, width, dtype=torch.float16, device=home.device) for _ in range(2))
        chosen = [[neurons - 1, 5, neurons - 64]]
        small = [numbers(rng, "float16", 3, width, scale=0.125) for _ in range(2)]
        for whole, part in zip((up, down), small):
            for row, at in zip(part, chosen[0]):
                whole[at] = home.array(row)
        none = (None, None, None)
        ffn = PackedFfn(None, Matrix(up), Matrix(down), *none, (width, neurons, width), 0, 1, 1, False)
        x = numbers(rng, "float16", tokens, width)
        got = fn(home.array(x), ffn, row_list(chosen, 4, home), "relu")
        h = np.maximum(x.astype(np.float64) @ small[0].astype(np.float64).T, 0)
        return close(home.numpy(got), h @ small[1].astype(np.float64), "float16")


@dataclass(frozen=True)
class FarPages:
    """Pages that begin beyond 2**31 values; only those are ever touched."""

    spark: bool = False

    def __call__(self, fn: Callable[..., Any], rng: np.random.Generator, home: Home) -> Outcome:
        assert isinstance(home, TorchHome)
        dh, pages = 64, 2**19 + 3
        keys, values = (torch.empty(pages, 64, 1, dh, dtype=torch.float16, device=home.device) for _ in range(2))
        small = [numbers(rng, "float16", 70, dh) for _ in range(2)]
        for whole, part in zip((keys, values), small):
            whole[pages - 1, :, 0] = home.array(part[:64])
            whole[pages - 2, :6, 0] = home.array(part[64:])
        table = home.array(np.array([[pages - 1, pages - 2]], np.int32))
        view = KvView(keys, values, home.array(np.array([70], np.int32)), table)
        q = numbers(rng, "float16", 1, 1, dh)
        k, v = (part.astype(np.float64) for part in small)
        r = 32 if self.spark else dh
        scores = k[:, :r] @ q[0, 0, :r].astype(np.float64) / 8
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        if self.spark:
            weights *= np.logaddexp(0, k[:, r:] @ q[0, 0, r:].astype(np.float64) / 8)
        query = home.array(q)
        got = fn(query, view, 0.125, r, 1000) if self.spark else fn(query, view, None, 0.125)
        return close(home.numpy(got), (weights @ v)[None, None], "float16")


CASES: Table = {
    "sparse_ffn_rows": {"far rows": FarRows(shared=False), "far rows, union": FarRows(shared=True)},
    "selective_attention": {"far pages": FarPages()},
    "topk_attention": {"far pages": FarPages(spark=True)},
}
