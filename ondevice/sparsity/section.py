"""The section `sparsity` of a config.json: which method a model skips work with, and its settings."""

from __future__ import annotations

from ondevice.sparsity.d2dmoe import D2dmoe
from ondevice.sparsity.lte import Lte
from ondevice.sparsity.method import Method
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
    return METHODS[name].read(fields, spec)
