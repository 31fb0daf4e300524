"""Pre-tokenizers of byte-level BPE vocabularies in GGUF files, by the name in `tokenizer.ggml.pre`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

# What came with Unicode 16. llama.cpp splits by the tables of Unicode 15.1, where these are unassigned; the regex
# engine here knows Unicode 16 and would join them into words, numbers or runs of marks.
_NEW_LETTERS = (
    (0x1C89, 0x1C8A),
    (0xA7CB, 0xA7CD),
    (0xA7DA, 0xA7DC),
    (0x105C0, 0x105F3),
    (0x10D4A, 0x10D65),
    (0x10D6F, 0x10D85),
    (0x10EC2, 0x10EC4),
    (0x11380, 0x113D3),
    (0x11BC0, 0x11BE0),
    (0x13460, 0x143FA),
    (0x16100, 0x1611D),
    (0x16D40, 0x16D6C),
    (0x18CFF, 0x18CFF),
    (0x1E5D0, 0x1E5F0),
)
_NEW_NUMBERS = (
    (0x10D40, 0x10D49),
    (0x116D0, 0x116E3),
    (0x11BF0, 0x11BF9),
    (0x16130, 0x16139),
    (0x16D70, 0x16D79),
    (0x1CCF0, 0x1CCF9),
    (0x1E5F1, 0x1E5FA),
)
_NEW_MARKS = (
    (0x0897, 0x0897),
    (0x10D69, 0x10D6D),
    (0x10EFC, 0x10EFC),
    (0x113B8, 0x113E2),
    (0x11F5A, 0x11F5A),
    (0x1611E, 0x1612F),
    (0x1E5EE, 0x1E5EF),
)
_NEW_PUNCTUATION = (
    (0x1B4E, 0x1B4F),
    (0x1B7F, 0x1B7F),
    (0x10D6E, 0x10D6E),
    (0x113D4, 0x113D8),
    (0x11BE1, 0x11BE1),
    (0x16D6D, 0x16D6F),
    (0x1E5FF, 0x1E5FF),
)
_NEW_SYMBOLS = (
    (0x2427, 0x2429),
    (0x31E4, 0x31E5),
    (0x10D8E, 0x10D8F),
    (0x1CC00, 0x1CEB3),
    (0x1F8B2, 0x1F8BB),
    (0x1F8C0, 0x1F8C1),
    (0x1FA89, 0x1FA89),
    (0x1FA8F, 0x1FA8F),
    (0x1FABE, 0x1FABE),
    (0x1FAC6, 0x1FAC6),
    (0x1FADC, 0x1FADC),
    (0x1FADF, 0x1FADF),
    (0x1FAE9, 0x1FAE9),
    (0x1FBCB, 0x1FBEF),
)


def _without(category: str, ranges: tuple[tuple[int, int], ...]) -> str:
    newer = "".join(f"\\x{{{first:X}}}-\\x{{{last:X}}}" for first, last in ranges)
    return rf"[\p{{{category}}}&&[^{newer}]]"


_L = _without("L", _NEW_LETTERS)
_N = _without("N", _NEW_NUMBERS)
_M = _without("M", _NEW_MARKS)
_P = _without("P", _NEW_PUNCTUATION)
_S = _without("S", _NEW_SYMBOLS)

# The English endings are written out in both cases: (?i:...) would let the regex engine take U+017F for an s.
_ENDINGS = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?{_L}+| ?{_N}+| ?[^\s{_L}{_N}]+|\s+(?!\S)|\s+"


def _words(letters: str, digits: str, endings: str = _ENDINGS, spaces: str = _SPACES, behind: str = r"[\r\n]*") -> str:
    """Words with one character before them, numbers, runs of other characters, spaces: what most models have.

    Args:
        letters: set of what words consist of.
        digits: how many digits make a number.
        endings: of English words, pieces of their own.
        spaces: how white space is split.
        behind: what still belongs to a run of other characters.
    """
    return rf"{endings}|[^\r\n{_L}{_N}]?{letters}+|{_N}{digits}| ?[^\s{letters}{_N}]+{behind}|{spaces}"


def _cased(digits: str, ending: str) -> str:
    """Words that end before a capital letter. Only ASCII letters have a case here, as in llama.cpp."""
    upper, lower = f"[{_L}&&[^a-z]]", f"[{_L}&&[^A-Z]]"
    before = rf"[^\r\n{_L}{_N}]?"
    return (
        rf"{before}{upper}*{lower}+{ending}|{before}{upper}+{lower}*{ending}"
        rf"|{_N}{digits}| ?[^\s{_L}{_N}]+[\r\n/]*|{_SPACES}"
    )


# Runs of CJK and of Hangul, as DeepSeek's first vocabularies have them; the range in the middle is theirs, too.
# White space in it is left out: llama.cpp has exchanged it by then.
_EAST_ASIAN = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}&&[^\s]]+"
# Letters of scripts that have a case.
_CASED_SCRIPTS = (
    r"\x{41}-\x{5A}\x{61}-\x{7A}\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}"
    r"\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}"
    r"\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}"
    r"\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}"
    r"\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}"
    r"\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}"
    r"\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}"
    r"\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}"
    r"\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}"
    r"\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}"
    r"\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}"
    r"\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}"
    r"\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}"
)
_DEEPSEEK3 = rf"[!-/:-@\[-`{{-~][A-Za-z]+|[^\r\n{_L}{_P}{_S}]?[{_L}{_M}]+| ?[{_P}{_S}]+[\r\n]*|{_SPACES}"


@dataclass(frozen=True)
class PreTokenizer:
    """How a named pre-tokenizer splits, and what else its name implies.

    Args:
        patterns: regular expressions applied one after the other; each match is a piece of its own.
        ignore_merges: a piece that is a token as it stands is not merged from its bytes.
        adds_bos: BOS is put in front where the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False

    def build(self, missing: str) -> Any:
        """The `tokenizers` pre-tokenizer.

        Args:
            missing: characters of the byte-level alphabet that have no token.

        Returns:
            A sequence: the splits, then bytes to the byte-level alphabet. Bytes without a token are cut out
            after that: the BPE would leave them out as well, but merge their neighbours across the gap.
        """
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        steps = [*splits, to_bytes]
        if missing:
            codes = "".join(f"\\x{{{ord(char):X}}}" for char in missing)
            steps.append(pre_tokenizers.Split(Regex(f"[{codes}]"), "removed"))
        return pre_tokenizers.Sequence(steps)


_LLAMA3 = _words(_L, "{1,3}")
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


def _kinds() -> dict[PreTokenizer, str]:
    """Pre-tokenizers, and the names that files have for them."""
    return {
        PreTokenizer((rf"[{_P}$+<=>^~|]+", _GPT2, f"{_N}+", "[0-9][0-9][0-9]")): "default",
        PreTokenizer((_GPT2,)): """gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 jina-es jina-de jina-v2-es
            jina-v2-de gigachat a.x-4.0 mellum""",
        PreTokenizer((_N, _GPT2)): "smollm starcoder refact codeshell command-r exaone minerva-7b",
        PreTokenizer((_LLAMA3,)): "dbrx smaug-bpe chatglm-bpe",
        PreTokenizer((_LLAMA3,), ignore_merges=True): "glm4",
        PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True): """llama-bpe llama3 llama-v3 falcon3 falcon-h1
            lfm2 pixtral midm-2.0""",
        PreTokenizer((_words(_L, ""),)): """qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan solar-open kormo
            grok-2""",
        PreTokenizer((_words(f"[{_L}{_M}]", ""),)): "qwen35",
        PreTokenizer((_cased("", ""),), ignore_merges=True, adds_bos=True): "tekken",
        PreTokenizer((_cased("{1,3}", f"(?:{_ENDINGS})?"),)): "gpt-4o llama4 kanana2 minimax-m2",
        PreTokenizer((f"{_N}{{1,3}}", r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+", _DEEPSEEK3)): """deepseek-v3
            hunyuan-dense joyai-llm""",
        PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?[{_CASED_SCRIPTS}]+",
                r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3001}\x{3002}]+",
                r"\s+$",
                _EAST_ASIAN,
                f"{_N}+",
            )
        ): "deepseek-llm",
        PreTokenizer((r"[\r\n]", rf"\s?{_L}+", rf"\s?{_P}+", _EAST_ASIAN, _N)): "deepseek-coder",
        PreTokenizer((rf"[{_P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")): "falcon",
        PreTokenizer((_words(_L, "", behind=""),)): "seed-coder",
        PreTokenizer((_words(_L, "", spaces=r"\s*[\r\n]|\s+(?!\S)|\s+"),)): "bailingmoe bailingmoe2 llada-moe",
        PreTokenizer((_BLOOM,)): "bloom poro-chat gpt3-finnish",
        PreTokenizer((_BLOOM, _N)): "viking",
    }


PRE_TOKENIZERS = {name: kind for kind, names in _kinds().items() for name in names.split()}
