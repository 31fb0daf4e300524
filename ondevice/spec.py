"""ModelSpec: everything that varies between the supported transformer architectures, as data.

`ondevice.spec_hub` fills it from a Hub `config.json`, `ondevice.spec_gguf` from GGUF metadata; the decoder reads
nothing else. A field that no decoder branch reads has no place here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ondevice.errors import ContextLengthError

if TYPE_CHECKING:
    from ondevice.sparsity.method import Method


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding of the half-split kind (dimension i turns with dimension i + dim/2).

    Args:
        dim: rotated dimensions of each head (below head_dim where only a part is rotated).
        theta: base of the geometric series of wavelengths.
        scaling: "default", "linear", "llama3", "yarn" or "longrope".
        factor: context extension factor of the scaling.
        original_context: training context that the scaling starts from, in tokens.
        low_freq_factor, high_freq_factor: llama3: borders of the blended band.
        beta_fast, beta_slow: yarn: rotations that bound the ramp.
        attention_factor: multiplies cos and sin (yarn, longrope).
        truncate: yarn: whether the ramp's borders are rounded to whole dimensions.
        short_factors, long_factors: longrope: divisor of each frequency [dim/2], up to and beyond original_context.
    """

    dim: int
    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def inverse_frequencies(self, context: int) -> NDArray[np.float64]:
        """Angle per position of each rotated pair.

        Args:
            context: number of tokens that the cache can hold; longrope picks its factors by it.

        Returns:
            float64 [dim/2], radians per position.

        Source: llama3 and linear scaling as published with the models; YaRN (Peng et al. 2023), section 3.
        """
        plain = self.theta ** (-np.arange(0, self.dim, 2, dtype=np.float64) / self.dim)
        match self.scaling:
            case "linear":
                return plain / self.factor
            case "llama3":
                return self._llama3(plain)
            case "yarn":
                return self._yarn(plain)
            case "longrope":
                factors = self.long_factors if context > self.original_context else self.short_factors
                return plain / np.asarray(factors, np.float64)
        return plain

    def _llama3(self, plain: NDArray[np.float64]) -> NDArray[np.float64]:
        """Long wavelengths are stretched, short ones kept, those between blended linearly in frequency."""
        rotations = self.original_context * plain / (2 * math.pi)
        kept = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return plain * (kept + (1 - kept) / self.factor)

    def _yarn(self, plain: NDArray[np.float64]) -> NDArray[np.float64]:
        """Ramp over dimensions between full interpolation and none."""

        def border(rotations: float) -> float:
            ratio = self.original_context / (rotations * 2 * math.pi)
            return self.dim * math.log(ratio) / (2 * math.log(self.theta))

        low, high = border(self.beta_fast), border(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001
        interpolated = np.clip((np.arange(self.dim // 2) - low) / (high - low), 0.0, 1.0)
        return plain * (1 - interpolated) + plain / self.factor * interpolated


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One decoder-only transformer.

    Args:
        architecture: the `model_type` that it was read from.
        n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, vocab_size: sizes.
        context_length: positions that the model was made for.
        norm: "rms" (root mean square) or "layer" (mean and variance, with bias).
        norm_eps: added to the mean square or variance.
        norm_offset: added to every norm's weight (Gemma on the Hub: 1).
        post_norms: further norms after attention and after the FFN, before the residual sum (Gemma 2 and 3).
        qk_norm: RMS norm over each head of q and k before rope.
        gated: the FFN is down(act(gate(x)) * up(x)), else down(act(up(x))).
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        qkv_bias, output_bias, ffn_bias: biases of q, k and v; of o; of the FFN's linears.
        rope: rotary embedding of global layers, None for learned positions.
        local_rope: rotary embedding of sliding-window layers where it differs (Gemma 3).
        position_offset: row of the learned position table that position 0 uses (OPT: 2); None without a table.
        windows: per layer, keys that a token sees including its own; 0 means all, which is the default.
        attention_scale: multiplies q.k; by default 1 / sqrt(head_dim).
        attention_softcap, logit_softcap: c * tanh(x / c) on scores and on logits; 0 switches off.
        embedding_scale: multiplies the token embedding.
        tied_head: the vocabulary head is the embedding table.
        sparsity: how work is skipped; None for a dense model.
    """

    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    context_length: int
    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    post_norms: bool = False
    qk_norm: bool = False
    gated: bool = True
    activation: str = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    rope: RopeSpec | None = None
    local_rope: RopeSpec | None = None
    position_offset: int | None = None
    windows: tuple[int, ...] = field(default=())
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    tied_head: bool = False
    sparsity: Method | None = None

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (0,) * self.n_layers)
        if len(self.windows) != self.n_layers:
            raise ValueError(f"{len(self.windows)} attention windows for {self.n_layers} layers")
        if not self.attention_scale:
            object.__setattr__(self, "attention_scale", self.head_dim**-0.5)

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.n_heads // self.n_kv_heads

    @property
    def rope_border(self) -> int:
        """Tokens beyond which rope takes other factors (longrope); 0 if there is no such border."""
        rope = self.rope
        if rope is None or rope.scaling != "longrope" or rope.short_factors == rope.long_factors:
            return 0
        return rope.original_context

    @property
    def rope_parts(self) -> int:
        """Equal parts of a head that are rotated each on its own."""
        return self.sparsity.rope_parts if self.sparsity else 1

    def layer_rope(self, layer: int) -> RopeSpec | None:
        """Rotary embedding of one layer, of a part of a head where there are several."""
        rope = self.local_rope if self.local_rope and self.windows[layer] else self.rope
        return rope if rope is None or self.rope_parts == 1 else replace(rope, dim=rope.dim // self.rope_parts)

    def check_context(self, tokens: int, flag: str = "max_tokens") -> None:
        """Raises ContextLengthError if `tokens` exceed the model's context."""
        if tokens > self.context_length:
            raise ContextLengthError(
                f"{tokens} tokens do not fit: {self.architecture} model has a context of {self.context_length}; "
                f"shorten the prompt or lower {flag}"
            )

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every tensor that a checkpoint of this spec must hold.

        Linears are [out, in]. Names: `embed`, `position`, `final_norm`, `head`, and `layers.N.` with `attn_norm`,
        `q`, `k`, `v`, `o`, `q_norm`, `k_norm`, `post_attn_norm`, `ffn_norm`, `gate`, `up`, `down`, `post_ffn_norm`;
        each followed by `.weight` or `.bias`. What skips work adds or changes names and shapes; its class says which.
        """
        d, q, kv = self.d_model, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocab_size, d)}
        if self.position_offset is not None:
            shapes["position.weight"] = (self.context_length + self.position_offset, d)

        def norm(name: str) -> None:
            shapes[f"{name}.weight"] = (d,)
            if self.norm == "layer":
                shapes[f"{name}.bias"] = (d,)

        def linear(name: str, out: int, inputs: int, bias: bool) -> None:
            shapes[f"{name}.weight"] = (out, inputs)
            if bias:
                shapes[f"{name}.bias"] = (out,)

        for layer in range(self.n_layers):
            p = f"layers.{layer}."
            norm(p + "attn_norm")
            for name, out in (("q", q), ("k", kv), ("v", kv)):
                linear(p + name, out, d, self.qkv_bias)
            linear(p + "o", d, q, self.output_bias)
            if self.qk_norm:
                shapes[p + "q_norm.weight"] = shapes[p + "k_norm.weight"] = (self.head_dim,)
            if self.post_norms:
                norm(p + "post_attn_norm")
            norm(p + "ffn_norm")
            if self.gated:
                linear(p + "gate", self.d_ff, d, self.ffn_bias)
            linear(p + "up", self.d_ff, d, self.ffn_bias)
            linear(p + "down", d, self.d_ff, self.ffn_bias)
            if self.post_norms:
                norm(p + "post_ffn_norm")
            if self.sparsity is not None:
                self.sparsity.change_tensors(self, layer, shapes)
        norm("final_norm")
        if not self.tied_head:
            shapes["head.weight"] = (self.vocab_size, d)
        return shapes
