"""Hub folders with byte-level BPE in vocab.json and merges.txt, as GPT-2 and the first Qwen2 have it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from ondevice.errors import CheckpointError, UnsupportedModelError
from ondevice.text.added_tokens import append_tokens, listed_tokens

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_CLASSES = frozenset({"", "GPT2Tokenizer", "CodeGenTokenizer"})
_END = "<|endoftext|>"


def read_vocab_merges(
    path: Path, config: Mapping[str, Any], vocabulary: Mapping[str, Any], added: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Builds the pipeline of a folder with vocab.json and merges.txt.

    Args:
        path: the folder.
        config: tokenizer_config.json.
        vocabulary: vocab.json.
        added: added_tokens.json.

    Returns:
        The pipeline, and the texts of bos_token and eos_token where the folder does not name them.

    Raises:
        CheckpointError: a file is damaged or contradicts another.
        UnsupportedModelError: a tokenizer class that splits in another way.
    """
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if kind not in _GPT2_CLASSES and kind != "Qwen2Tokenizer":
        raise UnsupportedModelError(
            path / "tokenizer_config.json",
            f"{kind!r} with vocab.json and merges.txt only; known are GPT2Tokenizer, CodeGenTokenizer and "
            "Qwen2Tokenizer. Use a copy that has tokenizer.json",
            "tokenizer_class",
        )
    ids = _ids(path / "vocab.json", vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(ids, _merges(path / "merges.txt", ids)))
    if kind == "Qwen2Tokenizer":
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(_QWEN2), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    else:
        with_space = config.get("add_prefix_space") is True
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=with_space)
    backend.decoder = decoders.ByteLevel()
    append_tokens(backend, listed_tokens(path, config, added), path)
    if backend.token_to_id(_END) is None:
        return backend, {}
    return backend, {"eos_token": _END} if kind == "Qwen2Tokenizer" else {"bos_token": _END, "eos_token": _END}


def _ids(file: Path, vocabulary: Mapping[str, Any]) -> dict[str, int]:
    if not vocabulary:
        raise CheckpointError(file, "empty; fetch it again")
    if any(type(token_id) is not int for token_id in vocabulary.values()) or set(vocabulary.values()) != set(
        range(len(vocabulary))
    ):
        raise CheckpointError(file, f"ids from 0 to {len(vocabulary) - 1} expected, each once; fetch it again")
    return dict(vocabulary)


def _merges(file: Path, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(file, f"not UTF-8 ({error}); fetch it again") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.rstrip("\r").partition(" ")
        if not right or not {left, right, left + right} <= ids.keys():
            raise CheckpointError(file, f"line {number}: {line!r:.80} is no merge of two tokens; fetch it again")
        pairs.append((left, right))
    return list(dict.fromkeys(pairs))
