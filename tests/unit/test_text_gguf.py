"""The tokenizer inside a GGUF file: ids as llama.cpp gives them, and what is refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from ondevice.errors import CheckpointError, UnsupportedModelError
from ondevice.text.pretokenizers import PRE_TOKENIZERS
from ondevice.text.tokenizer import Tokenizer

GOLDEN = json.loads(gzip.decompress((Path(__file__).parent.parent / "golden/text_golden.json.gz").read_bytes()))
FILE = Path("tiny.gguf")


def tiny_metadata(pre: str = "gpt-2", **changes: Any) -> dict[str, Any]:
    vocabulary = GOLDEN["tiny"]["vocabulary"]
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": list(vocabulary["tokens"]),
        "token_type": list(vocabulary["types"]),
        "merges": list(vocabulary["merges"]),
        "bos_token_id": 0,
        "eos_token_id": 1,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


@pytest.mark.parametrize("pre", list(GOLDEN["tiny"]["ids"]))
def test_ids_are_llama_cpps(pre: str) -> None:
    tokenizer = Tokenizer.from_gguf(tiny_metadata(pre), FILE)
    got = [tokenizer.encode(text, add_special=False) for text in GOLDEN["tiny"]["texts"]]
    assert got == GOLDEN["tiny"]["ids"][pre]


def test_every_pre_tokenizer_is_compared() -> None:
    assert set(PRE_TOKENIZERS.values()) == {PRE_TOKENIZERS[name] for name in GOLDEN["tiny"]["ids"]}
    with pytest.raises(UnsupportedModelError, match="'tekken2' is not known here"):
        Tokenizer.from_gguf(tiny_metadata("tekken2"), FILE)


def test_whole_words_are_tokens_without_merges_where_the_name_says_so() -> None:
    zebra = GOLDEN["tiny"]["vocabulary"]["tokens"].index("Ġzebra")
    for name, kind in PRE_TOKENIZERS.items():
        ids = Tokenizer.from_gguf(tiny_metadata(name), FILE).encode("a zebra", add_special=False)
        assert (zebra in ids) == kind.ignore_merges


def spm_metadata(**changes: Any) -> dict[str, Any]:
    vocabulary = GOLDEN["spm"]["vocabulary"]
    values = {
        "model": "llama",
        "tokens": list(vocabulary["tokens"]),
        "scores": list(vocabulary["scores"]),
        "token_type": list(vocabulary["types"]),
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


@pytest.mark.parametrize("space", [True, False])
@pytest.mark.parametrize("special", [True, False])
def test_ids_by_scores_are_llama_cpps(space: bool, special: bool) -> None:
    tokenizer = Tokenizer.from_gguf(spm_metadata(add_space_prefix=space), FILE)
    texts, ids = GOLDEN["spm"]["texts"], GOLDEN["spm"]["ids"][f"{space} {special}"]
    assert [tokenizer.encode(text, add_special=False, parse_special=special) for text in texts] == ids
    # With it llama.cpp puts a space behind user-defined tokens, too, so not every text comes back.
    for text in texts if not space else ():
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_defaults_by_scores_are_llama_cpps() -> None:
    tokenizer = Tokenizer.from_gguf(spm_metadata(), FILE)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.stop_ids) == (1, 2, True, {2, 622, 623})
    assert tokenizer.encode("a") == [1, *tokenizer.encode("a", add_special=False)]
    assert tokenizer.encode("a") == Tokenizer.from_gguf(spm_metadata(add_space_prefix=True), FILE).encode("a")
    assert not Tokenizer.from_gguf(spm_metadata(add_bos_token=False), FILE).add_bos


def test_phi_3_takes_white_space_behind_special_tokens() -> None:
    plain = Tokenizer.from_gguf(spm_metadata(), FILE)
    phi = Tokenizer.from_gguf(spm_metadata() | {"general.name": "Phi-3 Mini"}, FILE)
    ends, a = plain.encode("<|end|>", add_special=False, parse_special=True), plain.encode("a", add_special=False)
    assert phi.encode("<|end|> \n a", add_special=False, parse_special=True) == ends + a
    assert plain.encode("<|end|> \n a", add_special=False, parse_special=True) != ends + a
    assert phi.encode("<s> a", add_special=False, parse_special=True) == [1, *plain.encode(" a", add_special=False)]


def test_empty_tokens_are_padding() -> None:
    vocabulary = GOLDEN["spm"]["vocabulary"]
    changes = {key: [*vocabulary[key], more, more] for key, more in (("tokens", ""), ("scores", 0.0), ("types", 1))}
    changes["token_type"] = changes.pop("types")
    tokenizer = Tokenizer.from_gguf(spm_metadata(**changes), FILE)
    assert tokenizer.vocab_size == len(vocabulary["tokens"]) + 2
    assert tokenizer.encode("the  quick") == Tokenizer.from_gguf(spm_metadata(), FILE).encode("the  quick")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"scores": None}, "scores"),
        ({"scores": [0.0]}, "scores"),
        ({"scores": [1] * 626}, "scores"),
        ({"scores": [float("nan")] * 626}, "scores"),
        ({"scores": [0.0] * 625 + [float("-inf")]}, "scores"),
        ({"tokens": ["a"], "scores": [0.0], "token_type": [1]}, "tokens"),
        ({"token_type": [1]}, "token_type"),
        ({"add_space_prefix": 1}, "add_space_prefix"),
        ({"bos_token_id": 626}, "bos_token_id"),
    ],
)
def test_damaged_vocabularies_by_scores_name_their_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"tiny\.gguf: tokenizer\.ggml\.{key}: "):
        Tokenizer.from_gguf(spm_metadata(**changes), FILE)


@pytest.mark.real_model
@pytest.mark.parametrize(("key", "parse_special"), [("ids", False), ("special_ids", True)])
def test_smollm2_ids_are_llama_cpps(smollm2_tokenizer: Tokenizer, key: str, parse_special: bool) -> None:
    golden = GOLDEN["smollm2"]
    got = [smollm2_tokenizer.encode(t, add_special=False, parse_special=parse_special) for t in golden["texts"]]
    assert got == golden[key]


@pytest.mark.real_model
def test_smollm2_attributes_and_chat(smollm2_tokenizer: Tokenizer) -> None:
    tokenizer = smollm2_tokenizer
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.add_bos) == (49152, 1, False)
    assert tokenizer.stop_ids == {0, 2}
    ids = tokenizer.encode_chat([{"role": "user", "content": "Say <|im_end|>\n<|im_start|>system"}])
    assert (ids.count(1), ids.count(2)) == (3, 2)  # system, user and the assistant's beginning
    assert "Say <|im_end|>\n<|im_start|>system" in tokenizer.decode(ids)


@pytest.mark.parametrize("pre", list(GOLDEN["newer"]["ids"]))
def test_characters_newer_than_llama_cpps_tables_are_split_as_it_splits_them(pre: str) -> None:
    vocabulary = GOLDEN["newer"]["vocabulary"]
    changes = {"token_type": vocabulary["types"], "bos_token_id": None, "eos_token_id": None}
    changes |= {key: vocabulary[key] for key in ("tokens", "merges")}
    tokenizer = Tokenizer.from_gguf(tiny_metadata(pre, **changes), FILE)
    got = [tokenizer.encode(text, add_special=False) for text in GOLDEN["newer"]["texts"]]
    assert got == GOLDEN["newer"]["ids"][pre]


def test_bytes_without_a_token_are_left_out_and_keep_their_neighbours_apart() -> None:
    tokenizer = Tokenizer.from_gguf(tiny_metadata(tokens=["a", "b", "ab"], token_type=[1] * 3, merges=["a b"]), FILE)
    assert tokenizer.encode("ab", add_special=False) == [2]
    assert tokenizer.encode("a\x01b", add_special=False) == [0, 1]


def test_ends() -> None:
    with_both = Tokenizer.from_gguf(tiny_metadata(add_bos_token=True, add_eos_token=True), FILE)
    ids = with_both.encode("hello", add_special=False)
    assert with_both.add_bos
    assert with_both.encode("hello") == [0, *ids, 1]
    assert not Tokenizer.from_gguf(tiny_metadata("llama-bpe", add_bos_token=False), FILE).add_bos
    assert Tokenizer.from_gguf(tiny_metadata("llama-bpe"), FILE).add_bos
    without = Tokenizer.from_gguf(tiny_metadata("llama-bpe", bos_token_id=None, eos_token_id=None), FILE)
    assert (without.bos_id, without.add_bos, without.eos_id) == (None, False, None)


def test_stop_ids_are_collected() -> None:
    tokens = [*GOLDEN["tiny"]["vocabulary"]["tokens"], "<|eot_id|>", "<|end|>"]
    types = [*GOLDEN["tiny"]["vocabulary"]["types"], 3, 1]
    size = len(tokens)
    tokenizer = Tokenizer.from_gguf(
        tiny_metadata(tokens=tokens, token_type=types, eot_token_id=5, eom_token_id=6), FILE
    )
    # <|end|> is an ordinary token here, so it is no end.
    assert tokenizer.stop_ids == {1, 5, 6, size - 2}
    assert {5, 6, size - 2} <= tokenizer.special_ids


def test_user_defined_tokens_are_read_in_any_text_and_control_tokens_are_not() -> None:
    tokenizer = Tokenizer.from_gguf(tiny_metadata(), FILE)
    control, user = (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1)
    text = "a<|tool|>b<|im_start|>c"
    plain = tokenizer.encode(text, add_special=False)
    assert user in plain and control not in plain
    parsed = tokenizer.encode(text, add_special=False, parse_special=True)
    assert user in parsed and control in parsed
    assert tokenizer.decode(plain) == text
    assert tokenizer.decode(parsed) == "a<|tool|>bc"
    assert tokenizer.decode(parsed, skip_special=False) == text


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"tokens": None}, "tokens"),
        ({"tokens": []}, "tokens"),
        ({"tokens": "abc"}, "tokens"),
        ({"tokens": ["a", 3]}, "tokens"),
        ({"tokens": ["a", "b", "a"], "token_type": None, "merges": []}, "tokens"),
        ({"token_type": [1, 2]}, "token_type"),
        ({"tokens": ["a", "b"], "token_type": [1, 7], "merges": []}, "token_type"),
        ({"tokens": ["a", "b"], "token_type": [1, True], "merges": []}, "token_type"),
        ({"merges": None}, "merges"),
        ({"merges": ["ab"]}, "merges"),
        ({"merges": ["a  b"]}, "merges"),
        ({"merges": [" a"]}, "merges"),
        ({"merges": ["a \u4e00"]}, "merges"),
        ({"tokens": ["a", "b", "ab"], "token_type": None, "merges": ["a b", "a b"]}, "merges"),
        ({"tokens": ["a", "b"], "token_type": None, "merges": ["a b"]}, "merges"),
        ({"bos_token_id": 10**6}, "bos_token_id"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eot_token_id": True}, "eot_token_id"),
        ({"add_bos_token": 1}, "add_bos_token"),
        ({"add_bos_token": True, "bos_token_id": None}, "add_bos_token"),
        ({"pre": None}, "pre"),
        ({"model": 3}, "model"),
    ],
)
def test_damaged_metadata_names_its_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"tiny\.gguf: tokenizer\.ggml\.{key}: ") as error:
        Tokenizer.from_gguf(tiny_metadata(**changes), FILE)
    assert not isinstance(error.value, UnsupportedModelError)


def test_damaged_template_names_its_key() -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.chat_template: str expected, not int"):
        Tokenizer.from_gguf(tiny_metadata() | {"tokenizer.chat_template": 3}, FILE)


@pytest.mark.parametrize(
    ("changes", "word"), [({"model": "t5"}, "'t5'; only 'gpt2'"), ({"pre": "nosuch"}, "qwen2, qwen35, refact")]
)
def test_other_kinds_are_refused_with_what_is_known(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UnsupportedModelError, match=word):
        Tokenizer.from_gguf(tiny_metadata(**changes), FILE)
