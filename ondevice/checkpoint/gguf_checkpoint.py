"""A model in one GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ondevice.checkpoint.base import Checkpoint, check_tensors
from ondevice.checkpoint.gguf import MAX_STRINGS, GgufFile
from ondevice.checkpoint.gguf_types import READABLE, TYPES
from ondevice.checkpoint.names import GGUF_IGNORED, gguf_name, undo_interleaving
from ondevice.checkpoint.quantization import Tensor
from ondevice.errors import CheckpointError, UnsupportedModelError
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
        if "split.count" in self.file.metadata and self.file.metadata["split.count"] != 1:
            raise UnsupportedModelError(
                path, "a model in several GGUF files is not supported; merge it with llama-gguf-split --merge"
            )
        self.spec = spec_from_gguf(self.file)
        self._names = {name: gguf_name(name) for name in self.spec.tensors()}
        found = {name: info.shape for name, info in self.file.tensors.items() if name not in GGUF_IGNORED}
        check_tensors(path, self.spec, found, self._names)
        for name in self._names.values():
            kind = TYPES[self.file.tensors[name].type_id]
            if kind not in READABLE:
                raise UnsupportedModelError(
                    path,
                    f"type {kind.name} is not supported; {', '.join(t.name for t in READABLE)} are",
                    name,
                )
        self.generation_config = _generation_config(self.file.metadata)

    def tensor(self, name: str) -> Tensor:
        if name not in self._names:
            raise CheckpointError(self.path, "the model has no such tensor", name)
        return undo_interleaving(self.file.tensor(self._names[name]), name, self.spec)

    def stored(self, name: str) -> tuple[str, int]:
        info = self.file.tensors[self._names[name]]
        return TYPES[info.type_id].name, info.nbytes

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
