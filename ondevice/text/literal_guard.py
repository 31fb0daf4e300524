"""Keeps the text of special tokens inside messages from becoming special tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from ondevice.errors import OptionError

# Private-use characters: no template has a meaning for them, and no trimming takes them for white space.
_STAND_INS = (range(0x100000, 0x10FFFE), range(0xF0000, 0xFFFFE))


class LiteralGuard:
    """Swaps one character of each special token's text for a stand-in, so that it names no token any more.

    The first character of every occurrence is swapped. Where a text ends as a special token begins, or begins
    as one ends, its last or first character is swapped too: nothing can be completed from two texts, or from
    one and the template around it. Lengths and white space stay, so templates work on it as before.

    Args:
        special: text of every special token.
    """

    def __init__(self, special: Iterable[str]) -> None:
        texts = sorted(special, key=len, reverse=True)
        # Lookahead: overlapping occurrences are found as well.
        self._occurrence = re.compile(f"(?=({'|'.join(map(re.escape, texts))}))") if texts else None
        self._beginnings = {text[:size] for text in texts for size in range(1, len(text))}
        self._endings = {text[size:] for text in texts for size in range(1, len(text))}
        self._longest = max(map(len, texts), default=0)

    def seal(self, values: Any, template: str) -> tuple[Any, dict[int, str]]:
        """Seals every text in nested lists and dicts.

        Args:
            values: what will be given to the template: None, numbers, texts, lists, dicts.
            template: its source; stand-ins are characters that it does not have.

        Returns:
            A sealed copy, and the table for `str.translate` that undoes the seal in the rendered text.

        Raises:
            OptionError: every private-use character is already in the texts.
        """
        originals = dict.fromkeys(char for text in _texts(values) for char in self._swapped(text).values())
        if not originals:
            return values, {}
        taken = set(template).union(*_texts(values))
        free = (code for code in chain(*_STAND_INS) if chr(code) not in taken)
        stand_in = {char: chr(code) for char, code in zip(originals, free)}
        if len(stand_in) < len(originals):
            raise OptionError("messages: no private-use character is left to protect special tokens; remove some")
        return self._copy(values, stand_in), {ord(new): old for old, new in stand_in.items()}

    def cut(self, text: str, mark: str) -> str:
        """Puts a mark behind the first character of every special token's text.

        Args:
            text: any text.
            mark: what to put there.

        Returns:
            The text with the marks.
        """
        if self._occurrence is None:
            return text
        ends = [match.start() + 1 for match in self._occurrence.finditer(text)]
        return mark.join(text[start:end] for start, end in zip([0, *ends], [*ends, len(text)]))

    def _swapped(self, text: str) -> dict[int, str]:
        """Positions of the characters to swap, and the characters."""
        if self._occurrence is None or not text:
            return {}
        at = {match.start() for match in self._occurrence.finditer(text)}
        # Templates may trim: the ends are looked at with and without the white space around them.
        for start, end in {(0, len(text)), (len(text) - len(text.lstrip()), len(text.rstrip()))}:
            inner = text[start:end]
            sizes = range(1, min(self._longest, len(inner) + 1))
            if any(inner[-size:] in self._beginnings for size in sizes):
                at.add(end - 1)
            if any(inner[:size] in self._endings for size in sizes):
                at.add(start)
        return {position: text[position] for position in at}

    def _copy(self, value: Any, stand_in: dict[str, str]) -> Any:
        if isinstance(value, str):
            swapped = self._swapped(value)
            if not swapped:
                return value
            chars = list(value)
            for position, char in swapped.items():
                chars[position] = stand_in[char]
            return "".join(chars)
        if isinstance(value, list):
            return [self._copy(item, stand_in) for item in value]
        if isinstance(value, dict):
            return {self._copy(key, stand_in): self._copy(item, stand_in) for key, item in value.items()}
        return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
