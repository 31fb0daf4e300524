"""The pytest fixture `metal`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.msl.emulator import Emulator, Gpu


@pytest.fixture
def metal() -> Iterator[Emulator | Gpu]:
    """What runs Metal kernels here in place of `mx.fast.metal_kernel`; see `tests.msl`."""
    from tests.msl.emulator import metal_kernels

    with metal_kernels() as kernels:
        yield kernels
