"""SentencePiece's tokenizer.model: a protocol buffer, read with every length checked."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ondevice.errors import CheckpointError, UnsupportedModelError
from ondevice.text.source import TokenType

_MAX_BYTES = 256 * 2**20
_WAY_OUT = "fetch it again"
_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass
class SentencePieceModel:
    """What a tokenizer.model says.

    Args:
        pieces: text of every id.
        scores: of every id; higher is merged or chosen first.
        types: of every id.
        unigram: the most probable split is chosen; else pairs are merged by score.
        byte_fallback: characters without a piece become their UTF-8 bytes.
        dummy_prefix: a space is put before every text.
        collapse_spaces: runs of spaces become one, and those at both ends are removed.
        charsmap: the compiled normalization rules; empty where there are none.
        bos_id, eos_id: None where there is none.
    """

    pieces: list[str]
    scores: list[float]
    types: list[TokenType]
    unigram: bool = False
    byte_fallback: bool = True
    dummy_prefix: bool = True
    collapse_spaces: bool = False
    charsmap: bytes = b""
    bos_id: int | None = None
    eos_id: int | None = None


def read_sentencepiece(file: Path) -> SentencePieceModel:
    """Reads a tokenizer.model.

    Args:
        file: its path.

    Returns:
        What it says.

    Raises:
        CheckpointError: the file is damaged.
        UnsupportedModelError: splits into words or characters, or spaces as suffixes.
    """
    if file.stat().st_size > _MAX_BYTES:
        raise CheckpointError(file, f"larger than {_MAX_BYTES // 2**20} MiB")
    try:
        return _model(memoryview(file.read_bytes()), file)
    except _Damaged as error:
        raise CheckpointError(file, f"not a SentencePiece model ({error}); {_WAY_OUT}") from None


class _Damaged(Exception):
    pass


def _model(data: memoryview, file: Path) -> SentencePieceModel:
    pieces: list[tuple[str, float, TokenType]] = []
    trainer: dict[int, int | memoryview] = {}
    rules: dict[int, int | memoryview] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_bytes(value), len(pieces)))
        elif number in (2, 3):
            # A message that comes in parts is the parts together.
            (trainer if number == 2 else rules).update(_fields(_bytes(value)))
    if not pieces:
        raise _Damaged("no pieces")
    texts = [text for text, _, _ in pieces]
    if len(set(texts)) != len(texts):
        first = {text: index for index, text in reversed(list(enumerate(texts)))}
        index = next(i for i, text in enumerate(texts) if first[text] != i)
        raise _Damaged(f"piece {texts[index]!r} stands twice, at [{first[texts[index]]}] and [{index}]")
    types = [kind for _, _, kind in pieces]
    if types.count(TokenType.UNKNOWN) != 1:
        raise _Damaged(f"{types.count(TokenType.UNKNOWN)} unknown pieces instead of one")
    kind = _KINDS.get(_int(trainer, 3, 1), "unknown")
    if kind not in ("unigram", "bpe"):
        raise UnsupportedModelError(file, f"{kind!r}; only 'bpe' and 'unigram' are known here", "model_type")
    if _int(trainer, 24, 0):
        raise UnsupportedModelError(file, "true; only spaces before words are known here", "treat_whitespace_as_suffix")
    if not _int(rules, 5, 1):
        raise UnsupportedModelError(file, "false; only escaped spaces are known here", "escape_whitespaces")
    return SentencePieceModel(
        pieces=texts,
        scores=[score for _, score, _ in pieces],
        types=types,
        unigram=kind == "unigram",
        byte_fallback=bool(_int(trainer, 35, 0)),
        dummy_prefix=bool(_int(rules, 3, 1)),
        collapse_spaces=bool(_int(rules, 4, 1)),
        charsmap=bytes(_bytes(rules.get(2, memoryview(b"")))),
        bos_id=_control(_int(trainer, 41, 1), types),
        eos_id=_control(_int(trainer, 42, 2), types),
    )


def _control(token_id: int, types: list[TokenType]) -> int | None:
    """The id of BOS or EOS; files keep the trainer's number even where the piece is not there."""
    return token_id if token_id < len(types) and types[token_id] == TokenType.CONTROL else None


def _piece(data: memoryview, index: int) -> tuple[str, float, TokenType]:
    fields = dict(_fields(data))
    try:
        text = str(_bytes(fields.get(1, memoryview(b""))), "utf-8")
    except UnicodeDecodeError:
        raise _Damaged(f"piece [{index}] is not UTF-8") from None
    raw = fields.get(2, memoryview(bytes(4)))
    if isinstance(raw, int) or len(raw) != 4:
        raise _Damaged(f"the score of piece [{index}] is no float")
    score = struct.unpack("<f", raw)[0]
    kind = _int(fields, 3, 1)
    if not text or not math.isfinite(score) or not 1 <= kind <= max(TokenType):
        raise _Damaged(f"piece [{index}] has the text {text!r:.60}, the score {score}, the type {kind}")
    return text, score, TokenType(kind)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers and values of a message: numbers as int, all else as bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise _Damaged(f"field of kind {kind}")
        if size > len(data) - at:
            raise _Damaged("it ends too early")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for index in range(min(10, len(data) - at)):
        byte = data[at + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise _Damaged("it ends too early" if len(data) - at < 10 else "a number is too long")


def _int(fields: dict[int, int | memoryview], number: int, default: int) -> int:
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise _Damaged(f"field {number} is no number")
    return value


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _Damaged("a number instead of a message or text")
    return value
