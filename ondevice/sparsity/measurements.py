"""What was measured on this machine, kept in the user's cache: a small JSON file for each measurement.

It is used again while processor, threads and compiled kernels are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from ondevice.machine import cpu_name

if TYPE_CHECKING:
    from ondevice.ops.base import Ops

_LOG = logging.getLogger("ondevice")


def folder() -> Path:
    """Where measurements are kept."""
    return platformdirs.user_cache_path("ondevice") / "measurements"


def recall(key: Any, table: Ops) -> dict[float, float] | None:
    """Time ratios by ascending density; None where nobody has measured them.

    Args:
        key: JSON of what was measured.
        table: that measures.
    """
    try:
        found = json.loads(_path(key, table).read_text())
        ratios = {float(density): float(ratio) for density, ratio in found["ratios"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return ratios if ratios and all(math.isfinite(ratio) for ratio in ratios.values()) else None


def keep(key: Any, table: Ops, ratios: dict[float, float]) -> None:
    """Keeps what was measured. The file appears whole; what goes wrong is said and costs the next start a moment."""
    path, temporary = _path(key, table), None
    document = {**_machine(table), **key, "ratios": {str(density): ratio for density, ratio in ratios.items()}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        with os.fdopen(descriptor, "w") as file:
            json.dump(document, file, indent=1)
        os.replace(temporary, path)
    except OSError as e:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        _LOG.warning("%s: cannot be written: %s; measured anew at each start: set XDG_CACHE_HOME", folder(), e.strerror)


def count() -> int:
    """Measurements that are kept."""
    return sum(1 for _ in folder().glob("*.json"))


def clear() -> None:
    """Forgets all of them."""
    for path in folder().glob("*.json"):
        path.unlink(missing_ok=True)


def _machine(table: Ops) -> dict[str, Any]:
    return {"cpu": cpu_name(), "table": table.timing_key()}


def _path(key: Any, table: Ops) -> Path:
    digest = hashlib.sha256(json.dumps([_machine(table), key]).encode()).hexdigest()
    return folder() / f"{digest[:32]}.json"
