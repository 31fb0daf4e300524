"""The byte-level BPE tokenizer inside a GGUF file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from ondevice.errors import CheckpointError, UnsupportedModelError
from ondevice.text.pieces import byte_alphabet
from ondevice.text.pretokenizers import PRE_TOKENIZERS
from ondevice.text.source import TokenizerSource, turn_ends

_PREFIX = "tokenizer.ggml."


def _in_utf8(byte: int) -> bool:
    return byte not in (0xC0, 0xC1) and byte < 0xF5


class _TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def read_gguf(metadata: Mapping[str, Any], path: Path) -> TokenizerSource:
    """Builds a tokenizer from a GGUF file's metadata.

    Args:
        metadata: key -> plain Python value.
        path: the file, for messages.

    Returns:
        The parts of the tokenizer.

    Raises:
        CheckpointError: a key is missing, has the wrong type or contradicts another.
        UnsupportedModelError: another kind of vocabulary or pre-tokenizer.
    """
    keys = _Keys(metadata, path)
    model = keys.get("model", str)
    if model != "gpt2":
        raise UnsupportedModelError(
            path,
            f"vocabulary of kind {model!r}; only 'gpt2' (byte-level BPE) can be read from a GGUF file. "
            "Use the model's Hub folder with its tokenizer.json",
            _PREFIX + "model",
        )
    name = keys.get("pre", str)
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModelError(
            path, f"pre-tokenizer {name!r} is not known here; known are {known}", _PREFIX + "pre"
        )
    pre = PRE_TOKENIZERS[name]
    tokens = keys.tokens()
    types = keys.token_types(len(tokens))
    ids = {text: index for index, text in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(ids, keys.merges(ids), ignore_merges=pre.ignore_merges))
    backend.pre_tokenizer = pre.build("".join(c for c, b in byte_alphabet().items() if c not in ids and _in_utf8(b)))
    backend.decoder = decoders.ByteLevel()

    bos, eos = keys.token_id("bos_token_id", len(tokens)), keys.token_id("eos_token_id", len(tokens))
    ends = {keys.token_id(f"{name}_token_id", len(tokens)) for name in ("eot", "eom")} | {eos}
    stops = {token_id for token_id in ends if token_id is not None}
    named = stops | ({bos} if bos is not None else set())
    special = {
        text: index
        for index, text in enumerate(tokens)
        if text and (types[index] in (_TokenType.CONTROL, _TokenType.UNKNOWN) or index in named)
    }
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.add_tokens(
        [
            AddedToken(text, special=False, normalized=False)
            for index, text in enumerate(tokens)
            if text and types[index] == _TokenType.USER_DEFINED and text not in special
        ]
    )
    prefix = keys.end("add_bos_token", "bos_token_id", bos, default=pre.adds_bos and bos is not None)
    suffix = keys.end("add_eos_token", "eos_token_id", eos, default=False)
    _write_ends(backend, prefix, suffix, tokens)
    return TokenizerSource(
        backend=backend,
        path=path,
        special=special,
        bos_id=bos,
        eos_id=eos,
        prefix=prefix,
        suffix=suffix,
        stop_ids=frozenset(stops | turn_ends(special)),
        chat_template=keys.template(),
    )


def _write_ends(
    backend: tokenizers.Tokenizer, prefix: tuple[int, ...], suffix: tuple[int, ...], tokens: list[str]
) -> None:
    """Gives the pipeline the post-processor that adds BOS and EOS, so that a saved tokenizer.json has it."""
    before, after = [tokens[i] for i in prefix], [tokens[i] for i in suffix]
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=list({tokens[i]: i for i in (*prefix, *suffix)}.items()),
        )


class _Keys:
    """Typed, checked access to `tokenizer.ggml.*`."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self._metadata = metadata
        self._path = path

    def _error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(self._path, problem, _PREFIX + name)

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(_PREFIX + name, default)
        if value is None:
            raise self._error(name, "missing; the file has no usable tokenizer, fetch another one")
        # bool is an int in Python, but not in the file.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self._error(name, f"{kind.__name__} expected, not {type(value).__name__}")
        return value

    def _list(self, name: str, kind: type, default: Any = None) -> list[Any]:
        values: list[Any] = self.get(name, list, default)
        # type(), not isinstance: it refuses bools among ints, and is quick on 250,000 entries.
        wrong = next((i for i, value in enumerate(values) if type(value) is not kind), None)
        if wrong is not None:
            raise self._error(name, f"{kind.__name__} expected at [{wrong}], not {type(values[wrong]).__name__}")
        return values

    def tokens(self) -> list[str]:
        tokens = self._list("tokens", str)
        if not tokens:
            raise self._error("tokens", "empty")
        # Several vocabularies pad with empty texts; they are never matched, so only real texts must differ.
        first: dict[str, int] = {}
        for index, text in enumerate(tokens):
            if first.setdefault(text, index) != index and text:
                raise self._error("tokens", f"{text!r} stands twice, at [{first[text]}] and [{index}]")
        return tokens

    def token_types(self, count: int) -> list[int]:
        types = self._list("token_type", int, [int(_TokenType.NORMAL)] * count)
        if len(types) != count:
            raise self._error("token_type", f"{len(types)} entries for {count} tokens")
        highest = int(max(_TokenType))
        wrong = next((i for i, value in enumerate(types) if not 1 <= value <= highest), None)
        if wrong is not None:
            raise self._error("token_type", f"{types[wrong]} at [{wrong}] is no token type (1 to 6)")
        return types

    def merges(self, ids: Mapping[str, int]) -> list[tuple[str, str]]:
        pairs = []
        for index, merge in enumerate(self._list("merges", str)):
            left, space, right = merge.partition(" ")
            if not space or not left or not right or " " in right:
                raise self._error("merges", f"{merge!r} at [{index}] is not two tokens and one space")
            for text in (left, right, left + right):
                if text not in ids:
                    raise self._error("merges", f"{merge!r} at [{index}] needs {text!r}, which is no token")
            pairs.append((left, right))
        if len(set(pairs)) != len(pairs):
            twice = next(pair for pair, times in Counter(pairs).items() if times > 1)
            raise self._error("merges", f"{' '.join(twice)!r} stands twice")
        return pairs

    def token_id(self, name: str, count: int) -> int | None:
        if _PREFIX + name not in self._metadata:
            return None
        value: int = self.get(name, int)
        if not 0 <= value < count:
            raise self._error(name, f"{value} is outside the vocabulary of {count} tokens")
        return value

    def end(self, flag: str, id_name: str, token_id: int | None, default: bool) -> tuple[int, ...]:
        if not self.get(flag, bool, default):
            return ()
        if token_id is None:
            raise self._error(flag, f"true, but {_PREFIX}{id_name} is missing")
        return (token_id,)

    def template(self) -> str | None:
        key = "tokenizer.chat_template"
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(self._path, f"str expected, not {type(value).__name__}", key)
        return value or None
