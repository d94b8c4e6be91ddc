"""What routing=task needs beside the adapter (App. A): each task's definition, read by a frozen language model.

An embedding is the mean of the model's last hidden states over the text. It depends on the text and the model alone,
so each is computed once and kept on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from mixlora_cli.config import DataConfig
from mixlora_cli.data.definitions import definitions_of, made_definitions
from mixlora_cli.data.loading import definitions_file
from mixlora_cli.data.records import DEFAULT_TASK, Record
from mixlora_cli.errors import UserError
from mixlora_cli.method.pooling import masked_mean
from mixlora_cli.models.load import LoadedModel, checkpoint_fingerprint, first_line
from mixlora_cli.paths import cache_root
from mixlora_cli.progress import with_bar
from mixlora_cli.store import atomic, digest_of

ADAPTER_CONFIG = "adapter_config.json"
_MANY = 8  # definitions, from which on a person wants to see that something goes on


@dataclass(frozen=True)
class TaskRouting:
    """Definitions by task and who reads them; `embeddings` makes of them what the routers read."""

    definitions: Mapping[str, str]
    encoder: str | None
    """Hugging Face id or local folder of a language model; None = the base's own."""
    width: int | None = None
    """Features of an embedding that the adapter's routers take; None = those of the encoder."""

    def embeddings(self, base: LoadedModel) -> dict[str, Tensor]:
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

    def fingerprint(self, base: LoadedModel) -> str:
        """16 hex digits that change with a definition, a task's name or the encoder."""
        return digest_of([choose_encoder(self.encoder, base).fingerprint, sorted(self.definitions.items())])


def routing_to_train(
    data: DataConfig, tasks: Iterable[str], encoder: str | None, records: Sequence[Record] = ()
) -> TaskRouting:
    """What a training run with routing=task on these tasks reads.

    Args:
        data: names the file of definitions, or none.
        tasks: of the training.
        encoder: see `TaskRouting`.
        records: of the training, of which definitions are made where no file is named.

    Raises:
        UserError: a task has no definition, or without a file the records have no tasks.
    """
    if definitions_file(data) is None:
        definitions = made_definitions(records)
        if not definitions.keys() - {DEFAULT_TASK}:
            why = "streamed records are not known before" if data.streaming else "the records name no task"
            raise UserError(
                f"routing=task needs tasks and what defines them: {why} and data.metadata=null; give "
                "data.metadata=<file> with definitions, data.task_key=<key> or files by task, or train with "
                "routing=instance"
            )
        return TaskRouting(definitions, encoder)
    try:
        return TaskRouting(definitions_of(data, tasks), encoder)
    except UserError as error:
        raise UserError(f"{error}; or train with routing=instance, which needs none") from error


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


def choose_encoder(name: str | None, base: LoadedModel) -> TextEncoder:
    """The encoder that `routing.encoder` names; None is the base's own language model, before it is trained.

    Raises:
        UserError: the named model cannot be found.
    """
    model: nn.Module = base.model.get_decoder()
    dtype = next(model.parameters()).dtype
    if name is not None:
        return _other_language_model(name, dtype)

    def opened() -> tuple[nn.Module, PreTrainedTokenizerBase]:
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise RuntimeError("the language model is adapted already: embed the definitions before that")
        return model, base.tokenizer

    width = int(base.model.config.get_text_config().hidden_size)
    return TextEncoder(base.name, base.fingerprint, width, dtype, opened)


def _other_language_model(name: str, dtype: torch.dtype) -> TextEncoder:
    """A language model by Hugging Face id or local folder; of a vision-language one, the language part."""
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
        return model.get_decoder().requires_grad_(False).eval(), tokenizer

    width = int(config.get_text_config().hidden_size)
    return TextEncoder(name, checkpoint_fingerprint(config, name), width, dtype, opened)


def _unreadable(name: str, error: Exception) -> UserError:
    return UserError(
        f"routing.encoder={name} cannot be loaded: {first_line(error)} Give null for the base's own language model, a "
        "Hugging Face id that this machine can reach, or a local folder with config.json, weights and tokenizer files"
    )


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
    files = {
        text: folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"
        for text in definitions.values()
    }
    found = {text: _read(file, encoder.width) for text, file in files.items()}
    embeddings = {text: embedding for text, embedding in found.items() if embedding is not None}
    missing = [text for text in files if text not in embeddings]
    for text, embedding in zip(missing, _compute(missing, encoder), strict=True):
        # A cache that cannot be written costs only time.
        with suppress(OSError), atomic(files[text], synced=False) as temp, temp.open("wb") as stream:
            np.save(stream, embedding.numpy())
        embeddings[text] = embedding
    return {task: embeddings[text] for task, text in definitions.items()}


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


def _compute(texts: Sequence[str], encoder: TextEncoder) -> Iterator[Tensor]:
    if not texts:
        return
    model, tokenizer = encoder.open()
    for text in with_bar(texts, "embedding task definitions", hidden=len(texts) < _MANY):
        yield embed_text(text, model, tokenizer)


def embed_text(text: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """`mean_hidden_state` of an encoder that is open, on the GPU if there is one: (d,) in fp32, on the CPU."""
    with _ready(model):
        return mean_hidden_state(model, tokenizer, text)


@contextmanager
def _ready(model: nn.Module) -> Iterator[None]:
    """In eval mode, and on the GPU if there is one; both are put back."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        if torch.cuda.is_available():
            model.to("cuda")
        yield
    finally:
        model.to(device).train(was_training)


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
