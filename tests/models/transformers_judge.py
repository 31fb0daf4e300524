"""The cases as models of the `transformers` library. Needs the extra `judges`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from ondevice.checkpoint.names import hub_layout
from ondevice.spec_hub import spec_from_config
from tests.tiny import stored_tensors

torch.set_num_threads(1)  # models this small only wait for each other's threads
VERSIONS = f"transformers {transformers.__version__}, torch {torch.__version__}"


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Makes the library compute in float64 even where its models ask for float32: rope, norms and softmax.

    Models must be built inside. What is left of the difference to us is then our own error.
    """
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def build(config: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]]) -> Any:
    """A float32 model with plain ("eager") attention.

    Args:
        config: as in a config.json.
        tensors: by canonical name; exactly the model's parameters.
    """
    settings = transformers.AutoConfig.for_model(**copy.deepcopy(config))  # it writes into what it is given
    model = transformers.AutoModelForCausalLM.from_config(
        settings, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    stored = stored_tensors(spec_from_config(config, Path("config.json")), tensors)
    state = {name: torch.from_numpy(values) for name, values in stored.items()}
    if settings.tie_word_embeddings:
        state["lm_head.weight"] = state[hub_layout(config["model_type"]).name("embed.weight")]
    model.load_state_dict(state, strict=True)
    return model


@torch.no_grad()
def full_logits(model: Any, ids: Any) -> NDArray[Any]:
    """Logits of every position in one pass: [N, vocab]."""
    return model(torch.tensor([ids.tolist()]), use_cache=False).logits[0].numpy()


@torch.no_grad()
def cached_logits(model: Any, ids: Any) -> NDArray[Any]:
    """Logits of every position, token by token with the library's own cache: [N, vocab]."""
    cache = transformers.DynamicCache(config=model.config)
    steps = [model(torch.tensor([[int(i)]]), past_key_values=cache, use_cache=True) for i in ids]
    return np.concatenate([step.logits[0].numpy() for step in steps])


def load(folder: Path) -> Any:
    """A float32 model of a folder that somebody wrote, every parameter of it from there."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def with_vision(config: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]]) -> Any:
    """A Gemma 3 with a small vision tower around the text model of a case."""
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = transformers.Gemma3Config(
        text_config=copy.deepcopy(dict(config)), vision_config={**tower, "image_size": 28, "patch_size": 14}
    )
    settings._attn_implementation = "eager"
    model = transformers.Gemma3ForConditionalGeneration(settings).eval()
    text = build(config, tensors).model.state_dict()
    model.model.language_model.load_state_dict(text, strict=True)
    return model
