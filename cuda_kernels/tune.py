"""Which tile a kernel takes: a few choices, timed once for each shape, remembered in memory and in the user's cache.

Choices differ in what runs in parallel, never in the order in which a sum is taken. In the interpreter, and while a
CUDA graph is recorded, the first choice is taken, unless a time is known.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from cuda_kernels.launch import interpreted

Choice = dict[str, int]
REPEATS = 5
ROUNDS = 3
_known: dict[str, dict[str, Choice]] = {}


def cache_file() -> Path:
    """Where choices are kept; ONDEVICE_TRITON_TUNING names another file.

    "off" there keeps them in memory only, "first" measures nothing and takes the first choice.
    """
    named = os.environ.get("ONDEVICE_TRITON_TUNING")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "ondevice" / "triton_tiles.json"


def pick(kernel: str, key: tuple[Any, ...], choices: Sequence[Choice], run: Callable[[Choice], None]) -> Choice:
    """The fastest of some choices, timed at the first call for a key.

    Args:
        kernel: its name.
        key: shapes and types that matter to it.
        choices: the first is taken where nothing can be timed.
        run: launches the kernel; may be called many times, and must give the same each time.
    """
    if interpreted() or len(choices) == 1 or os.environ.get("ONDEVICE_TRITON_TUNING") == "first":
        return choices[0]
    where = f"{torch.cuda.get_device_name()} triton {triton.__version__}"
    known = _load(where)
    name = f"{kernel} {key}"
    if name in known and known[name] in choices:
        return known[name]
    if torch.cuda.is_current_stream_capturing():
        return choices[0]
    times = [(_time(choice, run), i) for i, choice in enumerate(choices)]
    seconds, best = min(times)
    if seconds == float("inf"):
        raise RuntimeError(f"{kernel}: none of its {len(choices)} tiles can run for {key} on {where}")
    known[name] = choices[best]
    _save(where)
    return choices[best]


def _time(choice: Choice, run: Callable[[Choice], None]) -> float:
    """Milliseconds of a launch, the best of a few rounds; infinite where the tile needs more than the device has."""
    try:
        run(choice)
    except triton.runtime.errors.OutOfResources:
        return float("inf")
    best = float("inf")
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPEATS):
            run(choice)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / REPEATS)
    return best


def _load(where: str) -> dict[str, Choice]:
    if where not in _known:
        mine = _stored().get(where)
        _known[where] = mine if isinstance(mine, dict) else {}
    return _known[where]


def _stored() -> dict[str, Any]:
    if os.environ.get("ONDEVICE_TRITON_TUNING") != "off":
        # A file that is missing or damaged costs another measurement, and nothing else.
        with contextlib.suppress(OSError, ValueError):
            stored = json.loads(cache_file().read_text())
            return stored if isinstance(stored, dict) else {}
    return {}


def _save(where: str) -> None:
    if os.environ.get("ONDEVICE_TRITON_TUNING") == "off":
        return
    path = cache_file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump({**_stored(), where: _known[where]}, file, indent=1)
        os.replace(name, path)
