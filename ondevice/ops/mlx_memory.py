"""Memory on MLX's device: what may be used, and refusing what would not fit before it is there.

A Mac whose GPU is given more memory than it may wire becomes slow, or its kernel panics; MLX itself does not refuse.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ondevice import machine
from ondevice.decoder import PREFILL_CHUNK
from ondevice.errors import OptionError
from ondevice.ops.mlx_bytes import KV_BITS, device_bytes, kv_bytes

if TYPE_CHECKING:
    from ondevice.checkpoint.base import Checkpoint
    from ondevice.ops.mlx_device import MlxDevice
    from ondevice.spec import ModelSpec

_LOG = logging.getLogger("ondevice")
LIMIT_VARIABLE = "ONDEVICE_MLX_MEMORY_GB"
CACHED_PART = 8
"""Of the limit, one part in so many may be buffers that MLX keeps for later ones of the same size."""


@dataclass(frozen=True, slots=True)
class MemoryGuard:
    """What may be used of the device's memory.

    Args:
        limit: bytes for everything that MLX holds in this process; None where nobody knows.
        reason: where the limit comes from, for messages.
        itemsize: bytes of a number of the table's type.
        name: of the device.
    """

    limit: int | None
    reason: str
    itemsize: int
    name: str

    @classmethod
    def of(cls, device: MlxDevice) -> MemoryGuard:
        """The guard of a device. On Metal, MLX is told to keep to the limit too, and to keep what it uses wired.

        Raises:
            OptionError: ONDEVICE_MLX_MEMORY_GB is no number above 0.
        """
        limit, reason = _limit(device)
        if device.metal and limit is not None:
            _tell_mlx(limit)
        return cls(limit, reason, device.dtype.size, device.name)

    def admit_weights(self, checkpoint: Checkpoint) -> None:
        """Refuses a model whose weights would not fit.

        Raises:
            OptionError: naming what to change.
        """
        stored = {name: checkpoint.stored(name)[0] for name in checkpoint.spec.tensors()}
        shapes = checkpoint.spec.tensors()
        need = sum(device_bytes(kind, shapes[name], self.itemsize) for name, kind in stored.items())
        self._admit(need, "the model's weights", "convert it to fewer bits (`ondevice convert --bits 4`)")

    def admit_cache(self, spec: ModelSpec, positions: int, stored: int, kv_bits: int) -> None:
        """Refuses a cache that would not fit, with what a chunk of a prompt needs beside it.

        Args:
            positions: of all sequences together.
            stored: of them, summed over the layers, of which those that rotate keep fewer.
            kv_bits: of keys and values; 0 for floats.

        Raises:
            OptionError: naming what to change.
        """
        each = kv_bytes(spec.head_dim, self.itemsize, kv_bits)
        need = 2 * stored * spec.n_kv_heads * each + working_bytes(spec)
        way = "lower --context or --max-tokens (`bench`: -d, -n and -b), give fewer prompts"
        fewer = [bits for bits in KV_BITS if not kv_bits or bits < kv_bits]
        if fewer:
            way += f", take --kv-bits {max(fewer)}"
        self._admit(need, f"a cache of {positions} positions", way)

    def _admit(self, need: int, what: str, way: str) -> None:
        held = mx.get_active_memory()
        if self.limit is None or held + need <= self.limit:
            return
        beside = f" beside {held / 1e9:.2f} GB that are in use" if held > need // 100 else ""
        raise OptionError(
            f"{what} would take {need / 1e9:.2f} GB on MLX's {self.name}{beside}, of {self.limit / 1e9:.2f} GB that "
            f"may be used ({self.reason}): {way}, or raise {LIMIT_VARIABLE} if you know better"
        )


def working_bytes(spec: ModelSpec) -> int:
    """About what one chunk of a prompt holds at its fullest: rows of the FFN and of the hidden state, and logits."""
    return 4 * (PREFILL_CHUNK * (3 * spec.d_ff + 8 * spec.d_model) + 2 * spec.vocab_size)


def _limit(device: MlxDevice) -> tuple[int | None, str]:
    text = os.environ.get(LIMIT_VARIABLE, "")
    if text:
        return _asked(text), LIMIT_VARIABLE
    if device.metal:
        # Only a Mac shows how large this is: about three quarters of its memory, unless iogpu.wired_limit_mb is set.
        size = mx.device_info(device.device).get("max_recommended_working_set_size")
        return (None if size is None else int(size)), "what Metal recommends; `sysctl iogpu.wired_limit_mb` raises it"
    available = machine.memory_bytes()[1]
    return (None if available is None else available + mx.get_active_memory()), "what is available"


def _asked(text: str) -> int:
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = math.nan
    if not 0 < gigabytes < 1e6:
        raise OptionError(f"{LIMIT_VARIABLE} is {text!r}; give the gigabytes that MLX may use, such as 12.5")
    return int(gigabytes * 1e9)


def _tell_mlx(limit: int) -> None:
    """Limits of the whole process. Wired memory is what macOS does not compress or swap between two tokens."""
    mx.set_memory_limit(limit)
    mx.set_cache_limit(limit // CACHED_PART)
    # Only a Mac shows whether this is allowed: macOS 15 and newer, up to what Metal recommends.
    recommended: Any = mx.device_info().get("max_recommended_working_set_size", limit)
    try:
        mx.set_wired_limit(min(limit, int(recommended)))
    except (RuntimeError, ValueError) as e:
        _LOG.warning("weights are not kept wired, so macOS may move them out between answers: %s", e)
