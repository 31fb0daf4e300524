"""Random texts that tokenizers stumble over."""

from __future__ import annotations

import random

_RANGES = [
    (0x00, 0x20), (0x20, 0x7F), (0x7F, 0x250), (0x250, 0x600), (0x600, 0x1100), (0x1100, 0x2000),
    (0x2000, 0x2C00), (0x2C00, 0xA000), (0xA000, 0xD800), (0xE000, 0x10000), (0x10000, 0x14700),
    (0x14700, 0x20000), (0x1CC00, 0x1CD00), (0x1D000, 0x1F000), (0x1F000, 0x20000), (0x20000, 0x32400),
    (0x30000, 0x40000), (0x40000, 0xE0000), (0xE0000, 0xE0200), (0xF0000, 0x110000),
]  # fmt: skip
_SPACES = (
    " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0" + "\u1680\u2000\u2003\u2007\u2028\u2029\u202f\u205f\u3000\u200b\u180e\ufeff"
)
_DIGITS = "0123456789٠١٢३०१२໐໑０１２𝟎𝟡²³½⅓ⅣⅫ〇一①②௰𐄇𑽐"
_MARKS = "\u0300\u0301\u0308\u0327\u064b\u093e\u0942\u0e31\u0e34\u20dd\u3099\ufe0f\ufe20"
_EMOJI = ["👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "1️⃣", "❤️", "🤷🏿‍♀️", "\u200d", "\u200c"]
_WORDS = [
    *("'s", "'S", "'t", "'ll", "'LL", "'re", "'Ve", "'m", "'d", "'ſ", "don't", "I'M", "can’t", "hello"),
    *(" World", "foo_bar", "x=1;", "def f(x):\n    return x", "</s>", "<|tool|>"),
    *("<|im_start|>", "<|endoftext|>", "http://a.b/c?d=e&f"),
    *("中文字符", "日本語テキスト", "한국어", "русский", "العربية", "हिन्दी", "ไทย"),
    *("a" * 30, "   ", "\n\n\n", "\r\n", "\t\t", "--", "...", "!?", "№", "™"),
]  # fmt: skip


def random_texts(count: int, seed: int) -> list[str]:
    """Texts of all planes with white space, digits of many scripts, marks, emoji and words."""
    rng = random.Random(seed)

    def piece() -> str:
        kind = rng.random()
        if kind < 0.25:
            first, end = rng.choice(_RANGES)
            return "".join(chr(rng.randrange(first, end)) for _ in range(rng.randint(1, 6)))
        if kind < 0.4:
            return "".join(rng.choices(_SPACES, k=rng.randint(1, 5)))
        if kind < 0.5:
            return " " * rng.randint(1, 4)
        if kind < 0.6:
            return "".join(rng.choices(_DIGITS, k=rng.randint(1, 7)))
        if kind < 0.68:
            return rng.choice("aeéЖ漢") + "".join(rng.choices(_MARKS, k=rng.randint(1, 3)))
        return rng.choice(_EMOJI) if kind < 0.76 else rng.choice(_WORDS)

    return ["".join(piece() for _ in range(rng.randint(1, 14))) for _ in range(count)]
