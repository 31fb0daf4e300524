"""Runs a text through one model, or two side by side, in windows that do not overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ondevice.errors import OptionError
from ondevice.generation.sampling import MOST_EXACT
from ondevice_eval.scores import Scores, Window

if TYPE_CHECKING:
    from ondevice.decoder import Decoder
    from ondevice.generation.kv_cache import KVCache

    Logits = Iterator[NDArray[np.float32]]

BY_TOKEN_PIECE = 64
"""Tokens decoded one by one between two looks at the scores."""


def evaluate(
    decoder: Decoder,
    tokens: Sequence[int],
    window: int,
    other: Decoder | None = None,
    by_token: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    top: int = 0,
) -> Scores:
    """Scores a text.

    Args:
        decoder: the model.
        tokens: the text.
        window: tokens that each window holds; its first one is not scored, as nothing comes before it.
        other: a model to compare with, over the same vocabulary.
        by_token: compute each token by a decode step of its own, as generation does, not by prefill.
        progress: called with (tokens done, tokens in all, "scoring").
        top: of models whose head has a sketch: so many of the largest logits are exact, as when decoding; 0 for all.

    Raises:
        OptionError: a text of one token, an impossible window or top, or different vocabularies.
    """
    both = [decoder] if other is None else [decoder, other]
    _check(both, tokens, window)
    _check_top(both, top)
    caches = [d.new_cache(1, min(window, len(tokens))) for d in both]
    scores = Scores()
    for start in range(0, len(tokens) - 1, window):
        ids = np.asarray(tokens[start : start + window])
        scores.windows.append(Window())
        for cache in caches:
            cache.truncate(0, 0)
        streams = [logits_of(d, ids, cache, by_token, top) for d, cache in zip(both, caches)]
        done = 0
        for chunks in zip(*streams):
            # The last token's logits say what follows the window: nothing to score them by.
            targets = ids[done + 1 : done + 1 + len(chunks[0])]
            logits = [chunk[: len(targets)] for chunk in chunks]
            scores.windows[-1].add(logits[0], targets, logits[1] if other else None)
            done += len(chunks[0])
            if progress:
                progress(start + done, len(tokens), "scoring")
    return scores


def _check(decoders: list[Decoder], tokens: Sequence[int], window: int) -> None:
    if len(tokens) < 2:
        raise OptionError(
            f"the text has {len(tokens)} tokens; the first of a window is not scored, so give two or more"
        )
    if window < 2:
        raise OptionError(f"window is {window}; it must be at least 2, as the first token of each is not scored")
    for decoder in decoders:
        decoder.spec.check_context(min(window, len(tokens)), "--window")
    sizes = {decoder.spec.vocab_size for decoder in decoders}
    if len(sizes) > 1:
        raise OptionError(f"vocabularies of {' and '.join(map(str, sorted(sizes)))} tokens cannot be compared")


def _check_top(decoders: list[Decoder], top: int) -> None:
    if top > MOST_EXACT and any(decoder.sketch is not None for decoder in decoders):
        raise OptionError(
            f"top is {top}; what needs more than {MOST_EXACT} exact logits decodes with the whole head: leave the "
            "sketch out"
        )


def logits_of(decoder: Decoder, ids: NDArray[np.int64], cache: KVCache, by_token: bool, top: int) -> Logits:
    """Logits of every token of a window, [some, vocab] at a time."""
    if not by_token:
        yield from decoder.prefill(ids.tolist(), cache, all_logits=True, top=top)
        return
    for start in range(0, len(ids), BY_TOKEN_PIECE):
        piece = ids[start : start + BY_TOKEN_PIECE].tolist()
        yield np.concatenate([decoder.decode([token], cache, [0], top) for token in piece])
