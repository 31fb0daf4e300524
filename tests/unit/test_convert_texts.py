"""The text that a conversion reads: its parts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ondevice.errors import OndeviceError
from ondevice_convert.texts import LEAST, PIECE, read_text, split_text, written_text


class Letters:
    """A token for each letter."""

    def encode(self, text: str, add_special: bool) -> list[int]:
        assert not add_special
        return [ord(c) % 64 for c in text]


def split(length: int, most: int = 100_000, context: int = 4096) -> Any:
    return split_text(
        "".join(chr(65 + i % 26) for i in range(length)), "hash", Path("a/b.txt"), Letters(), most, context
    )


def test_the_end_is_kept_apart_in_whole_windows() -> None:
    texts = split(60_000)
    assert texts.window == 1024 and len(texts.unseen) == 9 * 1024 and len(texts.fit) == 60_000 - 9 * 1024
    assert texts.origin == "b.txt" and split(1_000_000).window == 1024 and len(split(1_000_000).unseen) == 16 * 1024


@pytest.mark.parametrize("length", [LEAST, 5000, 20_000])
def test_small_texts_have_smaller_windows(length: int) -> None:
    texts = split(length)
    assert len(texts.unseen) >= 8 * texts.window and len(texts.unseen) % texts.window == 0
    assert len(texts.fit) + len(texts.unseen) == length


def test_windows_fit_the_context_and_long_texts_are_sampled_evenly() -> None:
    assert split(60_000, context=128).window == 128
    texts = split(200_000, most=8 * PIECE)
    assert len(texts.fit) == 8 * PIECE
    assert texts.fit[:PIECE] == [(65 + i % 26) % 64 for i in range(PIECE)]


def test_too_short_a_text_says_how_much_is_needed() -> None:
    with pytest.raises(OndeviceError, match=rf"b\.txt: {LEAST - 1} tokens are too few.*leave --text out"):
        split(LEAST - 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the text is empty"),
        (b" \n\t ", "the text is empty"),
        ("Grüße".encode("latin-1"), "not UTF-8 at byte 2; convert it first"),
        ("text".encode("utf-16-le"), "zero bytes at 1"),
    ],
)
def test_what_is_no_text_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(data)
    with pytest.raises(OndeviceError, match=message):
        read_text(path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfHello")
    assert read_text(path)[0] == "Hello"


def test_a_model_writes_its_own_text(tiny: Any) -> None:
    texts = written_text(tiny, 2048, seed=3)
    again, other = written_text(tiny, 2048, seed=3), written_text(tiny, 2048, seed=4)
    assert texts == again and texts.sha256 != other.sha256 and texts.origin == "written by the model itself"
    assert len(texts.fit) + len(texts.unseen) >= 2048 and max(texts.fit) < tiny.spec.vocab_size
