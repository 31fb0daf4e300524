"""Poison for what kernels write, so that a test sees what they leave out."""

from __future__ import annotations

POISON = False
"""Whether memory for results and scratch is filled with NaN, or with an index far out of range, before each launch."""
NO_INDEX = 0x3FFFFFFF
