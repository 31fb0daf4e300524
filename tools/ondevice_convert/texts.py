"""The text that a model is calibrated on, and the part of it that nothing is fitted on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ondevice.errors import OndeviceError

if TYPE_CHECKING:
    from ondevice.model import Model
    from ondevice.text.tokenizer import Tokenizer

Progress = Callable[[int, int, str], None]

LEAST = 2048
"""Tokens below which a text says too little: some hundred samples for each router, and two or three windows."""
WRITTEN = 32_768
"""Tokens that a model writes itself where no text is given."""
UNSEEN = 16 * 1024
"""Most tokens that are kept apart to measure quality on; a sixth of a smaller text."""
WINDOW = 1024
WINDOWS = 8
"""Windows that the unseen part should have at least, so that their spread can be told."""
PIECE = 512
"""Tokens of a piece, where a text is longer than what is asked for; pieces are spread evenly over it."""
SEQUENCES = 16
"""Sequences that a model writes side by side."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Token ids of both parts.

    Args:
        fit: to fit on.
        unseen: from the end of the text, to measure quality on.
        window: tokens of a window, with which quality is measured.
        origin: where the text came from, for the report.
        sha256: of its bytes; of the ids where the model wrote it.
    """

    fit: list[int]
    unseen: list[int]
    window: int
    origin: str
    sha256: str


def read_text(path: Path) -> tuple[str, str]:
    """A text and the SHA-256 of its bytes.

    Raises:
        OndeviceError: not UTF-8, or empty.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise OndeviceError(
            f"{path}: not UTF-8 at byte {e.start}; convert it first, as `iconv -t UTF-8 {path.name}` does"
        ) from e
    if not text.strip():
        raise OndeviceError(f"{path}: the text is empty; give one of {LEAST} tokens or more, some {LEAST * 5} letters")
    if "\0" in text:
        raise OndeviceError(f"{path}: has zero bytes at {text.index(chr(0))}: no text, or UTF-16; convert it to UTF-8")
    return text, hashlib.sha256(data).hexdigest()


def split_text(text: str, sha256: str, path: Path, tokenizer: Tokenizer, most: int, context: int) -> Texts:
    """The parts of a text that was read.

    Args:
        most: tokens to fit on, spread evenly over what is there.
        context: of the model; windows are no longer.

    Raises:
        OndeviceError: the text is too short.
    """
    ids = tokenizer.encode(text, add_special=False)
    if len(ids) < LEAST:
        raise OndeviceError(
            f"{path}: {len(ids)} tokens are too few to fit on; give {LEAST} or more, or leave --text out, and the "
            "model writes a text itself"
        )
    return _parts(ids, most, context, path.name, sha256)


def written_text(model: Model, most: int, seed: int, progress: Progress | None = None) -> Texts:
    """A text that the model itself writes, by sampling from its own distribution.

    Args:
        most: tokens to write, at most.
        seed: of the sampling.
    """
    length = min(most // SEQUENCES, WINDOW, model.spec.context_length - 1)
    random = np.random.default_rng(seed)
    ids: list[int] = []
    round_of = 0
    while len(ids) < min(most, WRITTEN):
        prompts = [_start(model, random) for _ in range(SEQUENCES)]
        ids += _sampled(model, prompts, length, seed + 1000 * round_of)
        round_of += 1
        if progress:
            progress(len(ids), min(most, WRITTEN), "writing a text to calibrate on")
    digest = hashlib.sha256(np.asarray(ids, np.int64).tobytes()).hexdigest()
    return _parts(ids, most, model.spec.context_length, "written by the model itself", digest)


def _start(model: Model, random: np.random.Generator) -> int:
    """What a text begins with: the token that says so, or any word."""
    bos = model.tokenizer.bos_id
    return int(bos) if bos is not None else int(random.integers(0, model.spec.vocab_size))


def _sampled(model: Model, starts: list[int], length: int, seed: int) -> list[int]:
    """Sequences after their first token, one behind the other."""
    from ondevice.generation.sampling import Sampler, SamplingParams

    decoder, slots = model.decoder, range(len(starts))
    cache = decoder.new_cache(len(starts), length + 1)
    samplers = [
        Sampler(SamplingParams(temperature=1.0, seed=seed + i), [start], decoder.spec.vocab_size)
        for i, start in enumerate(starts)
    ]
    last, written = list(starts), [[start] for start in starts]
    for _ in range(length):
        logits = decoder.decode(last, cache, slots)
        last = [sampler.choose(row) for sampler, row in zip(samplers, logits)]
        for sequence, token in zip(written, last):
            sequence.append(token)
    return [token for sequence in written for token in sequence]


def _parts(ids: list[int], most: int, context: int, origin: str, sha256: str) -> Texts:
    apart = min(UNSEEN, len(ids) // 6)
    window = max(32, min(WINDOW, context, apart // WINDOWS))
    apart -= apart % window
    fit, unseen = ids[: len(ids) - apart], ids[len(ids) - apart :]
    if len(fit) > most:
        pieces = max(1, most // PIECE)
        starts = np.linspace(0, len(fit) - PIECE, pieces).astype(int)
        fit = [token for start in starts for token in fit[start : start + PIECE]]
    return Texts(fit, unseen, window, origin, sha256)
