"""Makes text_golden.json.gz: texts and the token ids that llama.cpp gives them.

Run it where llama-cpp-python, gguf and tokenizers are installed, with this repository on PYTHONPATH:

    python tests/golden/text_generate.py SMOLLM2.gguf

SMOLLM2.gguf is the file of the default model (`ondevice pull smollm2`). The second part needs no model: it
trains a vocabulary of a few hundred tokens, writes it as a GGUF file without weights under the name of each
pre-tokenizer, and lets llama.cpp read that. The vocabulary is kept beside the ids.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

OUTPUT = Path(__file__).parent / "text_golden.json.gz"
PRE_TOKENIZERS = ("smollm", "gpt-2", "llama-bpe", "qwen2")

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


def tiny_vocabulary() -> dict[str, list[Any]]:
    """Tokens, types and merges of a small byte-level BPE; two bytes have no token, one token has no merge."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if c not in ("Ŀ", "ò")]
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=sorted(alphabet), show_progress=False)
    backend.train_from_iterator(random_texts(400, seed=7), trainer)
    model = json.loads(backend.to_str())["model"]
    kept = {text: i for text, i in model["vocab"].items() if text not in ("Ŀ", "ò")}
    merges = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
    merges = [m for m in merges if all(c not in "".join(m) for c in "Ŀò")]
    kept = {t: i for t, i in kept.items() if len(t) == 1 or t in {"".join(m) for m in merges}}
    tokens = [*sorted(kept, key=kept.__getitem__), "Ġzebra", "<|im_start|>", "<|tool|>"]
    types = [1] * (len(tokens) - 2) + [3, 4]
    return {"tokens": tokens, "types": types, "merges": [" ".join(m) for m in merges]}


def write_gguf(path: Path, vocabulary: dict[str, list[Any]], pre: str) -> None:
    """A GGUF file with a vocabulary and no weights."""
    writer = gguf.GGUFWriter(path, "llama")
    for add in (writer.add_block_count, writer.add_head_count, writer.add_context_length):
        add(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ids_of(path: Path, texts: list[str], special: bool = False) -> list[list[int]]:
    """Token ids by llama.cpp."""
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(t.encode(), add_bos=False, special=special) for t in texts]


def main() -> None:
    smollm2 = Path(sys.argv[1])
    texts = random_texts(300, seed=20)
    vocabulary = tiny_vocabulary()
    tiny_texts = [*random_texts(250, seed=21), " zebra zebra", "zebra"]
    tiny_ids = {}
    with tempfile.TemporaryDirectory() as folder:
        for pre in PRE_TOKENIZERS:
            write_gguf(Path(folder) / "tiny.gguf", vocabulary, pre)
            tiny_ids[pre] = ids_of(Path(folder) / "tiny.gguf", tiny_texts)
    golden = {
        "smollm2": {
            "texts": texts,
            "ids": ids_of(smollm2, texts),
            "special_ids": ids_of(smollm2, texts, special=True),
        },
        "tiny": {"vocabulary": vocabulary, "texts": tiny_texts, "ids": tiny_ids},
    }
    data = json.dumps(golden, ensure_ascii=False, separators=(",", ":")).encode()
    OUTPUT.write_bytes(gzip.compress(data, mtime=0))
    print(f"{OUTPUT}: {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
