"""A model in a folder: config.json and safetensors with the Hub's names, plain or quantized by MLX."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ondevice.checkpoint.base import Checkpoint, check_tensors
from ondevice.checkpoint.json_file import read_json
from ondevice.checkpoint.mapped import FileState
from ondevice.checkpoint.names import hub_layout
from ondevice.checkpoint.places import places
from ondevice.checkpoint.quantization import BITS, GROUP_SIZES, Quantized, Tensor
from ondevice.checkpoint.safetensors import Entry, SafetensorsFile
from ondevice.errors import CheckpointError, UnsupportedModelError
from ondevice.sparsity.head_sketch import too_narrow
from ondevice.spec import ModelSpec
from ondevice.spec_fields import Fields
from ondevice.spec_hub import spec_from_config

if TYPE_CHECKING:
    from ondevice.text.tokenizer import Tokenizer

FLOATS = ("F32", "F16", "BF16")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
MAX_FILES = 1000
SKETCH_KEY = "sketch_head"
"""Of config.json: true in models that want their head sketched."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a file, and its name there."""

    file: SafetensorsFile
    entry: Entry
    name: str


class HubCheckpoint(Checkpoint):
    """Opens a folder and checks its configuration and headers, not its weights.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        config = FileState.of(path / "config.json")
        self.spec, self.format = read_spec(self.config, path / "config.json")
        self.prefers_sketch = _prefers_sketch(self.config, self.spec, path / "config.json")
        self._files = _open_files(path)
        self.files = (config, *(file.state for file in self._files))
        self._layout = hub_layout(self.config["model_type"])
        self._entries: dict[str, _Stored] = {}
        for file in self._files:
            for original, entry in file.entries.items():
                name = self._layout.unalias(original)
                if name in self._entries:
                    raise CheckpointError(
                        path, f"is both in {self._entries[name].file.path.name} and {file.path.name}", original
                    )
                if name is not None:
                    self._entries[name] = _Stored(file, entry, original)
        self.spec = self._settle_head(self.spec)
        self._places = places(self._layout, self.spec)
        self._quantized = self._check()
        generation = path / "generation_config.json"
        stated = read_json(generation) if generation.exists() else {}
        inner = self.config.get("text_config")
        said = {**(inner if isinstance(inner, dict) else {}), **self.config}
        ends = {key: said[key] for key in ("bos_token_id", "eos_token_id") if said.get(key) is not None}
        self.generation_config = {**ends, **stated}

    def tensor(self, name: str) -> Tensor:
        if name not in self._places:
            raise CheckpointError(self.path, "the model has no such tensor", name)
        place = self._places[name]
        if place.name not in self._quantized:
            return place.take(self._array(place.name))
        bits, group_size = self._quantized[place.name]
        module = place.name.removesuffix(".weight")
        scales, biases = self._array(f"{module}.scales"), self._array(f"{module}.biases")
        return place.take(Quantized(self._array(place.name), scales, biases, bits, group_size))

    def release(self, name: str) -> None:
        module, kind = self._places[name].name.rsplit(".", 1)
        for part in (kind, "scales", "biases"):
            stored = self._entries.get(f"{module}.{part}")
            if stored is not None:
                stored.file.release(stored.name)

    def stored(self, name: str) -> tuple[str, int]:
        place = self._places[name]
        entry = self._entries[place.name].entry
        if place.name not in self._quantized:
            return entry.dtype, place.part(entry.nbytes)
        module = place.name.removesuffix(".weight")
        bits, group_size = self._quantized[place.name]
        extra = sum(self._entries[f"{module}.{part}"].entry.nbytes for part in ("scales", "biases"))
        return f"affine {bits}-bit g{group_size}", place.part(entry.nbytes) + place.part(extra)

    def tokenizer(self) -> Tokenizer:
        from ondevice.text.tokenizer import Tokenizer

        return Tokenizer.from_folder(self.path)

    def about(self) -> dict[str, Any]:
        kinds = [name for name in ("tokenizer.json", "tokenizer.model") if (self.path / name).exists()]
        return {
            "name": self.path.resolve().name,
            "licence": _licence(self.path),
            "tokenizer": kinds[0] if kinds else None,
        }

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _array(self, stored: str) -> Any:
        return self._entries[stored].file.array(self._entries[stored].name)

    def _settle_head(self, spec: ModelSpec) -> ModelSpec:
        """Whether the head is the embedding table, where configuration and files differ about it.

        A stored head that equals the table, or that is missing where nothing was said, is tied; one that
        differs from the table counts as the model's own, whatever the configuration says.
        """
        head, embed = self._layout.name("head.weight"), self._layout.name("embed.weight")
        if head not in self._entries:
            return dataclasses.replace(spec, tied_head=spec.tied_head or "tie_word_embeddings" not in self.config)
        if not spec.tied_head or embed not in self._entries:
            return spec
        parts = [
            (head.removesuffix("weight") + p, embed.removesuffix("weight") + p) for p in ("weight", "scales", "biases")
        ]
        present = [(a, b) for a, b in parts if a in self._entries or b in self._entries]
        if all(a in self._entries and b in self._entries for a, b in present) and all(
            self._array(a).dtype == self._array(b).dtype
            and np.array_equal(_bits(self._array(a)), _bits(self._array(b)))
            for a, b in present
        ):
            for name in {name for pair in present for name in pair}:
                self._entries[name].file.release(self._entries[name].name)
            for a, _ in present:
                del self._entries[a]
            return spec
        return dataclasses.replace(spec, tied_head=False)

    def _check(self) -> dict[str, tuple[int, int]]:
        """Compares headers and spec. Returns bits and group size of quantized tensors by stored name."""
        found = {name: stored.entry.shape for name, stored in self._entries.items()}
        quantized: dict[str, tuple[int, int]] = {}
        for name, place in {place.name: place for place in self._places.values()}.items():
            module, kind = name.rsplit(".", 1)
            if kind == "weight" and f"{module}.scales" in found:
                if place.transposed:
                    raise UnsupportedModelError(
                        self.path, "is [in, out] in this architecture, and as such not supported quantized", name
                    )
                quantized[name] = self._check_quantized(module, place.shape)
                found[name] = place.shape
                del found[f"{module}.scales"], found[f"{module}.biases"]
            elif name in found and self._entries[name].entry.dtype not in FLOATS:
                dtype = self._entries[name].entry.dtype
                raise UnsupportedModelError(
                    self.path, f"dtype {dtype} is not supported for weights; {', '.join(FLOATS)} are", name
                )
        if quantized and self.format == "hub":
            raise CheckpointError(self.path, "has quantized tensors, but config.json does not say how", "quantization")
        check_tensors(self.path, self.spec, found, self._places.values())
        return quantized

    def _check_quantized(self, module: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """Bits and group size of a quantized matrix, which its shapes tell."""
        entries = {
            p: self._entries[f"{module}.{p}"].entry
            for p in ("weight", "scales", "biases")
            if f"{module}.{p}" in self._entries
        }
        if len(entries) < 3 or len(shape) != 2:
            raise CheckpointError(self.path, "needs weight, scales and biases of a matrix", module)
        weight, scales, biases = entries["weight"], entries["scales"], entries["biases"]
        if weight.dtype != "U32" or scales.dtype not in FLOATS or biases.dtype != scales.dtype:
            raise UnsupportedModelError(
                self.path,
                f"quantized as {weight.dtype} with {scales.dtype} scales; only affine groups are supported",
                module,
            )
        rows, inputs = shape
        fits = all(len(e.shape) == 2 and e.shape[0] == rows and e.shape[1] for e in entries.values())
        if not fits or scales.shape != biases.shape or inputs % scales.shape[1] or weight.shape[1] * 32 % inputs:
            raise CheckpointError(
                self.path,
                f"weight {weight.shape}, scales {scales.shape} and biases {biases.shape} fit no {shape}",
                module,
            )
        bits, group_size = weight.shape[1] * 32 // inputs, inputs // scales.shape[1]
        original = self._entries[f"{module}.weight"].name.removesuffix(".weight")
        stated = self.config["quantization"].get(original, {}) if self.format == "mlx" else {}
        if bits not in BITS or group_size not in GROUP_SIZES:
            raise UnsupportedModelError(
                self.path,
                f"{bits} bits in groups of {group_size}: bits {BITS} and groups {GROUP_SIZES} are supported",
                module,
            )
        if isinstance(stated, Mapping) and (
            stated.get("bits", bits),
            stated.get("group_size", group_size),
        ) != (bits, group_size):
            raise CheckpointError(
                self.path,
                f"stored as {bits} bits in groups of {group_size}, config.json says {stated}",
                module,
            )
        return bits, group_size


def read_spec(config: Mapping[str, Any], path: Path) -> tuple[ModelSpec, str]:
    """What config.json says, all of it checked; enough to refuse a model before its weights are fetched.

    Args:
        config: its contents.
        path: for messages.

    Returns:
        The spec and the format, "hub" or "mlx".
    """
    spec = spec_from_config(config, path)
    _prefers_sketch(config, spec, path)
    return spec, "mlx" if _quantization(config, path) else "hub"


def _prefers_sketch(config: Mapping[str, Any], spec: ModelSpec, path: Path) -> bool:
    """What the configuration says of a sketch of the head; refused where there can be none."""
    fields = Fields(config, path)
    wanted, problem = fields.flag(SKETCH_KEY, False), too_narrow(spec)
    if wanted and problem:
        raise fields.error(SKETCH_KEY, f"{problem}; take the key out")
    return wanted


def _bits(array: Any) -> Any:
    """The bytes of an array, by which NaN equals itself."""
    return array.reshape(-1).view(np.uint8)


def _quantization(config: Mapping[str, Any], path: Path) -> bool:
    """Whether the configuration announces MLX's affine quantization; other kinds are refused."""
    stated = config.get("quantization")
    if stated is None:
        other = config.get("quantization_config")
        if other is not None:
            method = other.get("quant_method") if isinstance(other, Mapping) else other
            raise UnsupportedModelError(
                path,
                f"method {str(method)[:60]!r} is not supported; take the plain model or mlx-lm's format",
                "quantization_config",
            )
        return False
    if not isinstance(stated, Mapping):
        raise CheckpointError(path, "must be an object", "quantization")
    for where, settings in [("quantization", stated), *stated.items()]:
        mode = settings.get("mode", "affine") if isinstance(settings, Mapping) else "affine"
        if mode != "affine":
            raise UnsupportedModelError(path, f"mode {str(mode)[:60]!r} is not supported; affine is", where)
    return True


def _open_files(path: Path) -> list[SafetensorsFile]:
    """The safetensors files that hold the weights: those the index names, else all `model*.safetensors`."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(index, "must map tensor names to files", "weight_map")
        names = sorted(set(weight_map.values()))
        for name in names:
            if not re.fullmatch(r"[\w.-]+\.safetensors", name):
                raise CheckpointError(
                    index, f"{name[:80]!r} is no name of a safetensors file in this folder", "weight_map"
                )
    else:
        names = sorted(file.name for file in path.glob("model*.safetensors"))
    if not names:
        names = sorted(file.name for file in path.glob("*.safetensors"))
    if len(names) > MAX_FILES:
        raise CheckpointError(path, f"{len(names)} weight files; the limit is {MAX_FILES}")
    if not names:
        pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        if pickles:
            raise UnsupportedModelError(
                path,
                f"only pickled weights ({', '.join(pickles[:3])}), which can run code when opened; "
                "they are never read, get a safetensors or GGUF version of the model",
            )
        raise CheckpointError(path, "no model*.safetensors in this folder; download the model again")
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            path, f"{len(missing)} of {len(names)} weight files are missing ({missing[0]}); download again"
        )
    return [SafetensorsFile(path / name) for name in names]


def _licence(path: Path) -> str | None:
    """Licence that the model card's front matter states."""
    card = path / "README.md"
    if not card.is_file():
        return None
    with card.open("rb") as f:
        text = f.read(1 << 16).decode(errors="replace")
    parts = text.split("---", 2)
    found = (
        re.search(r"^license:[ \t]*['\"]?([\w.+-]+)", parts[1], re.M)
        if len(parts) == 3 and not parts[0].strip()
        else None
    )
    return found[1] if found else None
