"""Functions reach their callers as they were before machine code was made of them.

Numba makes machine code of every function by itself, and only then copies its LLVM module for callers. Making machine
code rewrites the module into forms that must not be optimised again: an address kept as an integer may become an offset
from null, and then the caller's optimiser drops what is stored there. What Numba itself runs is the function's first
machine code, whatever the copies say; our object code has nothing but the copies.
"""

from __future__ import annotations

from numba.core.codegen import JITCodeLibrary, JITCPUCodegen


class _Linkable(JITCodeLibrary):
    """A compiled function with its callees, copied for callers in time."""

    def _finalize_specific(self):
        # Numba copies what is finalized only, and keeps the copy.
        self._finalized = True
        self._get_module_for_linking()
        super()._finalize_specific()


def link_before_machine_code() -> None:
    """Makes it so for all functions that Numba compiles from now on in this process."""
    JITCPUCodegen._library_class = _Linkable
