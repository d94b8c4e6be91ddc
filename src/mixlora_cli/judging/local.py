"""The judge `hf`: a causal language model through transformers, asked in left-padded batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from mixlora_cli.config import JudgeConfig
from mixlora_cli.errors import UserError
from mixlora_cli.judging import prompt
from mixlora_cli.judging.judge import Questions
from mixlora_cli.judging.replies import Identity, question_to
from mixlora_cli.models.forward import choose_dtype
from mixlora_cli.models.load import checkpoint_fingerprint


@dataclass
class LocalJudge:
    """Generates greedily; the weights load with the first question."""

    settings: JudgeConfig
    identity: Identity = field(init=False)

    def __post_init__(self) -> None:
        """Raises UserError when the model cannot be found."""
        settings, name = self.settings, str(self.settings.model)
        try:
            config = AutoConfig.from_pretrained(name, revision=settings.revision or "main")
        except (OSError, ValueError) as error:
            raise _unreadable(name, error) from error
        commit = None if Path(name).is_dir() else getattr(config, "_commit_hash", None)
        revision = commit or checkpoint_fingerprint(config, name)[:16]
        dtype = str(choose_dtype(settings.precision)).removeprefix("torch.")
        decoding = {"greedy": True, "max_new_tokens": settings.max_new_tokens, "number format": dtype}
        self.identity = Identity("hf", name, revision, prompt.DIGEST, decoding)

    def replies(self, questions: Questions) -> Iterator[dict[str, str]]:
        """A batch's replies at a time, the longest questions first: one too large for the memory fails at once.

        Raises UserError when the model cannot be loaded.
        """
        if not questions:
            return
        model, tokenizer = self._load()
        texts = {key: question_to(prediction) for key, prediction in questions.items()}
        keys = sorted(texts, key=lambda key: (-len(texts[key]), key))
        for start in range(0, len(keys), self.settings.batch_size):
            batch = keys[start : start + self.settings.batch_size]
            replies = self._reply(model, tokenizer, [texts[key] for key in batch])
            yield dict(zip(batch, replies, strict=True))

    def _load(self) -> tuple[Any, PreTrainedTokenizerBase]:
        name, revision = self.identity.model, self.settings.revision or "main"
        dtype = choose_dtype(self.settings.precision)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, padding_side="left")
            model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype)
        except (OSError, ValueError, RuntimeError) as error:
            raise _unreadable(name, error) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        network: Any = model  # its `to` is typed as a wrapped function
        return network.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer

    @torch.inference_mode()
    def _reply(self, model: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[str]:
        inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        # Spelt out, because what is left open here is taken from the checkpoint's own settings.
        greedy = GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=self.settings.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        tokens = model.generate(**inputs.to(model.device), generation_config=greedy)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def _unreadable(name: str, error: Exception) -> UserError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UserError(
        f"judge.model={name} cannot be loaded: {reason} Give a Hugging Face id that this machine can reach, or a "
        "local folder with config.json, weights and tokenizer files"
    )
