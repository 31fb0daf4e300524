"""Names that both the library and the command line offer; importing them costs nothing."""

from __future__ import annotations

BACKENDS = ("auto", "cpu", "mlx", "cuda", "torch", "reference")
DEFAULT_MODEL = "smollm2"
