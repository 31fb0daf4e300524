"""`--sparsity METHOD[:key=value,...]` of the converter: which methods there are, and what fits them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ondevice.commands.method_option import MethodOption, read_method
from ondevice.errors import OptionError

if TYPE_CHECKING:
    from ondevice.checkpoint.base import Checkpoint
    from ondevice_convert.fitted import Fitted
    from ondevice_convert.samples import Samples

Progress = Callable[[int, int, str], None]
Fit = Callable[["Checkpoint", "Samples", MethodOption, Progress], "Fitted"]

AUTO = "auto"
KEYS: dict[str, Mapping[str, str]] = {
    AUTO: {},
    "cats": {"density": "0.5", "first": "best"},
    "teal": {"density": "0.5", "linears": "q+k+v+o+gate+up+down"},
    "lte": {"density": "0.5", "block": "32", "order": "clustered", "steps": "200"},
    "d2dmoe": {"tau": "0.1", "density": "", "block": "32", "width": "128", "order": "clustered", "steps": "200"},
    "polar": {"heads": "0.7", "unit": "auto", "recall": "0.99", "rank": "", "batches": "1", "dense_layers": "0"},
}
"""Keys of each method and what they are if not given; empty where the model decides."""
TRAINED = ("spark",)


@dataclass(frozen=True, slots=True)
class Kind:
    """How a method is fitted.

    Args:
        places: of `Decoder.watch` that it needs.
        fit: makes it.
    """

    places: tuple[str, ...]
    fit: Fit


def parse(text: str) -> MethodOption:
    """What an option asks for.

    Raises:
        OptionError: an unknown method or key, or one that conversion cannot make.
    """
    name = text.partition(":")[0]
    if name in TRAINED:
        raise OptionError(
            f"--sparsity {text}: {name} is how a model is trained from the start, so none can be converted to it; "
            f"take one of {', '.join(KEYS)}"
        )
    return MethodOption(text, *read_method(text, KEYS))


def kind_of(option: MethodOption) -> Kind:
    """How an option's method is fitted; "auto" needs what its candidates need."""
    match option.method:
        case "cats" | "teal":
            from ondevice_convert import fit_threshold

            if option.method == "cats":
                return Kind(fit_threshold.CATS_PLACES, fit_threshold.fit_cats)
            return Kind(fit_threshold.TEAL_PLACES, fit_threshold.fit_teal)
        case "lte":
            from ondevice_convert import fit_lte

            return Kind(("ffn",), fit_lte.fit_lte)
        case "d2dmoe":
            from ondevice_convert import fit_d2dmoe

            return Kind(("ffn",), fit_d2dmoe.fit_d2dmoe)
        case "polar":
            from ondevice_convert import fit_polar

            return Kind(fit_polar.POLAR_PLACES, fit_polar.fit_polar)
    raise ValueError(option.method)


AUTO_PLACES = ("ffn",)
