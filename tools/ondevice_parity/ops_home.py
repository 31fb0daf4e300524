"""The kernels behind an op table, as the cases call them: the reference, and the CPU.

A case's lists become selections by the table's own selectors, of scores that are 1 for what is listed, and selections
are read by masking ones. So a case shows the kernel together with what leads to it in a model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.quantization import Tensor
from ondevice.generation.kv_cache import KVCache
from ondevice.ops.base import Ops, Step
from ondevice.sparsity.selection import Selection
from ondevice.sparsity.spark import Spark, SparkPart
from ondevice.spec import ModelSpec
from ondevice_parity.check import Home, Unsupported

Arrays = Sequence[NDArray[Any]]


@dataclass(frozen=True)
class Lists:
    """As a home's RowList."""

    indices: NDArray[np.int32]
    count: NDArray[np.int32]

    def mask(self, units: int) -> NDArray[np.bool_]:
        mask = np.zeros((len(self.count), units), bool)
        for row, indices, count in zip(mask, self.indices, self.count):
            row[indices[:count]] = True
        return mask


@dataclass(frozen=True)
class View:
    """As a home's KvView."""

    keys: NDArray[Any]
    values: NDArray[Any]
    lengths: NDArray[np.int32]
    block_table: NDArray[np.int32] | None

    def sequence(self, i: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values [length, kv heads, head dim] of a sequence."""
        at, page = np.arange(self.lengths[i]), self.keys.shape[1]
        index = (i, at) if self.block_table is None else (self.block_table[i, at // page], at % page)
        return self.keys[index].astype(np.float32), self.values[index].astype(np.float32)


@dataclass(frozen=True)
class Packed:
    """An FFN, with what calls need to know of it."""

    handle: Any
    neurons: int
    block: int
    valued: bool


class OpsHome(Home):
    """Kernels of an op table.

    Args:
        make: a new table.
        cache: type of its keys and values.
        quantized_error: as of Home.
        halves: whether keys are chosen by half of a head's dimensions only.
    """

    def __init__(self, make: Callable[[], Ops], cache: Any, quantized_error: float = 0.0, halves: bool = False) -> None:
        self.ops, self.cache_type, self.quantized_error, self.halves = make(), cache, quantized_error, halves
        self._numbers = itertools.count()

    def array(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def numpy(self, array: NDArray[Any]) -> NDArray[Any]:
        return array.astype(np.float64) if array.dtype.kind == "f" else array

    def rows(self, indices: NDArray[np.int32], count: NDArray[np.int32]) -> Lists:
        return Lists(indices, count)

    def view(self, keys: Any, values: Any, lengths: Any, block_table: Any) -> View:
        return View(keys, values, lengths, block_table)

    def as_cached(self, array: NDArray[Any]) -> NDArray[Any]:
        return array.astype(self.cache_type).astype(array.dtype)

    def pack_ffn(
        self,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        gate_bias: Any = None,
        up_bias: Any = None,
        down_bias: Any = None,
        block: int = 1,
        valued: bool = False,
    ) -> Packed:
        handle = self.ops.pack_ffn(gate, up, down, gate_bias, up_bias, down_bias, block, valued)
        return Packed(handle, up.shape[0], block, valued)

    def pack_linear(self, weight: Tensor, bias: NDArray[Any] | None) -> Any:
        return self.ops.pack_linear([weight], [bias])

    def pack_inputs(self, weight: Tensor, bias: NDArray[Any] | None) -> Any:
        return self.ops.pack_input_major([weight], [bias]), weight.shape[1]

    def kernel(self, name: str, twin: bool = False) -> Callable[..., Any]:
        kernels: dict[str, Callable[..., Any]] = {
            "sparse_ffn_rows": self._ffn,
            "grouped_experts": self._ffn,
            "quantized_linear": self._linear,
            "sparse_inputs": self._inputs,
            "select_topk": self._topk,
            "select_threshold": self._threshold,
            "statistical_topk": self._statistical,
            "selective_attention": self._attention,
            "topk_attention": self._topk_attention,
        }
        return kernels[name]

    # Running

    def _run(self, arrays: Arrays, body: Callable[..., Any], cache: Any = None, positions: Any = None) -> Any:
        """The body's result for arrays [N, ...], which it gets as the table's own."""
        n = len(arrays[0])
        if not n:
            raise Unsupported("steps of an op table have a token at least")
        tables = [self.ops.pack_embedding(np.ascontiguousarray(array)) for array in arrays]
        everyone = np.arange(n, dtype=np.int32)
        slots = np.zeros(n, np.int32) if positions is not None else everyone
        step = Step(everyone, everyone if positions is None else positions, slots, everyone)
        cache = cache or self._cache(1, 1, 16, n)

        def whole(now: Step) -> Any:
            return body(now, *(self.ops.embed(table, now.tokens) for table in tables))

        # No run may be served by the program of another one.
        return self.ops.run(step, cache, whole, f"case {next(self._numbers)}")

    def _cache(self, heads: int, kv_heads: int, dh: int, longest: int, spark: SparkPart | None = None) -> KVCache:
        spec = ModelSpec(
            architecture="llama", n_layers=1, d_model=heads * dh, n_heads=heads, n_kv_heads=kv_heads, head_dim=dh,
            d_ff=32, vocab_size=32, context_length=max(longest, 1), rope=None,
            sparsity=None if spark is None else Spark(keys=spark),
        )  # fmt: skip
        return KVCache(self.ops, spec, 1, max(longest, 1))

    # Selections

    def _listed(self, selection: Selection, ones: Any) -> Any:
        return self.ops.mask(ones, selection)

    def _as_lists(self, mask: NDArray[np.bool_]) -> Lists:
        order = np.argsort(~mask, axis=1, kind="stable").astype(np.int32)
        return Lists(order, mask.sum(axis=1).astype(np.int32))

    def _topk(self, scores: Any, k: int, shared: bool, group: int = 1, active: Any = None) -> Lists:
        if group > 1:
            raise Unsupported("groups of heads are chosen for attention alone, and cannot be read")
        if active is not None:
            raise Unsupported("an op table's tokens all vote")
        ones = np.ones(scores.shape, np.float32)
        masked = self._run([scores, ones], lambda _, s, o: self._listed(self.ops.select_topk(s, k, shared), o))
        return self._as_lists((masked != 0)[: 1 if shared else None])

    def _threshold(self, scores: Any, threshold: float, relative: bool = False) -> Lists:
        ones = np.ones(scores.shape, np.float32)

        def body(_: Step, s: Any, o: Any) -> Any:
            return self._listed(self.ops.select_threshold(s, threshold, relative), o)

        return self._as_lists(self._run([scores, ones], body) != 0)

    def _statistical(self, scores: Any, c: float) -> tuple[Any, Lists]:
        ones = np.ones(scores.shape, np.float32)

        def body(_: Step, s: Any, o: Any) -> Any:
            values, selection = self.ops.statistical_topk(s, c)
            return self.ops.join([values, self._listed(selection, o)])

        both = self._run([scores, ones], body)
        return both[:, : scores.shape[1]], self._as_lists(both[:, scores.shape[1] :] != 0)

    def _selection(self, scores: Any, rows: Lists) -> Selection:
        """Of scores that are 1 for what is listed."""
        if len(rows.count) == 1 and rows.count[0]:
            return self.ops.select_topk(scores, int(rows.count[0]), True)
        return self.ops.select_threshold(scores, 0.5)

    # Products

    def _ffn(
        self, x: Any, ffn: Packed, rows: Lists, activation: str, values: Any = None, residual: Any = None
    ) -> NDArray[np.float32]:
        mask = np.broadcast_to(rows.mask(ffn.neurons // ffn.block), (len(x), ffn.neurons // ffn.block))
        extra = [array for array in (values, residual) if array is not None]

        def body(_: Step, inputs: Any, scores: Any, *more: Any) -> Any:
            given = list(more)
            selection = self._selection(scores, rows)
            selection = selection if ffn.block == 1 else self.ops.expand(selection, ffn.block)
            if values is not None:
                selection = selection.with_values(given.pop(0))
            return self.ops.sparse_ffn(inputs, ffn.handle, selection, activation, given[0] if given else None)

        return self._run([x, mask.astype(np.float32), *extra], body)

    def _linear(self, x: Any, weight: Any) -> NDArray[np.float32]:
        return self._run([x], lambda _, inputs: self.ops.linear(inputs, weight))

    def _inputs(self, x: Any, weight: Any, rows: Lists) -> NDArray[np.float32]:
        handle, inputs = weight
        mask = np.broadcast_to(rows.mask(inputs), x.shape).astype(np.float32)

        def body(_: Step, given: Any, scores: Any) -> Any:
            return self.ops.sparse_linear(given, handle, self._selection(scores, rows))

        return self._run([x, mask], body)

    # Attention: a sequence after the other, since a step's selections of heads have one length

    def _filled(self, view: View, i: int, heads: int, spark: SparkPart | None) -> KVCache:
        """A cache with a sequence in its slot 0."""
        keys, values = view.sequence(i)
        length, kv_heads, dh = keys.shape
        cache = self._cache(heads, kv_heads, dh, length, spark)
        cache.reserve(0, length)

        def body(step: Step, k: Any, v: Any) -> Any:
            self.ops.append(cache, 0, k, v, step)
            return k

        self._run([x.reshape(length, -1) for x in (keys, values)], body, cache, np.arange(length, dtype=np.int32))
        return cache

    def _each(self, q: Any, view: View, attend: Callable[..., Any], spark: SparkPart | None = None) -> Any:
        """attend(i, step, queries, cache) of each sequence that sees a key; zeros for the others."""
        if not len(q):
            raise Unsupported("steps of an op table have a token at least")
        out = np.zeros(q.shape, np.float32)
        for i, length in enumerate(view.lengths):
            if not length:
                continue
            cache = self._filled(view, i, q.shape[1], spark)
            row, last = q[i].reshape(1, -1).astype(np.float32), np.array([length - 1], np.int32)
            got = self._run([row], lambda step, x, i=i, cache=cache: attend(i, step, x, cache), cache, last)
            out[i] = got.reshape(q.shape[1:])
        return out

    def _attention(
        self, q: Any, view: View, heads: Lists | None, scale: float, unit: str, window: int, softcap: float
    ) -> Any:
        group = q.shape[1] // view.keys.shape[2] if unit == "kv_group" else 1
        mask = None if heads is None else heads.mask(q.shape[1] // group)

        def attend(i: int, step: Step, x: Any, cache: KVCache) -> Any:
            chosen = None
            if mask is not None:
                scores = self.ops.pack_embedding(np.repeat(mask[i : i + 1], group, axis=1).astype(np.float32))
                first = Step(*(np.zeros(1, np.int32) for _ in range(4)))
                chosen = self.ops.select_heads(self.ops.embed(scores, first.tokens), int(mask[i].sum()), group)
            return self.ops.attention(x, cache, 0, step, scale, window, softcap, chosen)

        return self._each(q, view, attend)

    def _topk_attention(self, q: Any, view: View, scale: float, r: int, k: int, window: int = 0) -> Any:
        if self.halves and 2 * r != q.shape[2]:
            raise Unsupported(f"keys are chosen by half of a head, and this is {r} of {q.shape[2]}")

        def attend(i: int, step: Step, x: Any, cache: KVCache) -> Any:
            return self.ops.topk_attention(x, cache, 0, step, scale, window, r, k)

        return self._each(q, view, attend, SparkPart(r, k))
