"""A file mapped read-only into memory, from which arrays are taken without copying."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.errors import CheckpointError


class MappedFile:
    """Read-only bytes of a file.

    Args:
        path: file to map.

    Raises:
        CheckpointError: it is missing, empty, unreadable or no plain file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes: mmap.mmap | bytes
        try:
            if not path.is_file():
                raise CheckpointError(path, "no such file")
            with path.open("rb") as f:
                self.size = path.stat().st_size
                if not self.size:
                    raise CheckpointError(path, "the file is empty; download it again")
                self.bytes = mmap.mmap(f.fileno(), self.size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as e:
            raise CheckpointError(path, f"cannot be read: {e}") from e

    def array(self, dtype: Any, offset: int, count: int) -> NDArray[Any]:
        """Read-only view of `count` elements at byte `offset`, which the caller knows to lie in the file."""
        if not self.bytes:
            raise CheckpointError(self.path, "the checkpoint has been closed; open it again")
        return np.frombuffer(self.bytes, dtype, count, offset)

    def close(self) -> None:
        """Lets go of the file; arrays that were handed out keep it mapped."""
        self.bytes = b""
