"""Writes our own format: a folder as the Hub and mlx-lm lay it out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.atomic import atomic_folder
from ondevice.checkpoint.json_file import read_json
from ondevice.checkpoint.names import hub_layout
from ondevice.checkpoint.places import Joiner, places
from ondevice.checkpoint.progress import Progress, silent
from ondevice.checkpoint.quantization import GROUP_SIZES, Quantized, Tensor, dequantize
from ondevice.checkpoint.safetensors import write_safetensors
from ondevice.errors import CheckpointError, UnsupportedModelError
from ondevice.spec import ModelSpec
from ondevice.spec_hub import as_on_hub, config_from_spec

if TYPE_CHECKING:
    from ondevice.text.tokenizer import Tokenizer

MAX_SHARD_BYTES = 1 << 30


def write_checkpoint(
    folder: Path,
    spec: ModelSpec,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Tokenizer | None = None,
    *,
    config_extra: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Writes a model. The folder appears when everything is in it; after an error nothing is left behind.

    Args:
        folder: to make; must not exist.
        spec: of the model.
        tensors: canonical name and contents of every tensor of the spec, in any order; held in memory only
            until their shard is written.
        tokenizer: saved beside the weights.
        config_extra: further keys for config.json.
        generation_config: contents of generation_config.json, if any.
        max_shard_bytes: largest weight file.
        progress: called with tensors done, tensors in all, and the tensor's name.

    Raises:
        OndeviceError: the folder exists or the disk is full.
        CheckpointError: a tensor is missing, unknown or of the wrong shape.
        UnsupportedModelError: the spec cannot be expressed in a config.json.
    """
    on_hub = as_on_hub(spec)
    config = config_from_spec(on_hub)
    joiner = Joiner(places(hub_layout(spec.architecture), on_hub), folder)
    progress = progress or silent
    with atomic_folder(Path(folder)) as temporary:
        shards = _Shards(temporary, max_shard_bytes)
        missing = spec.tensors()
        total = len(missing)
        for name, tensor in tensors:
            if missing.get(name) != tensor.shape:
                raise CheckpointError(folder, f"shape {tensor.shape} offered, {missing.get(name)} wanted", name)
            del missing[name]
            if "norm" in name and name.endswith(".weight") and spec.norm_offset != on_hub.norm_offset:
                tensor = dequantize(tensor) + np.float32(spec.norm_offset - on_hub.norm_offset)
            whole = joiner.add(name, tensor)
            if whole is not None:
                shards.add(joiner.places[name].name, whole)
            progress(total - len(missing), total, name)
        if missing:
            raise CheckpointError(folder, f"{len(missing)} tensors were not given", next(iter(missing)))
        shards.finish()
        if shards.kinds:
            config["quantization"] = config["quantization_config"] = shards.quantization()
        config["torch_dtype"] = shards.dtypes.most_common(1)[0][0]
        _write_json(temporary / "config.json", {**config, **(config_extra or {})})
        if tokenizer is not None:
            tokenizer.save(temporary)
        if generation_config:
            generation = temporary / "generation_config.json"
            stated = read_json(generation) if generation.exists() else {}  # by the tokenizer: its stops
            _write_json(generation, {**stated, **generation_config})


class _Shards:
    """Collects tensors and writes a file whenever the next one would overfill it."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.pending: dict[str, NDArray[Any]] = {}
        self.pending_bytes = self.total_bytes = 0
        self.written: list[tuple[Path, list[str]]] = []
        self.kinds: dict[str, tuple[int, int]] = {}
        self.dtypes: Counter[str] = Counter()

    def add(self, name: str, tensor: Tensor) -> None:
        if isinstance(tensor, Quantized):
            module = name.removesuffix(".weight")
            if tensor.group_size not in GROUP_SIZES:
                raise UnsupportedModelError(
                    self.folder,
                    f"groups of {tensor.group_size} have no place in this format; dequantize or requantize them first",
                    name,
                )
            self.kinds[module] = tensor.bits, tensor.group_size
            plain = tensor.super_scales is None and tensor.biases is not None
            scales, biases = (tensor.scales, tensor.biases) if plain else tensor.affine()
            assert biases is not None
            parts = {name: tensor.packed, f"{module}.scales": scales, f"{module}.biases": biases}
        else:
            parts = {name: tensor}
        size = sum(array.nbytes for array in parts.values())
        if self.pending and self.pending_bytes + size > self.max_bytes:
            self.flush()
        self.pending |= parts
        self.pending_bytes += size
        self.total_bytes += size
        floats = parts[list(parts)[-1]]
        self.dtypes[str(floats.dtype)] += floats.size

    def flush(self) -> None:
        path = self.folder / f"shard-{len(self.written)}"
        write_safetensors(path, self.pending, {"format": "mlx" if self.kinds else "pt"})
        self.written.append((path, list(self.pending)))
        self.pending, self.pending_bytes = {}, 0

    def finish(self) -> None:
        """Writes the rest, gives the files their names and, if there are several, writes the index."""
        self.flush()
        if len(self.written) == 1:
            self.written[0][0].rename(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for i, (path, names) in enumerate(self.written, 1):
            final = f"model-{i:05}-of-{len(self.written):05}.safetensors"
            path.rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(self.folder / "model.safetensors.index.json", index)

    def quantization(self) -> dict[str, Any]:
        """`quantization` as mlx-lm writes it: the commonest kind, and the modules that differ from it."""
        (bits, group_size), _ = Counter(self.kinds.values()).most_common(1)[0]
        settings: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": "affine"}
        for module, kind in self.kinds.items():
            if kind != (bits, group_size):
                settings[module] = {"group_size": kind[1], "bits": kind[0]}
        return settings


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """NumPy numbers as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no place in a JSON file")
