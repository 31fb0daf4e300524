"""Errors that a user can act on. Each message names the file or option, the value, and the way out."""

from __future__ import annotations

from pathlib import Path


class OndeviceError(Exception):
    """Base of every error that this package raises on purpose."""


class CheckpointError(OndeviceError):
    """A model file or folder is damaged, incomplete or lies about its contents.

    Args:
        path: file or folder that was read.
        problem: what is wrong and, where there is one, the way out.
        key: tensor, metadata key or setting concerned.
    """

    def __init__(self, path: Path | str, problem: str, key: str | None = None) -> None:
        self.path = Path(path)
        self.key = key
        super().__init__(f"{path}: {f'{key}: ' if key else ''}{problem}")


class UnsupportedModelError(CheckpointError):
    """The file is sound but needs something that this version does not have."""


class TemplateError(OndeviceError):
    """A chat template is refused: it fails, runs too long or writes too much."""


class ModelNotFoundError(OndeviceError):
    """No model of that name in the store, on disk or in the list of aliases."""


class ContextLengthError(OndeviceError):
    """More tokens than the model's context or the KV cache can hold."""


class NumericalError(OndeviceError):
    """NaN or infinite values came out of a layer."""


class OptionError(OndeviceError, ValueError):
    """An option has a value that cannot be used."""


class BackendError(OndeviceError):
    """The backend lacks an operation that the model needs."""


class SparsityError(OndeviceError):
    """A sparse path cannot run, and strict settings forbid the dense one."""
