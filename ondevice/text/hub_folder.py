"""The tokenizer in a Hub folder: tokenizer.json, or what older models have, and the small files around it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ondevice.errors import CheckpointError
from ondevice.text.ends import read_ends
from ondevice.text.sentencepiece_folder import read_sentencepiece_folder
from ondevice.text.source import TokenizerSource, turn_ends
from ondevice.text.vocab_merges import read_vocab_merges

_MAX_JSON_BYTES = 64 * 2**20
_MAX_TOKENIZER_BYTES = 512 * 2**20


def read_folder(path: Path) -> TokenizerSource:
    """Reads a tokenizer from a Hub folder. No code from the folder is run.

    Args:
        path: the folder.

    Returns:
        The parts of the tokenizer.

    Raises:
        CheckpointError: a file is missing, damaged or contradicts another.
        UnsupportedModelError: the folder has a tokenizer of another kind.
    """
    config = _read_json(path / "tokenizer_config.json")
    token_map = _read_json(path / "special_tokens_map.json")
    backend, names = _read_backend(path, config)
    # What the vocabulary's own file calls them counts last.
    token_map = names | token_map
    special = _special_tokens(backend, config, token_map)
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in special if not _is_added(backend, text)]
    )
    generation = _read_json(path / "generation_config.json")
    model = _read_json(path / "config.json")
    if isinstance(model.get("text_config"), dict):
        model = model["text_config"] | {k: v for k, v in model.items() if v is not None}
    # What the model was published with for generating is more careful than its architecture's defaults.
    ids_from = generation if generation.get("eos_token_id") is not None else model
    ids_file = path / ("generation_config.json" if ids_from is generation else "config.json")
    listed = _ids(ids_from, "eos_token_id", backend, ids_file)

    bos = _named_id("bos_token", backend, config, token_map)
    if bos is None and not any("bos_token" in names for names in (config, token_map)):
        bos = next(iter(_ids(ids_from, "bos_token_id", backend, ids_file)), None)
    eos = _named_id("eos_token", backend, config, token_map)
    if eos is None:
        eos = next(iter(listed), None)
    prefix, suffix = read_ends(backend)
    return TokenizerSource(
        backend=backend,
        path=path,
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        special=special,
        bos_id=bos,
        eos_id=eos,
        prefix=_with_end(prefix, "bos", bos, config, path),
        suffix=_with_end(suffix, "eos", eos, config, path),
        stop_ids=frozenset(listed) | turn_ends(special) | ({eos} if eos is not None else set()),
        chat_template=_chat_template(path, config),
    )


def _read_backend(path: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The pipeline, and the texts of bos_token and eos_token that the folder need not name."""
    file = path / "tokenizer.json"
    if file.is_file():
        return _read_tokenizer_json(file), {}
    added = _read_json(path / "added_tokens.json")
    if (path / "tokenizer.model").is_file():
        return read_sentencepiece_folder(path, config, added)
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return read_vocab_merges(path, config, _read_json(path / "vocab.json"), added)
    raise CheckpointError(
        file, "missing, as are tokenizer.model, and vocab.json with merges.txt; fetch the model's tokenizer files"
    )


def _read_tokenizer_json(file: Path) -> tokenizers.Tokenizer:
    if file.stat().st_size > _MAX_TOKENIZER_BYTES:
        raise CheckpointError(file, f"larger than {_MAX_TOKENIZER_BYTES // 2**20} MiB")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for a damaged file
        raise CheckpointError(file, f"not a tokenizer that can be read ({error}); fetch it again") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise CheckpointError(file, f"larger than {_MAX_JSON_BYTES // 2**20} MiB")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file, f"not JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(file, f"a JSON object expected, not {type(value).__name__}")
    return value


def _content(entry: Any) -> str | None:
    """Text of a token entry, which is a text or an object with its options."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) and text else None


def _is_added(backend: tokenizers.Tokenizer, text: str) -> bool:
    return any(t.special and t.content == text for t in backend.get_added_tokens_decoder().values())


def _special_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], token_map: Mapping[str, Any]
) -> dict[str, int]:
    """Special tokens of all files that have an id; a name without one has no row in the model."""
    texts = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    for names in (config, token_map):
        entries = [names.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")]
        more = names.get("additional_special_tokens")
        texts += [text for e in (*entries, *(more if isinstance(more, list) else ())) if (text := _content(e))]
    added = config.get("added_tokens_decoder")
    for entry in added.values() if isinstance(added, dict) else ():
        if isinstance(entry, dict) and entry.get("special") is True and (text := _content(entry)):
            texts.append(text)
    return {text: i for text in texts if (i := backend.token_to_id(text)) is not None}


def _named_id(name: str, backend: tokenizers.Tokenizer, *files: Mapping[str, Any]) -> int | None:
    text = next((text for names in files if (text := _content(names.get(name)))), None)
    return None if text is None else backend.token_to_id(text)


def _ids(values: Mapping[str, Any], key: str, backend: tokenizers.Tokenizer, file: Path) -> list[int]:
    value = values.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if type(token_id) is not int:
            raise CheckpointError(file, f"an id or a list of ids expected, not {value!r}", key)
        if token_id < 0 or backend.id_to_token(token_id) is None:
            raise CheckpointError(file, f"{token_id} is not in the tokenizer's vocabulary", key)
    return ids


def _with_end(
    ends: tuple[int, ...], kind: str, token_id: int | None, config: Mapping[str, Any], path: Path
) -> tuple[int, ...]:
    """The ends with or without BOS or EOS, where tokenizer_config.json says which."""
    key = f"add_{kind}_token"
    wanted = config.get(key)
    if not isinstance(wanted, bool) or wanted == (token_id in ends):
        return ends
    if not wanted:
        return tuple(i for i in ends if i != token_id)
    if token_id is None:
        raise CheckpointError(path / "tokenizer_config.json", f"true, but there is no {kind}_token", key)
    return (token_id, *ends) if kind == "bos" else (*ends, token_id)


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(file, f"larger than {_MAX_JSON_BYTES // 2**20} MiB")
        try:
            return file.read_text(encoding="utf-8") or None
        except UnicodeDecodeError as error:
            raise CheckpointError(file, f"not UTF-8 ({error})") from error
    for source, values in (
        ("chat_template.json", _read_json(path / "chat_template.json")),
        ("tokenizer_config.json", config),
    ):
        template = values.get("chat_template")
        if isinstance(template, list):
            named = {e.get("name"): e.get("template") for e in template if isinstance(e, dict)}
            template = named.get("default")
        if template is not None and not isinstance(template, str):
            raise CheckpointError(path / source, "a text or a list with one named 'default' expected", "chat_template")
        if template:
            return template
    return None
