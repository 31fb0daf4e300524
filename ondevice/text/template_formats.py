"""Text formatting inside chat templates: `%`, `str.format`, dates and JSON, all with bounded results."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

from jinja2.sandbox import SandboxedEnvironment, SandboxedFormatter

from ondevice.text.template_values import TooLarge, joined, limit, weight

_MAX_FIELD = 1000
_NUMBERS = re.compile(r"\d+")


def _check_widths(specification: str) -> None:
    if "*" in specification or any(int(n[:9]) > _MAX_FIELD for n in _NUMBERS.findall(specification)):
        raise TooLarge(f"a format with fields wider than {_MAX_FIELD} characters")


def percent(text: str, values: Any) -> str:
    """`text % values` with bounded fields and a bounded result.

    Args:
        text: the format.
        values: one value, a tuple or a dict.

    Returns:
        The formatted text.

    Raises:
        TooLarge: a field is too wide, or the whole is too long.
    """
    for match in re.finditer(r"%(?:\([^)]*\))?[^a-zA-Z%]*", text):
        _check_widths(re.sub(r"^%\([^)]*\)", "", match.group()))
    limit(len(text) + text.count("%") * (_MAX_FIELD + weight(values)), "formatting with %")
    return text % values


class BoundedFormatter(SandboxedFormatter):
    """`str.format` with bounded fields."""

    def __init__(self, environment: SandboxedEnvironment) -> None:
        super().__init__(environment)

    def format_text(self, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Formats a text.

        Args:
            text: the format.
            args, kwargs: as for `str.format`.

        Returns:
            The formatted text.

        Raises:
            TooLarge: a field is too wide, or the whole is too long.
        """
        fields = text.count("{") * (_MAX_FIELD + weight(args) + weight(kwargs))
        limit(len(text) + fields, "str.format")
        return self.vformat(text, args, kwargs)

    def format_field(self, value: Any, format_spec: str) -> str:
        _check_widths(format_spec)
        return super().format_field(value, format_spec)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The `tojson` filter of Hub templates, which does not escape for HTML.

    Args:
        value: JSON values.
        ensure_ascii, indent, separators, sort_keys: as for `json.dumps`.

    Returns:
        JSON text.

    Raises:
        TooLarge: the result would be too long.
    """
    limit(weight(value), "tojson")
    if (isinstance(indent, int) and indent > 16) or any(len(text) > 16 for text in separators or ()):
        raise TooLarge("tojson with an indent or a separator of more than 16 characters")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii,
        indent=indent if isinstance(indent, int) else None,
        separators=(separators[0], separators[1]) if separators else None,
        sort_keys=sort_keys,
    )
    return joined(encoder.iterencode(value))


def strftime_now(pattern: str) -> str:
    """The date or time of now, as templates with a date in their system prompt ask for.

    Args:
        pattern: as for `datetime.strftime`, without field widths.

    Returns:
        The formatted time.

    Raises:
        TooLarge: the pattern is long or has widths.
    """
    if len(pattern) > 200 or re.search(r"%[^A-Za-z%]*\d", pattern):
        raise TooLarge(f"strftime_now({pattern[:40]!r})")
    return datetime.now().strftime(pattern)
