"""Makes text_golden.json.gz: texts and the token ids that llama.cpp gives them.

Run it where llama-cpp-python, gguf, tokenizers and sentencepiece are installed, with this repository on PYTHONPATH:

    python tests/golden/text_generate.py SMOLLM2.gguf

SMOLLM2.gguf is the file of the default model (`ondevice pull smollm2`). The other parts need no model:
they train vocabularies of a few hundred tokens, write them as GGUF files without weights (under the name of each
pre-tokenizer, and as SentencePiece's), and let llama.cpp read those. The vocabularies are kept beside the ids.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from tests.golden.text_random import random_texts
from tests.golden.text_spm import SPM_TEXTS, gguf_vocabulary

OUTPUT = Path(__file__).parent / "text_golden.json.gz"
PRE_TOKENIZERS = (
    *("smollm", "gpt-2", "llama-bpe", "qwen2", "default", "dbrx", "glm4", "qwen35", "tekken", "gpt-4o", "deepseek-v3"),
    *("deepseek-llm", "deepseek-coder", "falcon", "seed-coder", "bailingmoe", "bloom", "viking"),
)


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


def joining_vocabulary() -> dict[str, list[Any]]:
    """Joins a few characters with any byte before or after them, so that ids show where a text was split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [pair for x in "a1!AĠĊ" for b in alphabet for pair in ((x, b), (b, x))]
    merges = list(dict.fromkeys(" ".join(pair) for pair in pairs))
    tokens = list(dict.fromkeys([*alphabet, *(merge.replace(" ", "") for merge in merges)]))
    return {"tokens": tokens, "types": [1] * len(tokens), "merges": merges}


def newer_characters() -> list[str]:
    """First and last of each run of characters that Python's tables have not and the regex engine has."""
    unassigned = "".join(chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) == "Cn")
    split = pre_tokenizers.Split(tokenizers.Regex(r"[^\p{L}\p{N}\p{M}\p{P}\p{S}]+"), "removed")
    known = {ord(c) for piece, _ in split.pre_tokenize_str(unassigned) for c in piece}
    return [chr(c) for c in sorted(known) if not {c - 1, c + 1} <= known or c % 64 == 0]


def write_gguf(path: Path, vocabulary: dict[str, list[Any]], pre: str | None, space: bool = True) -> None:
    """A GGUF file with a vocabulary and no weights; without `pre`, SentencePiece's."""
    writer = gguf.GGUFWriter(path, "llama")
    for add in (writer.add_block_count, writer.add_head_count, writer.add_context_length):
        add(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    if pre is None:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(vocabulary["scores"])
        writer.add_add_space_prefix(space)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
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
        joins = joining_vocabulary()
        newer = [f"a{c}a 1{c}1 {c}!{c}!A{c}A {c}{c}\n" for c in newer_characters()]
        newer_ids = {}
        for pre in ("deepseek-v3", "qwen2"):
            write_gguf(Path(folder) / "joins.gguf", joins, pre)
            newer_ids[pre] = ids_of(Path(folder) / "joins.gguf", newer)
        spm = gguf_vocabulary()
        spm_texts = [*random_texts(250, seed=22), *SPM_TEXTS]
        spm_ids = {}
        for space in (False, True):
            write_gguf(Path(folder) / "spm.gguf", spm, None, space)
            for special in (False, True):
                spm_ids[f"{space} {special}"] = ids_of(Path(folder) / "spm.gguf", spm_texts, special)
    golden = {
        "smollm2": {
            "texts": texts,
            "ids": ids_of(smollm2, texts),
            "special_ids": ids_of(smollm2, texts, special=True),
        },
        "tiny": {"vocabulary": vocabulary, "texts": tiny_texts, "ids": tiny_ids},
        "newer": {"vocabulary": joins, "texts": newer, "ids": newer_ids},
        "spm": {"vocabulary": spm, "texts": spm_texts, "ids": spm_ids},
    }
    data = json.dumps(golden, ensure_ascii=False, separators=(",", ":")).encode()
    OUTPUT.write_bytes(gzip.compress(data, mtime=0))
    print(f"{OUTPUT}: {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
