"""What routing=task needs beside the adapter: a definition of each task, and the language model that reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mixlora_cli.config import DataConfig, TrainConfig
from mixlora_cli.data.definitions import definitions_of
from mixlora_cli.errors import UserError
from mixlora_cli.method.config import PEFT_TYPE
from mixlora_cli.models.base import Base
from mixlora_cli.models.task_embeddings import embed_definitions
from mixlora_cli.models.text_encoder import choose_encoder

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
