"""The frozen language model that reads task definitions: the base's own, or another from the hub or a local folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from mixlora_cli.errors import UserError
from mixlora_cli.models.base import Base
from mixlora_cli.models.hub import checkpoint_fingerprint


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
