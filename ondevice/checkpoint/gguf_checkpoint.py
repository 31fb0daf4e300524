"""A model in one GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ondevice.checkpoint.base import Checkpoint, check_tensors
from ondevice.checkpoint.gguf import MAX_STRINGS, GgufFile
from ondevice.checkpoint.gguf_types import READABLE, TYPES
from ondevice.checkpoint.names import GGUF_IGNORED, gguf_layout
from ondevice.checkpoint.places import places
from ondevice.checkpoint.quantization import Quantized, Tensor
from ondevice.errors import CheckpointError, UnsupportedModelError
from ondevice.spec import ModelSpec
from ondevice.spec_gguf import spec_from_gguf

if TYPE_CHECKING:
    from ondevice.text.tokenizer import Tokenizer

SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


class GgufCheckpoint(Checkpoint):
    """Opens a GGUF file and checks its header, not its weights.

    Args:
        path: the file.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GgufFile(path)
        self.files = (self.file.state,)
        if "split.count" in self.file.metadata and self.file.metadata["split.count"] != 1:
            raise UnsupportedModelError(
                path, "a model in several GGUF files is not supported; merge it with llama-gguf-split --merge"
            )
        self.spec = spec_from_gguf(self.file)
        self._places = places(gguf_layout(self.spec.architecture), self.spec)
        found = {name: info.shape for name, info in self.file.tensors.items() if name not in GGUF_IGNORED}
        check_tensors(path, self.spec, found, self._places.values())
        for place in self._places.values():
            kind = TYPES[self.file.tensors[place.name].type_id]
            if kind not in READABLE:
                raise UnsupportedModelError(
                    path,
                    f"type {kind.name} is not supported; {', '.join(t.name for t in READABLE)} are",
                    place.name,
                )
        self.generation_config = _generation_config(self.file.metadata)

    def tensor(self, name: str) -> Tensor:
        if name not in self._places:
            raise CheckpointError(self.path, "the model has no such tensor", name)
        place = self._places[name]
        return undo_interleaving(place.take(self.file.tensor(place.name)), name, self.spec)

    def release(self, name: str) -> None:
        self.file.release(self._places[name].name)

    def stored(self, name: str) -> tuple[str, int]:
        place = self._places[name]
        info = self.file.tensors[place.name]
        return TYPES[info.type_id].name, place.part(info.nbytes)

    def tokenizer(self) -> Tokenizer:
        from ondevice.text.tokenizer import Tokenizer

        return Tokenizer.from_gguf(_plain_tokenizer_keys(self.file.metadata, self.path), self.path)

    def about(self) -> dict[str, Any]:
        get = self.file.metadata.get
        return {
            "name": get("general.name") or self.path.stem,
            "licence": get("general.license"),
            "tokenizer": " ".join(filter(None, (get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")))) or None,
        }

    def close(self) -> None:
        self.file.close()


def undo_interleaving(tensor: Tensor, canonical: str, spec: ModelSpec) -> Tensor:
    """Rows of q and k as the half-split rotary embedding wants them.

    GGUF files of architecture llama (which is Mistral's too) hold the two rows that turn together side by
    side; the Hub's order, and ours, has them dim/2 rows apart. Other tensors come back as they are.

    Args:
        tensor: weight [heads * head_dim, in] or bias [heads * head_dim].
        canonical: name of the tensor.
        spec: of the model.
    """
    module = canonical.split(".")[-2]
    if spec.architecture not in ("llama", "mistral") or spec.rope is None or module not in ("q", "k"):
        return tensor
    heads = spec.n_heads if module == "q" else spec.n_kv_heads
    rows = np.arange(heads * spec.head_dim).reshape(heads, spec.head_dim)
    dim = spec.rope.dim
    rows[:, :dim] = np.concatenate([rows[:, 0:dim:2], rows[:, 1:dim:2]], axis=1)
    index = rows.reshape(-1)
    return tensor.rows(index) if isinstance(tensor, Quantized) else tensor[index]


def _plain_tokenizer_keys(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    """The tokenizer's metadata with arrays of numbers as lists; absurdly long ones are refused."""
    plain: dict[str, Any] = {}
    for key, value in metadata.items():
        if not key.startswith("tokenizer."):
            continue
        if isinstance(value, np.ndarray):
            if len(value) > MAX_STRINGS:
                raise CheckpointError(path, f"{len(value)} entries; the limit is {MAX_STRINGS}", key)
            value = value.tolist()
        plain[key] = value
    return plain


def _generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Ids that begin and end a text, and sampling settings where the file has them."""
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    found: dict[str, Any] = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({x for x in ends if x is not None}) or None,
        **{hub: metadata.get(f"general.sampling.{key}") for key, hub in SAMPLING.items()},
    }
    return {key: value for key, value in found.items() if value is not None}
