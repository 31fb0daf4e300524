"""GGUF container: typed metadata and a table of tensors, read from a mapped file.

Nothing that the file says about sizes, counts or places is believed before it is compared with the file's
length and with the limits below, so that a hostile file costs no more than an honest one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.gguf_types import TYPES, decode
from ondevice.checkpoint.mapped import MappedFile
from ondevice.checkpoint.quantization import Tensor
from ondevice.errors import CheckpointError, UnsupportedModelError

MAX_ENTRIES = 1 << 16  # metadata keys, tensors
MAX_NAME = 1 << 16  # bytes of a key or tensor name
MAX_STRINGS = 1 << 21  # strings in all arrays together; the largest vocabularies and merge lists need 1 << 20
MAX_TEXT = 1 << 26  # bytes of one string
MAX_DIM = 1 << 40
MAX_ALIGNMENT = 1 << 20

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. `shape`: slowest dimension first; `offset` counts from the start of the file."""

    shape: tuple[int, ...]
    type_id: int
    offset: int
    nbytes: int


class GgufFile:
    """An open GGUF file of version 2 or 3.

    Args:
        path: file to read.

    Attributes:
        state: of the file when it was opened.
        metadata: key -> int, float, bool, str, list of str, or read-only 1-d array for an array of numbers.
        tensors: name -> TensorInfo, in the file's order.

    Raises:
        CheckpointError: the file is damaged or lies about its contents.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = MappedFile(path)
        self.state = self._file.state
        reader = _Reader(self._file)
        n_tensors, n_keys = reader.header()
        self.metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = reader.string("a metadata key", MAX_NAME)
            if key in self.metadata:
                raise CheckpointError(path, "this metadata key occurs twice", key)
            self.metadata[key] = reader.value(key)
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise CheckpointError(path, f"{alignment!r} is not a power of two", "general.alignment")
        self.tensors = reader.tensor_table(n_tensors, alignment)

    def tensor(self, name: str) -> Tensor:
        """Contents of a tensor: a float array (a view of the file), or Quantized for block types."""
        info = self.tensors[name]
        try:
            return decode(self._file.array(np.uint8, info.offset, info.nbytes), info.type_id, info.shape)
        except ValueError as e:
            raise CheckpointError(self.path, str(e), name) from e

    def release(self, name: str) -> None:
        """Lets go of a tensor's pages."""
        self._file.release(self.tensors[name].offset, self.tensors[name].nbytes)

    def close(self) -> None:
        """Lets go of the file; arrays that were handed out keep it mapped."""
        self._file.close()


class _Reader:
    """Cursor over the header of a mapped file."""

    def __init__(self, file: MappedFile) -> None:
        self.path, self.bytes, self.size, self.at = file.path, file.bytes, file.size, 0
        self.file = file
        self.strings_left = MAX_STRINGS

    def fail(self, problem: str, key: str | None = None) -> CheckpointError:
        return CheckpointError(self.path, problem, key)

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise self.fail(f"the file ends inside {what}; it is truncated or damaged, download it again")

    def u32(self, what: str) -> int:
        self.need(4, what)
        self.at += 4
        return int(_U32.unpack_from(self.bytes, self.at - 4)[0])

    def u64(self, what: str) -> int:
        self.need(8, what)
        self.at += 8
        return int(_U64.unpack_from(self.bytes, self.at - 8)[0])

    def string(self, what: str, limit: int) -> str:
        length = self.u64(what)
        if length > limit:
            raise self.fail(f"{what} of {length} bytes is longer than the limit of {limit}")
        self.need(length, what)
        self.at += length
        try:
            return self.bytes[self.at - length : self.at].decode()
        except UnicodeDecodeError as e:
            raise self.fail(f"{what} is not UTF-8: {e}") from e

    def header(self) -> tuple[int, int]:
        """Checks magic and version. Returns the numbers of tensors and of metadata keys."""
        if self.bytes[:4] != b"GGUF":
            raise self.fail(f"starts with {self.bytes[:4]!r}, not b'GGUF': this is no GGUF file")
        self.at = 4
        version = self.u32("the version")
        if version & 0xFFFF == 0:
            raise UnsupportedModelError(self.path, "big-endian GGUF is not supported; use the little-endian file")
        if version not in (2, 3):
            raise UnsupportedModelError(self.path, f"GGUF version {version} is not supported; 2 and 3 are")
        n_tensors, n_keys = self.u64("the tensor count"), self.u64("the metadata count")
        for count, what in ((n_tensors, "tensors"), (n_keys, "metadata keys")):
            if count > MAX_ENTRIES:
                raise self.fail(f"announces {count} {what}; the limit is {MAX_ENTRIES}")
        return n_tensors, n_keys

    def value(self, key: str) -> Any:
        """One metadata value of any type."""
        kind = self.u32(key)
        if kind == STRING:
            return self.string(key, MAX_TEXT)
        if kind == ARRAY:
            return self.array(key)
        number = self.numbers(key, kind, 1)[0].item()
        return bool(number) if kind == BOOL else number

    def array(self, key: str) -> list[str] | NDArray[Any]:
        kind, count = self.u32(key), self.u64(key)
        if kind == STRING:
            return self.strings(key, count)
        values = self.numbers(key, kind, count)
        return values != 0 if kind == BOOL else values

    def numbers(self, key: str, kind: int, count: int) -> NDArray[Any]:
        dtype = SCALARS.get(kind)
        if dtype is None:
            raise self.fail(f"value type {kind} is unknown or nested", key)
        self.need(count * dtype.itemsize, f"the value of {key}")
        start = self.at
        self.at += count * dtype.itemsize
        return self.file.array(dtype, start, count)

    def strings(self, key: str, count: int) -> list[str]:
        """An array of strings. The loop is written out because vocabularies have 100 000 of them."""
        if count > self.strings_left:
            raise self.fail(f"an array of {count} strings is beyond the limit of {MAX_STRINGS}", key)
        self.need(8 * count, f"the value of {key}")
        self.strings_left -= count
        out: list[str] = []
        at, size, data, length_at, add = self.at, self.size, self.bytes, _U64.unpack_from, out.append
        try:
            for _ in range(count):
                end = at + 8 + length_at(data, at)[0]
                if end > size:
                    raise self.fail("a string runs past the end of the file; download it again", key)
                add(data[at + 8 : end].decode())
                at = end
        except (UnicodeDecodeError, struct.error) as e:
            raise self.fail(f"string {len(out)} is damaged: {e}", key) from e
        self.at = at
        return out

    def tensor_table(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        """The table of tensors, and the places of their data, which follows the table."""
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self.string("a tensor name", MAX_NAME)
            if name in entries:
                raise self.fail("this tensor occurs twice", name)
            n_dims = self.u32(name)
            if not 1 <= n_dims <= 4:
                raise self.fail(f"has {n_dims} dimensions; 1 to 4 are allowed", name)
            dims = tuple(self.u64(name) for _ in range(n_dims))
            entries[name] = (dims[::-1], self.u32(name), self.u64(name))
        start = -(-self.at // alignment) * alignment
        tensors = {name: self.place(name, *entry, start, alignment) for name, entry in entries.items()}
        check_overlap(tensors, self.fail)
        return tensors

    def place(
        self, name: str, shape: tuple[int, ...], type_id: int, offset: int, start: int, alignment: int
    ) -> TensorInfo:
        kind = TYPES.get(type_id)
        if kind is None:
            raise self.fail(f"tensor type {type_id} is unknown", name)
        elements = 1
        for dim in shape:
            elements *= dim
            if not 1 <= elements <= MAX_DIM:
                raise self.fail(f"the shape {shape} is empty or beyond {MAX_DIM} elements", name)
        if shape[-1] % kind.block:
            raise self.fail(f"rows of {shape[-1]} are no whole {kind.name} blocks of {kind.block}", name)
        nbytes = elements // kind.block * kind.block_bytes
        if offset % alignment:
            raise self.fail(f"the offset {offset} is not aligned to {alignment}", name)
        if start + offset + nbytes > self.size:
            raise self.fail(
                f"its data ends at byte {start + offset + nbytes}, the file at {self.size}: "
                "the file is truncated or damaged, download it again",
                name,
            )
        return TensorInfo(shape, type_id, start + offset, nbytes)


def check_overlap(tensors: dict[str, TensorInfo], fail: Callable[[str, str], CheckpointError]) -> None:
    """Raises if two tensors share bytes."""
    ordered = sorted(tensors.items(), key=lambda item: item[1].offset)
    for (first, a), (second, b) in pairwise(ordered):
        if a.offset + a.nbytes > b.offset:
            raise fail(f"shares bytes with the tensor {first}: the file is damaged", second)
