"""Writes our own format: a folder as the Hub and mlx-lm lay it out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ondevice.checkpoint.json_file import read_json
from ondevice.checkpoint.names import hub_layout
from ondevice.checkpoint.partial import make_folder
from ondevice.checkpoint.places import Joiner, places
from ondevice.checkpoint.progress import Progress, silent
from ondevice.checkpoint.quantization import Tensor, dequantize
from ondevice.checkpoint.shards import Shards
from ondevice.errors import CheckpointError
from ondevice.spec import ModelSpec
from ondevice.spec_hub import as_on_hub, config_from_spec

if TYPE_CHECKING:
    from ondevice.text.tokenizer import Tokenizer

MAX_SHARD_BYTES = 512 << 20
"""Largest weight file; it is held in memory until it is written."""
_VERSION = 1
"""Of how tensors are put into files: other versions do not go on with each other's folders."""

Lazy = Tensor | Callable[[], Tensor]
"""A tensor, or what makes it when it is needed."""


def write_checkpoint(
    folder: Path,
    spec: ModelSpec,
    tensors: Iterable[tuple[str, Lazy]],
    tokenizer: Tokenizer | None = None,
    *,
    config_extra: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    job: str | None = None,
    release: Callable[[str], None] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes a model. The folder appears when everything is in it.

    After an error nothing is left behind, unless there is a job: then finished weight files are kept beside the
    folder, and the next call with the same job, tensors and limits goes on after them. It gives the same bytes as a
    call that nothing disturbed.

    Args:
        folder: to make; must not exist.
        spec: of the model.
        tensors: canonical name and contents of every tensor of the spec, in any order, which must be the same in all
            runs of a job; held in memory only until their file is written. A function is only called if its tensor
            is not in a finished file already.
        tokenizer: saved beside the weights.
        config_extra: further keys for config.json.
        generation_config: contents of generation_config.json, if any.
        max_shard_bytes: largest weight file, unless a single tensor is larger.
        progress: called with tensors done, tensors in all, and the tensor's name.
        job: digest of all that decides the contents: the source's files, options, seeds, texts. What another job
            has left is thrown away.
        release: called with the canonical name of each tensor that has been written, as `Checkpoint.release`.
        finish: called with the folder that will be renamed, to put further files in it.

    Raises:
        OndeviceError: the folder exists, another process makes it with a job, or the disk is full.
        CheckpointError: a tensor is missing, unknown or of the wrong shape.
        UnsupportedModelError: the spec cannot be expressed in a config.json.
    """
    folder, on_hub = Path(folder), as_on_hub(spec)
    config = config_from_spec(on_hub)
    joiner = Joiner(places(hub_layout(spec.architecture), on_hub), folder)
    if job is not None:
        decided = repr((_VERSION, job, max_shard_bytes, sorted(joiner.places.items())))
        job = hashlib.sha256(decided.encode()).hexdigest()
    with make_folder(folder, job) as work:
        shards = Shards(work, max_shard_bytes)
        _write_tensors(shards, joiner, spec, tensors, on_hub.norm_offset, progress or silent, release or _keep)
        index = shards.finish()
        if index is not None:
            _write_json(work.folder / "model.safetensors.index.json", index)
        if tokenizer is not None:
            tokenizer.save(work.folder)
        if generation_config:
            generation = work.folder / "generation_config.json"
            stated = read_json(generation) if generation.exists() else {}  # by the tokenizer: its stops
            _write_json(generation, {**stated, **generation_config})
        if finish is not None:
            finish(work.folder)
        if shards.kinds:
            config["quantization"] = config["quantization_config"] = shards.quantization()
        config["torch_dtype"] = shards.dtypes.most_common(1)[0][0]
        _write_json(work.folder / "config.json", {**config, **(config_extra or {})})


def _write_tensors(
    shards: Shards,
    joiner: Joiner,
    spec: ModelSpec,
    tensors: Iterable[tuple[str, Lazy]],
    norm_offset: float,
    progress: Progress,
    release: Callable[[str], None],
) -> None:
    """Puts every tensor that is not there yet into shards; norms get the offset that the folder's have."""
    folder, there, missing = joiner.path, shards.names, spec.tensors()
    total, unwritten, ready = len(missing), list[str](), list[str]()
    for name, tensor in tensors:
        if name not in missing:
            raise CheckpointError(folder, "the model has no such tensor, or it was given before", name)
        if joiner.places[name].name not in there:
            if callable(tensor):
                tensor = tensor()
            if missing[name] != tensor.shape:
                raise CheckpointError(folder, f"shape {tensor.shape} offered, {missing[name]} wanted", name)
            if "norm" in name and name.endswith(".weight") and spec.norm_offset != norm_offset:
                tensor = dequantize(tensor) + np.float32(spec.norm_offset - norm_offset)
            whole = joiner.add(name, tensor)
            unwritten.append(name)
            if whole is not None:
                filled = shards.add(joiner.places[name].name, whole)
                if filled:  # by those before
                    for written in ready:
                        release(written)
                    ready = []
                ready += unwritten
                unwritten = []
            tensor = whole = None  # type: ignore[assignment]  # not kept while the next one is made
        del missing[name]
        progress(total - len(missing), total, name)
    if missing:
        raise CheckpointError(folder, f"{len(missing)} tensors were not given", next(iter(missing)))
    shards.flush()
    for written in ready:
        release(written)


def _keep(name: str) -> None:
    """Releases nothing."""


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """NumPy numbers as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no place in a JSON file")
