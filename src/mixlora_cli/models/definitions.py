"""The frozen language model that reads task definitions: the base's own, or another from the hub or a local folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from mixlora_cli.config import DataConfig, TrainConfig
from mixlora_cli.data.definitions import definitions_of
from mixlora_cli.errors import UserError
from mixlora_cli.method.config import PEFT_TYPE
from mixlora_cli.method.pooling import masked_mean
from mixlora_cli.models.load import Base, checkpoint_fingerprint
from mixlora_cli.paths import cache_root
from mixlora_cli.progress import with_bar


@dataclass(frozen=True)
class TextEncoder:
    """A frozen language model, opened only when there is something to read."""

    name: str
    fingerprint: str
    """Hex digest that identifies its weights; with `dtype`, what a cache is keyed by."""
    width: int
    """Features d of its hidden states."""
    dtype: torch.dtype
    open: Callable[[], tuple[nn.Module, PreTrainedTokenizerBase]]
    """A module whose output has `last_hidden_state` (B, S, d) behind the final norm, and its tokenizer."""


def choose_encoder(name: str | None, base: Base) -> TextEncoder:
    """The encoder that `routing.encoder` names; None is the base's own language model.

    Raises:
        UserError: the named model cannot be found.
    """
    return own_language_model(base) if name is None else other_language_model(name, _dtype(base))


def own_language_model(base: Base) -> TextEncoder:
    """The base's own language model, before anything is trained on it."""
    model: nn.Module = base.model.model.language_model

    def opened() -> tuple[nn.Module, PreTrainedTokenizerBase]:
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise RuntimeError("the language model is adapted already: embed the definitions before that")
        return model, base.tokenizer

    width = int(base.model.config.get_text_config().hidden_size)
    return TextEncoder(base.name, base.fingerprint, width, _dtype(base), opened)


def other_language_model(name: str, dtype: torch.dtype) -> TextEncoder:
    """A language model by Hugging Face id or local folder; of a vision-language one, the language part.

    Raises:
        UserError: it cannot be found, now or when it is opened.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from error

    def opened() -> tuple[nn.Module, PreTrainedTokenizerBase]:
        try:
            model = AutoModel.from_pretrained(name, dtype=dtype)
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, RuntimeError) as error:
            raise _unreadable(name, error) from error
        return getattr(model, "language_model", model).requires_grad_(False).eval(), tokenizer

    width = int(config.get_text_config().hidden_size)
    return TextEncoder(name, checkpoint_fingerprint(config, name), width, dtype, opened)


def _dtype(base: Base) -> torch.dtype:
    parameter: nn.Parameter = next(base.model.model.language_model.parameters())
    return parameter.dtype


def _unreadable(name: str, error: Exception) -> UserError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UserError(
        f"routing.encoder={name} cannot be loaded: {reason} Give null for the base's own language model, a Hugging "
        "Face id that this machine can reach, or a local folder with config.json, weights and tokenizer files"
    )


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


ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class TaskRouting:
    """Definitions by task and who reads them; `embeddings` makes of them what the routers read."""

    definitions: Mapping[str, str]
    encoder: str | None
    """Hugging Face id or local folder of a language model; None = the base's own."""
    width: int | None = None
    """Features of an embedding that the adapter's routers take; None = those of the encoder."""

    def embeddings(self, base: Base) -> dict[str, Tensor]:
        """Embedding (d,) of each task. To be called before an adapter is attached to the base.

        Raises:
            UserError: the encoder cannot be loaded, or is of another width than the one that the adapter knows.
        """
        encoder = choose_encoder(self.encoder, base)
        if self.width not in (None, encoder.width):
            raise UserError(
                f"this adapter's routers read task embeddings of {self.width} features, but {encoder.name} gives "
                f"{encoder.width}; expected the model that it was trained with"
            )
        return embed_definitions(self.definitions, encoder)

    def fingerprint(self, base: Base) -> str:
        """16 hex digits that change with a definition, a task's name or the encoder."""
        parts = [choose_encoder(self.encoder, base).fingerprint, sorted(self.definitions.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def embedding_width(embeddings: Mapping[str, Tensor] | None) -> int | None:
    """Features d of an embedding; None without embeddings."""
    return None if embeddings is None else len(next(iter(embeddings.values())))


def routing_to_train(config: TrainConfig, tasks: Iterable[str]) -> TaskRouting | None:
    """Task routing of a training run on these tasks; None where nothing routes by task.

    Raises:
        UserError: a task has no definition.
    """
    if config.adapter.name != "mixlora" or config.routing.name != "task":
        return None
    try:
        definitions = definitions_of(config.data, tasks)
    except UserError as error:
        raise UserError(f"{error}; or train with routing=instance, which needs none") from error
    return TaskRouting(definitions, config.routing.encoder)


def routing_of_adapter(adapter: Path | None, data: DataConfig, tasks: Iterable[str]) -> TaskRouting | None:
    """Task routing that a saved adapter was trained with, for these tasks; None where it does not route by task.

    Raises:
        UserError: its configuration cannot be read, or a task has no definition.
    """
    saved = _saved(adapter)
    if saved.get("routing") != "task":
        return None
    return TaskRouting(
        definitions_of(data, tasks), saved.get("task_encoder"), saved.get("task_embedding_dim")
    )


def routes_by_chance(adapter: Path | None) -> bool:
    """Whether a saved adapter is MixLoRA with routing=random.

    Raises:
        UserError: its configuration cannot be read.
    """
    return _saved(adapter).get("routing") == "random"


def _saved(adapter: Path | None) -> Mapping[str, Any]:
    """A MixLoRA adapter's configuration; empty where there is no adapter, or one of another kind."""
    if adapter is None or not (adapter / ADAPTER_CONFIG).is_file():
        return {}
    path = adapter / ADAPTER_CONFIG
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        kind = saved.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as an adapter's configuration ({error})") from None
    return saved if kind == PEFT_TYPE else {}
