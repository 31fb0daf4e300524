"""What the header of a file of packed weights says, and whether it can be believed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.tiles import Layout
from ondevice.checkpoint.safetensors import Entry, SafetensorsFile
from ondevice.checkpoint.tile_files import SOURCE
from ondevice.errors import CheckpointError
from ondevice.ops.cpu_weights import Format, Tiles

KEY = "key"
"""What the weights were packed from and by: a file with another one is of no use."""
USES = ("linear", "embedding", "tied")
_HANDLES, _DIGEST = "handles", "digest"


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A run of tiles in a file."""

    format: Format
    rows: int
    tiles: Entry
    bias: Entry | None


@dataclass(frozen=True, slots=True)
class StoredHandle:
    """What one handle is made of. `use`: one of USES; "tied" is both of the others."""

    use: str
    runs: list[StoredRun]

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, inputs] of the whole."""
        return sum(run.rows for run in self.runs), self.runs[0].format.inputs


def described(
    model: str, key: str, handles: Mapping[str, tuple[str, Sequence[Tiles]]]
) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Arrays and metadata of a file.

    Args:
        model: path of the model.
        key: see KEY.
        handles: use and tiles by name, in the order of use.
    """
    arrays: dict[str, NDArray[Any]] = {}
    told = []
    for i, (name, (use, runs)) in enumerate(handles.items()):
        told.append({"name": name, "use": use, "runs": [_told(tiles) for tiles in runs]})
        for j, tiles in enumerate(runs):
            arrays[_array_name(i, j)] = tiles.data.reshape(tiles.row_tiles, -1)
            if tiles.bias is not None:
                arrays[_array_name(i, j) + ".bias"] = tiles.bias
    metadata = {SOURCE: model, KEY: key, _HANDLES: json.dumps(told)}
    kinds = {name: ("U8" if array.dtype == np.uint8 else "F32", array.shape) for name, array in arrays.items()}
    return arrays, {**metadata, _DIGEST: _digest(kinds, metadata)}


def understood(file: SafetensorsFile) -> dict[str, StoredHandle]:
    """Handles by name.

    Raises:
        CheckpointError: the header contradicts itself.
    """
    metadata = dict(file.metadata)
    digest = metadata.pop(_DIGEST, None)
    if digest != _digest({name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}, metadata):
        raise CheckpointError(file.path, "is not what was written", _DIGEST)
    try:
        handles = json.loads(metadata[_HANDLES])
        return {handle["name"]: _handle(file, handle, i) for i, handle in enumerate(handles)}
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
        raise CheckpointError(file.path, f"cannot be understood: {e!r}", _HANDLES) from e


def _handle(file: SafetensorsFile, told: Mapping[str, Any], number: int) -> StoredHandle:
    runs = [_run(file, run, _array_name(number, j)) for j, run in enumerate(told["runs"])]
    if told["use"] not in USES or len({run.format.inputs for run in runs}) != 1:
        raise CheckpointError(file.path, f"{len(runs)} runs for {str(told['use'])[:20]!r}", told["name"])
    return StoredHandle(told["use"], runs)


def _told(tiles: Tiles) -> dict[str, Any]:
    return {"rows": tiles.rows, "format": dataclasses.asdict(tiles.format)}


def _run(file: SafetensorsFile, told: Mapping[str, Any], name: str) -> StoredRun:
    layout = told["format"]["layout"]
    form = Format(**{**told["format"], "layout": None if layout is None else Layout(**layout)})
    rows, data, bias = told["rows"], file.entries[name], file.entries.get(f"{name}.bias")
    tiles = -(-rows // 16)
    if type(rows) is not int or rows < 1 or (data.dtype, data.shape) != ("U8", (tiles, form.tile_bytes)):
        raise CheckpointError(file.path, f"{data.dtype} {data.shape} hold no {rows} rows of {form}", name)
    if bias is not None and (bias.dtype, bias.shape) != ("F32", (16 * tiles,)):
        raise CheckpointError(file.path, f"{bias.dtype} {bias.shape} are no biases of {rows} rows", name)
    return StoredRun(form, rows, data, bias)


def _array_name(handle: int, run: int) -> str:
    """Sorts in the order of use."""
    return f"{handle:06}.{run:03}"


def _digest(kinds: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> str:
    """Of names, types, shapes and metadata. Places follow from them, since files have no gaps."""
    return hashlib.sha256(json.dumps([sorted(kinds.items()), sorted(metadata.items())]).encode()).hexdigest()
