"""Times one test on a loaded model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ondevice.errors import OptionError
from ondevice.machine import memory_bytes
from ondevice_bench.parts import Profile, profile_table
from ondevice_bench.traffic import bytes_per_token, held_arrays, held_bytes

if TYPE_CHECKING:
    from ondevice.decoder import Decoder
    from ondevice.ops.base_skipping import Tally
    from ondevice_bench.cases import Case

SEED = 0


@dataclass(frozen=True, slots=True)
class Result:
    """What a test gave.

    Args:
        samples: tokens per second of each repetition, those of all sequences together.
        bytes_per_token: see `traffic`.
        profile: of one more repetition, where it was asked for.
        skipped: what the op table counted while it was timed, by name.
    """

    case: Case
    samples: list[float]
    bytes_per_token: float
    profile: Profile | None = None
    skipped: dict[str, Tally] = field(default_factory=dict)


def measure(
    decoder: Decoder,
    case: Case,
    repetitions: int,
    profile: bool = False,
    between: Callable[[], object] | None = None,
) -> Result:
    """Runs a test: the depth is filled, one repetition warms up, the others are timed.

    Args:
        repetitions: that are timed.
        profile: run one more that says where the time goes; "tg" only.
        between: called before each step, not timed.

    Raises:
        OptionError: keys and values take more memory than there is.
    """
    return in_turn([decoder], case, repetitions, profile, between)[0]


def in_turn(
    decoders: Sequence[Decoder],
    case: Case,
    repetitions: int,
    profile: bool = False,
    between: Callable[[], object] | None = None,
    alike: bool = False,
) -> list[Result]:
    """The same test on several models, a repetition of each in turn: what disturbs one disturbs the others too.

    Args:
        alike: read the depth once, and give its keys and values to every sequence, each in memory of its own. For
            random weights, where what the context says means nothing.
    """
    runs = [_Run(decoder, case, alike) for decoder in decoders]
    for run in runs:
        run.rewind()
        run.once(between)
    samples: list[list[float]] = [[] for _ in runs]
    counts: list[dict[str, Tally]] = [{} for _ in runs]
    for _ in range(repetitions):
        for run, mine, own in zip(runs, samples, counts):
            run.rewind()
            # Models that one table runs share its counts.
            before = _skipped(run.decoder)
            mine.append(case.tokens * case.batch / run.once(between))
            for name, tally in _skipped(run.decoder).items():
                own[name] = _sum(own.get(name), _since(tally, before[name]))
    results = []
    for run, mine, skipped in zip(runs, samples, counts):
        tokens = case.tokens * case.batch * repetitions
        nbytes = bytes_per_token(run.decoder, run.cache, case) - sum(t.bytes_skipped for t in skipped.values()) / tokens
        results.append(Result(case, mine, nbytes, _profile(run) if profile and case.kind == "tg" else None, skipped))
    return results


def _skipped(decoder: Decoder) -> dict[str, Tally]:
    """A copy of what the table has counted so far."""
    return {name: replace(tally) for name, tally in decoder.ops.counts().items()}


def _sum(tally: Tally | None, more: Tally) -> Tally:
    if tally is None:
        return more
    return replace(more, **{f.name: getattr(tally, f.name) + getattr(more, f.name) for f in fields(more)})


def _since(now: Tally, earlier: Tally) -> Tally:
    return replace(now, **{f.name: getattr(now, f.name) - getattr(earlier, f.name) for f in fields(now)})


def _profile(run: _Run) -> Profile:
    run.rewind()
    with profile_table(run.decoder.ops)() as parts:
        seconds = run.once()
    return Profile(dict(parts), seconds, run.case.tokens, run.case.batch)


class _Run:
    """A test's cache, filled to its depth, and its tokens."""

    def __init__(self, decoder: Decoder, case: Case, alike: bool) -> None:
        self.decoder, self.case = decoder, case
        self.cache = decoder.new_cache(case.batch, case.positions)
        self._check_memory()
        random = np.random.default_rng(SEED)
        self.tokens = random.integers(0, decoder.spec.vocab_size, (case.batch, case.positions)).tolist()
        if case.depth:
            for slot, tokens in enumerate(self.tokens):
                if slot and alike and not any(self.cache.rings):
                    self._copy(slot)
                else:
                    self._read(tokens[: case.depth], slot)

    def _check_memory(self) -> None:
        need, available = held_bytes(self.cache.pages), memory_bytes()[1]
        if available is not None and need > available:
            raise OptionError(
                f"test {self.case.name}: keys and values take {need / 1e9:.1f} GB and {available / 1e9:.1f} GB are "
                "available; lower -b or -d"
            )

    def _read(self, tokens: list[int], slot: int) -> None:
        for _ in self.decoder.prefill(tokens, self.cache, slot):
            pass

    def _copy(self, slot: int) -> None:
        """Gives a sequence what the first one has read."""
        cache = self.cache
        cache.reserve(slot, self.case.depth)
        pages = -(-self.case.depth // cache.page)
        first, own = (cache.block_table[i, :pages].tolist() for i in (0, slot))
        before = (slice(None),) * self.decoder.ops.page_axis
        for array in held_arrays(cache.pages):
            # All pages at once: an array library may copy the whole array at each assignment.
            array[(*before, own)] = array[(*before, first)]
        cache.lengths[slot] = self.case.depth

    def _decode(self, position: int) -> None:
        self.decoder.decode([tokens[position] for tokens in self.tokens], self.cache, range(self.case.batch), top=1)

    def rewind(self) -> None:
        """Goes back to the depth; what a ring no longer has is read again."""
        for slot, tokens in enumerate(self.tokens):
            if self.cache.truncate(slot, self.case.depth) < self.case.depth:
                self._read(tokens[: self.case.depth], slot)

    def once(self, between: Callable[[], object] | None = None) -> float:
        """Seconds of one repetition, behind `rewind`."""
        case = self.case
        if case.kind == "pp":
            steps = [partial(self._read, tokens[case.depth :], slot) for slot, tokens in enumerate(self.tokens)]
        else:
            steps = [partial(self._decode, position) for position in range(case.depth, case.positions)]
        seconds = 0.0
        for step in steps:
            if between is not None:
                between()
            start = time.perf_counter()
            step()
            seconds += time.perf_counter() - start
        return seconds
