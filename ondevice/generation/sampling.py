"""From logits to a token: penalties, temperature, top-k, top-p and min-p, with a random stream per sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral, Real

import numpy as np
from numpy.typing import NDArray

from ondevice.errors import OptionError

FIRST_CANDIDATES = 256
"""Most likely tokens sorted at first; top-p takes more where their mass is not enough."""
FEW_EXACT, MOST_EXACT = 16, 64
"""Of logits where a sketch of the head gives the others: for drawing from all words, and for the longest top-k."""
BLOCK = 256
"""Tokens whose weights are added up, or compared, before single ones are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one answer is chosen.

    The order is: penalties, temperature, top-k, top-p, min-p.

    Args:
        max_tokens: most tokens of the answer, at least 0.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities reach top_p.
        min_p: keep tokens at least min_p times as likely as the most likely.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or answer; 1 is off.
        presence_penalty: subtracted once from logits of tokens in the answer.
        frequency_penalty: subtracted for each time that a token is in the answer.
        seed: of the random stream; None takes one from the system.
        stop: strings that end the answer; they are not part of it.
        logprobs: report the log-probability of each token and of this many alternatives; None reports nothing.
        ignore_eos: go on after the model's own end of text.

    Raises:
        OptionError: a value out of range.
    """

    max_tokens: int = 256
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = field(default=())
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        limits = {
            "max_tokens": (0, None),
            "temperature": (0, 100),
            "top_k": (0, None),
            "top_p": (0, 1),
            "min_p": (0, 1),
            "repetition_penalty": (0.01, 100),
            "presence_penalty": (-100, 100),
            "frequency_penalty": (-100, 100),
            "seed": (0, 2**64 - 1),
            "logprobs": (0, 1000),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is None and name in ("seed", "logprobs"):
                continue
            kind = Integral if name in ("max_tokens", "top_k", "seed", "logprobs") else Real
            number = isinstance(value, kind) and not isinstance(value, bool)
            # Written so that NaN, which fails every comparison, is refused.
            if not (number and value >= low and (high is None or value <= high)):
                bounds = f"at least {low}" if high is None else f"between {low} and {high}"
                raise OptionError(
                    f"{name} is {value!r}; it must be a {'whole ' if kind is Integral else ''}number {bounds}"
                )
        if self.top_p == 0:
            raise OptionError("top_p is 0, which would keep no token; use temperature=0 for the most likely one")
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise OptionError(f"stop is {self.stop!r}; it must be non-empty strings")

    @property
    def penalized(self) -> bool:
        """Whether logits are changed before the choice."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def exact_logits(self) -> int:
        """How many of the largest logits must be exact, whatever the others are; 0 for all.

        Penalties may make a word that was far from the best the best one, so all are exact before them.
        """
        if self.logprobs is not None or self.penalized or self.top_k > MOST_EXACT:
            return 0
        return 1 if self.temperature == 0 else self.top_k or FEW_EXACT


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probabilities of the model itself, before penalties, temperature and filters.

    Args:
        token: the token chosen.
        logprob: natural logarithm of its probability.
        top: the most likely tokens and their log-probabilities, in order.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one sequence.

    Args:
        params: how.
        prompt: ids that the repetition penalty counts.
        vocab_size: length of the logits.
    """

    def __init__(self, params: SamplingParams, prompt: list[int], vocab_size: int) -> None:
        self.params = params
        seed = np.random.SeedSequence().entropy if params.seed is None else params.seed
        self._random = np.random.Generator(np.random.Philox(seed))
        self._counts = np.zeros(vocab_size, np.int32)
        self._seen = np.zeros(vocab_size, bool)
        self._seen[prompt] = True

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token.

        Args:
            logits: float32 [vocab]; left as it is.
        """
        p = self.params
        scores = self._penalized(logits)
        token = int(scores.argmax()) if p.temperature == 0 or p.top_k == 1 else self._draw(scores)
        self._counts[token] += 1
        self._seen[token] = True
        return token

    def _penalized(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        p = self.params
        if p.penalized:
            scores = scores.copy()
        if p.repetition_penalty != 1:
            seen = scores[self._seen]
            scores[self._seen] = np.where(seen > 0, seen / p.repetition_penalty, seen * p.repetition_penalty)
        if p.presence_penalty:
            scores -= np.float32(p.presence_penalty) * (self._counts > 0)
        if p.frequency_penalty:
            scores -= np.float32(p.frequency_penalty) * self._counts.astype(np.float32)
        return scores

    def _draw(self, scores: NDArray[np.float32]) -> int:
        p = self.params
        with np.errstate(over="ignore"):  # a tiny temperature: minus infinity is what is meant
            divisor = max(np.float32(p.temperature), np.finfo(np.float32).tiny)
            weights = np.exp((scores - scores.max()) / divisor)
        if p.top_k == 0 and p.top_p == 1 and p.min_p == 0:
            return self._pick(weights)
        limit = p.top_k or len(weights)
        order = _most_likely(weights, limit, p.top_p)
        kept = weights[order]
        if p.top_p < 1:
            # Top-p looks at the distribution that top-k has left.
            whole = kept.sum() if p.top_k else weights.sum()
            mass = np.cumsum(kept) / whole
            kept = kept[: int(np.searchsorted(mass, p.top_p)) + 1]
        if p.min_p:
            kept = kept[kept >= p.min_p * kept[0]]
        return int(order[self._pick(kept)])

    def _pick(self, weights: NDArray[np.float32]) -> int:
        """An index with probability in proportion to its weight."""
        blocks = _blocks(weights).sum(axis=1, dtype=np.float64)
        edges = np.cumsum(blocks)
        target = self._random.random() * edges[-1]
        block = min(int(np.searchsorted(edges, target, side="right")), len(edges) - 1)
        inside = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
        # Rounding may put the target behind the block's last weight.
        target = min(target - edges[block] + blocks[block], np.nextafter(inside[-1], 0))
        return block * BLOCK + int(np.searchsorted(inside, target, side="right"))


def _blocks(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """The weights in rows of BLOCK, filled up with zeros."""
    rest = -len(weights) % BLOCK
    return (np.concatenate([weights, np.zeros(rest, weights.dtype)]) if rest else weights).reshape(-1, BLOCK)


def _most_likely(weights: NDArray[np.float32], limit: int, top_p: float) -> NDArray[np.int64]:
    """Indices by falling weight: `limit` of them, or fewer if those hold `top_p` of all mass."""
    size = min(limit, FIRST_CANDIDATES, len(weights))
    whole = weights.sum(dtype=np.float64)
    while True:
        part = _largest(weights, size)
        enough = top_p < 1 and limit >= len(weights) and weights[part].sum(dtype=np.float64) >= top_p * whole
        if size == min(limit, len(weights)) or enough:
            # Ties by id, so that the order is the same on every machine.
            return part[np.lexsort((part, -weights[part]))]
        size = min(size * 8, limit, len(weights))


def _largest(weights: NDArray[np.float32], size: int) -> NDArray[np.int64]:
    """Indices of the `size` largest weights, in any order."""
    candidates = np.arange(len(weights))
    peaks = _blocks(weights).max(axis=1)
    if size <= len(peaks):
        # At least `size` weights are as large as the smallest of the `size` largest peaks.
        candidates = np.flatnonzero(weights >= np.partition(peaks, len(peaks) - size)[len(peaks) - size])
    some = weights[candidates]
    return candidates[np.argpartition(some, len(some) - size)[len(some) - size :]]


def token_logprob(logits: NDArray[np.float32], token: int, alternatives: int) -> TokenLogprob:
    """Log-probability of a token and of the most likely ones."""
    scores = logits.astype(np.float64)
    logprobs = scores - scores.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        best = _most_likely(np.exp(logprobs), min(alternatives, len(scores)), 1.0)
        top = tuple((int(i), float(logprobs[i])) for i in best)
    return TokenLogprob(token, float(logprobs[token]), top)
