"""Writes smollm2_greedy.json: how llama.cpp goes on greedily after twenty prompts, with SmolLM2-135M-Instruct.

    python tests/golden/smollm2_generate.py SmolLM2-135M-Instruct.Q4_1.gguf

Needs llama-cpp-python (the committed file: 0.3.36, one x86-64 CPU with AVX-512 VNNI). Ten prompts go through the
model's chat template, ten are prose to be continued. Each is answered from the file itself, where llama.cpp rounds
activations to 8 bits, and from the same weights written out as float32, where it does not. Ids are stored, so that the
test compares decoding and nothing else.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np

CHAT = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain how a bicycle stays upright.",
    "List three uses of vinegar in the kitchen.",
    "Who wrote Romeo and Juliet?",
    "What is 12 times 12?",
    "Translate 'good morning' into Spanish.",
    "Tell me a story about a lost dog.",
    "Why do leaves change colour in autumn?",
    "Give me advice for a job interview.",
]
PROSE = [
    "The mountain village had one road, and in winter the snow closed it for weeks at a time. The people",
    "A computer's memory holds the programs that are running and the data that they work on. When the memory is full,",
    "Bread is made from flour, water, salt and yeast. First the flour and water are mixed, and then",
    "In the nineteenth century, railways changed the way that goods and people moved across the country. Before that,",
    "To plant a tree, dig a hole that is twice as wide as the roots. Then",
    "The heart is a muscle that pumps blood through the body. It has four chambers, and",
    "She opened the old wooden box and found a letter from her grandmother. It said",
    "Water boils at one hundred degrees Celsius at sea level, but on a high mountain",
    "The library is open from Monday to Friday. Visitors who want to borrow books must",
    "Sailors once found their way by the stars. On clear nights they measured",
]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TOKENS = 64


def chat_text(prompt: str) -> str:
    turns = [("system", SYSTEM), ("user", prompt)]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text + "<|im_start|>assistant\n"


def answers(file: str, prompts: list[str]) -> list[tuple[list[int], list[int]]]:
    model = llama_cpp.Llama(file, n_ctx=512, verbose=False, logits_all=True, n_threads=2)
    made = []
    for prompt in prompts:
        ids = model.tokenize(prompt.encode(), add_bos=False, special=True)
        model.reset()
        model.eval(ids)
        out: list[int] = []
        while len(out) < TOKENS:
            token = int(np.argmax(model.scores[model.n_tokens - 1]))
            out.append(token)
            if token == model.token_eos():
                break
            model.eval([token])
        made.append((ids, out))
    return made


def main() -> None:
    prompts = [chat_text(p) for p in CHAT] + PROSE
    with tempfile.TemporaryDirectory() as folder:
        wide = f"{folder}/float32.gguf"
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.allow_requantize = 0, True
        assert llama_cpp.llama_model_quantize(sys.argv[1].encode(), wide.encode(), ctypes.byref(settings)) == 0
        exact, rounded = answers(wide, prompts), answers(sys.argv[1], prompts)
    rows = [
        {"prompt": prompt, "ids": ids, "float32": floats, "q4_1": codes}
        for prompt, (ids, floats), (_, codes) in zip(CHAT + PROSE, exact, rounded)
    ]
    Path(__file__).with_name("smollm2_greedy.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
