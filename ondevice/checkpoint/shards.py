"""The weight files of a folder: how many tensors go into each, and what config.json must say of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from numpy.typing import NDArray

from ondevice.checkpoint.partial import Work
from ondevice.checkpoint.quantization import GROUP_SIZES, Quantized, Tensor
from ondevice.checkpoint.safetensors import write_safetensors
from ondevice.errors import UnsupportedModelError


class Shards:
    """Collects tensors and writes a file whenever the next one would overfill it.

    Args:
        work: the folder, and the files in it that an earlier run has finished.
        max_bytes: largest file.
    """

    def __init__(self, work: Work, max_bytes: int) -> None:
        self.work, self.max_bytes = work, max_bytes
        self.pending: dict[str, NDArray[Any]] = {}
        self.pending_bytes = 0
        self.finished: list[dict[str, Any]] = work.finished
        self.kinds: dict[str, tuple[int, int]] = {}
        self.dtypes: Counter[str] = Counter()
        self._new_kinds: dict[str, tuple[int, int]] = {}
        self._new_dtypes: Counter[str] = Counter()
        for entry in self.finished:
            self.kinds |= {module: (bits, group_size) for module, (bits, group_size) in entry["kinds"].items()}
            self.dtypes.update(entry["dtypes"])

    @property
    def names(self) -> set[str]:
        """Stored names of the tensors in finished files; of a quantized one its three parts."""
        return {name for entry in self.finished for name in entry["tensors"]}

    def add(self, name: str, tensor: Tensor) -> bool:
        """Takes a tensor, whose stored name ends in ".weight" if it is quantized. True if that has filled a file."""
        if isinstance(tensor, Quantized):
            module = name.removesuffix(".weight")
            if tensor.group_size not in GROUP_SIZES:
                raise UnsupportedModelError(
                    self.work.folder,
                    f"groups of {tensor.group_size} have no place in this format; dequantize or requantize them first",
                    name,
                )
            plain = tensor.super_scales is None and tensor.biases is not None
            scales, biases = (tensor.scales, tensor.biases) if plain else tensor.affine()
            assert biases is not None
            parts = {name: tensor.packed, f"{module}.scales": scales, f"{module}.biases": biases}
        else:
            parts = {name: tensor}
        size = sum(array.nbytes for array in parts.values())
        filled = bool(self.pending) and self.pending_bytes + size > self.max_bytes
        if filled:
            self.flush()
        self.pending |= parts
        self.pending_bytes += size
        if isinstance(tensor, Quantized):
            self.kinds[module] = self._new_kinds[module] = tensor.bits, tensor.group_size
        floats = parts[list(parts)[-1]]
        self.dtypes[str(floats.dtype)] += floats.size
        self._new_dtypes[str(floats.dtype)] += floats.size
        return filled

    def flush(self) -> None:
        """Writes what is pending to a file, if anything is."""
        if not self.pending:
            return
        path = self.work.folder / f"shard-{len(self.finished)}"
        write_safetensors(path, self.pending, {"format": "mlx" if self.kinds else "pt"})
        entry = {
            "file": path.name,
            "size": path.stat().st_size,
            "tensors": list(self.pending),
            "bytes": self.pending_bytes,
            "kinds": self._new_kinds,
            "dtypes": self._new_dtypes,
        }
        self.finished.append(entry)
        self.work.record(self.finished)
        self.pending, self.pending_bytes = {}, 0
        self._new_kinds, self._new_dtypes = {}, Counter()

    def finish(self) -> dict[str, Any] | None:
        """Writes the rest and gives the files their names. Returns the index, if there are several."""
        self.flush()
        total = len(self.finished)
        for i, entry in enumerate(self.finished, 1):
            entry["final"] = f"model-{i:05}-of-{total:05}.safetensors" if total > 1 else "model.safetensors"
        self.work.record(self.finished)
        for entry in self.finished:
            (self.work.folder / entry["file"]).rename(self.work.folder / entry["final"])
        if total == 1:
            return None
        weight_map = {name: entry["final"] for entry in self.finished for name in entry["tensors"]}
        nbytes = sum(entry["bytes"] for entry in self.finished)
        return {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}

    def quantization(self) -> dict[str, Any]:
        """`quantization` as mlx-lm writes it: the commonest kind, and the modules that differ from it."""
        (bits, group_size), _ = Counter(self.kinds.values()).most_common(1)[0]
        settings: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": "affine"}
        for module, kind in self.kinds.items():
            if kind != (bits, group_size):
                settings[module] = {"group_size": kind[1], "bits": kind[0]}
        return settings
