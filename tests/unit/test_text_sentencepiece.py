"""Folders with tokenizer.model: ids are SentencePiece's own, damaged files are refused."""

import functools
import json
import random
import struct
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import models, normalizers

from ondevice.errors import CheckpointError, UnsupportedModelError
from ondevice.text.sentencepiece_backend import check_charsmap
from ondevice.text.sentencepiece_file import read_sentencepiece
from ondevice.text.tokenizer import Tokenizer
from tests.golden.text_random import random_texts
from tests.golden.text_spm import LLAMA, SPM_TEXTS, corpus, train
from tests.golden.text_tiny import TEXTS

KINDS: dict[str, Any] = {
    "llama": {"kind": "bpe", "vocab_size": 620, "byte_fallback": True, **LLAMA},
    "gemma": {
        "kind": "bpe",
        "vocab_size": 620,
        "byte_fallback": True,
        "add_dummy_prefix": False,
        **LLAMA,
        "user_defined_symbols": ["\n\n", "▁▁", "<tab>"],
    },
    "bpe without bytes": {"kind": "bpe", "vocab_size": 400, **LLAMA},
    "bpe with symbols": {
        "kind": "bpe",
        "vocab_size": 620,
        "byte_fallback": True,
        **LLAMA,
        "user_defined_symbols": ["<sep>", "ab"],
        "control_symbols": ["<ctl>"],
    },
    "bpe nfkc": {"kind": "bpe", "vocab_size": 400},
    "unigram": {"kind": "unigram", "vocab_size": 110},
    "unigram nfkc_cf": {"kind": "unigram", "vocab_size": 110, "normalization_rule_name": "nmt_nfkc_cf"},
    "unigram with bytes": {"kind": "unigram", "vocab_size": 375, "byte_fallback": True, **LLAMA},
    "unigram with symbols": {
        "kind": "unigram",
        "vocab_size": 380,
        "byte_fallback": True,
        "user_defined_symbols": ["<sep>", "ab"],
        "control_symbols": ["<ctl>"],
    },
}


def model_of(kind: str, **options: Any) -> bytes:
    return train(**{**KINDS[kind], **options})


def write(folder: Path, model: bytes, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


@functools.cache
def texts() -> list[str]:
    rng = random.Random(4)
    parts = [
        " ",
        "  ",
        "a",
        "b",
        "ab",
        "aa",
        "the",
        "qu",
        "ick",
        "▁",
        "run",
        "ning",
        "n",
        "1",
        "23",
        "\n",
        "中",
        "<sep>",
    ]
    mixed = ["".join(rng.choices(parts, k=rng.randint(1, 12))) for _ in range(700)]
    well_formed = [text.encode(errors="replace").decode() for text in random_texts(700, seed=30)]
    return [*well_formed, *mixed, *SPM_TEXTS, *TEXTS, "<ctl>x", "<sep>ab <sep> abba"]


def is_plain(text: str) -> bool:
    """Without combining marks: the `tokenizers` library applies compiled rules to whole graphemes."""
    return not any(unicodedata.category(char)[0] == "M" for char in text)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_sentencepieces(kind: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path, model_of(kind)))
    judge = sentencepiece.SentencePieceProcessor(model_proto=model_of(kind))
    compiled = bool(read_sentencepiece(tmp_path / "tokenizer.model").charsmap)
    compared = [text for text in texts() if not compiled or is_plain(text)]
    assert len(compared) > 700
    for text in compared:
        assert tokenizer.encode(text, add_special=False) == judge.encode(text), repr(text)
    assert tokenizer.vocab_size == judge.get_piece_size()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (judge.bos_id(), judge.eos_id())
    assert tokenizer.encode("a") == [judge.bos_id(), *judge.encode("a")]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_come_out_as_sentencepiece_decodes_them(kind: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path, model_of(kind)))
    judge = sentencepiece.SentencePieceProcessor(model_proto=model_of(kind))
    for text in corpus()[:100] + texts()[:200]:
        ids = judge.encode(text)
        if judge.unk_id() not in ids:
            assert tokenizer.decode(ids) == judge.decode(ids), repr(text)
    if KINDS[kind].get("byte_fallback") and "normalization_rule_name" in KINDS[kind]:
        for text in texts():
            assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_a_saved_tokenizer_json_of_the_same_gives_the_same(tmp_path: Path) -> None:
    """Built here as converters build it: merges from scores, a space before each part of a text."""
    file = write(tmp_path / "a", model_of("llama")) / "tokenizer.model"
    model = read_sentencepiece(file)
    ids = {piece: i for i, piece in enumerate(model.pieces)}
    merges = [
        (model.scores[i], (piece[:cut], piece[cut:]))
        for piece, i in ids.items()
        for cut in range(1, len(piece))
        if model.types[i] == 1 and piece[:cut] in ids and piece[cut:] in ids
    ]
    merges.sort(key=lambda merge: -merge[0])
    library = tokenizers.Tokenizer(
        models.BPE(ids, [pair for _, pair in merges], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = Tokenizer.from_folder(tmp_path / "a")
    (tmp_path / "b").mkdir()
    tokenizer.save(tmp_path / "b")
    assert not (tmp_path / "b" / "tokenizer.model").exists()
    again = Tokenizer.from_folder(tmp_path / "b")
    for text in texts():
        expected = library.encode(text).ids
        assert tokenizer.encode(text, add_special=False, parse_special=True) == expected
        assert again.encode(text, add_special=False, parse_special=True) == expected
        assert again.decode(expected, skip_special=False) == tokenizer.decode(expected, skip_special=False)
    assert (again.bos_id, again.stop_ids, again.encode("a")) == (1, {2}, tokenizer.encode("a"))


@pytest.mark.parametrize("kind", ["gemma", "bpe nfkc", "bpe with symbols", "unigram", "unigram with symbols"])
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    first = Tokenizer.from_folder(write(tmp_path / "a", model_of(kind)))
    (tmp_path / "b").mkdir()
    first.save(tmp_path / "b")
    second = Tokenizer.from_folder(tmp_path / "b")
    for text in texts():
        ids = first.encode(text, parse_special=True)
        assert second.encode(text, parse_special=True) == ids
        assert second.decode(ids) == first.decode(ids)
    assert second.special_ids == first.special_ids


def test_special_tokens_and_what_follows_them(tmp_path: Path) -> None:
    old = Tokenizer.from_folder(write(tmp_path / "old", model_of("llama")))
    new = Tokenizer.from_folder(write(tmp_path / "new", model_of("llama"), tokenizer_config={"legacy": False}))
    quick = old.encode("the", add_special=False)
    inside = new.encode("athe", add_special=False)[1:]
    assert old.encode("<s>the", parse_special=True) == [1, *quick]
    assert new.encode("<s>the", parse_special=True) == [1, *inside] != [1, *quick]
    assert new.encode("the") == [1, *quick]
    assert not old.special_ids & set(old.encode("<s>the</s><unk>", add_special=False))


def test_added_tokens(tmp_path: Path) -> None:
    size = 620
    decoder = {
        "0": {"content": "<unk>", "special": True},
        "7": {"content": "<|im_start|>", "special": True},
        str(size + 1): {"content": "<|im_end|>", "special": True},
    }
    config = {"added_tokens_decoder": decoder, "eos_token": "<|im_end|>", "add_bos_token": False}
    files = {"tokenizer_config": config, "added_tokens": {"<tool>": size, "<|im_end|>": size + 1}}
    tokenizer = Tokenizer.from_folder(write(tmp_path, model_of("llama"), **files))
    ids = tokenizer.encode("<|im_start|><tool><|im_end|>", parse_special=True)
    assert ids == [7, size, size + 1]
    assert size in tokenizer.encode("a<tool>b") and size + 1 not in tokenizer.encode("a<|im_end|>b")
    assert (tokenizer.eos_id, tokenizer.add_bos, tokenizer.special_ids) == (size + 1, False, {0, 1, 2, 7, size + 1})
    assert tokenizer.decode(ids) == "<tool>"


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"added_tokens": {"<x>": 9000}}, "'<x>' has the id 9000, but 620"),
        ({"added_tokens": {"<x>": "1"}}, "added_tokens.json: <x>: the id '1'"),
        ({"added_tokens": {"▁the": 5}}, "'▁the' has the id 5, but"),
        (
            {"added_tokens": {"<x>": 620}, "tokenizer_config": {"added_tokens_decoder": {"621": {"content": "<x>"}}}},
            "two",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": {"-1": {"content": "x"}}}}, "added_tokens_decoder: '-1'"),
        ({"tokenizer_config": {"added_tokens_decoder": {"5": None}}}, "added_tokens_decoder: '5'"),
        ({"tokenizer_config": {"tokenizer_class": "T5Tokenizer"}}, "tokenizer_class: 'T5Tokenizer'"),
    ],
)
def test_contradicting_files_are_named(files: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=word.replace("(", "\\(")):
        Tokenizer.from_folder(write(tmp_path, model_of("llama", vocab_size=620), **files))


@pytest.mark.parametrize("kind", ["llama", "unigram nfkc_cf"])
def test_truncated_and_damaged_files_are_refused_or_read(kind: str, tmp_path: Path) -> None:
    whole = model_of(kind)
    rng = random.Random(8)
    damaged = [
        b"",
        b"x",
        b"\xff" * 100,
        bytes(1000),
        b'{"a": 1}',
        *(whole[: rng.randrange(len(whole))] for _ in range(20)),
    ]
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 5, 50])):
            data[rng.randrange(min(len(data), 6000))] = rng.randrange(256)
        damaged.append(bytes(data))
    refused = 0
    for data in damaged:
        try:
            tokenizer = Tokenizer.from_folder(write(tmp_path, data))
            tokenizer.decode(tokenizer.encode("".join(TEXTS)))
        except CheckpointError as error:
            assert "tokenizer.model" in str(error)
            refused += 1
    assert refused >= 20


def field(number: int, kind: int, payload: bytes) -> bytes:
    size = bytes([len(payload)]) if kind == 2 else b""
    return bytes([number << 3 | kind]) + size + payload


def piece(text: str | bytes, score: float = 0.0, kind: int = 1) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return field(1, 2, field(1, 2, raw) + field(2, 5, struct.pack("<f", score)) + field(3, 0, bytes([kind])))


UNKNOWN = piece("<unk>", kind=2)


def test_user_defined_pieces_of_unigram_models_compete(tmp_path: Path) -> None:
    """Models that were put together by hand have pieces that run across them."""
    pieces = [("ab", 0.0, 4), ("abc", -1.95, 1), ("abd", -1.85, 1), *((text, -2.0, 1) for text in "▁abcd")]
    data = UNKNOWN + piece("<s>", kind=3) + piece("</s>", kind=3) + b"".join(piece(*p) for p in pieces)
    tokenizer = Tokenizer.from_folder(write(tmp_path, data))
    judge = sentencepiece.SentencePieceProcessor(model_proto=data)
    for text in ("abc", "ab", "abd", "aab", "abab", "abcd abc", "dab c", "xab", "xabc"):
        assert tokenizer.encode(text, add_special=False) == judge.encode(text)
    assert (len(judge.encode("abc")), len(judge.encode("abd"))) == (3, 2)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (piece("a"), "0 unknown pieces"),
        (UNKNOWN + piece("<u>", kind=2), "2 unknown pieces"),
        (UNKNOWN + piece("a") * 2, "'a' stands twice, at \\[1\\] and \\[2\\]"),
        (UNKNOWN + piece(b"\xff"), "piece \\[1\\] is not UTF-8"),
        (UNKNOWN + piece(""), "piece \\[1\\] has the text ''"),
        (UNKNOWN + piece("a", float("nan")), "the score nan"),
        (UNKNOWN + piece("a", float("inf")), "the score inf"),
        (UNKNOWN + piece("a", kind=7), "the type 7"),
        (UNKNOWN + field(1, 0, b"\1"), "a number instead"),
        (UNKNOWN + b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "ends too early"),
        (UNKNOWN + b"\x08" + b"\xff" * 11, "number is too long"),
        (UNKNOWN + b"\x0b", "field of kind 3"),
        (UNKNOWN + field(2, 2, field(3, 2, b"x")), "field 3 is no number"),
        (UNKNOWN + field(3, 2, field(2, 2, b"junk")), "normalization rules"),
    ],
)
def test_wrong_contents_are_named(data: bytes, word: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"tokenizer\.model: .*{word}") as error:
        Tokenizer.from_folder(write(tmp_path, data))
    assert not isinstance(error.value, UnsupportedModelError)


@pytest.mark.parametrize(
    ("data", "key"),
    [
        (UNKNOWN + field(2, 2, field(3, 0, b"\3")), "model_type: 'word'"),
        (UNKNOWN + field(2, 2, field(3, 0, b"\x09")), "model_type: 'unknown'"),
        (UNKNOWN + field(2, 2, b"\xc0\x01\x01"), "treat_whitespace_as_suffix"),
        (UNKNOWN + field(3, 2, field(5, 0, b"\0")), "escape_whitespaces"),
    ],
)
def test_other_kinds_are_refused(data: bytes, key: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=key):
        Tokenizer.from_folder(write(tmp_path, data))


def test_damaged_rules_cannot_crash_the_library(tmp_path: Path) -> None:
    rules = read_sentencepiece(write(tmp_path, model_of("unigram")) / "tokenizer.model").charsmap
    check_charsmap(rules)
    rng = random.Random(3)
    text = "".join(map(chr, range(1, 0x800)))
    for _ in range(15):
        data = bytearray(rules)
        for _ in range(rng.choice([1, 4])):
            data[rng.randrange(4, len(data))] = rng.randrange(256)
        try:
            check_charsmap(bytes(data))
        except ValueError:
            continue
        normalizers.Precompiled(bytes(data)).normalize_str(text)
    for junk in (b"", b"ab", bytes(300), rules[:1000], rules[:-5], struct.pack("<I", 4) + b"\xff\xff\xff\xff\0"):
        with pytest.raises(ValueError):
            check_charsmap(junk)
