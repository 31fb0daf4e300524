"""What Triton's interpreter lacks: NumPy from 2.4 on, and products of bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np


def mend() -> None:
    """Mends the interpreter of Triton 3.6, once.

    NumPy no longer makes a number of an array with one element, which loop bounds are; and bfloat16 values, kept as
    integers, were multiplied as such.
    """
    from triton.runtime import interpreter

    original, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot
    if getattr(original, "mended", False):
        return

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != interpreter.tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << np.uint32(16)
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    def mended_dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        return dot(self, widened(a), widened(b), *more)

    patch.mended = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patch
    interpreter.InterpreterBuilder.create_dot = mended_dot
