"""From logits to scores: negative log-likelihood, KL divergence and agreement, with their standard errors."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ondevice.errors import OptionError
from ondevice.machine import default_threads

ROWS = 64
"""Positions worked on at once: float64 copies of a large vocabulary's logits stay small."""


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural log-probabilities in float64: [N, vocab] -> [N, vocab]."""
    scores = logits.astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    return scores


@dataclass(slots=True)
class Window:
    """Sums over the scored tokens of one window.

    Args:
        tokens: scored.
        nll: sum of negative log-likelihoods, nats.
        other_nll: the same of the other model.
        kl: sum of KL(other || model), nats.
        agreed: tokens where both models find the same one most likely.
    """

    tokens: int = 0
    nll: float = 0.0
    other_nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def add(
        self,
        logits: NDArray[np.float32],
        targets: NDArray[np.int64],
        other: NDArray[np.float32] | None = None,
    ) -> None:
        """Scores positions.

        Args:
            logits: [N, vocab], of the model.
            targets: [N], the tokens that came next.
            other: [N, vocab], of the model that it is compared with.
        """
        parts = [slice(start, start + ROWS) for start in range(0, len(targets), ROWS)]
        # NumPy lets go of the interpreter in its loops, and a vocabulary's exponentials take as long as its logits.
        with ThreadPoolExecutor(default_threads()) as pool:
            found = pool.map(
                lambda part: _sums(logits[part], targets[part], None if other is None else other[part]), parts
            )
            for nll, other_nll, kl, agreed in found:
                self.nll, self.other_nll = self.nll + nll, self.other_nll + other_nll
                self.kl, self.agreed = self.kl + kl, self.agreed + agreed
        self.tokens += len(targets)


def _sums(
    logits: NDArray[np.float32], targets: NDArray[np.int64], other: NDArray[np.float32] | None
) -> tuple[float, float, float, int]:
    """What some positions add to a window's `nll`, `other_nll`, `kl` and `agreed`.

    Exponentials are float32, which is three times as fast; their sums are float64.
    """
    rows = np.arange(len(targets))
    mine, _, total = _exponentials(logits)
    nll = float((total - mine[rows, targets]).sum())
    if other is None:
        return nll, 0.0, 0.0, 0
    theirs, weights, their_total = _exponentials(other)
    apart = theirs - mine
    apart *= weights
    weighed = apart.sum(axis=-1, dtype=np.float64) / np.exp(their_total)
    agreed = int((logits.argmax(axis=-1) == other.argmax(axis=-1)).sum())
    their_nll = float((their_total - theirs[rows, targets]).sum())
    return nll, their_nll, float((weighed - (their_total - total)).sum()), agreed


def _exponentials(logits: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """Logits [N, vocab] less each row's largest, the exponentials of that, and the logarithms [N] of their sums."""
    scores = logits - logits.max(axis=-1, keepdims=True)
    weights = np.exp(scores)
    return scores, weights, np.log(weights.sum(axis=-1, dtype=np.float64))


@dataclass(slots=True)
class Scores:
    """All windows of a text."""

    windows: list[Window] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return sum(w.tokens for w in self.windows)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood per token, nats."""
        return sum(w.nll for w in self.windows) / self.tokens

    @property
    def nll_stderr(self) -> float | None:
        """Standard error of `nll` with windows as the independent units; None for a single window.

        Tokens of one window share their topic, so treating them as independent would promise too much.

        Source: the ratio estimator's variance over clusters (Cochran, Sampling Techniques, section 6.3).
        """
        count, mean = len(self.windows), self.nll
        if count < 2:
            return None
        squares = sum((w.nll - mean * w.tokens) ** 2 for w in self.windows)
        return math.sqrt(count / (count - 1) * squares) / self.tokens

    @property
    def rise(self) -> float:
        """Relative rise of the perplexity over the other model's: 0.01 where it is 1 % higher."""
        return math.expm1(self._paired.nll)

    def rise_upper(self, confidence: float = 0.95) -> float | None:
        """What `rise` stays under, with that confidence, on text like this one; None for a single window.

        Both models read the same windows, so it is the difference in each that is looked at: most of what makes one
        window harder than another is the same for both and drops out. The bound is one-sided.

        Args:
            confidence: above 0 and below 1.

        Source: the ratio estimator of `nll_stderr`, with Student's t for as few units as there are windows.
        """
        if not 0 < confidence < 1:
            raise OptionError(f"confidence is {confidence}; it must lie between 0 and 1, both excluded")
        paired = self._paired
        error = paired.nll_stderr
        if error is None:
            return None
        from scipy.stats import t  # slow to import, and of no use to most that use scores

        return math.expm1(paired.nll + float(t.ppf(confidence, len(self.windows) - 1)) * error)

    @property
    def _paired(self) -> Scores:
        """The same windows, with the difference to the other model in the place of the loss."""
        return Scores([Window(w.tokens, w.nll - w.other_nll) for w in self.windows])

    @property
    def kl(self) -> float:
        """Mean KL(other || model) per token, nats."""
        return sum(w.kl for w in self.windows) / self.tokens

    @property
    def agreement(self) -> float:
        """Share of tokens where both models find the same one most likely."""
        return sum(w.agreed for w in self.windows) / self.tokens
