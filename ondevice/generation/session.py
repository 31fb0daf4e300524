"""A conversation whose keys and values stay in the cache, so that a turn computes only what is new."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ondevice.decoder import Decoder
from ondevice.errors import ContextLengthError
from ondevice.generation.batch import Piece, Row, Stats, generate
from ondevice.generation.sampling import SamplingParams
from ondevice.text.tokenizer import Tokenizer


class Session:
    """One sequence that grows turn by turn.

    Args:
        decoder: the model.
        tokenizer: its tokenizer.
        context: tokens that the conversation may hold, prompts and answers together.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, context: int) -> None:
        self._decoder, self._tokenizer = decoder, tokenizer
        self._cache = decoder.new_cache(1, context)
        self._held: list[int] = []
        self.stats = Stats()

    @property
    def context(self) -> int:
        """Tokens that fit."""
        return self._cache.capacity

    @property
    def used(self) -> int:
        """Tokens in the cache."""
        return int(self._cache.lengths[0])

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Piece]:
        """Answers a prompt that usually begins with what the session holds; stopping half-way is fine.

        Args:
            prompt: ids of the whole conversation.

        Raises:
            ContextLengthError: the prompt leaves no room for an answer.
        """
        ids = list(prompt)
        if not ids:
            raise ContextLengthError("an empty prompt has nothing to go on from")
        if len(ids) >= self.context:
            raise ContextLengthError(
                f"the conversation has {len(ids)} tokens and the context holds {self.context}: start anew or shorten it"
            )
        # The last token is always computed again: its logits choose the first word of the answer.
        shared = min(_common(ids, self._held[: self.used]), len(ids) - 1)
        self._cache.truncate(0, shared)
        row = Row(0, ids, params, self._tokenizer, self._decoder.spec.vocab_size)
        self.stats, self._held = row.stats, ids
        for piece in generate(self._decoder, [row], self._cache):
            self._held = ids + row.tokens
            yield piece


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    n = 0
    for x, y in zip(a, b):
        if x != y:
            break
        n += 1
    return n
