"""Small JSON files that come with a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ondevice.errors import CheckpointError

MAX_BYTES = 1 << 24


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it is missing, too large, no JSON or no object.
    """
    try:
        with path.open("rb") as f:
            data = f.read(MAX_BYTES + 1)
    except OSError as e:
        raise CheckpointError(path, f"cannot be read: {e.strerror}") from e
    if len(data) > MAX_BYTES:
        raise CheckpointError(path, f"is larger than {MAX_BYTES} bytes, which no such file is")
    return parse_object(data, path)


def parse_object(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object from bytes of UTF-8.

    Raises:
        CheckpointError: no JSON, no object, or a key twice in one object.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(path, f"holds damaged JSON: {str(e)[:200]}") from e
    if not isinstance(value, dict):
        raise CheckpointError(path, "holds no JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found
