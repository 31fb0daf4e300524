"""Hub folders whose tokenizer is SentencePiece's tokenizer.model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ondevice.errors import CheckpointError, UnsupportedModelError
from ondevice.text.added_tokens import append_tokens, listed_tokens
from ondevice.text.ends import write_ends
from ondevice.text.sentencepiece_backend import build_backend
from ondevice.text.sentencepiece_file import SentencePieceModel, read_sentencepiece
from ondevice.text.source import TokenType

# Classes that put BOS before a text unless the folder says otherwise; without a class, too.
_ADD_BOS = frozenset({"", "LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "PreTrainedTokenizer"})


def read_sentencepiece_folder(
    path: Path, config: Mapping[str, Any], added: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Builds the pipeline of a folder with tokenizer.model.

    Args:
        path: the folder.
        config: tokenizer_config.json.
        added: added_tokens.json.

    Returns:
        The pipeline, and the texts of bos_token and eos_token where the folder does not name them.

    Raises:
        CheckpointError: a file is damaged or contradicts another.
        UnsupportedModelError: a tokenizer class whose ends are not known.
    """
    file = path / "tokenizer.model"
    model = read_sentencepiece(file)
    tokens = listed_tokens(path, config, added)
    _put_into(model, {i: token for i, token in tokens.items() if i < len(model.pieces)}, file)
    try:
        backend = build_backend(model, prefix_once=config.get("legacy") is False)
    except ValueError as error:
        raise CheckpointError(file, f"damaged normalization rules ({error}); fetch it again") from None
    control = (TokenType.CONTROL, TokenType.UNKNOWN)
    texts = [
        AddedToken(piece, special=True, normalized=False)
        for index, (piece, kind) in enumerate(zip(model.pieces, model.types))
        if kind in control and index not in tokens
    ]
    backend.add_special_tokens(texts)
    append_tokens(backend, tokens, path)
    named = {"bos_token": model.bos_id, "eos_token": model.eos_id}
    names = {key: model.pieces[token_id] for key, token_id in named.items() if token_id is not None}
    write_ends(backend, _prefix(backend, names | dict(config), path), ())
    return backend, names


def _put_into(model: SentencePieceModel, tokens: Mapping[int, AddedToken], file: Path) -> None:
    """Writes tokens that the folder gives ids of the model into it; some replace a piece that was kept free."""
    ids = {piece: index for index, piece in enumerate(model.pieces)}
    for index, token in tokens.items():
        if ids.get(token.content, index) != index:
            raise CheckpointError(
                file.parent, f"{token.content!r} has the id {index}, but {ids[token.content]} in {file.name}"
            )
        if model.pieces[index] != token.content:
            model.pieces[index], model.types[index] = token.content, TokenType.CONTROL


def _prefix(backend: tokenizers.Tokenizer, config: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if isinstance(config.get("add_bos_token"), bool):
        wanted = config["add_bos_token"]
    elif kind in _ADD_BOS:
        wanted = True
    else:
        raise UnsupportedModelError(
            path / "tokenizer_config.json",
            f"{kind!r} with tokenizer.model only, and nothing says whether BOS is put before a text; "
            "add add_bos_token, or use a copy that has tokenizer.json",
            "tokenizer_class",
        )
    name = config.get("bos_token")
    text = name.get("content") if isinstance(name, dict) else name
    bos = backend.token_to_id(text) if wanted and isinstance(text, str) else None
    return () if bos is None else (bos,)
