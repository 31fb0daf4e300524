"""The tokenizer inside a GGUF file: byte-level BPE, or SentencePiece's BPE by scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models

from ondevice.errors import CheckpointError, UnsupportedModelError
from ondevice.text.ends import write_ends
from ondevice.text.gguf_keys import PREFIX, GgufKeys
from ondevice.text.pieces import byte_alphabet
from ondevice.text.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from ondevice.text.sentencepiece_backend import SPACE, build_backend
from ondevice.text.sentencepiece_file import SentencePieceModel
from ondevice.text.source import TokenizerSource, TokenType, turn_ends


def read_gguf(metadata: Mapping[str, Any], path: Path) -> TokenizerSource:
    """Builds a tokenizer from a GGUF file's metadata.

    Args:
        metadata: key -> plain Python value.
        path: the file, for messages.

    Returns:
        The parts of the tokenizer.

    Raises:
        CheckpointError: a key is missing, has the wrong type or contradicts another.
        UnsupportedModelError: another kind of vocabulary or pre-tokenizer.
    """
    keys = GgufKeys(metadata, path)
    kind = keys.get("model", str)
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            path,
            f"vocabulary of kind {kind!r}; only 'gpt2' (byte-level BPE) and 'llama' (SentencePiece's BPE) can be read "
            "from a GGUF file. Use the model's Hub folder with its tokenizer.json",
            PREFIX + "model",
        )
    tokens = keys.tokens()
    types = keys.token_types(len(tokens))
    bos, eos = keys.token_id("bos_token_id", len(tokens)), keys.token_id("eos_token_id", len(tokens))
    if kind == "gpt2":
        pre = _pre_tokenizer(keys, path)
        adds_bos = pre.adds_bos and bos is not None
        backend = _byte_level(tokens, keys, pre)
    else:
        bos = _by_default(1, types) if bos is None else bos
        eos = _by_default(2, types) if eos is None else eos
        adds_bos = bos is not None
        backend = _by_scores(tokens, types, keys, path)
    ends = {keys.token_id(f"{name}_token_id", len(tokens)) for name in ("eot", "eom")} | {eos}
    stops = {token_id for token_id in ends if token_id is not None}
    named = stops | ({bos} if bos is not None else set())
    special = _add_tokens(backend, tokens, types, named, strips_right=_is_phi3(metadata))
    prefix = keys.end("add_bos_token", "bos_token_id", bos, default=adds_bos)
    suffix = keys.end("add_eos_token", "eos_token_id", eos, default=False)
    write_ends(backend, prefix, suffix)
    return TokenizerSource(
        backend=backend,
        path=path,
        vocab_size=len(tokens),
        special=special,
        bos_id=bos,
        eos_id=eos,
        prefix=prefix,
        suffix=suffix,
        stop_ids=frozenset(stops | turn_ends(special)),
        chat_template=keys.template(),
    )


def _pre_tokenizer(keys: GgufKeys, path: Path) -> PreTokenizer:
    name = keys.get("pre", str)
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModelError(
            path, f"pre-tokenizer {name!r} is not known here; known are {known}", PREFIX + "pre"
        )
    return PRE_TOKENIZERS[name]


def _in_utf8(byte: int) -> bool:
    return byte not in (0xC0, 0xC1) and byte < 0xF5


def _byte_level(tokens: list[str], keys: GgufKeys, pre: PreTokenizer) -> tokenizers.Tokenizer:
    ids = {text: index for index, text in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(ids, keys.merges(ids), ignore_merges=pre.ignore_merges))
    backend.pre_tokenizer = pre.build("".join(c for c, b in byte_alphabet().items() if c not in ids and _in_utf8(b)))
    backend.decoder = decoders.ByteLevel()
    return backend


def _by_scores(tokens: list[str], types: list[int], keys: GgufKeys, path: Path) -> tokenizers.Tokenizer:
    missing = {f"<0x{byte:02X}>" for byte in range(256)}.difference(tokens)
    if missing:
        problem = f"{min(missing)!r} is missing; without all byte tokens some texts have no ids. Fetch another file"
        raise CheckpointError(path, problem, PREFIX + "tokens")
    model = SentencePieceModel(
        # Rows that pad the vocabulary have no text; each needs one of its own here, and is never found.
        pieces=[text or f"{SPACE}<empty {index}>" for index, text in enumerate(tokens)],
        scores=keys.scores(len(tokens)),
        types=[TokenType(kind) if text else TokenType.UNUSED for text, kind in zip(tokens, types)],
        dummy_prefix=keys.get("add_space_prefix", bool, True),
    )
    return build_backend(model, raw_user_defined=True)


def _by_default(token_id: int, types: list[int]) -> int | None:
    """The usual id of BOS or EOS, for files that do not name it."""
    return token_id if token_id < len(types) and types[token_id] == TokenType.CONTROL else None


def _is_phi3(metadata: Mapping[str, Any]) -> bool:
    """Phi 3 was trained without white space behind special tokens, and its files do not say so."""
    name = str(metadata.get("general.name", "")).lower()
    return metadata.get(PREFIX + "model") == "llama" and ("phi-3" in name or "phi3" in name)


def _add_tokens(
    backend: tokenizers.Tokenizer, tokens: list[str], types: list[int], named: set[int], strips_right: bool
) -> dict[str, int]:
    """Marks special and user-defined tokens.

    Args:
        backend: the pipeline.
        tokens, types: the vocabulary.
        named: ids that the file gives a role.
        strips_right: they take the white space behind them, with a few exceptions.

    Returns:
        Text of every special token -> id.
    """
    # Plain numbers: looking an enumeration up for each of 100 000 tokens takes long.
    control, unknown, user_defined = map(int, (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED))
    special = {
        text: index
        for index, (text, kind) in enumerate(zip(tokens, types))
        if (kind in (control, unknown) or index in named) and text
    }
    keep_right = {"<unk>", "<s>", "<|endoftext|>"}
    backend.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False, rstrip=strips_right and text not in keep_right)
            for text in special
        ]
    )
    user = [t for t, kind in zip(tokens, types) if kind == user_defined and t and t not in special]
    backend.add_tokens([AddedToken(text, special=False, normalized=False, rstrip=strips_right) for text in user])
    return special
