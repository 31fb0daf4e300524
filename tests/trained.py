"""A tiny ReLU model trained on text, so that its zeros are real: what skipping them gains costs nothing.

Trained by transformers on the CPU (extra `judges`) in less than a minute of one core, on the documentation that Python
brings along. A penalty on the size of the activations makes nine of ten zero, as in published models of this kind.

Source: L1 penalty on activations, Glorot et al. 2011, Deep Sparse Rectifier Neural Networks, section 3.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.machine import default_threads

VOCAB, CONTEXT = 1024, 256
STEPS, BATCH, RATE, WARM = 360, 2, 4e-3, 0.08
"""Of training: windows of CONTEXT tokens in a step; the rate rises over the first part of the steps, then falls."""
PENALTY = 0.5
"""Weight of the activations' mean size beside the loss."""
HELD_OUT = 0.08
"""Part of the text that nothing is trained on: its end."""
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "relu",
    "hidden_size": 128,
    "intermediate_size": 1024,
    "head_dim": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained model.

    Args:
        folder: in our format, float16, with its tokenizer.
        seen: the text that it was trained on.
        held_out: more of the same, which it was not.
    """

    folder: Path
    seen: str
    held_out: str


def trained(parent: Path) -> Trained:
    """The model, trained unless an earlier call left it there.

    Args:
        parent: folder for models; may hold others.
    """
    seen, held_out = texts()
    recipe = hashlib.sha256(Path(__file__).read_bytes() + seen.encode() + held_out.encode()).hexdigest()[:12]
    folder = parent / f"relu-{recipe}"
    if not folder.exists():
        _write(folder, seen)
    return Trained(folder, seen, held_out)


def texts() -> tuple[str, str]:
    """What is trained on, and what is held out."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    cut = text.rindex("\n\n", 0, int((1 - HELD_OUT) * len(text)))
    return text[:cut], text[cut:]


def _write(folder: Path, text: str) -> None:
    from ondevice.checkpoint import open_checkpoint
    from ondevice.checkpoint.quantization import dequantize
    from ondevice.checkpoint.writer import write_checkpoint
    from tests.conftest import write_tokenizer

    with TemporaryDirectory() as temporary:
        raw = Path(temporary)
        write_tokenizer(raw, template=None, text=text, vocab=VOCAB)
        from tokenizers import Tokenizer

        ids = np.asarray(Tokenizer.from_file(str(raw / "tokenizer.json")).encode(text).ids)
        _train(ids).save_pretrained(raw)
        with open_checkpoint(raw) as checkpoint:
            names = checkpoint.spec.tensors()
            tensors = ((name, dequantize(checkpoint.tensor(name)).astype(np.float16)) for name in names)
            write_checkpoint(folder, checkpoint.spec, tensors, checkpoint.tokenizer())


def _train(ids: NDArray[np.int64]) -> Any:
    """A model of transformers. The same seed, threads and processor give the same model."""
    import torch
    import transformers

    threads, random = torch.get_num_threads(), np.random.default_rng(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or default_threads()))
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CONFIG)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    active: list[Any] = []
    for name, module in model.named_modules():
        if name.endswith("act_fn"):
            module.register_forward_hook(lambda _, __, out: active.append(out))
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=WARM)
    for _ in range(STEPS):
        starts = random.integers(0, len(ids) - CONTEXT, BATCH)
        batch = torch.from_numpy(np.stack([ids[start : start + CONTEXT] for start in starts]))
        active.clear()
        loss = model(input_ids=batch, labels=batch).loss
        size = torch.stack([out.mean() for out in active]).mean()
        (loss + PENALTY * size).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    return model.eval()
