"""Streamed text is what decoding all at once gives, and that is what the tokenizers library gives."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders

from ondevice.errors import UnsupportedModelError
from ondevice.generation.batch import Row
from ondevice.generation.sampling import SamplingParams
from ondevice.text.detokenizer import Detokenizer
from ondevice.text.pieces import byte_alphabet
from ondevice.text.tokenizer import Tokenizer
from tests.golden.text_tiny import TEXTS, byte_fallback, byte_level, metaspace, write_folder

KINDS = [byte_level, byte_fallback, metaspace]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    backend = request.param()
    folder = write_folder(tmp_path_factory.mktemp("tokenizer"), backend)
    return Tokenizer.from_folder(folder), backend


def stream(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
    return [*map(detokenizer.push, ids), detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_out_as_the_library_decodes_them(pair: tuple, text: str) -> None:
    tokenizer, backend = pair
    ids = backend.encode(text).ids
    expected = backend.decode(ids)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == expected


def test_a_round_trip_is_exact_where_the_vocabulary_has_all_bytes(tmp_path: Path) -> None:
    for kind in (byte_level, byte_fallback):
        tokenizer = Tokenizer.from_folder(write_folder(tmp_path / kind.__name__, kind()))
        for text in TEXTS:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_behind_a_prompt_the_text_is_what_both_have_beyond_it(pair: tuple) -> None:
    tokenizer, _ = pair
    for text in [text for text in TEXTS if text] + [" a", "  a b", "a  b"]:
        ids = tokenizer.encode(text)
        for cut in range(len(ids) + 1):
            prompt = tokenizer.decode(ids[:cut])
            if "\ufffd" in prompt:
                continue  # it ends inside a character
            detokenizer = Detokenizer(tokenizer, prompt=ids[:cut])
            rest = "".join([*map(detokenizer.push, ids[cut:]), detokenizer.finish()])
            assert prompt + rest == tokenizer.decode(ids)


def test_only_a_prompt_without_text_is_the_start(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, byte_fallback()))
    word = tokenizer.encode("the", add_special=False)
    for prompt, text in (([], "the"), ([1], "the"), (word, " the"), ([1, *word], " the")):
        detokenizer = Detokenizer(tokenizer, prompt=prompt)
        assert "".join(map(detokenizer.push, word)) == text


def test_an_answer_goes_on_from_its_prompt(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, byte_fallback()))
    (word,) = tokenizer.encode("the", add_special=False)
    logits = np.zeros(tokenizer.vocab_size, np.float32)
    logits[word] = 9
    for prompt, text in (([1], "the"), ([1, word], " the")):
        row = Row(0, prompt, SamplingParams(temperature=0.0), tokenizer, tokenizer.vocab_size)
        assert row.accept(logits, room=True).text == text


def test_random_ids_stream_as_they_decode(pair: tuple) -> None:
    tokenizer, backend = pair
    rng = random.Random(5)
    for _ in range(300):
        # Ids beyond the vocabulary are rows that pad an embedding.
        ids = [rng.randrange(tokenizer.vocab_size + 5) for _ in range(rng.randint(0, 12))]
        for skip in (True, False):
            assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special=skip)
        # For a run of byte tokens that is not UTF-8 the library gives one U+FFFD for each byte of the whole run,
        # which cannot be streamed; byte-level vocabularies have no such difference.
        expected = backend.decode([i for i in ids if i < tokenizer.vocab_size])
        if "\ufffd" not in expected or "ByteFallback" not in str(backend.decoder):
            assert tokenizer.decode(ids) == expected


def test_characters_come_out_whole(tmp_path: Path) -> None:
    backend = byte_level()
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, backend))
    table = {byte: backend.token_to_id(char) for char, byte in byte_alphabet().items()}
    ids = [table[byte] for byte in "a€😀".encode()]
    assert stream(tokenizer, ids) == ["a", "", "", "€", "", "", "", "😀", ""]
    assert stream(tokenizer, [table[0xE2], table[0x82], table[0x61]]) == ["", "", "\ufffda", ""]
    assert stream(tokenizer, [table[0xF0], table[0x9F]]) == ["", "", "\ufffd"]
    bad = bytes([0xFF, 0xC3, 0x28, 0xE2, 0x82, 0xF0, 0x41, 0x80])
    assert "".join(stream(tokenizer, [table[b] for b in bad])) == bad.decode(errors="replace")


def test_byte_alphabet_is_the_librarys() -> None:
    library = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for char in ("a", " ", "\n", "\x7f", "é", "€", "\U0010ffff"):
        mapped = library.pre_tokenize_str(char)[0][0]
        assert bytes(byte_alphabet()[c] for c in mapped) == char.encode()
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_byte_fallback_tokens_join_into_characters(tmp_path: Path) -> None:
    backend = byte_fallback()
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, backend))
    ids = [backend.token_to_id(f"<0x{byte:02X}>") for byte in "\n😀".encode()]
    assert stream(tokenizer, [backend.token_to_id("▁"), *ids]) == ["", "\n", "", "", "", "😀", ""]
    assert backend.decode([backend.token_to_id("▁"), *ids]) == "\n😀"
    assert tokenizer.token_bytes(ids[0]) == b"\n"
    assert "".join(stream(tokenizer, ids[:3])) == "\n\ufffd"


def test_only_the_first_space_goes(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, byte_fallback()))
    space = tokenizer.encode(" ", add_special=False)
    assert tokenizer.decode([1, *space, *space]) == tokenizer.decode([*space, *space])
    assert stream(tokenizer, tokenizer.encode("a b"))[:3] != stream(tokenizer, tokenizer.encode(" a b"))[:3]
    assert tokenizer.decode(tokenizer.encode("    a")) == "    a"


def test_special_tokens_are_left_out_in_the_middle_of_a_character(tmp_path: Path) -> None:
    backend = byte_level()
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, backend))
    first, second = (backend.token_to_id(char) for char in "Ã©")
    special = next(iter(tokenizer.special_ids))
    assert stream(tokenizer, [first, special, second]) == ["", "", "é", ""]


def test_added_tokens_stand_for_their_text(tmp_path: Path) -> None:
    """é is in the byte-level alphabet as well, where it means the byte 0xE9."""
    backend = byte_level()
    backend.add_tokens(["é"])
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, backend))
    assert tokenizer.decode([backend.token_to_id("é")]) == "é"
    assert tokenizer.decode(tokenizer.encode("café au lait")) == "café au lait"


@pytest.mark.parametrize(
    "make",
    [
        decoders.WordPiece,
        lambda: decoders.Strip(" ", 1, 0),
        lambda: decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
        lambda: decoders.Replace(tokenizers.Regex("a+"), "b"),
        lambda: None,
    ],
)
def test_unknown_decoders_are_refused(make: Callable, tmp_path: Path) -> None:
    backend = byte_level()
    backend.decoder = make()
    with pytest.raises(UnsupportedModelError, match="decoder"):
        Tokenizer.from_folder(write_folder(tmp_path, backend))
