"""Files on disk <-> arrays."""

from __future__ import annotations

from pathlib import Path

from ondevice.checkpoint.base import Checkpoint
from ondevice.errors import CheckpointError, ModelNotFoundError

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a model. Only headers are read, and all of them are checked.

    Args:
        path: a .gguf file, or a folder with config.json and safetensors.

    Raises:
        ModelNotFoundError: nothing lies there.
        CheckpointError: it is damaged, incomplete or not supported.
    """
    path = Path(path)
    if path.is_dir():
        from ondevice.checkpoint.hub import HubCheckpoint

        return HubCheckpoint(path)
    if not path.exists():
        raise ModelNotFoundError(f"{path}: no such file or folder")
    if path.suffix.lower() != ".gguf":
        raise CheckpointError(path, "neither a .gguf file nor a folder with config.json; give one of these")
    from ondevice.checkpoint.gguf_checkpoint import GgufCheckpoint

    return GgufCheckpoint(path)
