"""`--sparsity METHOD[:key=value,...]` of the converter: which methods there are, and what fits them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ondevice.checkpoint.base import Checkpoint
from ondevice.commands.method_option import MethodOption, read_method
from ondevice.errors import OptionError
from ondevice.spec import ModelSpec
from ondevice_convert import fit_d2dmoe, fit_lte, fit_polar, fit_threshold
from ondevice_convert.fitted import Fitted
from ondevice_convert.samples import Samples

AUTO = "auto"
AUTO_PLACES = ("ffn",)
"""What the candidates of a budget need."""
TRAINED = ("spark",)
"""Methods that a model must be trained with."""
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Kind:
    """How a method is made.

    Args:
        keys: of its option, and what they are if not given.
        places: of `gather` that it needs.
        check: refuses options by OptionError, before any work.
        fit: makes it.
    """

    keys: Mapping[str, str]
    places: tuple[str, ...]
    check: Callable[[MethodOption, ModelSpec], None]
    fit: Callable[[Checkpoint, Samples, MethodOption, Progress], Fitted]


KINDS = {
    "cats": Kind(fit_threshold.CATS_KEYS, fit_threshold.CATS_PLACES, fit_threshold.check_cats, fit_threshold.fit_cats),
    "teal": Kind(fit_threshold.TEAL_KEYS, fit_threshold.TEAL_PLACES, fit_threshold.check_teal, fit_threshold.fit_teal),
    "lte": Kind(fit_lte.KEYS, ("ffn",), fit_lte.check_lte, fit_lte.fit_lte),
    "d2dmoe": Kind(fit_d2dmoe.KEYS, ("ffn",), fit_d2dmoe.check_d2dmoe, fit_d2dmoe.fit_d2dmoe),
    "polar": Kind(fit_polar.POLAR_KEYS, fit_polar.POLAR_PLACES, fit_polar.check_polar, fit_polar.fit_polar),
}


def parse(text: str) -> MethodOption:
    """What an option asks for.

    Raises:
        OptionError: an unknown method or key, or a method that conversion cannot make.
    """
    name = text.partition(":")[0]
    if name in TRAINED:
        raise OptionError(
            f"--sparsity {text}: {name} is how a model is trained from the start, so none can be converted to it; "
            f"take one of {', '.join((AUTO, *KINDS))}"
        )
    return MethodOption(text, *read_method(text, {AUTO: {}, **{name: kind.keys for name, kind in KINDS.items()}}))


def check(option: MethodOption, spec: ModelSpec) -> None:
    """Refuses what a model cannot have, by OptionError."""
    if option.method != AUTO:
        KINDS[option.method].check(option, spec)
