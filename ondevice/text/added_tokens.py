"""Tokens that a Hub folder lists beside its vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ondevice.errors import CheckpointError


def listed_tokens(path: Path, config: Mapping[str, Any], added: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Tokens of tokenizer_config.json and added_tokens.json.

    Args:
        path: the folder, for messages.
        config: tokenizer_config.json; its added_tokens_decoder goes before the other file.
        added: added_tokens.json, text -> id.

    Returns:
        Id -> token, by id.

    Raises:
        CheckpointError: an entry is not of that form, or an id or a text stands twice.
    """
    tokens = {}
    file = path / "added_tokens.json"
    for name, token_id in added.items():
        if type(token_id) is not int or token_id < 0 or token_id in tokens or not name:
            raise CheckpointError(file, f"the id {token_id!r}; an id of its own is needed, fetch the file again", name)
        tokens[token_id] = AddedToken(name, normalized=False)
    decoder = config.get("added_tokens_decoder")
    file = path / "tokenizer_config.json"
    for key, entry in decoder.items() if isinstance(decoder, dict) else ():
        text = entry.get("content") if isinstance(entry, dict) else None
        if not (key.isascii() and key.isdigit()) or len(key) > 9 or not isinstance(text, str) or not text:
            raise CheckpointError(file, f"{key!r}: {entry!r:.80} is no token; fetch it again", "added_tokens_decoder")
        flags = {name: entry.get(name) is True for name in ("single_word", "lstrip", "rstrip", "special")}
        tokens[int(key)] = AddedToken(text, normalized=False, **flags)
    texts = [token.content for token in tokens.values()]
    twice = next((text for text in texts if texts.count(text) > 1), None) if len(set(texts)) < len(texts) else None
    if twice is not None:
        raise CheckpointError(path, f"the added token {twice!r} has two ids; fetch its tokenizer files again")
    return dict(sorted(tokens.items()))


def append_tokens(backend: tokenizers.Tokenizer, tokens: Mapping[int, AddedToken], path: Path) -> None:
    """Adds tokens to a pipeline.

    Args:
        backend: the pipeline.
        tokens: id -> token, by id; those inside the vocabulary have their texts there.
        path: the folder, for messages.

    Raises:
        CheckpointError: the library gives one another id, as there is a gap before it.
    """
    backend.add_tokens(list(tokens.values()))
    for token_id, token in tokens.items():
        got = backend.token_to_id(token.content)
        if got != token_id:
            raise CheckpointError(
                path,
                f"the added token {token.content!r} has the id {token_id}, but {got} is the next free one; "
                "use a copy that has tokenizer.json",
            )
