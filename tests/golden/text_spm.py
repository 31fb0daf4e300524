"""Tiny SentencePiece models, trained on the fly."""

from __future__ import annotations

import functools
import io
import random
from typing import Any

import sentencepiece

from tests.golden.text_tiny import TEXTS

_WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "naïve",
    "café",
    "owners",
    "in",
    "Zürich",
    "say",
    "中文字符",
    "日本語テキスト",
    "to",
    "русский",
    "friends",
    "running",
    "runs",
    "runner",
    "hello",
    "world",
    "한국어",
    "12345",
    "3.14",
    "!?",
    "</s>",
    "<sep>",
    "http://a.b/c?d=e&f",
    "foo_bar",
]
LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True}
SPM_TEXTS = [
    *(
        "",
        " ",
        "  ",
        "a",
        " a",
        "  a  b ",
        "\n",
        "\n\n a",
        "▁",
        "▁▁a",
        "a▁b",
        "<0x41>",
        "<0x",
        "<s>",
        "</s>a",
        "a <s> b",
    ),
    *("<unk>", "a<unk> b", "<sep>", "a<sep>b", "a <sep> b", "<sep> <sep>", "<s> a </s> b", "<|end|> \n a", "x<|end|>"),
    *("the quick brown fox", " the  quick   brown    fox     ", "running runners run", "中文字符 日本語", "12345 3.14"),
]


def corpus() -> list[str]:
    """Sentences with words, indents and runs of spaces."""
    rng = random.Random(1)
    sentences = [" ".join(rng.choices(_WORDS, k=rng.randint(3, 12))) for _ in range(600)]
    return [*sentences, *TEXTS[:5] * 5, *["    indented code", "a   b    c"] * 20]


@functools.cache
def _trained(kind: str, options: tuple[tuple[str, Any], ...]) -> bytes:
    out = io.BytesIO()
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=out, model_type=kind, minloglevel=2, **given
    )
    return out.getvalue()


def train(kind: str, vocab_size: int, **options: Any) -> bytes:
    """A model file: kind is "bpe" or "unigram"; options are the trainer's."""
    hashable = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    return _trained(kind, tuple({"vocab_size": vocab_size, **hashable}.items()))


def gguf_vocabulary() -> dict[str, list[Any]]:
    """Tokens, scores and types as converters write them, with user-defined and control tokens behind the model."""
    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(train("bpe", 620, byte_fallback=True, **LLAMA))
    ids = range(model.get_piece_size())
    kinds = (("is_unknown", 2), ("is_control", 3), ("is_unused", 5), ("is_byte", 6))
    types = [next((kind for name, kind in kinds if getattr(model, name)(i)), 1) for i in ids]
    return {
        "tokens": [*map(model.id_to_piece, ids), "<sep>", "   ", "<|end|>", "<|endoftext|>"],
        "scores": [*map(model.get_score, ids), 0.0, -1000.0, 0.0, 0.0],
        "types": [*types, 4, 4, 3, 3],
    }
