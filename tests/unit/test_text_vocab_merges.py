"""Folders with vocab.json and merges.txt."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from ondevice.errors import CheckpointError, UnsupportedModelError
from ondevice.text.tokenizer import Tokenizer
from tests.golden.text_random import random_texts
from tests.golden.text_tiny import TEXTS, byte_level, must_name_damage

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    byte_level().model.save(str(folder))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def texts() -> list[str]:
    return [*TEXTS, *(text.encode(errors="replace").decode() for text in random_texts(200, seed=40))]


def test_gpt2_ids_are_the_librarys(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path))
    library = byte_level()
    library.encode_special_tokens = True
    for text in texts():
        text = text.replace("<tool>", "")
        assert tokenizer.encode(text) == library.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids, tokenizer.add_bos) == (0, 0, {0}, False)


def test_qwen2_splits_in_its_own_way(tmp_path: Path) -> None:
    decoder = {"1": {"content": "<|im_start|>", "special": True}, "400": {"content": "<|new|>", "special": True}}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder, "eos_token": "<|endoftext|>"}
    size = byte_level().get_vocab_size(with_added_tokens=False)
    decoder[str(size)] = decoder.pop("400")
    tokenizer = Tokenizer.from_folder(write(tmp_path, tokenizer_config=config))
    library = byte_level()
    library.encode_special_tokens = True
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_QWEN2), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    for text in texts():
        text = text.replace("<tool>", "")
        assert tokenizer.encode(text) == library.encode(text).ids
    assert tokenizer.encode("<|im_start|>a<|new|>", parse_special=True)[::2] == [1, size]
    assert (tokenizer.bos_id, tokenizer.special_ids) == (None, {0, 1, size})


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("vocab.json", "{}", "empty"),
        ("vocab.json", '{"a": 1}', "ids from 0 to 0"),
        ("vocab.json", '{"a": 0, "b": 0}', "ids from 0 to 1"),
        ("vocab.json", '{"a": 0, "b": "1"}', "ids from 0 to 1"),
        ("vocab.json", "[]", "a JSON object"),
        ("merges.txt", "#version: 0.2\nab\n", "line 2: 'ab' is no merge"),
        ("merges.txt", "a b c\n", "line 1"),
        ("merges.txt", "zq zq\n", "line 1"),
        ("merges.txt", "\xff\xfe", "not UTF-8"),
        ("added_tokens.json", '{"<x>": 100000}', "'<x>' has the id 100000"),
    ],
)
def test_damaged_files_are_named(name: str, text: str, word: str, tmp_path: Path) -> None:
    must_name_damage(write(tmp_path), name, text, word)


def test_other_classes_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="tokenizer_class: 'RobertaTokenizer'"):
        Tokenizer.from_folder(write(tmp_path, tokenizer_config={"tokenizer_class": "RobertaTokenizerFast"}))
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match="missing, as are tokenizer"):
        Tokenizer.from_folder(tmp_path)
