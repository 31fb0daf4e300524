"""Pre-tokenizers of byte-level BPE vocabularies in GGUF files, by the name in `tokenizer.ggml.pre`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

# Letters and digits that came with Unicode 16. llama.cpp splits by the tables of Unicode 15.1, where these
# are unassigned; the regex engine here knows Unicode 16 and would join them into words.
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


def _without(category: str, ranges: tuple[tuple[int, int], ...]) -> str:
    newer = "".join(f"\\x{{{first:X}}}-\\x{{{last:X}}}" for first, last in ranges)
    return rf"[\p{{{category}}}&&[^{newer}]]"


_L = _without("L", _NEW_LETTERS)
_N = _without("N", _NEW_NUMBERS)

# The English endings are written out in both cases: (?i:...) would let the regex engine take U+017F for an s.
_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?{_L}+| ?{_N}+| ?[^\s{_L}{_N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
    rf"|[^\r\n{_L}{_N}]?{_L}+|{_N}{{DIGITS}}| ?[^\s{_L}{_N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


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


_SMOLLM = PreTokenizer((_N, _GPT2))
_GPT2_PRE = PreTokenizer((_GPT2,))
_LLAMA3_PRE = PreTokenizer((_LLAMA3.replace("DIGITS", "1,3"),), ignore_merges=True, adds_bos=True)
_QWEN2 = PreTokenizer((_LLAMA3.replace("{DIGITS}", ""),))

PRE_TOKENIZERS = {
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "refact": _SMOLLM,
    "codeshell": _SMOLLM,
    "command-r": _SMOLLM,
    "gpt-2": _GPT2_PRE,
    "phi-2": _GPT2_PRE,
    "olmo": _GPT2_PRE,
    "llama-bpe": _LLAMA3_PRE,
    "llama3": _LLAMA3_PRE,
    "llama-v3": _LLAMA3_PRE,
    "falcon3": _LLAMA3_PRE,
    "lfm2": _LLAMA3_PRE,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "stablelm2": _QWEN2,
}
