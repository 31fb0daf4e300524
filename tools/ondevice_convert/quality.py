"""What models lose against the one they were made of: each window of a text through all of them in turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ondevice.decoder import Decoder
from ondevice.ops.base_skipping import Tally
from ondevice_eval.evaluation import logits_of
from ondevice_eval.scores import Scores, Window

Progress = Callable[[int, int, str], None]
EXACT_WORDS = 40
"""Words whose logits are exact where a head is sketched: what sampling among the 40 most likely sees."""


@dataclass(frozen=True, slots=True)
class Quality:
    """One model on a text, beside the dense one.

    Args:
        perplexity: exp of the mean negative log-likelihood of a token.
        stderr: of the perplexity, windows taken as independent; None for one window.
        rise: of the perplexity over the dense model's, as a part of it.
        rise_upper: upper bound of the rise, from each window's difference, that holds with a confidence of 95 %: where
            one of several candidates was picked, for all of them together.
        kl: mean KL(dense || model) of a token, nats.
        agreement: part of the tokens where both find the same word most likely.
        density: what the model kept, by what it is: "ffn", "inputs", "heads".
        tokens: scored.
    """

    perplexity: float
    stderr: float | None
    rise: float
    rise_upper: float | None
    kl: float
    agreement: float
    density: dict[str, float]
    tokens: int

    @classmethod
    def of(cls, scores: Scores, density: dict[str, float], confidence: float) -> Quality:
        """From the sums over windows."""
        perplexity, error = float(np.exp(scores.nll)), scores.nll_stderr
        upper = scores.rise_upper(confidence) if len(scores.windows) > 1 else None
        return cls(
            perplexity,
            None if error is None else perplexity * error,
            scores.rise,
            upper,
            scores.kl,
            scores.agreement,
            density,
            scores.tokens,
        )


def compare(
    dense: Decoder,
    others: Sequence[Decoder],
    tokens: Sequence[int],
    window: int,
    progress: Progress | None = None,
    label: str = "measuring quality",
    confidence: float = 0.95,
) -> list[Quality]:
    """Scores models beside the dense one. Methods that skip in decoding only are computed token by token.

    Args:
        dense: the model that they were made of.
        others: at least one, over the same vocabulary; those with a sketched head are scored with `EXACT_WORDS`.
        tokens: the text.
        window: tokens of a window; the first of each is not scored.
        progress: called with (tokens done, tokens in all, label).
        confidence: of each upper bound.
    """
    scores, kept = [Scores() for _ in others], [Kept() for _ in others]
    caches = [decoder.new_cache(1, min(window, len(tokens))) for decoder in (dense, *others)]
    done = 0
    for start in range(0, len(tokens) - 1, window):
        ids = np.asarray(tokens[start : start + window])
        targets = ids[1:]
        for cache in caches:
            cache.truncate(0, 0)
        # One window's logits stay in memory: 200 MB for a vocabulary of 49,000 words.
        theirs = np.concatenate(list(logits_of(dense, ids, caches[0], False, 0)))[: len(targets)]
        for other, cache, own, parts in zip(others, caches[1:], scores, kept):
            own.windows.append(Window())
            at, before = 0, counted(other)
            for logits in logits_of(other, ids, cache, by_token=_decodes_only(other), top=EXACT_WORDS):
                part = slice(at, at + len(logits))
                own.windows[-1].add(logits[: len(targets[part])], targets[part], theirs[part])
                at += len(logits)
            parts.add(before, counted(other))
            done += len(ids)
            if progress:
                progress(done, len(tokens) * len(others), label)
    return [Quality.of(own, parts.densities(), confidence) for own, parts in zip(scores, kept)]


class Kept:
    """What a model keeps, by what it is. Models of one table share its counts, so each run is counted by itself."""

    def __init__(self) -> None:
        self._kept: Counter[str] = Counter()
        self._units: Counter[str] = Counter()

    def add(self, before: Mapping[str, Tally], after: Mapping[str, Tally]) -> None:
        """Counts what was run between two looks."""
        for name, tally in after.items():
            earlier = before.get(name, Tally())
            self._kept[name] += tally.kept - earlier.kept
            self._units[name] += tally.units - earlier.units

    def densities(self) -> dict[str, float]:
        """Parts that were kept; of what could not be skipped there is none."""
        return {name: self._kept[name] / units for name, units in self._units.items() if units and name != "words"}


def counted(decoder: Decoder) -> dict[str, Tally]:
    """A copy of a table's counts."""
    return {name: replace(tally) for name, tally in decoder.ops.counts().items()}


def _decodes_only(decoder: Decoder) -> bool:
    method = decoder.spec.sparsity
    return method is not None and not method.in_prompts
