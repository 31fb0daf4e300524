"""The bytes behind each token id, read from the decoder that a tokenizer.json names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from ondevice.errors import UnsupportedModelError


def byte_alphabet() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 stands for itself, the other bytes from U+0100 on.

    Returns:
        Character -> byte.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = byte_alphabet()


@dataclass
class _Rules:
    byte_level: bool = False
    byte_fallback: bool = False
    replacements: list[tuple[str, str]] = field(default_factory=list)
    # Removed from the first token altogether (Metaspace).
    dropped_at_start: str = ""
    # Removed from the start of the whole text, this many times (Strip).
    stripped: str = ""
    strip_count: int = 0


class Pieces:
    """Token id -> bytes, for one tokenizer.

    Args:
        backend: the `tokenizers` pipeline.
        literal_ids: added tokens; their text stands for itself and is not in the byte-level alphabet.
        size: ids from here on are not the model's.
        path: where the tokenizer came from, for messages.

    Raises:
        UnsupportedModelError: the pipeline has a decoder that is not known here.
    """

    def __init__(self, backend: tokenizers.Tokenizer, literal_ids: Iterable[int], size: int, path: Path) -> None:
        self._backend = backend
        self._literal = frozenset(literal_ids)
        self._size = size
        self._rules = _read_rules(backend, path)
        self._cache: dict[int, bytes] = {}

    @property
    def stripped(self) -> tuple[str, int]:
        """Character, and how many of it are removed from the start of a whole text."""
        return self._rules.stripped, self._rules.strip_count

    def first(self, token_id: int) -> bytes:
        """Bytes of a token that starts a text.

        Args:
            token_id: any id.

        Returns:
            As `of`, without what only marks the start of a text.
        """
        if not self._rules.dropped_at_start:
            return self.of(token_id)
        return self._bytes(token_id, self._text(token_id).replace(self._rules.dropped_at_start, ""))

    def of(self, token_id: int) -> bytes:
        """Bytes of a token inside a text.

        Args:
            token_id: any id; padding rows of an embedding have no token.

        Returns:
            Its bytes, not always whole characters; empty for an id without a token.
        """
        found = self._cache.get(token_id)
        if found is None:
            found = self._cache[token_id] = self._bytes(token_id, self._text(token_id))
        return found

    def _text(self, token_id: int) -> str:
        return (self._backend.id_to_token(token_id) if 0 <= token_id < self._size else None) or ""

    def _bytes(self, token_id: int, text: str) -> bytes:
        if self._rules.byte_level:
            values = [_BYTE_OF.get(char, -1) for char in text]
            if token_id in self._literal or -1 in values:
                return text.encode()
            return bytes(values)
        if self._rules.byte_fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            try:
                return bytes.fromhex(text[3:5])
            except ValueError:
                pass
        for old, new in self._rules.replacements:
            text = text.replace(old, new)
        return text.encode()


def _read_rules(backend: tokenizers.Tokenizer, path: Path) -> _Rules:
    if backend.decoder is None:
        raise UnsupportedModelError(path, "no decoder; spaces between its tokens are not known", "decoder")
    spec = json.loads(backend.decoder.__getstate__())
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    rules = _Rules()
    fused = False
    for step in steps:
        if not _add_step(rules, step, fused):
            raise UnsupportedModelError(
                path,
                f"decoder step {json.dumps(step, ensure_ascii=False)} is not known here; known are "
                "ByteLevel, Metaspace, ByteFallback, Fuse, Replace of a text, Strip at the start after Fuse",
                "decoder",
            )
        fused = fused or step["type"] == "Fuse"
    return rules


def _add_step(rules: _Rules, step: dict[str, Any], fused: bool) -> bool:
    """Takes one step of a decoder into the rules; False if it is not known."""
    kind = step["type"]
    if kind == "Replace" and isinstance(step["pattern"], dict) and "String" in step["pattern"]:
        rules.replacements.append((step["pattern"]["String"], step["content"]))
    elif kind == "Strip" and fused and not step["stop"]:
        rules.stripped, rules.strip_count = step["content"], step["start"]
    elif kind == "Metaspace":
        rules.replacements.append((step["replacement"], " "))
        if step["prepend_scheme"] != "never":
            rules.dropped_at_start = step["replacement"]
    elif kind == "ByteLevel":
        rules.byte_level = True
    elif kind == "ByteFallback":
        rules.byte_fallback = True
    else:
        return kind == "Fuse"
    return True
