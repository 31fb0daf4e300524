"""Tiny tokenizers, trained on the fly, as Hub folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from ondevice.errors import CheckpointError
from ondevice.text.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  leading spaces,   runs of them    and trailing ones   ",
    "line\n\n\nbreaks\r\nand\ttabs\n",
    "def f(x):\n    if x:\n        return x + 1  # ok\n",
    "中文字符，日本語テキスト、한국어 텍스트",
    "naïve café — “quotes” … №1",
    "👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 1️⃣",
    "हिन्दी العربية русский ไทย e\u0301",
    "<|im_end|> typed </s> by a user <0x41>",
    "",
    " ",
    "\n",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Contents directly one after the other, and after text of the template that begins a special token.
BARE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ '<|im_' }}{{ messages[0]['content'] }}"


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE with ChatML's special tokens and <tool>, an added token that is not special."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2: spaces as U+2581, one put in front, unknown characters as bytes, BOS in front."""
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=specials + [f"<0x{byte:02X}>" for byte in range(256)],
        limit_alphabet=60,
        show_progress=False,
    )
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(TEXTS[:5] * 3, trainer)
    # The trainer marks the bytes as special; in real files they are ordinary entries of the vocabulary.
    spec = json.loads(trained.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in specials]
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], pair=["<s>", "$A", "<s>", "$B"], special_tokens=[("<s>", 1)]
    )
    return backend


def metaspace() -> tokenizers.Tokenizer:
    """Unigram with the Metaspace pre-tokenizer and decoder; EOS behind every text."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    return backend


def write_folder(folder: Path, backend: tokenizers.Tokenizer, **files: Any) -> Path:
    """Writes tokenizer.json and further JSON files, named without their ending."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def must_name_damage(folder: Path, name: str, text: str, word: str) -> None:
    """A tokenizer's folder is refused in words that match, once one of its files has this text."""
    (folder / name).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=word):
        Tokenizer.from_folder(folder)
