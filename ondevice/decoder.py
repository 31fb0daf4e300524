"""The one transformer, written against the op table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ondevice.errors import NumericalError
from ondevice.generation.kv_cache import KVCache
from ondevice.layer import Early, Layer, no_router
from ondevice.ops.base import Array, Handle, Ops, Step
from ondevice.packing import Packer
from ondevice.sparsity.break_even import BreakEvens
from ondevice.sparsity.plan import make_plan
from ondevice.sparsity.settings import SparsitySettings

if TYPE_CHECKING:
    from ondevice.checkpoint.base import Checkpoint
    from ondevice.spec import ModelSpec, RopeSpec

PREFILL_CHUNK = 512
"""Tokens of a prompt that pass through the layers at once: enough to share each weight, few enough to stay in cache."""


class Decoder:
    """A model's packed weights and its forward pass.

    Args:
        checkpoint: where the tensors come from.
        ops: the table that runs them.
        progress: called with (tensors done, tensors in all, label) while weights are packed.
        settings: of skipping work.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ops: Ops,
        progress: Callable[[int, int, str], None] | None = None,
        settings: SparsitySettings | None = None,
    ) -> None:
        settings = settings or SparsitySettings()
        self.spec: ModelSpec = settings.apply(checkpoint.spec)
        self.ops = ops
        self._prompts_alike = self.spec.sparsity is None or self.spec.sparsity.in_prompts
        self._ropes: dict[tuple[int, tuple[bool, ...]], list[Handle | None]] = {}
        self.plan = make_plan(
            settings.plan, self.spec, BreakEvens(checkpoint, ops, self.spec, settings, progress).of_layer
        )
        Packer(checkpoint, ops, self.spec, settings, self.plan, progress).fill(self)

    embed: Handle
    position: Handle | None
    layers: list[Layer]
    final_norm: Handle
    head: Handle
    sketch: Handle | None = None
    _seen: dict[tuple[str, int], Array] | None = None

    def new_cache(self, slots: int, capacity: int, together: int = PREFILL_CHUNK) -> KVCache:
        """An empty cache for `slots` sequences of at most `capacity` tokens, `together` of one in a step."""
        return KVCache(self.ops, self.spec, slots, capacity, together)

    def prefill(
        self, tokens: Sequence[int], cache: KVCache, slot: int = 0, all_logits: bool = False, top: int = 0
    ) -> Iterator[NDArray[np.float32]]:
        """Appends a piece of prompt to a slot, in chunks, yielding after each so that a caller can stop.

        Args:
            tokens: ids, at least one.
            all_logits: logits of every token, else of the last one only.
            top: as of `decode`.

        Yields:
            float32 [tokens of the chunk, vocab] with all_logits; else [0, vocab], and [1, vocab] for the last chunk.

        Raises:
            ContextLengthError: the tokens do not fit the cache; nothing has been changed.
        """
        cache.reserve(slot, len(tokens))
        ids = np.asarray(tokens, np.int32)
        for start in range(0, len(ids), PREFILL_CHUNK):
            chunk = ids[start : start + PREFILL_CHUNK]
            n, first = len(chunk), int(cache.lengths[slot])
            last = start + n == len(ids)
            outputs = np.arange(n) if all_logits else np.arange(n - 1, n) if last else np.arange(0)
            positions = np.arange(first, first + n, dtype=np.int32)
            slots = np.full(n, slot, np.int32)
            step = Step(chunk, positions, slots, outputs.astype(np.int32))
            yield self._step(step, cache, top=top if len(outputs) else 0)

    def decode(self, tokens: Sequence[int], cache: KVCache, slots: Sequence[int], top: int = 0) -> NDArray[np.float32]:
        """One more token for each of several slots.

        Args:
            tokens: [B] ids.
            slots: [B], different from each other.
            top: how many of the largest logits must be exact, where the head has a sketch; 0 for all.

        Returns:
            float32 [B, vocab].
        """
        for slot in slots:
            cache.reserve(slot, 1)
        index = np.asarray(slots, np.int32)
        everyone = np.arange(len(index), dtype=np.int32)
        step = Step(np.asarray(tokens, np.int32), cache.lengths[index], index, everyone)
        return self._step(step, cache, 0 if self._prompts_alike else len(index), top)

    def states(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """What the head reads of each token of a new sequence: float32 [N, d]."""
        cache = self.new_cache(1, len(tokens), len(tokens))
        cache.reserve(0, len(tokens))
        index = np.arange(len(tokens), dtype=np.int32)
        step = Step(np.asarray(tokens, np.int32), index, np.zeros_like(index), index)
        return self.ops.run(step, cache, lambda s: self._state(s, cache, 0), "states")

    def watch(
        self, tokens: Sequence[int], places: Sequence[str], layers: Sequence[int], cache: KVCache | None = None
    ) -> list[NDArray[np.float32]]:
        """What passes some places of some layers when a new sequence runs, as in a prompt.

        Args:
            tokens: [N] ids.
            places: any of "attention" (its normed input), "heads" (its output, before the projection) and "ffn" (its
                normed input).
            layers: their numbers, ascending.
            cache: of one slot, for this alone and for so many tokens together; with one and the same, calls are
                prepared once.

        Returns:
            For each of the places float32 [N, layers, width].
        """
        cache = cache or self.new_cache(1, len(tokens), len(tokens))
        cache.truncate(0, 0)
        cache.reserve(0, len(tokens))
        index = np.arange(len(tokens), dtype=np.int32)
        cache.touch(np.zeros_like(index), index)
        seen: dict[tuple[str, int], Array] = {}

        def body(step: Step) -> Array:
            self._seen = seen
            try:
                self._hidden(step, cache, layers[-1] + 1, 0)
            finally:
                self._seen = None
            return self.ops.join([seen[place, i] for place in places for i in layers])

        step = Step(np.asarray(tokens, np.int32), index, np.zeros_like(index), index)
        joined = self.ops.run(step, cache, body, f"watch {places} {layers}")
        heads = self.spec.n_heads * self.spec.head_dim
        widths = [heads if place == "heads" else self.spec.d_model for place in places]
        ends = np.cumsum([width * len(layers) for width in widths])
        return [part.reshape(len(tokens), len(layers), -1) for part in np.split(joined, ends[:-1], axis=1)]

    def _step(self, step: Step, cache: KVCache, batch: int = 0, top: int = 0) -> NDArray[np.float32]:
        """Runs a step and takes its tokens into the cache.

        Args:
            batch: sequences of a decode step, if such steps run otherwise than prompts; else 0.
            top: as of `decode`.
        """
        if not self.spec.vocab_size > int(step.tokens.max()) >= 0 <= int(step.tokens.min()):
            raise ValueError(f"token ids must lie in 0..{self.spec.vocab_size - 1}")
        cache.touch(step.slots, step.positions)
        top = 0 if self.sketch is None else top
        name = f"{'decode' if batch else 'logits'} {top}"
        logits = self.ops.run(step, cache, lambda s: self._forward(s, cache, batch, top), name)
        # A sum is quicker than a look at each, and can overflow where all is well.
        if not np.isfinite(logits.sum()) and not np.isfinite(logits).all():
            self._name_bad_layer(step, cache, batch)
        np.maximum.at(cache.lengths, step.slots, step.positions + 1)
        return logits

    def _forward(self, step: Step, cache: KVCache, batch: int, top: int) -> Array:
        ops, spec = self.ops, self.spec
        x = self._state(step, cache, batch)
        logits = ops.head(x, self.head, self.sketch, top) if top else ops.linear(x, self.head)
        return ops.softcap(logits, spec.logit_softcap) if spec.logit_softcap else logits

    def _state(self, step: Step, cache: KVCache, batch: int) -> Array:
        """What the head reads, [M, d]."""
        hidden = self._hidden(step, cache, self.spec.n_layers, batch)
        self.ops.part("head")
        return self.ops.norm(self.ops.take(hidden, step.outputs), self.final_norm)

    def _hidden(self, step: Step, cache: KVCache, n_layers: int, batch: int) -> Array:
        """The residual stream [N, d] after the first `n_layers` layers."""
        ops, spec = self.ops, self.spec
        ops.part("embed")
        x = ops.embed(self.embed, step.tokens, spec.embedding_scale)
        if self.position is not None:
            x = ops.add(x, ops.embed(self.position, step.positions, offset=spec.position_offset or 0))
        ropes = self._layer_ropes(cache.capacity)
        for i, layer in enumerate(self.layers[:n_layers]):
            x, early = self._attention(i, layer, x, step, cache, ropes[i], batch)
            x = self._ffn(i, layer, x, early)
        return x

    def _attention(
        self, i: int, layer: Layer, x: Array, step: Step, cache: KVCache, rope: Handle | None, batch: int
    ) -> tuple[Array, Early]:
        """The residual stream after a layer's attention, and what the layer has selected for its FFN."""
        ops, spec = self.ops, self.spec
        ops.part("qkv")
        normed = ops.norm(x, layer.attn_norm)
        self._see("attention", i, normed)
        with nullcontext() if layer.router is no_router else ops.beside(normed):
            early = layer.router(normed, batch)
        q, k, v = layer.qkv(normed)
        ops.part("attention")
        if layer.q_norm is not None:
            q = ops.norm(q, layer.q_norm, spec.n_heads)
            k = ops.norm(k, layer.k_norm, spec.n_kv_heads)
        if rope is not None:
            q = ops.rope(q, spec.n_heads * spec.rope_parts, step.positions, rope)
            k = ops.rope(k, spec.n_kv_heads * spec.rope_parts, step.positions, rope)
        ops.append(cache, i, k, v, step)
        a = layer.attend(q, cache, step, early.heads)
        self._see("heads", i, a)
        ops.part("o")
        return self._residual(x, layer.post_attn_norm, lambda residual: layer.o(a, residual)), early

    def _see(self, place: str, i: int, x: Array) -> None:
        if self._seen is not None:
            self._seen[place, i] = x

    def _ffn(self, i: int, layer: Layer, x: Array, early: Early) -> Array:
        self.ops.part("ffn")
        normed = self.ops.norm(x, layer.ffn_norm)
        self._see("ffn", i, normed)
        return self._residual(x, layer.post_ffn_norm, lambda residual: layer.ffn(normed, residual, early))

    def _residual(self, x: Array, post_norm: Handle | None, branch: Callable[[Array | None], Array]) -> Array:
        """x plus what a branch gives; the branch adds x itself unless its result is normed first."""
        if post_norm is None:
            return branch(x)
        return self.ops.add(x, self.ops.norm(branch(None), post_norm))

    def _layer_ropes(self, capacity: int) -> list[Handle | None]:
        """Each layer's rotation for caches of this capacity; layers with equal rotations share one handle.

        Tables are made for a power of two of positions, so that a server meets few different ones.
        """
        positions = max(512, 1 << (capacity - 1).bit_length())
        ropes = [self.spec.layer_rope(i) for i in range(self.spec.n_layers)]
        # Long and short factors of longrope must not share a table of one size.
        key = (positions, tuple(rope is not None and capacity > rope.original_context for rope in ropes))
        if key not in self._ropes:
            made: dict[RopeSpec | None, Handle | None] = {None: None}
            for rope in ropes:
                if rope is not None and rope not in made:
                    frequencies = rope.inverse_frequencies(capacity)
                    made[rope] = self.ops.pack_rope(frequencies, rope.attention_factor, positions)
            self._ropes[key] = [made[rope] for rope in ropes]
        return self._ropes[key]

    def _name_bad_layer(self, step: Step, cache: KVCache, batch: int) -> None:
        """Runs a step again up to each layer in turn and raises at the first bad one."""
        for n in range(self.spec.n_layers + 1):
            name = f"hidden {n}{' decode' if batch else ''}"
            x = self.ops.run(step, cache, lambda s, n=n: self._hidden(s, cache, n, batch), name)  # type: ignore[misc]
            if not np.isfinite(x).all():
                where = f"layer {n - 1}" if n else "the embedding"
                raise NumericalError(f"NaN or infinite values after {where}: its weights or the cache are damaged")
        raise NumericalError("NaN or infinite values in the final norm or the vocabulary head: damaged weights")
