"""ModelSpec from a Hub `config.json`, and back.

Each family is one line in FAMILIES. Keys that are left out take the defaults of the `transformers` library, since
that is what the authors of such files relied on. Nothing in a configuration is ever executed: `auto_map`,
`model_file` and other keys that name code are not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ondevice import spec_hub_gemma as gemma
from ondevice import spec_hub_gpt as gpt
from ondevice import spec_hub_llama as llama
from ondevice.errors import UnsupportedModelError
from ondevice.sparsity.section import KEY as SECTION
from ondevice.sparsity.section import read_section
from ondevice.spec import ModelSpec
from ondevice.spec_fields import Fields, check_spec


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """One value of model_type.

    Args:
        read: spec of a configuration.
        write: keys that stand for a spec of this architecture; None if it is written as another one.
        model_class: what transformers calls the model.
        norm_offset: what is added to the weights of norms.
    """

    read: Callable[[Fields], ModelSpec]
    write: Callable[[ModelSpec], dict[str, Any]] | None
    model_class: str = ""
    norm_offset: float = 0.0


FAMILIES = {
    "llama": Family(llama.read_llama, llama.write_llama, "LlamaForCausalLM"),
    "mistral": Family(llama.read_mistral, llama.write_mistral, "MistralForCausalLM"),
    "qwen2": Family(llama.read_qwen2, llama.write_qwen2, "Qwen2ForCausalLM"),
    "qwen3": Family(llama.read_qwen3, llama.write_qwen3, "Qwen3ForCausalLM"),
    "phi3": Family(llama.read_phi3, llama.write_phi3, "Phi3ForCausalLM"),
    "gemma2": Family(gemma.read_gemma2, gemma.write_gemma2, "Gemma2ForCausalLM", norm_offset=1.0),
    "gemma3_text": Family(gemma.read_gemma3_text, gemma.write_gemma3_text, "Gemma3ForCausalLM", norm_offset=1.0),
    "gemma3": Family(gemma.read_gemma3, None),
    "gpt2": Family(gpt.read_gpt2, gpt.write_gpt2, "GPT2LMHeadModel"),
    "opt": Family(gpt.read_opt, gpt.write_opt, "OPTForCausalLM"),
}


def spec_from_config(config: Mapping[str, Any], path: Path) -> ModelSpec:
    """Reads the spec of a Hub configuration.

    Args:
        config: contents of a config.json.
        path: that file, for messages.

    Raises:
        UnsupportedModelError: model type or feature that this version does not have.
        CheckpointError: settings that are missing, out of range or contradict each other.
    """
    fields = Fields(config, path)
    model_type = fields.text("model_type")
    family = FAMILIES.get(model_type)
    if family is None:
        raise fields.unsupported(
            "model_type", f"{model_type[:60]!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    spec = family.read(fields)
    return check_spec(dataclasses.replace(spec, sparsity=read_section(fields, check_spec(spec, path))), path)


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """Hub configuration that stands for a spec.

    Args:
        spec: of a supported architecture, as Hub checkpoints have it (see `as_on_hub`).

    Returns:
        Keys and values for a config.json; `spec_from_config` of them gives the same spec.

    Raises:
        UnsupportedModelError: the architecture's configuration has no words for a feature of this spec.
    """
    family = FAMILIES[spec.architecture]
    assert family.write is not None, spec.architecture
    config = {
        "architectures": [family.model_class],
        "model_type": spec.architecture,
        **family.write(spec),
    }
    if spec.sparsity is not None:
        config[SECTION] = spec.sparsity.document()
    _check_same(spec, spec_from_config(config, Path("config.json")))
    return config


def as_on_hub(spec: ModelSpec) -> ModelSpec:
    """The spec with the norm offset of Hub checkpoints, from which that of other files may differ."""
    return dataclasses.replace(spec, norm_offset=FAMILIES[spec.architecture].norm_offset)


def _check_same(spec: ModelSpec, read_back: ModelSpec) -> None:
    names = [f.name for f in dataclasses.fields(spec)]
    lost = [name for name in names if getattr(spec, name) != getattr(read_back, name)]
    if lost:
        raise UnsupportedModelError(
            Path("config.json"), f"a {spec.architecture} configuration cannot express its {', '.join(lost)}"
        )
