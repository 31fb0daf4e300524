"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ondevice.errors import OndeviceError


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path`, which takes its place when the block ends without an error.

    Args:
        path: file to make or replace.

    Raises:
        OndeviceError: the disk is full or refuses.
    """
    temporary = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as e:
        raise OndeviceError(
            f"{path}: cannot be written: {e.strerror or e}; free some space or choose another place"
        ) from e
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Makes a temporary folder beside `path`, which is renamed to it when the block ends without an error.

    Args:
        path: folder to make; must not exist.

    Raises:
        OndeviceError: it exists, or the disk is full or refuses.
    """
    if path.exists():
        raise OndeviceError(f"{path}: exists already; remove it or choose another name")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=path.parent))
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(path)
    except OSError as e:
        raise OndeviceError(
            f"{path}: cannot be written: {e.strerror or e}; free some space or choose another place"
        ) from e
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
