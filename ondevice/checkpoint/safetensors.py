"""safetensors files: eight bytes of header length, a JSON header, then the tensors' bytes without gaps."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.atomic import atomic_file
from ondevice.checkpoint.json_file import parse_object
from ondevice.checkpoint.mapped import MappedFile
from ondevice.errors import CheckpointError, UnsupportedModelError

MAX_HEADER = 1 << 24
MAX_ELEMENTS = 1 << 48

DTYPES: dict[str, Any] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "BOOL": np.dtype("?"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the header: dtype name, shape, first byte in the file, bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """An open safetensors file.

    Args:
        path: file to read.

    Attributes:
        state: of the file when it was opened.
        entries: name -> Entry.
        metadata: the header's free texts.

    Raises:
        CheckpointError: the file is damaged or lies about its contents.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = MappedFile(path)
        self.state = self._file.state
        size = self._file.size
        length = struct.unpack_from("<Q", self._file.bytes)[0] if size >= 8 else size
        if length > MAX_HEADER or 8 + length > size:
            raise CheckpointError(
                path,
                f"a header of {length} bytes does not fit the file of {size} (limit {MAX_HEADER}): damaged",
            )
        header = parse_object(self._file.bytes[8 : 8 + length], path)
        self.metadata = _metadata(header.pop("__metadata__", {}), path)
        self.entries = {name: _entry(name, value, 8 + length, path) for name, value in header.items()}
        _check_places(self.entries, 8 + length, size, path)

    def array(self, name: str) -> NDArray[Any]:
        """Read-only view of a tensor's bytes in the file; copied if they are not aligned there."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        array = self._file.array(dtype, entry.offset, entry.nbytes // dtype.itemsize).reshape(entry.shape)
        return array if entry.offset % dtype.itemsize == 0 else array.copy()

    def release(self, name: str) -> None:
        """Lets go of a tensor's pages."""
        self._file.release(self.entries[name].offset, self.entries[name].nbytes)

    def close(self) -> None:
        """Lets go of the file; arrays that were handed out keep it mapped."""
        self._file.close()


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(path, "must be an object of texts", "__metadata__")
    return value


def _entry(name: str, value: Any, start: int, path: Path) -> Entry:
    """Checks one tensor of the header by itself."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(path, "must have dtype, shape and data_offsets", name)
    dtype, shape, places = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnsupportedModelError(path, f"dtype {str(dtype)[:20]!r} is not supported; {', '.join(DTYPES)} are", name)
    if not _naturals(shape) or len(shape) > 16 or not _naturals(places) or len(places) != 2:
        raise CheckpointError(path, "shape and data_offsets must be lists of integers from 0 up", name)
    elements = 1
    for dim in shape:
        elements *= dim
        if elements > MAX_ELEMENTS:
            raise CheckpointError(path, f"has more than {MAX_ELEMENTS} elements", name)
    nbytes = elements * DTYPES[dtype].itemsize
    if places[1] - places[0] != nbytes:
        raise CheckpointError(
            path, f"{dtype} of shape {shape} takes {nbytes} bytes, the offsets {places} say otherwise", name
        )
    return Entry(dtype, tuple(shape), start + places[0], nbytes)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)


def _check_places(entries: Mapping[str, Entry], start: int, size: int, path: Path) -> None:
    """The tensors must follow one another and end with the file."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != at:
            raise CheckpointError(path, "overlaps another tensor or leaves a gap: the file is damaged", name)
        at += entry.nbytes
    if at != size:
        raise CheckpointError(
            path,
            f"the tensors end at byte {at}, the file at {size}: it is cut off or damaged, download it again",
        )


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Writes a file whole or not at all: under a temporary name, flushed to disk, then renamed.

    Args:
        path: file to make; one that exists is replaced.
        tensors: arrays by name, of a dtype in DTYPES.
        metadata: free texts for the header.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, array in ordered:
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, array in ordered:
            f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
