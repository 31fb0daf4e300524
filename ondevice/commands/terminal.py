"""Text in from stdin and out to the terminal."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Mapping
from typing import Any

from ondevice.errors import OndeviceError


def safe(text: str) -> str:
    """The text without control characters: a model must not move the cursor, set titles or answer for the user."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}" for c in text)


def write(text: str) -> None:
    """Writes to stdout at once; as it is into pipes and files, made safe on a terminal."""
    sys.stdout.write(safe(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def read_stdin() -> str:
    """All of stdin, without the line break that `echo` and editors put at the end.

    Raises:
        OndeviceError: it is not text.
    """
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as e:
        raise OndeviceError(f"stdin: not {e.encoding} at byte {e.start}; convert it first") from e


def table(values: Mapping[str, Any], indent: str = "") -> str:
    """Lines of "key  value", the values aligned."""
    width = max((len(key) for key in values), default=0)
    return "\n".join(f"{indent}{key:<{width}}  {value}" for key, value in values.items())
