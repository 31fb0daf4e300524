"""Packed weights on disk, so that the next start need not pack them again.

A safetensors file with the tiles of each handle as U8 [tiles, bytes of a tile] and its biases as F32, in the order of
use. The header is checked in full; of the tiles only the number of bytes, since more would take longer than to pack
them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from cpu_kernels import pack
from cpu_kernels import tiles as kernel_tiles
from cpu_kernels.integer_dots import instruction_set
from ondevice.checkpoint import tile_files
from ondevice.checkpoint.base import Checkpoint
from ondevice.checkpoint.mapped import FileState
from ondevice.checkpoint.safetensors import SafetensorsFile, write_safetensors
from ondevice.errors import CheckpointError, OndeviceError
from ondevice.ops.cpu_memory import WeightMemory
from ondevice.ops.cpu_tile_header import KEY, StoredHandle, StoredRun, described, understood
from ondevice.ops.cpu_weights import Tiles

SMALLEST = 1 << 20
"""Bytes of tiles from which on a file pays."""
PIECE = 1 << 23
"""Bytes that one thread reads at once."""
READERS = 4
_LOG = logging.getLogger("ondevice")
_PACKAGE = Path(__file__).parents[1]


def _digest_of_sources(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


_SOURCES = _digest_of_sources(
    (
        *sorted((_PACKAGE / "checkpoint").glob("*.py")),
        *(
            _PACKAGE / name
            for name in ("packing.py", "sparsity/method.py", "ops/cpu_weights.py", "ops/cpu_tile_header.py")
        ),
        *(Path(module.__file__) for module in (kernel_tiles, pack)),
    )
)
"""Of all that decides what bytes the tiles of a checkpoint are. Taken at import: a process that outlives an upgrade
must not file its tiles under the new one's name."""
_warned: set[Path] = set()


class TileCache:
    """The packed weights of one model: those from an earlier process, and those for later ones.

    Args:
        checkpoint: that the weights are of.
        memory: that tiles are read into.
    """

    def __init__(self, checkpoint: Checkpoint, memory: WeightMemory) -> None:
        self._model = checkpoint.path.resolve()
        self._path = tile_files.path_of(self._model, instruction_set())
        states = [(str(file.path), file.size, file.changed) for file in checkpoint.files]
        self._key = hashlib.sha256(json.dumps([states, _SOURCES, instruction_set()]).encode()).hexdigest()
        self._memory = memory
        self._readers = ThreadPoolExecutor(READERS)
        self._file: BinaryIO | None = None
        self._stored: dict[str, StoredHandle] = {}
        self._handles: dict[str, tuple[str, Sequence[Tiles]]] = {}
        self._all_found = True
        if self._path.exists():
            self._open()

    def close(self) -> None:
        """Lets go of the file."""
        self._readers.shutdown()
        if self._file is not None:
            self._file.close()

    def recall(self, name: str, shape: tuple[int, ...]) -> tuple[str, Sequence[Tiles]] | None:
        """Use and tiles of a handle; None if it must be packed.

        Args:
            name: of the handle.
            shape: [rows, inputs] that it must have.
        """
        stored = self._stored.get(name)
        if stored is None:
            return None
        try:
            if stored.shape != shape:
                raise CheckpointError(self._path, f"shape {stored.shape}, the model has {shape}", name)
            self._handles[name] = stored.use, [self._tiles(run) for run in stored.runs]
        except (CheckpointError, OSError) as e:
            self._refuse(e)
            return None
        return self._handles[name]

    def remember(self, name: str, use: str, tiles: Sequence[Tiles]) -> None:
        """Takes a handle that had to be packed."""
        self._handles[name] = use, tiles
        self._all_found = False

    def write(self, progress: Callable[[int, int, str], None] | None) -> None:
        """Keeps all handles, unless they came from the file. What goes wrong is said once and harms nothing."""
        nbytes = sum(t.data.nbytes for _, tiles in self._handles.values() for t in tiles)
        if self._all_found or nbytes < SMALLEST:
            return
        if progress:
            progress(0, 0, "keeping packed weights for the next start")
        try:
            tile_files.make_room(self._path, nbytes)
            write_safetensors(self._path, *described(str(self._model), self._key, self._handles))
        except (OndeviceError, OSError) as e:
            if self._path.parent not in _warned:
                _warned.add(self._path.parent)
                way_out = f"free space, set XDG_CACHE_HOME, or set {tile_files.OFF}=1 to have it so"
                _LOG.warning("%s; weights are packed anew at every start: %s", e, way_out)

    def _open(self) -> None:
        try:
            header = SafetensorsFile(self._path)
            handles = understood(header)
            file = self._path.open("rb", buffering=0)
        except (CheckpointError, OSError) as e:
            self._refuse(e)
            return
        # Another process may just have put a new file in the place of the one whose header was read.
        same = FileState.of(self._path, file.fileno()) == header.state
        if same and header.metadata[KEY] == self._key:
            self._file, self._stored = file, handles
        else:
            file.close()
        header.close()

    def _refuse(self, problem: Exception) -> None:
        """Drops the file, of which nothing more is read."""
        _LOG.warning("%s; the weights are packed again", problem)
        self._stored = {}
        with contextlib.suppress(OSError):  # that it is there no more is all that is wanted; writing tells the rest
            self._path.unlink()

    def _tiles(self, run: StoredRun) -> Tiles:
        data = self._memory.take(run.tiles.nbytes)
        self._read(data, run.tiles.offset)
        bias = None
        if run.bias is not None:
            bias = np.empty(run.bias.shape, np.float32)
            self._read(bias.view(np.uint8), run.bias.offset)
        return Tiles(run.format, run.rows, data, bias)

    def _read(self, out: NDArray[np.uint8], offset: int) -> None:
        starts = range(0, len(out), PIECE)
        if len(starts) == 1:
            self._read_piece(out, offset)
        else:
            list(self._readers.map(lambda at: self._read_piece(out[at : at + PIECE], offset + at), starts))

    def _read_piece(self, out: NDArray[np.uint8], offset: int) -> None:
        assert self._file is not None
        left = out.data
        while left:
            count = os.preadv(self._file.fileno(), [left], offset)
            if not count:
                raise CheckpointError(self._path, "ends before its last byte")
            left, offset = left[count:], offset + count
