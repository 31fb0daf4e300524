"""Hands a checkpoint's tensors to the op table, part by part."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ondevice.layer import DenseLinear, Layer, MaskedNeurons, Neurons, SkippingNeurons
from ondevice.ops.base import Handle, Ops
from ondevice.sparsity.method import DENSE

if TYPE_CHECKING:
    from ondevice.checkpoint.base import Checkpoint
    from ondevice.checkpoint.quantization import Tensor
    from ondevice.decoder import Decoder
    from ondevice.sparsity.plan import Plan
    from ondevice.sparsity.settings import SparsitySettings
    from ondevice.spec import ModelSpec


class Packer:
    """Fills a decoder.

    Args:
        checkpoint: where the tensors come from.
        ops: the table that packs them.
        spec: of the model as it will run; what it does not use is not packed.
        settings: of skipping work.
        plan: which layers skip.
        progress: called with (tensors done, tensors in all, label).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ops: Ops,
        spec: ModelSpec,
        settings: SparsitySettings,
        plan: Plan,
        progress: Callable[[int, int, str], None] | None,
    ) -> None:
        self.checkpoint, self.ops, self.spec, self.settings, self.progress = checkpoint, ops, spec, settings, progress
        self.plan = plan
        self.names = spec.tensors()
        self.done = 0

    def get(self, name: str) -> Tensor:
        """A tensor of the checkpoint."""
        self.done += 1
        if self.progress:
            self.progress(self.done, len(self.names), "loading")
        return self.checkpoint.tensor(name)

    def optional(self, name: str) -> Tensor | None:
        """A tensor, or None if the model has none of that name."""
        return self.get(name) if name in self.names else None

    def norm(self, name: str) -> Handle:
        """A norm of the residual stream."""
        spec, bias = self.spec, self.optional(f"{name}.bias")
        return self.ops.pack_norm(self.get(f"{name}.weight"), bias, spec.norm, spec.norm_eps, spec.norm_offset)

    def optional_norm(self, name: str) -> Handle | None:
        """A norm, or None if the model has none of that name."""
        return self.norm(name) if f"{name}.weight" in self.names else None

    def head_norm(self, name: str) -> Handle | None:
        """qk-norm is an RMS norm in every architecture, whatever the layers use."""
        if f"{name}.weight" not in self.names:
            return None
        weight = self.get(f"{name}.weight")
        return self.ops.pack_norm(weight, None, "rms", self.spec.norm_eps, self.spec.norm_offset)

    def linear(self, *names: str) -> Handle:
        """Linears with a common input, joined along their outputs."""

        def pack() -> Handle:
            weights = [self.get(f"{name}.weight") for name in names]
            return self.ops.pack_linear(weights, [self.optional(f"{name}.bias") for name in names])

        return self.kept([f"{name}.weight" for name in names], pack)

    def input_major(self, *names: str) -> Handle:
        """As `linear`, for a selection of inputs."""
        weights = [self.get(f"{name}.weight") for name in names]
        handle = self.ops.pack_input_major(weights, [self.optional(f"{name}.bias") for name in names])
        self.release([f"{name}.weight" for name in names])
        return handle

    def neurons(
        self, i: int, gate: str | None, up: str, down: str, activation: str, block: int, valued: bool = False
    ) -> Neurons:
        """The FFN of layer `i`, or one of its linears that is made as an FFN, in the form that the plan says.

        Args:
            gate, up, down: names of linears; no gate where there is none, or where one factor is computed before.
            block, valued: as of `Ops.pack_ffn`.
        """
        if not self.sparse(i):
            first = DenseLinear(self.ops, self.linear(*filter(None, (gate, up))))
            last = DenseLinear(self.ops, self.linear(down))
            return MaskedNeurons(self.ops, first, last, activation, gate is not None)
        names = [name for name in (gate, up, down) if name is not None]
        weights = {name: self.get(f"{name}.weight") for name in names}
        biases = {name: self.optional(f"{name}.bias") for name in names}
        gates = (None, None) if gate is None else (weights[gate], biases[gate])
        handle = self.ops.pack_ffn(
            gates[0], weights[up], weights[down], gates[1], biases[up], biases[down], block, valued
        )
        self.release([f"{name}.weight" for name in names])
        return SkippingNeurons(self.ops, handle, activation)

    def sparse(self, i: int) -> bool:
        """Whether layer `i` skips, as the plan says."""
        method = self.spec.sparsity
        return method is not None and self.plan.sparse(i, method.density(self.spec, i))

    def table(self, name: str, pack: Callable[[Tensor], Handle]) -> Handle:
        """A table of embeddings."""
        return self.kept([name], lambda: pack(self.get(name)))

    def kept(self, names: list[str], pack: Callable[[], Handle]) -> Handle:
        """What `pack` makes of these tensors, or the op table has kept of them."""
        shapes = [self.names[name] for name in names]
        # Another plan joins other tensors: what it kept must not be taken for this.
        handle = self.ops.kept("+".join(names), (sum(shape[0] for shape in shapes), *shapes[0][1:]), pack)
        self.release(names)
        return handle

    def release(self, names: list[str]) -> None:
        """Gives back the memory that tensors were read into."""
        for name in names:
            self.checkpoint.release(name)

    def layer(self, i: int) -> Layer:
        """Layer `i`, its parts in the forms that the model's method gives them."""
        p, method = f"layers.{i}.", self.spec.sparsity or DENSE
        return Layer(
            attn_norm=self.norm(p + "attn_norm"),
            router=method.router(self, i),
            qkv=method.qkv(self, i),
            q_norm=self.head_norm(p + "q_norm"),
            k_norm=self.head_norm(p + "k_norm"),
            attend=method.attend(self, i),
            o=method.o(self, i),
            post_attn_norm=self.optional_norm(p + "post_attn_norm"),
            ffn_norm=self.norm(p + "ffn_norm"),
            ffn=method.ffn(self, i),
            post_ffn_norm=self.optional_norm(p + "post_ffn_norm"),
        )

    def fill(self, decoder: Decoder) -> None:
        """Packs everything, giving the decoder its handles and layers."""
        if self.spec.tied_head:
            decoder.embed, decoder.head = self.table("embed.weight", self.ops.pack_tied)
        else:
            decoder.embed = self.table("embed.weight", self.ops.pack_embedding)
            decoder.head = self.linear("head")
        learned = "position.weight" in self.names
        decoder.position = self.table("position.weight", self.ops.pack_embedding) if learned else None
        decoder.layers = [self.layer(i) for i in range(self.spec.n_layers)]
        decoder.final_norm = self.norm("final_norm")
