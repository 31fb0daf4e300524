"""What every kind of checkpoint offers, whatever files it consists of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ondevice.checkpoint.mapped import FileState
from ondevice.checkpoint.places import Place
from ondevice.checkpoint.quantization import Tensor
from ondevice.errors import CheckpointError
from ondevice.spec import ModelSpec

if TYPE_CHECKING:
    from ondevice.text.tokenizer import Tokenizer


class Checkpoint(ABC):
    """An open model: its spec, its tensors by canonical name, its tokenizer. Usable as a context manager.

    Attributes:
        path: file or folder.
        format: "gguf", "hub" or "mlx".
        spec: sizes and features.
        files: that the weights come from, as they were when opened; none where there are no files.
        generation_config: settings for sampling and the ids that end a text, named as in a Hub
            generation_config.json; empty where the checkpoint states none.
        prefers_sketch: whether the model asks for a sketch of its head, where users say nothing about it.
    """

    path: Path
    format: str
    spec: ModelSpec
    files: tuple[FileState, ...] = ()
    generation_config: dict[str, Any]
    prefers_sketch: bool = False

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Contents of a tensor.

        Args:
            name: a key of `spec.tensors()`.

        Returns:
            Array (read-only, mapped from the file where possible) or Quantized.

        Raises:
            CheckpointError: no such tensor, or its contents are damaged.
        """

    def release(self, name: str) -> None:  # noqa: B027 -- what is not mapped from a file cannot be given back
        """Gives memory of a tensor that was read back to the system. Its contents stay valid, to be read anew.

        Args:
            name: a key of `spec.tensors()`; others that are stored together with it are released too.
        """

    @abstractmethod
    def stored(self, name: str) -> tuple[str, int]:
        """Type ("F32", "Q4_1", "affine 4-bit g64" ...) and bytes of a tensor, from the header alone."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, built anew at each call."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What the checkpoint says of itself: name, licence, tokenizer."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of the files. Arrays that were handed out stay valid."""

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are stored."""
        return sum(self.stored(name)[1] for name in self.spec.tensors())

    def describe(self) -> dict[str, Any]:
        """A summary for people and for JSON output; no weight is read."""
        shapes = self.spec.tensors()
        parameters: Counter[str] = Counter()
        size: Counter[str] = Counter()
        tensors: Counter[str] = Counter()
        for name, shape in shapes.items():
            kind, nbytes = self.stored(name)
            parameters[kind] += prod(shape)
            size[kind] += nbytes
            tensors[kind] += 1
        total = sum(parameters.values())
        spec = self.spec
        return {
            "path": str(self.path),
            "format": self.format,
            "architecture": spec.architecture,
            **self.about(),
            "parameters": total,
            "bytes": sum(size.values()),
            "bits_per_weight": round(8 * sum(size.values()) / total, 3),
            "types": {
                kind: {
                    "tensors": tensors[kind],
                    "parameters": parameters[kind],
                    "bytes": size[kind],
                    "bits_per_weight": round(8 * size[kind] / parameters[kind], 3),
                }
                for kind in sorted(parameters)
            },
            "context_length": spec.context_length,
            "layers": spec.n_layers,
            "d_model": spec.d_model,
            "n_heads": spec.n_heads,
            "n_kv_heads": spec.n_kv_heads,
            "head_dim": spec.head_dim,
            "d_ff": spec.d_ff,
            "vocab_size": spec.vocab_size,
            "tied_head": spec.tied_head,
            "sliding_window": max(spec.windows),
            "sparsity": spec.sparsity and spec.sparsity.document(),
            "sketch_head": self.prefers_sketch,
        }

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_tensors(path: Path, spec: ModelSpec, found: dict[str, tuple[int, ...]], places: Iterable[Place]) -> None:
    """Compares the tensors of a checkpoint with those that its spec asks for.

    Args:
        path: for messages.
        spec: of the model.
        found: shape of each tensor by the name in the file; names that do not matter already left out.
        places: of the tensors that the spec asks for.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of the wrong shape.
    """
    wanted = {place.name: place.shape for place in places}
    hint = ""
    if spec.sparsity:
        hint = f" (`sparsity` in config.json says {spec.sparsity.name}; take it out if this is the dense model)"
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointError(path, f"the tensor is missing (shape {shape}); download the model again{hint}", name)
        if found[name] != shape:
            raise CheckpointError(path, f"has the shape {found[name]}, the settings ask for {shape}{hint}", name)
    extra = sorted(found.keys() - wanted.keys())
    if extra:
        some = ", ".join(extra[:4]) + (", ..." if len(extra) > 4 else "")
        raise CheckpointError(
            path,
            f"{len(extra)} tensors that a {spec.architecture} model so configured does not have ({some}); "
            "without them the answers would be wrong, so the model is refused",
        )
