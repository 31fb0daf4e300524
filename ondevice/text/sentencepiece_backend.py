"""A `tokenizers` pipeline that splits texts as SentencePiece does.

Everything after it (special tokens, literal text, the detokenizer, saving) is then one way for all tokenizers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from ondevice.text.sentencepiece_file import SentencePieceModel
from ondevice.text.source import TokenType

SPACE = "\u2581"


def build_backend(
    model: SentencePieceModel, *, prefix_once: bool = False, raw_user_defined: bool = False
) -> tokenizers.Tokenizer:
    """Builds the pipeline; special tokens are not marked as such yet.

    Ids are SentencePiece's own, with one exception: compiled normalization rules are applied by whole graphemes,
    so a letter with several combining marks may be composed differently.

    Args:
        model: pieces and rules, checked.
        prefix_once: the space before a text is not repeated behind special tokens, and not put before another.
        raw_user_defined: user-defined pieces are found before normalization, and the text behind one begins anew.

    Returns:
        The pipeline.

    Raises:
        ValueError: the compiled normalization rules are damaged.
    """
    split = _of_type(model, TokenType.USER_DEFINED) if not (model.unigram or raw_user_defined) else []
    backend = tokenizers.Tokenizer(_unigram(model) if model.unigram else _bpe(model, whole_words=bool(split)))
    backend.normalizer = normalizers.Sequence(_normalizers(model, prefix=not prefix_once))
    steps: list[Any] = []
    if model.dummy_prefix and prefix_once:
        steps.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False))
    if split:
        steps.append(pre_tokenizers.Split(Regex(_any_of(text.replace(" ", SPACE) for text in split)), "isolated"))
    if model.unigram or split:
        steps += _cuts(model)
    if steps:
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.Sequence(_decoders(model))
    return backend


def _of_type(model: SentencePieceModel, *types: TokenType) -> list[str]:
    return [piece for piece, kind in zip(model.pieces, model.types) if kind in types]


def _bpe(model: SentencePieceModel, whole_words: bool) -> Any:
    by_score = sorted(range(len(model.pieces)), key=lambda i: (-model.scores[i], i))
    # Other types are never made by merging; a dict, as it keeps the order.
    mergeable = dict.fromkeys(model.pieces[i] for i in by_score if model.types[i] == TokenType.NORMAL)
    merges = [
        (left, right)
        for piece in mergeable
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in mergeable and (right := piece[cut:]) in mergeable
    ]
    return models.BPE(
        {piece: index for index, piece in enumerate(model.pieces)},
        merges,
        unk_token=next(iter(_of_type(model, TokenType.UNKNOWN)), None),
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=whole_words,
    )


def _unigram(model: SentencePieceModel) -> Any:
    def score(index: int) -> float:
        if model.types[index] == TokenType.USER_DEFINED:
            # What SentencePiece 0.2.3 was measured to give: nearly always better than any other split.
            return 0.1 * (len(model.pieces[index].encode()) - 1)
        return model.scores[index] if model.types[index] == TokenType.NORMAL else 0.0

    vocabulary = [(piece, score(index)) for index, piece in enumerate(model.pieces)]
    return models.Unigram(vocabulary, model.types.index(TokenType.UNKNOWN), model.byte_fallback)


def _normalizers(model: SentencePieceModel, prefix: bool) -> list[Any]:
    steps: list[Any] = []
    if model.charsmap:
        check_charsmap(model.charsmap)
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.collapse_spaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.dummy_prefix and prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if model.collapse_spaces:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    return steps


def check_charsmap(data: bytes) -> None:
    """Checks compiled normalization rules: every step through them stays inside.

    Args:
        data: size of the double-array trie as uint32, the trie, then texts that end with a zero byte.

    Raises:
        ValueError: they are damaged.
    """
    size = struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0
    if size < 4 or size % 4 or size > len(data) - 4:
        raise ValueError(f"a trie of {size} bytes in {len(data)}")
    units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
    texts = data[4 + size :]
    is_value = units >> 31 == 1
    # From a unit one goes to its position XOR its offset XOR a byte.
    offsets = (units >> 10) << ((units & 0x200) >> 6)
    furthest = (np.arange(len(units)) ^ offsets) | 0xFF
    # The root's own position is 0; what has the label 0 is not in use.
    if (furthest[~is_value] >= len(units)).any():
        raise ValueError("a trie that points outside")
    starts = units[is_value] & 0x7FFFFFFF
    if texts[-1:] != b"\0" or (starts >= len(texts)).any():
        raise ValueError("a rule without its text")
    try:
        texts.decode()
    except UnicodeDecodeError:
        raise ValueError("a rule whose text is not UTF-8") from None
    if (np.frombuffer(texts, np.uint8)[starts] & 0xC0 == 0x80).any():
        raise ValueError("a rule whose text begins inside a character")


def _any_of(texts: Iterable[str]) -> str:
    """Regular expression for one of several texts, the longest first."""
    return "|".join("".join(f"\\x{{{ord(c):X}}}" for c in text) for text in sorted(texts, key=len, reverse=True))


def _cuts(model: SentencePieceModel) -> list[Any]:
    """Cuts the text of control, unknown, unused and byte pieces behind its first character.

    The library's models would make the piece of its text; SentencePiece never does.
    """
    other = set(TokenType) - {TokenType.NORMAL, TokenType.USER_DEFINED}
    texts = [text for text in _of_type(model, *other) if len(text) > 1]
    # BPE does so only where the text stands alone; a cut elsewhere would keep unknown characters apart.
    start, end = ("", "") if model.unigram else (r"\A", r"\z")
    pattern = "|".join(f"{start}{_any_of([text[0]])}(?={_any_of([text[1:]])}{end})" for text in texts)
    return [pre_tokenizers.Split(Regex(pattern), "merged_with_previous")] if pattern else []


def _decoders(model: SentencePieceModel) -> list[Any]:
    steps: list[Any] = [decoders.Replace(SPACE, " ")]
    if model.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return steps
