"""The folder of packed weights that are kept for the next start, and which file belongs to which model.

A file is named for the model's path and for the instruction set that it was packed for, so a newer one takes the place
of an older one. What must be equal for it to be used stands in its header; see `ondevice.ops.cpu_tile_cache`.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import platformdirs

from ondevice.checkpoint.safetensors import SafetensorsFile
from ondevice.environment import switched_on
from ondevice.errors import CheckpointError, OndeviceError

OFF = "ONDEVICE_NO_TILE_CACHE"
"""Variable that, set to 1, forbids reading and writing packed weights."""
SOURCE = "source"
"""Key of a file's metadata: path of the model."""
ABANDONED = 3600.0
"""Seconds after which an unfinished file belongs to no process that still writes."""


def folder() -> Path:
    """Where packed weights are kept."""
    return platformdirs.user_cache_path("ondevice") / "tiles"


def switched_off() -> bool:
    """Whether the environment forbids the cache."""
    return switched_on(OFF)


def path_of(model: Path, instructions: str) -> Path:
    """The file of a model's packed weights.

    Args:
        model: file or folder.
        instructions: name of the instruction set.
    """
    return folder() / f"{_prefix(model)}{instructions}.safetensors"


def cached_bytes(model: Path) -> int:
    """Bytes kept of a model, for all instruction sets."""
    return _bytes(folder().glob(f"{_prefix(model)}*"))


def all_bytes() -> tuple[int, int]:
    """Number and bytes of all files."""
    files = list(folder().glob("*.safetensors"))
    return len(files), _bytes(files)


def remove(model: Path) -> int:
    """Deletes what is kept of a model. Returns the bytes freed."""
    return _delete(folder().glob(f"{_prefix(model)}*"))


def clear() -> int:
    """Deletes everything in the folder. Returns the bytes freed."""
    return _delete(path for path in folder().glob("*") if path.is_file())


def make_room(path: Path, nbytes: int) -> None:
    """Makes the folder ready for a file: what this file replaces goes, and what no model needs any more.

    Args:
        path: that will be written.
        nbytes: of the file.

    Raises:
        OndeviceError: less than twice of that is free.
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    _delete(found for found in path.parent.iterdir() if _is_stale(found))
    free = shutil.disk_usage(path.parent).free
    if free < 2 * nbytes:
        raise OndeviceError(f"{path.parent}: {free >> 20} MiB are free, {2 * nbytes >> 20} MiB are wanted to spare")


def _is_stale(path: Path) -> bool:
    """Whether a file is left over from a process that died, is damaged, or is of a model that is gone."""
    try:
        if path.name.startswith(".tmp-"):
            return time.time() - path.stat().st_mtime > ABANDONED
        if path.suffix != ".safetensors":
            return False
        file = SafetensorsFile(path)
    except FileNotFoundError:
        return False
    except CheckpointError:
        return True
    source = file.metadata.get(SOURCE, "")
    file.close()
    return not Path(source).exists()


def _prefix(model: Path) -> str:
    return hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:16] + "-"


def _bytes(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        with suppress(FileNotFoundError):  # another process was quicker
            total += file.stat().st_size
    return total


def _delete(files: Iterable[Path]) -> int:
    freed = 0
    for file in list(files):
        try:
            size = file.stat().st_size
            file.unlink()
        except FileNotFoundError:
            continue
        except OSError as e:
            raise OndeviceError(f"{file}: cannot be deleted: {e.strerror}; delete it by hand") from e
        freed += size
    return freed
