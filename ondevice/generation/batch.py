"""Generation for one sequence or a batch: prefill each, then decode all together until each has ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ondevice.decoder import Decoder
from ondevice.errors import ContextLengthError
from ondevice.generation.kv_cache import KVCache
from ondevice.generation.sampling import Sampler, SamplingParams, TokenLogprob, token_logprob
from ondevice.sparsity.stats import SparsityStats, sparsity_stats
from ondevice.text.detokenizer import Detokenizer
from ondevice.text.stop import StopMatcher
from ondevice.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of one sequence.

    Args:
        text: what may be shown; empty while a character or a stop string is incomplete.
        token: the id that it came with; None for what is only let go of at the end.
        row: which prompt of the batch.
        finish_reason: None while it goes on; "stop" (end of text or a stop string) or "length".
        logprob: where asked for.
        stats: of the whole answer, with its last piece.
    """

    text: str
    token: int | None
    row: int = 0
    finish_reason: str | None = None
    logprob: TokenLogprob | None = None
    stats: Stats | None = None


@dataclass(slots=True)
class Stats:
    """Times of one answer. In a batch, prefill is the row's own; decoding is shared by all rows.

    Args:
        prompt_tokens: of the whole prompt.
        reused_tokens: of the prompt, found in the cache.
        generated_tokens: of the answer, with its end token.
        prompt_seconds: from the start to the first logits.
        generation_seconds: from the first token (of the batch's last prompt) to the last.
        sketched_tokens: of the answer, chosen from logits of a sketched head; None if the model's head has no sketch.
        sparsity: what was skipped while the batch ran, up to the end of this answer; None for a dense model.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    sketched_tokens: int | None = None
    sparsity: SparsityStats | None = None

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens computed per second."""
        return (self.prompt_tokens - self.reused_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generation_tps(self) -> float:
        """Tokens per second after the first."""
        return max(self.generated_tokens - 1, 0) / self.generation_seconds if self.generation_seconds else 0.0


@dataclass
class Row:
    """One prompt, its answer so far, and the slot where its keys and values lie."""

    index: int
    prompt: list[int]
    params: SamplingParams
    tokenizer: Tokenizer
    vocab_size: int
    slot: int = 0
    tokens: list[int] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    finish_reason: str | None = None
    stop: str | None = None

    def __post_init__(self) -> None:
        self._sampler = Sampler(self.params, self.prompt, self.vocab_size)
        self._detokenizer = Detokenizer(self.tokenizer, prompt=self.prompt)
        self._stops = StopMatcher(self.params.stop)
        self._decoding_since = 0.0

    def start_decoding(self) -> None:
        """Sets the clock of the answer back: the prompts of a batch's other rows are not part of it."""
        self._decoding_since = time.perf_counter()

    def accept(self, logits: NDArray[np.float32], room: bool) -> Piece:
        """Chooses the next token. room: whether the cache can take it and go on."""
        token = self._sampler.choose(logits)
        logprob = None
        if self.params.logprobs is not None:
            logprob = token_logprob(logits, token, self.params.logprobs)
        now = time.perf_counter()
        self._decoding_since = self._decoding_since or now
        self.tokens.append(token)
        self.stats.generated_tokens += 1
        self.stats.generation_seconds = now - self._decoding_since
        text = self._text(token, room)
        stats = None if self.finish_reason is None else self.stats
        return Piece(text, token, self.index, self.finish_reason, logprob, stats)

    def _text(self, token: int, room: bool) -> str:
        """Text that this token sets free, and whether the answer ends with it."""
        if token in self.tokenizer.stop_ids and not self.params.ignore_eos:
            self.finish_reason = "stop"
            return self._rest()
        text, self.stop = self._stops.push(self._detokenizer.push(token))
        if self.stop is not None:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.params.max_tokens or not room:
            self.finish_reason = "length"
            text += self._rest()
        return text

    def _rest(self) -> str:
        """What was held back, up to a stop string that the last bytes may complete."""
        text, self.stop = self._stops.push(self._detokenizer.finish())
        if self.stop is not None:
            self.finish_reason = "stop"
            return text
        return text + self._stops.finish()


def generate(decoder: Decoder, rows: Sequence[Row], cache: KVCache) -> Iterator[Piece]:
    """Answers of all rows, as they come.

    A slot may hold the beginning of its row's prompt already; the rest is computed.

    Raises:
        ContextLengthError: a prompt does not fit; no row has started.
    """
    for row in rows:
        if len(row.prompt) > cache.capacity:
            raise ContextLengthError(
                f"the prompt has {len(row.prompt)} tokens, the context {cache.capacity}: shorten the prompt"
            )
    before = decoder.ops.counts()

    def accept(row: Row, logits: NDArray[np.float32]) -> Piece:
        piece = row.accept(logits, _room(row, cache))
        if piece.stats is not None:
            piece.stats.sparsity = sparsity_stats(decoder.spec, decoder.plan, before, decoder.ops.counts())
        return piece

    active: list[Row] = []
    for row in rows:
        if decoder.sketch is not None:
            row.stats.sketched_tokens = 0
        if row.params.max_tokens == 0:
            row.finish_reason = "length"
            yield Piece("", None, row.index, "length", stats=row.stats)
            continue
        yield accept(row, _prefill(decoder, row, cache))
        if row.finish_reason is None:
            active.append(row)
    for row in active:
        row.start_decoding()
    while active:
        for row, scores in _decode(decoder, active, cache):
            yield accept(row, scores)
        active = [row for row in active if row.finish_reason is None]


def _decode(decoder: Decoder, rows: Sequence[Row], cache: KVCache) -> Iterator[tuple[Row, NDArray[np.float32]]]:
    """Logits of each row's next token. Rows that a sketched head serves differently are decoded apart."""
    sketched = decoder.sketch is not None
    needs = [row.params.exact_logits if sketched else 0 for row in rows]
    found: dict[int, NDArray[np.float32]] = {}
    for need in dict.fromkeys(needs):
        some = [row for row, own in zip(rows, needs) if own == need]
        logits = decoder.decode([row.tokens[-1] for row in some], cache, [row.slot for row in some], need)
        found.update((row.slot, scores) for row, scores in zip(some, logits))
    for row, need in zip(rows, needs):
        if need:
            row.stats.sketched_tokens = (row.stats.sketched_tokens or 0) + 1
        yield row, found[row.slot]


def _room(row: Row, cache: KVCache) -> bool:
    """Whether the token chosen next can be fed back."""
    return int(cache.lengths[row.slot]) < cache.capacity


def _prefill(decoder: Decoder, row: Row, cache: KVCache) -> NDArray[np.float32]:
    """Computes what the cache does not hold of a prompt; the logits of its last token."""
    start = time.perf_counter()
    reused = int(cache.lengths[row.slot])
    *_, logits = decoder.prefill(row.prompt[reused:], cache, row.slot)
    row.stats.prompt_tokens, row.stats.reused_tokens = len(row.prompt), reused
    row.stats.prompt_seconds = time.perf_counter() - start
    return logits[-1]
