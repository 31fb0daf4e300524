"""Stop strings: cut exactly, hold back no more than needed."""

import random
from collections.abc import Sequence

import pytest

from ondevice.errors import OptionError
from ondevice.text.stop import StopMatcher


def run(stops: Sequence[str], pieces: Sequence[str]) -> tuple[str, str | None]:
    matcher, out = StopMatcher(stops), ""
    for piece in pieces:
        text, hit = matcher.push(piece)
        out += text
        if hit is not None:
            return out, hit
    return out + matcher.finish(), None


def test_cut_in_the_middle_of_a_piece() -> None:
    assert run(["STOP"], ["abcSTOPdef"]) == ("abc", "STOP")


def test_match_over_several_pieces() -> None:
    assert run(["\n\nUser:"], ["a\n", "\nUs", "er", ": b"]) == ("a", "\n\nUser:")


def test_only_a_beginning_of_a_stop_is_held() -> None:
    matcher = StopMatcher(["abc"])
    assert matcher.push("xxab") == ("xx", None)
    assert matcher.push("ab") == ("ab", None)
    assert matcher.push("d") == ("abd", None)
    assert matcher.push("a") == ("", None)
    assert matcher.finish() == "a"
    assert matcher.finish() == ""


def test_a_beginning_inside_a_beginning() -> None:
    assert run(["aab"], ["a", "a", "a", "b"]) == ("a", "aab")


def test_the_first_to_be_complete_wins() -> None:
    assert run(["abcd", "bc"], ["abcd"]) == ("a", "bc")
    assert run(["abcd", "bc"], list("abcd")) == ("a", "bc")
    assert run(["b", "ab"], ["ab"]) == ("", "ab")


def test_nothing_follows_a_match() -> None:
    matcher = StopMatcher(["x"])
    assert matcher.push("ax") == ("a", "x")
    assert matcher.push("b") == ("", "x")
    assert matcher.finish() == ""


def test_without_stops_all_text_passes() -> None:
    assert StopMatcher([]).push("abc") == ("abc", None)


def test_the_split_does_not_matter() -> None:
    rng = random.Random(3)
    for _ in range(500):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        text = "".join(rng.choices("abc", k=20))
        cuts = sorted(rng.sample(range(21), 5))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 20])]
        assert run(stops, pieces) == run(stops, [text]), (stops, pieces)
        ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
        assert run(stops, [text])[0] == (text[: min(ends)[1]] if ends else text)


@pytest.mark.parametrize("stops", [[""], ["a", ""], "abc", [3]])
def test_empty_stops_are_refused(stops: Sequence[str]) -> None:
    with pytest.raises(OptionError, match="stop="):
        StopMatcher(stops)
