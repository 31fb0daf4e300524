"""Skipping work in the reference table: everything is computed, then what was not selected is set to zero."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.quantization import Tensor, dequantize
from ondevice.ops.base import Ops, Step
from ondevice.ops.base_skipping import Tally
from ondevice.ops.reference_activation import activate
from ondevice.sparsity.selection import HeadSelection, Selection

if TYPE_CHECKING:
    from ondevice.generation.kv_cache import KVCache

KINDS = ("ffn", "inputs", "heads", "keys")


@dataclass(frozen=True, slots=True)
class _Ffn:
    gate: Any
    up: Any
    down: Any
    gate_bias: Any
    up_bias: Any
    down_bias: Any
    block: int
    valued: bool


class ReferenceSkipping(Ops):
    """Masks are bool [N or 1, units], head selections int [N, kept]."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        self._tallies = {kind: Tally() for kind in KINDS}
        self._random = np.random.default_rng(0)

    def counts(self) -> dict[str, Tally]:
        return {kind: replace(tally) for kind, tally in self._tallies.items()}

    def _count(self, kind: str, masks: Sequence[NDArray[np.bool_]] | None, bytes_skipped: int) -> None:
        """Notes a call. masks: what it ran, each bool [rows, units]; None for all."""
        tally = self._tallies[kind]
        tally.calls += 1
        if masks is not None:
            tally.sparse += 1
            tally.kept += sum(int(mask.sum()) for mask in masks)
            tally.units += sum(mask.size for mask in masks)
            tally.bytes_skipped += bytes_skipped

    def _count_weights(self, kind: str, selection: Selection | None, tokens: int, unit_bytes: int) -> None:
        """Notes a call that reads `unit_bytes` of weights for each unit that any of its tokens needs."""
        if selection is None:
            self._count(kind, None, 0)
            return
        rows = np.broadcast_to(selection.mask, (tokens, selection.units))
        self._count(kind, [rows], int((~rows.any(axis=0)).sum()) * unit_bytes)

    # FFN

    def pack_ffn(
        self,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        block: int,
        valued: bool,
    ) -> _Ffn:
        def values(tensor: Tensor | None) -> Any:
            return 0.0 if tensor is None else dequantize(tensor, self.dtype)

        gates = None if gate is None else values(gate)
        return _Ffn(
            gates, values(up), values(down), values(gate_bias), values(up_bias), values(down_bias), block, valued
        )

    def sparse_ffn(self, x: Any, ffn: _Ffn, selection: Selection | None, activation: str, residual: Any = None) -> Any:
        up = x @ ffn.up.T + ffn.up_bias
        if ffn.valued:
            assert selection is not None and selection.values is not None
            h = selection.values * activate(up, activation)
        elif ffn.gate is None:
            h = activate(up, activation)
        else:
            h = activate(x @ ffn.gate.T + ffn.gate_bias, activation) * up
        if selection is not None:
            h = np.where(selection.mask, h, 0)
        matrices = (ffn.gate, ffn.up, ffn.down)
        neuron_bytes = sum(m.nbytes for m in matrices if m is not None) // len(ffn.up)
        self._count_weights("ffn", selection, len(x), neuron_bytes)
        y = h @ ffn.down.T + ffn.down_bias
        return y if residual is None else y + residual

    def mask(self, h: Any, selection: Selection) -> Any:
        self.ran_dense("ffn")
        return np.where(selection.mask, h if selection.values is None else h * selection.values, 0)

    def ran_dense(self, kind: str) -> None:
        self._count(kind, None, 0)

    def select_topk(self, scores: Any, k: int, shared: bool) -> Selection:
        if shared:
            scores = np.maximum(scores, 0).sum(axis=0, keepdims=True)
        mask = np.zeros(scores.shape, bool)
        np.put_along_axis(mask, _largest(scores, k), True, axis=1)
        return Selection(mask, scores.shape[1], shared)

    def select_threshold(self, scores: Any, threshold: float, relative: bool = False) -> Selection:
        if relative:
            largest = scores.max(axis=1, keepdims=True)
            mask = (scores >= threshold * largest) | (scores == largest)
        else:
            mask = scores > threshold
        return Selection(mask, scores.shape[1], False)

    def pack_factors(self, values: Tensor) -> Any:
        return dequantize(values, self.dtype)

    def select_magnitude(self, x: Any, threshold: float, factors: Any = None) -> Selection:
        sizes = np.abs(x) if factors is None else np.abs(x) * factors
        return Selection(sizes > threshold, x.shape[1], False)

    def statistical_topk(self, scores: Any, c: float) -> tuple[Any, Selection]:
        border = scores.mean(axis=1, keepdims=True) + c * scores.std(axis=1, keepdims=True)
        return np.maximum(scores - border, 0), Selection(scores > border, scores.shape[1], False)

    def expand(self, selection: Selection, block: int) -> Selection:
        return replace(selection, mask=np.repeat(selection.mask, block, axis=1), units=selection.units * block)

    def forced(self, selection: Any, density: float) -> Any:
        if isinstance(selection, HeadSelection):
            return self._forced_heads(selection, density)
        order = self._random.random(selection.mask.shape).argsort(axis=1)
        return replace(selection, mask=order < round(density * selection.units))

    def random_selection(self, x: Any, units: int, density: float) -> Selection:
        return self.forced(Selection(np.zeros((len(x), units), bool), units, False), density)

    # Linears

    def join(self, parts: Sequence[Any]) -> Any:
        return np.concatenate(parts, axis=1)

    def pack_input_major(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Any:
        return self.pack_linear(weights, biases)

    def sparse_linear(self, x: Any, weight: Any, selection: Selection, residual: Any = None) -> Any:
        self._count_weights("inputs", selection, len(x), weight[0].nbytes // x.shape[1])
        return self.linear(np.where(selection.mask, x, 0), weight, residual)

    # Attention

    def select_heads(self, scores: Any, k: int, group: int) -> HeadSelection:
        units = scores.reshape(len(scores), -1, group).max(axis=2)
        self._head_units = units.shape[1]
        return HeadSelection(_largest(units, k), k, group)

    def _forced_heads(self, heads: HeadSelection, density: float) -> HeadSelection:
        kept = round(density * self._head_units)
        scores = self._random.random((len(heads.index), self._head_units))
        return replace(heads, index=_largest(scores, kept), kept=kept)

    def only_heads(
        self, out: Any, heads: HeadSelection | None, cache: KVCache, layer: int, step: Step, window: int
    ) -> Any:
        """Attention's result [N, H * dh] with heads that were not selected set to 0."""
        if heads is None:
            self._count("heads", None, 0)
            return out
        skipped, masks = 0, []
        result = np.zeros_like(out)
        for token, keys, values in self._seen(cache, layer, step, window):
            run = np.zeros(out.shape[1] // keys.shape[2], bool)
            for unit in heads.index[token]:
                run[unit * heads.group : (unit + 1) * heads.group] = True
            masks.append(run[None])
            idle = ~run.reshape(keys.shape[1], -1).any(axis=1)
            skipped += keys[:, idle].nbytes + values[:, idle].nbytes
            result[token] = np.where(np.repeat(run, keys.shape[2]), out[token], 0)
        self._count("heads", masks, skipped)
        return result

    def topk_attention(
        self, q: Any, cache: KVCache, layer: int, step: Step, scale: float, window: int, r: int, k: int
    ) -> Any:
        out = np.empty(q.shape, self.dtype)
        masks, skipped = [], 0
        for token, keys, values in self._seen(cache, layer, step, window):
            n, kv_heads, dh = keys.shape
            c = NormalDist().inv_cdf(1 - k / n) if n > k else 0.0
            for kv, queries in enumerate(q[token].reshape(kv_heads, -1, dh)):
                s = queries[:, :r] @ keys[:, kv, :r].T * scale
                largest = s.max(axis=1, keepdims=True)
                border = s.mean(axis=1, keepdims=True) + c * s.std(axis=1, keepdims=True)
                kept = (s > border) | (s == largest) | (n <= k)
                weights = np.where(kept, np.exp(s - largest), 0)
                weights /= weights.sum(axis=1, keepdims=True)
                weights *= np.logaddexp(0, queries[:, r:] @ keys[:, kv, r:].T * scale)
                out[token].reshape(kv_heads, -1, dh)[kv] = weights @ values[:, kv]
                masks.append(kept)
                skipped += int((~kept.any(axis=0)).sum()) * (keys[0, kv, r:].nbytes + values[0, kv].nbytes)
        self._count("keys", masks, skipped)
        return out

    def _seen(self, cache: KVCache, layer: int, step: Step, window: int) -> Iterator[tuple[int, Any, Any]]:
        """Each token of a step with the keys and values [n, kv_heads, head_dim] that it sees, the oldest first."""
        for token, (slot, position) in enumerate(zip(step.slots, step.positions)):
            positions = np.arange(max(0, position + 1 - window) if window else 0, position + 1)
            pages = cache.block_table[slot, positions // cache.page]
            keys, values = (store[layer, pages, positions % cache.page] for store in cache.pages)
            yield token, keys, values


def _largest(scores: Any, k: int) -> Any:
    """Indices [N, k] of each row's k largest entries; of equal ones the first."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]
