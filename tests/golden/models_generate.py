"""Makes models_transformers.npz and models_llama_cpp.npz: logits that other engines give for tiny models.

Run it from the repository's root with the root on PYTHONPATH, in an environment of this project with the extras
`dev` and, for the first line, `judges`:

    python tests/golden/models_generate.py transformers
    python tests/golden/models_generate.py llama.cpp INTERPRETER

INTERPRETER is a Python that has NumPy and llama-cpp-python (`pip install llama-cpp-python`, in an environment of its
own). It runs this file again for each GGUF file, with a float32 cache and without flash attention. The logits of
transformers are those of float64 arithmetic throughout, rounded to float32.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np


def transformers_goldens() -> None:
    """Configuration and tensor names as the library saves them, and its logits."""
    from safetensors import safe_open

    from tests.models import transformers_judge as judge
    from tests.models.cases import CASES, POSITIONS, case_ids, case_tensors
    from tests.models.goldens import TRANSFORMERS, save_goldens

    logits, cases = {}, {}
    for name, config in CASES.items():
        tensors, ids = case_tensors(name), case_ids(name)
        with tempfile.TemporaryDirectory() as folder:
            judge.build(config, tensors).save_pretrained(folder)
            saved = json.loads((Path(folder) / "config.json").read_text())
            with safe_open(Path(folder) / "model.safetensors", "np") as file:
                names = sorted(file.keys())
        cases[name] = {"ids": ids.tolist(), "config": saved, "tensors": names}
        with judge.float64_throughout():
            logits[name] = judge.full_logits(judge.build(config, tensors), ids)[POSITIONS].astype(np.float32)
    save_goldens(TRANSFORMERS, logits, {"made_by": judge.VERSIONS, "cases": cases})


def llama_cpp_goldens(interpreter: str) -> None:
    """Writes each case's GGUF file and has llama.cpp run it."""
    from tests.models.cases import POSITIONS, case_ids
    from tests.models.gguf_cases import GGUF_CASES, write_case
    from tests.models.goldens import LLAMA_CPP, save_goldens

    logits, cases, version = {}, {}, ""
    with tempfile.TemporaryDirectory() as folder:
        for name in GGUF_CASES:
            file, out = write_case(Path(folder) / f"{name}.gguf", name), Path(folder) / f"{name}.npy"
            ids = case_ids(name).tolist()
            command = [interpreter, __file__, "run-gguf", str(file), str(out), json.dumps(ids)]
            version = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            logits[name] = np.load(out)[POSITIONS]
            cases[name] = {"ids": ids}
    save_goldens(LLAMA_CPP, logits, {"made_by": f"llama-cpp-python {version}", "cases": cases})


def run_gguf(file: str, out: str, ids: list[int]) -> None:
    """Saves llama.cpp's logits of every position, float32 [N, vocab], and prints its version."""
    import llama_cpp as lib

    lib.llama_backend_init()
    settings = lib.llama_model_default_params()
    settings.use_extra_bufts = False
    model = lib.llama_model_load_from_file(file.encode(), settings)
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.type_k = params.type_v = lib.GGML_TYPE_F32
    params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_threads = params.n_threads_batch = 2
    context = lib.llama_init_from_model(model, params)
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    if lib.llama_decode(context, batch):
        raise SystemExit(f"{file}: llama.cpp could not run it")
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (vocab,)) for i in range(len(ids))]
    np.save(out, np.stack(rows))
    print(lib.__version__)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["transformers"]:
            transformers_goldens()
        case ["llama.cpp", interpreter]:
            llama_cpp_goldens(interpreter)
        case ["run-gguf", file, out, ids]:
            run_gguf(file, out, json.loads(ids))
        case _:
            raise SystemExit(__doc__)
