"""Operations of the op table that skip work. A table need not have any: models without sparsity never ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from ondevice.checkpoint.quantization import Tensor
from ondevice.errors import BackendError, OptionError
from ondevice.sparsity.selection import HeadSelection, Selection

if TYPE_CHECKING:
    from ondevice.generation.kv_cache import KVCache
    from ondevice.ops.base import Ops, Step
    from ondevice.sparsity.head_sketch import SketchTensors

Array = Any
Handle = Any


@dataclass(slots=True)
class Tally:
    """How much of one kind of work was done and skipped.

    Args:
        calls: of operations that can skip.
        sparse: calls that had a selection.
        kept: units that were run in the sparse calls, of every token (of all tokens of a step in a shared one).
        units: that dense calls would have run instead.
        bytes_skipped: of weights, or of keys and values, that no token of a step needed.
    """

    calls: int = 0
    sparse: int = 0
    kept: int = 0
    units: int = 0
    bytes_skipped: int = 0


class SkippingOps:
    """What tables without one of these operations do: refuse.

    Attributes:
        name: of the platform.
        forced_density: of a trial's table: part of the units that every selection keeps, in the selector's place.
        has_sketches: whether `pack_sketch` and `head` are there.
    """

    name: str
    has_sketches: bool = False
    forced_density: float | None = None

    def _lacks(self, operation: str) -> NoReturn:
        raise BackendError(
            f"the {self.name} backend has no {operation}, which this model's sparsity needs: "
            "run it dense (dense=True) or take --backend reference"
        )

    def pack_ffn(
        self,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        block: int,
        valued: bool,
    ) -> Handle:
        """An FFN of D neurons of which each token may run some.

        Args:
            gate: [D, in]; None where there is none, or where one factor is computed before (valued).
            up: [D, in].
            down: [out, D].
            gate_bias, up_bias: [D] or None.
            down_bias: [out] or None; added once, whatever is selected.
            block: neurons that are always selected together; divides D.
            valued: neurons are value * act(up x + bias) with values that the selection brings.
        """
        self._lacks("pack_ffn")

    def sparse_ffn(
        self, x: Array, ffn: Handle, selection: Selection | None, activation: str, residual: Array | None = None
    ) -> Array:
        """down h (+ bias, + residual), where h is 0 for neurons that are not selected.

        Args:
            x: [N, in].
            ffn: of `pack_ffn`. h is act(gate x) * (up x), act(up x) without a gate, value * act(up x) if valued.
            selection: of the D neurons (see `expand`); None runs all of them.
            activation: of the gate, or of up without one; "none" for none.
            residual: [N, out].

        Returns:
            [N, out].
        """
        self._lacks("sparse_ffn")

    def mask(self, h: Array, selection: Selection) -> Array:
        """h [N, D], times the selection's values where it has some, with 0 for neurons that are not selected.

        What `sparse_ffn` would have between its two products, for an FFN that computes everything.
        """
        self._lacks("mask")

    def ran_dense(self, kind: str) -> None:
        """Counts a call that could have skipped, and runs dense by plan. kind: as of `counts`."""

    def trial(self) -> Ops | None:
        """An empty table like this one, to measure where skipping pays; None where time is not what decides."""
        return None

    def timing_key(self) -> str:
        """What measurements of time depend on, beside the processor."""
        return self.name

    def select_topk(self, scores: Array, k: int, shared: bool) -> Selection:
        """The k units of the largest scores; of equal ones the first.

        Args:
            scores: [N, M].
            shared: one choice for all tokens, by the sums over tokens of relu(score); else one for each.

        Source: the union of a batch, Polar Sparsity (Shrestha et al. 2025), section 4.1.
        """
        self._lacks("select_topk")

    def select_threshold(self, scores: Array, threshold: float, relative: bool = False) -> Selection:
        """Each token's units with score > threshold.

        Args:
            scores: [N, M].
            relative: score >= threshold * the token's largest instead, and always the largest itself.

        Source: LTE (Zheng et al. 2024), section 3; relative: D2DMoE (Szatkowski et al. 2024), section 3.
        """
        self._lacks("select_threshold")

    def pack_factors(self, values: Tensor) -> Handle:
        """A factor for each unit [M], as `select_magnitude` takes it."""
        self._lacks("pack_factors")

    def select_magnitude(self, x: Array, threshold: float, factors: Handle | None = None) -> Selection:
        """Each token's entries of [N, M] with |x| * factor > threshold.

        Args:
            factors: of `pack_factors`; None for 1.

        Source: of inputs, TEAL (Liu et al. 2024); of activated gates, CATS (Lee et al. 2024).
        """
        self._lacks("select_magnitude")

    def statistical_topk(self, scores: Array, c: float) -> tuple[Array, Selection]:
        """Each token's scores above mean + c * (population) standard deviation, and by how much.

        Args:
            scores: [N, M].
            c: standard normal quantile of the share that is left out.

        Returns:
            max(score - border, 0) [N, M], and the units where that is positive.

        Source: Spark Transformer (You et al. 2025), statistical top-k.
        """
        self._lacks("statistical_topk")

    def expand(self, selection: Selection, block: int) -> Selection:
        """A selection of blocks as one of neurons: unit u becomes the units u * block .. (u + 1) * block - 1."""
        self._lacks("expand")

    def forced(self, selection: Any, density: float) -> Any:
        """Random units in the place of a selection, of units or of heads, for measurements of given densities.

        Drawn anew at each call; a table may leave a selection that keeps as many already.

        Args:
            selection: gives the shape, and has been computed; what it holds is not used.
            density: part of the units that each row keeps, from 0 to 1; rounded to whole units.
        """
        self._lacks("forced")

    def random_selection(self, x: Array, units: int, density: float) -> Selection:
        """Random units of each token of x [N, ...], drawn anew at each call, for measurements without a selector.

        Args:
            units: to choose from.
            density: part of them that each token keeps, from 0 to 1; rounded to whole units.
        """
        self._lacks("random_selection")

    def join(self, parts: Sequence[Array]) -> Array:
        """Arrays [N, ...] side by side."""
        self._lacks("join")

    def pack_input_major(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Handle:
        """As `pack_linear`, arranged such that single inputs can be left out."""
        self._lacks("pack_input_major")

    def sparse_linear(self, x: Array, weight: Handle, selection: Selection, residual: Array | None = None) -> Array:
        """As `linear`, with inputs that are not selected taken as 0: [N, in] -> [N, out].

        Args:
            weight: of `pack_input_major`.
            selection: of the inputs.
        """
        self._lacks("sparse_linear")

    def select_heads(self, scores: Array, k: int, group: int) -> HeadSelection:
        """Each token's k heads of the largest scores; of equal ones the first.

        Args:
            scores: [N, H].
            group: neighbouring heads that are chosen together, by the largest of their scores; k counts such groups.

        Source: Polar Sparsity (Shrestha et al. 2025), section 4.2.
        """
        self._lacks("select_heads")

    def topk_attention(
        self, q: Array, cache: KVCache, layer: int, step: Step, scale: float, window: int, r: int, k: int
    ) -> Array:
        """Attention that chooses its keys by the first r dimensions of each head and weighs them by the others.

        With s = scale * <q, key> over the first r dimensions of the n keys that a token sees, keys are kept where
        s > mean + c * (population) standard deviation, c being the standard normal quantile of 1 - k / n, and where s
        is the largest; all of them where n <= k. Over those, softmax(s) * softplus(scale * <q, key> over the other
        dimensions) weighs the values.

        Args:
            q: [N, H * dh].
            window: keys seen, counting the token's own; 0 for all.

        Returns:
            [N, H * dh].

        Source: Spark Transformer (You et al. 2025), Spark attention.
        """
        self._lacks("topk_attention")

    def pack_sketch(self, head: Handle, tensors: Callable[[], SketchTensors], shape: tuple[int, int]) -> Handle:
        """A sketch of the vocabulary head.

        Args:
            head: of `pack_linear`.
            tensors: makes the sketch, for tables that do not have it from an earlier process.
            shape: [vocab, d] of the head.
        """
        raise OptionError(f"the {self.name} backend has no sketch of the head and computes all of it: leave it out")

    def head(self, x: Array, head: Handle, sketch: Handle, top: int) -> Array:
        """Logits, those exact that may be among a token's `top` largest; the others are a sketch's scores.

        Args:
            x: [N, d].
            head: of `pack_linear`.
            sketch: of `pack_sketch` for that head.
            top: at least 1.

        Returns:
            [N, vocab].
        """
        self._lacks("head")

    def counts(self) -> dict[str, Tally]:
        """What has been skipped since the table was made: "ffn", "inputs", "heads", "keys", "words" of the head."""
        return {}
