"""The one transformer, written against the op table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ondevice.errors import NumericalError
from ondevice.generation.kv_cache import KVCache
from ondevice.ops.base import Array, Handle, Ops, Step

if TYPE_CHECKING:
    from ondevice.checkpoint.base import Checkpoint
    from ondevice.checkpoint.quantization import Tensor
    from ondevice.spec import ModelSpec

PREFILL_CHUNK = 512
"""Tokens of a prompt that pass through the layers at once: enough to share each weight, few enough to stay in cache."""


@dataclass(frozen=True, slots=True)
class _Layer:
    attn_norm: Handle
    qkv: Handle
    q_norm: Handle | None
    k_norm: Handle | None
    o: Handle
    post_attn_norm: Handle | None
    ffn_norm: Handle
    up: Handle
    down: Handle
    post_ffn_norm: Handle | None


class Decoder:
    """A model's packed weights and its forward pass.

    Args:
        checkpoint: where the tensors come from.
        ops: the table that runs them.
        progress: called with (tensors done, tensors in all, label) while weights are packed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ops: Ops,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> None:
        self.spec: ModelSpec = checkpoint.spec
        self.ops = ops
        self._ropes: dict[tuple[int, tuple[bool, ...]], list[Handle | None]] = {}
        _Packer(checkpoint, ops, progress).fill(self)

    embed: Handle
    position: Handle | None
    layers: list[_Layer]
    final_norm: Handle
    head: Handle

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """An empty cache for `slots` sequences of at most `capacity` tokens."""
        return KVCache(self.ops, self.spec, slots, capacity)

    def prefill(
        self, tokens: Sequence[int], cache: KVCache, slot: int = 0, all_logits: bool = False
    ) -> Iterator[NDArray[np.float32]]:
        """Appends a piece of prompt to a slot, in chunks, yielding after each so that a caller can stop.

        Args:
            tokens: ids, at least one.
            all_logits: logits of every token, else of the last one only.

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
            yield self._step(Step(chunk, positions, slots, outputs.astype(np.int32)), cache)

    def decode(self, tokens: Sequence[int], cache: KVCache, slots: Sequence[int]) -> NDArray[np.float32]:
        """One more token for each of several slots.

        Args:
            tokens: [B] ids.
            slots: [B], different from each other.

        Returns:
            float32 [B, vocab].
        """
        for slot in slots:
            cache.reserve(slot, 1)
        index = np.asarray(slots, np.int32)
        everyone = np.arange(len(index), dtype=np.int32)
        return self._step(Step(np.asarray(tokens, np.int32), cache.lengths[index], index, everyone), cache)

    def _step(self, step: Step, cache: KVCache) -> NDArray[np.float32]:
        if not self.spec.vocab_size > int(step.tokens.max()) >= 0 <= int(step.tokens.min()):
            raise ValueError(f"token ids must lie in 0..{self.spec.vocab_size - 1}")
        logits = self.ops.run(step, cache, lambda s: self._forward(s, cache))
        # A sum is quicker than a look at each, and can overflow where all is well.
        if not np.isfinite(logits.sum()) and not np.isfinite(logits).all():
            self._name_bad_layer(step, cache)
        np.maximum.at(cache.lengths, step.slots, step.positions + 1)
        return logits

    def _forward(self, step: Step, cache: KVCache) -> Array:
        ops, spec = self.ops, self.spec
        hidden = self._hidden(step, cache, spec.n_layers)
        ops.part("head")
        x = ops.norm(ops.take(hidden, step.outputs), self.final_norm)
        logits = ops.linear(x, self.head)
        return ops.softcap(logits, spec.logit_softcap) if spec.logit_softcap else logits

    def _hidden(self, step: Step, cache: KVCache, n_layers: int) -> Array:
        """The residual stream [N, d] after the first `n_layers` layers."""
        ops, spec = self.ops, self.spec
        ops.part("embed")
        x = ops.embed(self.embed, step.tokens, spec.embedding_scale)
        if self.position is not None:
            x = ops.add(x, ops.embed(self.position, step.positions, offset=spec.position_offset or 0))
        ropes = self._layer_ropes(cache.capacity)
        for i, layer in enumerate(self.layers[:n_layers]):
            x = self._attention(i, layer, x, step, cache, ropes[i])
            x = self._ffn(layer, x)
        return x

    def _attention(self, i: int, layer: _Layer, x: Array, step: Step, cache: KVCache, rope: Handle | None) -> Array:
        ops, spec = self.ops, self.spec
        q_width, kv_width = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        ops.part("qkv")
        qkv = ops.linear(ops.norm(x, layer.attn_norm), layer.qkv)
        ops.part("attention")
        q, k, v = ops.split(qkv, (q_width, kv_width, kv_width))
        if layer.q_norm is not None:
            q = ops.norm(q, layer.q_norm, spec.n_heads)
            k = ops.norm(k, layer.k_norm, spec.n_kv_heads)
        if rope is not None:
            q = ops.rope(q, spec.n_heads, step.positions, rope)
            k = ops.rope(k, spec.n_kv_heads, step.positions, rope)
        ops.append(cache, i, k, v, step)
        window, softcap = spec.windows[i], spec.attention_softcap
        a = ops.attention(q, cache, i, step, spec.attention_scale, window, softcap)
        ops.part("o")
        return self._residual(x, a, layer.o, layer.post_attn_norm)

    def _ffn(self, layer: _Layer, x: Array) -> Array:
        ops, spec = self.ops, self.spec
        ops.part("ffn")
        h = ops.linear(ops.norm(x, layer.ffn_norm), layer.up)
        h = ops.activation(h, spec.activation, spec.gated)
        return self._residual(x, h, layer.down, layer.post_ffn_norm)

    def _residual(self, x: Array, h: Array, weight: Handle, post_norm: Handle | None) -> Array:
        if post_norm is None:
            return self.ops.linear(h, weight, residual=x)
        return self.ops.add(x, self.ops.norm(self.ops.linear(h, weight), post_norm))

    def _layer_ropes(self, capacity: int) -> list[Handle | None]:
        """Each layer's rotation for caches of this capacity; layers with equal rotations share one handle.

        Tables are made for a power of two of positions, so that a server meets few different ones.
        """
        positions = max(512, 1 << (capacity - 1).bit_length())
        ropes = [self.spec.layer_rope(i) for i in range(self.spec.n_layers)]
        # Long and short factors of longrope must not share a table of one size.
        key = (positions, tuple(rope is not None and capacity > rope.original_context for rope in ropes))
        if key not in self._ropes:
            made: dict[int, Handle | None] = {id(None): None}
            for rope in ropes:
                if rope is not None and id(rope) not in made:
                    frequencies = rope.inverse_frequencies(capacity)
                    made[id(rope)] = self.ops.pack_rope(frequencies, rope.attention_factor, positions)
            self._ropes[key] = [made[id(rope)] for rope in ropes]
        return self._ropes[key]

    def _name_bad_layer(self, step: Step, cache: KVCache) -> None:
        """Runs a step again up to each layer in turn and raises at the first bad one."""
        for n in range(self.spec.n_layers + 1):
            x = self.ops.run(step, cache, lambda s, n=n: self._hidden(s, cache, n), f"hidden {n}")  # type: ignore[misc]
            if not np.isfinite(x).all():
                where = f"layer {n - 1}" if n else "the embedding"
                raise NumericalError(f"NaN or infinite values after {where}: its weights or the cache are damaged")
        raise NumericalError("NaN or infinite values in the final norm or the vocabulary head: damaged weights")


class _Packer:
    """Hands a checkpoint's tensors to the op table, part by part."""

    def __init__(self, checkpoint: Checkpoint, ops: Ops, progress: Callable[[int, int, str], None] | None) -> None:
        self.checkpoint, self.ops, self.spec, self.progress = checkpoint, ops, checkpoint.spec, progress
        self.names = self.spec.tensors()
        self.done = 0

    def get(self, name: str) -> Tensor:
        self.done += 1
        if self.progress:
            self.progress(self.done, len(self.names), "loading")
        return self.checkpoint.tensor(name)

    def optional(self, name: str) -> Tensor | None:
        return self.get(name) if name in self.names else None

    def norm(self, name: str) -> Handle:
        spec, bias = self.spec, self.optional(f"{name}.bias")
        return self.ops.pack_norm(self.get(f"{name}.weight"), bias, spec.norm, spec.norm_eps, spec.norm_offset)

    def optional_norm(self, name: str) -> Handle | None:
        return self.norm(name) if f"{name}.weight" in self.names else None

    def head_norm(self, name: str) -> Handle | None:
        """qk-norm is an RMS norm in every architecture, whatever the layers use."""
        if f"{name}.weight" not in self.names:
            return None
        weight = self.get(f"{name}.weight")
        return self.ops.pack_norm(weight, None, "rms", self.spec.norm_eps, self.spec.norm_offset)

    def linear(self, *names: str) -> Handle:
        weights = [self.get(f"{name}.weight") for name in names]
        return self.ops.pack_linear(weights, [self.optional(f"{name}.bias") for name in names])

    def layer(self, i: int) -> _Layer:
        p = f"layers.{i}."
        gate = [p + "gate"] if self.spec.gated else []
        return _Layer(
            attn_norm=self.norm(p + "attn_norm"),
            qkv=self.linear(p + "q", p + "k", p + "v"),
            q_norm=self.head_norm(p + "q_norm"),
            k_norm=self.head_norm(p + "k_norm"),
            o=self.linear(p + "o"),
            post_attn_norm=self.optional_norm(p + "post_attn_norm"),
            ffn_norm=self.norm(p + "ffn_norm"),
            up=self.linear(*gate, p + "up"),
            down=self.linear(p + "down"),
            post_ffn_norm=self.optional_norm(p + "post_ffn_norm"),
        )

    def fill(self, decoder: Decoder) -> None:
        if self.spec.tied_head:
            decoder.embed, decoder.head = self.ops.pack_tied(self.get("embed.weight"))
        else:
            decoder.embed = self.ops.pack_embedding(self.get("embed.weight"))
            decoder.head = self.linear("head")
        position = self.optional("position.weight")
        decoder.position = None if position is None else self.ops.pack_embedding(position)
        decoder.layers = [self.layer(i) for i in range(self.spec.n_layers)]
        decoder.final_norm = self.norm("final_norm")
