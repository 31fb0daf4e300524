"""Models that tests share: a tiny random one that can chat, and the real one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ondevice.errors import ModelNotFoundError
from tests.msl.fixture import metal as metal
from tests.msl.fixture import pytest_terminal_summary as pytest_terminal_summary
from tests.tiny import tiny_checkpoint, tiny_spec

TEXT = "The quick brown fox jumps over the lazy dog. Why is the sky blue? Hello there, how are you today? " * 4
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VOCAB = 320


def write_tokenizer(folder: Path, template: str | None = TEMPLATE, text: str = TEXT, vocab: int = VOCAB) -> None:
    """Adds a byte-level tokenizer of at most `vocab` tokens, trained on `text`, to a checkpoint's folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session", autouse=True)
def no_tile_cache():
    """Keeps tests, and the processes that they start, out of the user's own cache of packed weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONDEVICE_NO_TILE_CACHE", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def own_measurements(tmp_path_factory):
    """Keeps what tests measure out of the user's own cache."""
    folder = tmp_path_factory.mktemp("measurements")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ondevice.sparsity.measurements.folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    """Folder of a random llama with a tokenizer and a chat template; context 128."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model", tiny_spec(vocab_size=VOCAB))
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_path):
    """The tiny model on the reference backend: nothing to compile, every run the same."""
    import ondevice

    return ondevice.load(tiny_path, backend="reference")


@pytest.fixture(scope="session")
def tiny_cpu(tiny_path):
    """The tiny model on the CPU backend, two threads."""
    import ondevice

    return ondevice.load(tiny_path, backend="cpu", threads=2)


@pytest.fixture(scope="session")
def trained_relu(request, tmp_path_factory):
    """A tiny trained ReLU model (`tests.trained`); pytest's cache keeps it for later runs."""
    for module in ("torch", "transformers"):
        pytest.importorskip(module, reason="the extra `judges` is not installed")
    from tests.trained import trained

    cache = getattr(request.config, "cache", None)
    parent = tmp_path_factory.mktemp("trained") if cache is None else cache.mkdir("trained")
    return trained(Path(parent))


@pytest.fixture(scope="session")
def smollm2_path():
    """SmolLM2-135M-Instruct: the file that ONDEVICE_TEST_MODEL names, or the store's, fetched once."""
    given = os.environ.get("ONDEVICE_TEST_MODEL")
    if given:
        assert Path(given).exists(), f"ONDEVICE_TEST_MODEL={given}: no such file"
        return Path(given)
    from ondevice.checkpoint import store

    try:
        return store.resolve("smollm2")
    except ModelNotFoundError:
        print("\nfetching smollm2 (93 MB) into the store, once")
        return store.pull("smollm2")


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_path):
    """The real model's tokenizer."""
    from ondevice.checkpoint import open_checkpoint

    with open_checkpoint(smollm2_path) as checkpoint:
        return checkpoint.tokenizer()


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    """The real model on the CPU backend."""
    import ondevice

    return ondevice.load(smollm2_path, backend="cpu")
