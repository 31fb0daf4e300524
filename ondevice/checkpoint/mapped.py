"""A file mapped read-only into memory, from which arrays are taken without copying."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells whether a file is still the one that was opened. `changed`: nanoseconds since 1970."""

    path: Path
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path, descriptor: int | None = None) -> FileState:
        """State of the file that a path leads to, or that is open at a descriptor."""
        found = os.stat(path if descriptor is None else descriptor)
        return cls(path.resolve(), found.st_size, found.st_mtime_ns)


class MappedFile:
    """Read-only bytes of a file.

    Args:
        path: file to map.

    Attributes:
        state: of the file when it was opened.

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
                self.state = FileState.of(path, f.fileno())
                self.size = self.state.size
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

    def release(self, offset: int, nbytes: int) -> None:
        """Takes the pages that lie wholly in a range out of this process's memory; using them reads them anew."""
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if isinstance(self.bytes, mmap.mmap) and length > 0:
            self.bytes.madvise(mmap.MADV_DONTNEED, first, length)

    def close(self) -> None:
        """Lets go of the file; arrays that were handed out keep it mapped."""
        self.bytes = b""
