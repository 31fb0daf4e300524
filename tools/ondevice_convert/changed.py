"""A checkpoint with another spec, further tensors, and neurons in another order; nothing is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.base import Checkpoint
from ondevice.checkpoint.quantization import Quantized, Tensor, dequantize, quantize
from ondevice.spec import ModelSpec
from ondevice_convert.forms import stored_form

if TYPE_CHECKING:
    from ondevice.text.tokenizer import Tokenizer

FINER = {4: 6, 5: 8, 6: 8}
"""Bits that a quantized `down` gets whose columns are put in another order, by those that it had. Its groups then hold
other columns, and rounding them in the same bits costs more than most routers do."""
_FFN = re.compile(r"layers\.(\d+)\.(gate|up|down)\.(weight|bias)")


class Changed(Checkpoint):
    """What a method makes of a model.

    Args:
        source: the model; stays open.
        spec: with the method.
        added: tensors by canonical name, in the place of the source's or beside them.
        orders: of a layer's neurons, int [d_ff]: which neuron comes where. `down` is then rounded anew in
            its own groups, in the bits of `FINER`.
    """

    def __init__(
        self,
        source: Checkpoint,
        spec: ModelSpec,
        added: Mapping[str, Tensor] | None = None,
        orders: Mapping[int, NDArray[np.int64]] | None = None,
    ) -> None:
        self.source, self.spec, self.added, self.orders = source, spec, added or {}, orders or {}
        self.path, self.format, self.generation_config = source.path, source.format, source.generation_config
        self.prefers_sketch = source.prefers_sketch

    def tensor(self, name: str) -> Tensor:
        if name in self.added:
            return self.added[name]
        tensor, found = self.source.tensor(name), _FFN.fullmatch(name)
        if found is None or int(found[1]) not in self.orders:
            return tensor
        order = self.orders[int(found[1])]
        if found[2] != "down":
            return tensor.rows(order) if isinstance(tensor, Quantized) else tensor[order]
        if found[3] == "bias":
            return tensor
        if not isinstance(tensor, Quantized):
            return tensor[:, order]
        # As precise as they were: sums of a 16-bit scale and another float need 32 bits, and are rare.
        dtype = tensor.scales.dtype if tensor.super_scales is None else np.float16
        return quantize(dequantize(tensor)[:, order], FINER.get(tensor.bits, tensor.bits), tensor.group_size, dtype)

    def _reordered(self, name: str) -> bool:
        """Whether it is a `down` whose columns are in another order."""
        found = _FFN.fullmatch(name)
        return found is not None and found.group(2, 3) == ("down", "weight") and int(found[1]) in self.orders

    def release(self, name: str) -> None:
        if name not in self.added:
            self.source.release(name)

    def stored(self, name: str) -> tuple[str, int]:
        if name not in self.added:
            form = stored_form(self.source, name) if self._reordered(name) else None
            if form is None or not form.bits:
                return self.source.stored(name)
            rows, inputs = self.spec.tensors()[name]
            bits = FINER.get(form.bits, form.bits)
            return f"affine {bits}-bit g{form.group_size}", rows * (inputs * bits // 8 + inputs // form.group_size * 4)
        tensor = self.added[name]
        kind = f"affine {tensor.bits}-bit" if isinstance(tensor, Quantized) else str(tensor.dtype)
        return kind, tensor.nbytes

    def tokenizer(self) -> Tokenizer:
        return self.source.tokenizer()

    def about(self) -> dict[str, Any]:
        return self.source.about()

    def close(self) -> None:
        """The source stays open: it belongs to whoever opened it."""
