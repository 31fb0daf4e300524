"""Switches in the environment."""

from __future__ import annotations

import os


def switched_on(*names: str) -> bool:
    """Whether one of some variables says yes: 1, true, yes or on."""
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in names)
