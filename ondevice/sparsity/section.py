"""The section `sparsity` of a config.json: which method a model skips work with, and its settings."""

from __future__ import annotations

from dataclasses import replace

from ondevice.sparsity.d2dmoe import D2dmoe
from ondevice.sparsity.lte import Lte
from ondevice.sparsity.method import DENSITY, Method
from ondevice.sparsity.polar import Polar
from ondevice.sparsity.spark import Spark
from ondevice.sparsity.threshold import Cats, Teal
from ondevice.spec import ModelSpec
from ondevice.spec_fields import Fields

KEY = "sparsity"
METHODS: dict[str, type[Method]] = {method.name: method for method in (Polar, Spark, Lte, D2dmoe, Teal, Cats)}


def read_section(config: Fields, spec: ModelSpec) -> Method | None:
    """The method of a model.

    Args:
        config: contents of its config.json.
        spec: its sizes and features, as of a dense model.

    Returns:
        None where there is no section: the model is dense.

    Raises:
        CheckpointError: unknown or impossible settings.
    """
    if config.raw(KEY, None) is None:
        return None
    values = config.sub(KEY).values
    fields = Fields(values, config.path, section=f"{KEY}.")
    name = fields.text("method")
    if name not in METHODS:
        raise fields.unsupported("method", f"{name[:60]!r} is not supported; supported: {', '.join(METHODS)}")
    own = replace(fields, values={key: value for key, value in values.items() if key != DENSITY})
    method = METHODS[name].read(own, spec)
    if fields.raw(DENSITY, None) is None:
        return method
    if METHODS[name].density is not Method.density:
        raise fields.error(DENSITY, f"{name} says elsewhere how much it keeps; take it out")
    densities = fields.numbers(DENSITY, spec.n_layers)
    if max(densities) > 1:
        raise fields.error(DENSITY, f"{max(densities):g} is no part of a layer; give numbers above 0, up to 1")
    return replace(method, densities=densities)
