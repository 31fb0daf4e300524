"""What every method has in common: how it changes a model's tensors and the parts of its layers.

A method that changes nothing is the dense model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ondevice.errors import OptionError
from ondevice.layer import Attend, DenseLinear, Ffn, FullAttention, JoinedQkv, Linear, PlainFfn, Qkv, Router, no_router

if TYPE_CHECKING:
    from ondevice.packing import Packer
    from ondevice.spec import ModelSpec
    from ondevice.spec_fields import Fields

Shapes = dict[str, tuple[int, ...]]
DENSITY = "density"
"""Key of the part that each layer keeps, in the section of any method that does not say it otherwise."""


@dataclass(frozen=True, slots=True)
class Method:
    """A way to skip work, with its settings.

    Args:
        densities: part that each layer keeps when it decodes, on average, where that was measured.

    Attributes:
        name: in the section and on the command line.
        in_prompts: whether prompts skip too, token by token; else only steps of decoding do.
    """

    densities: tuple[float, ...] | None = field(default=None, kw_only=True)

    name: ClassVar[str] = "dense"
    in_prompts: ClassVar[bool] = True

    def kind(self, spec: ModelSpec) -> str:
        """What it promises: "exact" (zeros are skipped), "trained" (for it) or "approximate" (chosen afterwards)."""
        return "exact"

    @property
    def skips(self) -> tuple[str, ...]:
        """What it leaves out, in the words of `Ops.counts`."""
        return ()

    def density(self, spec: ModelSpec, layer: int) -> float | None:
        """Part of its neurons, or inputs, that a layer is expected to keep when it decodes; None if nobody knows."""
        return None if self.densities is None else self.densities[layer]

    @property
    def rope_parts(self) -> int:
        """Equal parts of a head that are rotated each on its own."""
        return 1

    @classmethod
    def read(cls, fields: Fields, spec: ModelSpec) -> Method:
        """From the section of a config.json.

        Args:
            fields: the section.
            spec: of the model, as of a dense one.

        Raises:
            CheckpointError: settings that are missing, unknown, out of range or not for this model.
        """
        fields.known("method")
        return cls()

    def section(self) -> dict[str, Any]:
        """The settings as `read` of the same class takes them."""
        return {"method": self.name}

    def document(self) -> dict[str, Any]:
        """The whole section of a config.json."""
        stated = {} if self.densities is None else {DENSITY: list(self.densities)}
        return {**self.section(), **stated}

    def change_tensors(self, spec: ModelSpec, layer: int, shapes: Shapes) -> None:
        """Adds to a dense model's tensors what this method needs in a layer, and changes those that it has otherwise.

        Args:
            shapes: by canonical name, of this layer and those before it.
        """

    def with_tau(self, tau: float) -> Method:
        """The method with another tau.

        Raises:
            OptionError: it has none, or not this one.
        """
        raise OptionError(
            f"tau is {tau}, but the model's method {self.name} has no tau; leave it out, or take a d2dmoe model"
        )

    def dense(self) -> Method | None:
        """What runs the model with everything selected; None for the dense model.

        Raises:
            OptionError: there is no such model.
        """
        return None

    # Parts of a layer, dense unless a method says otherwise

    def router(self, pack: Packer, i: int) -> Router:
        """What selects before the attention of layer `i`."""
        return no_router

    def linear(self, pack: Packer, i: int, *names: str) -> Linear:
        """Linears of layer `i` with a common input, such as "gate" and "up"."""
        return DenseLinear(pack.ops, pack.linear(*(f"layers.{i}.{name}" for name in names)))

    def qkv(self, pack: Packer, i: int) -> Qkv:
        """Queries, keys and values of layer `i`."""
        spec = pack.spec
        q, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        return JoinedQkv(pack.ops, self.linear(pack, i, "q", "k", "v"), (q, kv, kv))

    def attend(self, pack: Packer, i: int) -> Attend:
        """Attention of layer `i`."""
        spec = pack.spec
        return FullAttention(pack.ops, i, spec.attention_scale, spec.windows[i], spec.attention_softcap)

    def o(self, pack: Packer, i: int) -> Linear:
        """Output projection of layer `i`."""
        return self.linear(pack, i, "o")

    def ffn(self, pack: Packer, i: int) -> Ffn:
        """FFN of layer `i`."""
        spec = pack.spec
        gate = ["gate"] if spec.gated else []
        up, down = self.linear(pack, i, *gate, "up"), self.linear(pack, i, "down")
        return PlainFfn(pack.ops, up, down, spec.activation, spec.gated)


DENSE = Method()
