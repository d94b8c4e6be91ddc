"""What task routing reads (App. A): the mean of a frozen language model's last hidden states over a task's definition.

An embedding depends on the text and the model alone, so each is computed once and kept on disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mixlora_cli.method.pooling import masked_mean
from mixlora_cli.models.text_encoder import TextEncoder
from mixlora_cli.paths import cache_root
from mixlora_cli.progress import with_bar

_MANY = 8  # definitions, from which on a person wants to see that something goes on


def embed_definitions(
    definitions: Mapping[str, str], encoder: TextEncoder, root: Path | None = None
) -> dict[str, Tensor]:
    """Embedding (d,) of each task's definition in fp32, on the CPU; from disk where it is, else computed and stored.

    Args:
        definitions: text by task; tasks with one text share its embedding.
        root: cache folder; None = `cache_root()`.

    Raises:
        UserError: a text is missing in the cache and the encoder cannot be loaded.
    """
    dtype = str(encoder.dtype).removeprefix("torch.")
    folder = (root or cache_root()) / "task-embeddings" / f"{encoder.fingerprint[:16]}-{dtype}"
    files = {text: folder / f"{_key(text)}.npy" for text in definitions.values()}
    found = {text: _read(file, encoder.width) for text, file in files.items()}
    embeddings = {text: embedding for text, embedding in found.items() if embedding is not None}
    missing = [text for text in files if text not in embeddings]
    for text, embedding in zip(missing, _compute(missing, encoder), strict=True):
        _store(files[text], embedding)
        embeddings[text] = embedding
    return {task: embeddings[text] for task, text in definitions.items()}


@torch.no_grad()
def mean_hidden_state(model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Avg(f(z)) of Eq. 10 in fp32: (d,).

    The model sees the text as its tokenizer frames it; special tokens of that frame are not of the definition and do
    not count. One text at a time: no padding, and nothing else that an embedding could depend on.
    """
    device = next(model.parameters()).device
    encoded = tokenizer(text, return_special_tokens_mask=True)
    own = torch.tensor([encoded["special_tokens_mask"]], device=device) == 0
    hidden: Tensor = model(
        input_ids=torch.tensor([encoded["input_ids"]], device=device), use_cache=False
    ).last_hidden_state
    return masked_mean(hidden, own)[0].cpu()


def _compute(texts: Sequence[str], encoder: TextEncoder) -> Iterator[Tensor]:
    if not texts:
        return
    model, tokenizer = encoder.open()
    console = Console(stderr=True)
    with _ready(model):
        for text in with_bar(texts, "embedding task definitions", console, hidden=len(texts) < _MANY):
            yield mean_hidden_state(model, tokenizer, text)


@contextmanager
def _ready(model: nn.Module) -> Iterator[None]:
    """In eval mode, and on the GPU if there is one; both are put back."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        if torch.cuda.is_available():
            model.cuda()
        yield
    finally:
        model.to(device).train(was_training)


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read(file: Path, width: int) -> Tensor | None:
    """A stored embedding; None where there is none or what is there cannot be one, as after a crash of the disk."""
    try:
        with file.open("rb") as stream:
            values = np.lib.format.read_array(stream, allow_pickle=False)
    except (OSError, ValueError):
        return None
    if values.shape != (width,) or values.dtype != np.float32:
        return None
    return torch.from_numpy(values) if np.isfinite(values).all() else None


def _store(file: Path, embedding: Tensor) -> None:
    """Write whole or not at all. A cache that cannot be written costs only time."""
    partial = file.with_name(f"{file.stem}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            np.save(stream, embedding.numpy())
        partial.replace(file)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
