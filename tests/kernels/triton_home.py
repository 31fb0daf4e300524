"""Triton's kernels as tests run them: in its interpreter, on the CPU.

Importing this sets TRITON_INTERPRET, which Triton reads when a kernel is defined; so tests import it before them.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

MISSING = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
needs_triton = [
    pytest.mark.triton,
    pytest.mark.skipif(
        bool(MISSING), reason=f"needs {' and '.join(MISSING)}: pip install 'ondevice[triton]' (Linux on x86-64 only)"
    ),
]
if not MISSING:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def compiled_environment() -> dict[str, str]:
    """The environment of a process that compiles kernels instead of interpreting them."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
