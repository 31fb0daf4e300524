"""Language models on your own machine, fast because work that a token does not need is skipped.

import ondevice
model = ondevice.load("smollm2")
print(model.generate("Why is the sky blue?", max_tokens=100).text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ondevice.errors import OndeviceError as OndeviceError
    from ondevice.generation.sampling import SamplingParams as SamplingParams
    from ondevice.model import Answer as Answer
    from ondevice.model import Model as Model
    from ondevice.model import load as load

__version__ = "0.1.0"

_HOMES = {
    "load": "ondevice.model",
    "Model": "ondevice.model",
    "Answer": "ondevice.model",
    "SamplingParams": "ondevice.generation.sampling",
    "OndeviceError": "ondevice.errors",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Public names, imported when first used: `ondevice --help` must not wait for NumPy."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ondevice' has no attribute {name!r}")
