"""What a chat template may compute with, and how large it may grow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ondevice.errors import OptionError

MAX_CHARS = 4_000_000
# All texts and lists made during one rendering together; real templates copy each message a few times.
MAX_WORK = 16 * MAX_CHARS
# What an item of a list counts beside its characters: it takes memory and time as well.
ITEM = 16
_NUMBERS = {int, float, bool, type(None)}
MAX_BITS = 4096
MAX_DEPTH = 100


class TooLarge(Exception):
    """A value would be larger than a template may make it."""


class MeasuredList(list[Any]):
    """A list given to a template, with its weight."""

    __slots__ = ("weight",)
    weight: int


class MeasuredDict(dict[Any, Any]):
    """A dict given to a template, with its weight."""

    __slots__ = ("weight",)
    weight: int


def plain(value: Any, name: str, depth: int = 0) -> Any:
    """Copies a value that is given to a template.

    Args:
        value: None, numbers, texts, lists and dicts of them.
        name: what it is, for messages.
        depth: how deep it stands.

    Returns:
        The copy; its lists and dicts carry their weight, so that checks need not walk them again.

    Raises:
        OptionError: it holds something else, or is nested deeper than MAX_DEPTH.
    """
    if depth > MAX_DEPTH:
        raise OptionError(f"{name}: nested deeper than {MAX_DEPTH} levels")
    if value is None or isinstance(value, (str, bool, float)):
        return value
    if isinstance(value, int) and value.bit_length() <= MAX_BITS:
        return value
    copy: MeasuredList | MeasuredDict
    if isinstance(value, (list, tuple)):
        copy = MeasuredList(plain(item, name, depth + 1) for item in value)
        copy.weight = weight(list(copy))
        return copy
    if isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
        copy = MeasuredDict((key, plain(item, name, depth + 1)) for key, item in value.items())
        copy.weight = weight(dict(copy))
        return copy
    raise OptionError(f"{name}: {type(value).__name__} cannot be given to a chat template; use JSON values")


def weight(value: Any) -> int:
    """Size of a value: its characters, and ITEM for each text, list, dict and number in it.

    Args:
        value: anything a template can hold.

    Returns:
        The weight. What stands in a list twice counts twice, as it would when it is written out.
    """
    return _weigh(value, {})


def _weigh(value: Any, known: dict[int, int]) -> int:
    """As `weight`; `known` has the lists and dicts met so far, which may hold one another many times."""
    if isinstance(value, str):
        return ITEM + len(value)
    if isinstance(value, (MeasuredList, MeasuredDict)):
        return value.weight
    if not isinstance(value, (list, tuple, dict, set, frozenset)):
        return ITEM
    if id(value) not in known:
        items = [*value, *value.values()] if isinstance(value, dict) else value
        total = ITEM * (1 + len(items))
        kinds = set(map(type, items))
        # Long lists of texts or numbers are common, and walking them under a trace function is slow.
        if kinds == {str}:
            total += sum(map(len, items))
        elif not kinds <= _NUMBERS and total <= MAX_CHARS:
            for item in items:
                total += _weigh(item, known) - ITEM
        known[id(value)] = total
    return known[id(value)]


def limit(size: int, what: str) -> int:
    """Refuses a size over MAX_CHARS.

    Args:
        size: predicted or measured size.
        what: the operation, for the message.

    Returns:
        The size.

    Raises:
        TooLarge: it is over.
    """
    if size > MAX_CHARS:
        raise TooLarge(f"{what} would make more than {MAX_CHARS:,} characters or items")
    return size


def replaced(text: str, old: str, new: str, count: int = -1) -> str:
    """`str.replace` with a bounded result.

    Args:
        text, old, new, count: as for `str.replace`.

    Returns:
        The new text.

    Raises:
        TooLarge: the result would be over MAX_CHARS.
    """
    hits = text.count(old) if count < 0 else min(count, text.count(old))
    limit(len(text) + hits * (len(new) - len(old)), "replace")
    return text.replace(old, new, count)


def joined(texts: Iterable[str], separator: str = "") -> str:
    """`str.join` with a bounded result.

    Args:
        texts: any iterable, read only as far as the limit.
        separator: put between them.

    Returns:
        The text.

    Raises:
        TooLarge: the result would be over MAX_CHARS.
    """
    parts = []
    size = 0
    for text in texts:
        size += len(text) + len(separator)
        limit(size, "joining texts")
        parts.append(text)
    return separator.join(parts)


def whole_numbers(*values: Any) -> None:
    """Refuses integers too long to compute with.

    Args:
        values: operands; other types are ignored.

    Raises:
        TooLarge: one has more than MAX_BITS bits.
    """
    if any(isinstance(value, int) and value.bit_length() > MAX_BITS for value in values):
        raise TooLarge(f"a number would have more than {MAX_BITS:,} bits")
