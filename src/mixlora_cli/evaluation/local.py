"""A model here that answers: a base, alone or with a trained run's adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from mixlora_cli.config import EvalConfig
from mixlora_cli.data.encode import Item, encode_prompts, encode_records
from mixlora_cli.data.records import Record
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.fingerprint import prompt_digest
from mixlora_cli.evaluation.instances import Answered, Chosen, Unanswered
from mixlora_cli.launch import ProcessGroup
from mixlora_cli.models.definitions import TaskRouting
from mixlora_cli.models.features import has_fixed_features, pictures_from
from mixlora_cli.models.generate import Generator, batches, longest_first
from mixlora_cli.models.load import build_base
from mixlora_cli.models.session import Run, Session


class LocalModel:
    """Answers greedily, in padded batches; the adapter is put on with the first question."""

    def __init__(self, config: EvalConfig, run: Run, routing: TaskRouting | None) -> None:
        """Load the base."""
        self._config, self._run, self._routing = config, run, routing
        self._base = build_base(run.model, run.dtype)
        self._items: dict[tuple[str, int], Item] = {}
        self._labelled: dict[int, Item] = {}
        self._draws = config.seed if run.selects_by == "chance" else None
        self.label, self.model, self.no_losses = run.label, self._base.name, ""

    def usable(self, part: Chosen) -> list[Record]:
        """Records whose prompts can be encoded. Raises UserError where one cannot and `data.on_error` is "stop".

        Of held-out ones the answers too, unless this chat template does not let answers be told from prompts.
        """
        chat, on_error, source = self._base.chat, self._config.data.on_error, f"the {part.name} data"
        items = {item.index: item for item in encode_prompts(part.records, chat, on_error, source)}
        self._items |= {(part.name, index): item for index, item in items.items()}
        usable = [record for record in part.records if record.index in items]
        if part.split == "heldout":
            try:
                labelled = encode_records(usable, chat, max_length=None, source=source)
                self._labelled = {item.index: item for item in labelled}
            except UserError as error:
                self.no_losses = str(error)
        return usable

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Of base, adapter, prompt, pictures and decoding."""
        config, run, base = self._config, self._run, self._base
        found = {
            "model": base.fingerprint,
            "number format": str(run.dtype).removeprefix("torch."),
            "adapter": run.digest,
            "prompt": prompt_digest(base),
            "pictures": pictures_from(config.eval.cache_features and has_fixed_features(base)),
            "decoding": f"greedy, at most {config.eval.max_new_tokens} tokens",
        }
        if self._routing is not None:
            found["task definitions"] = self._routing.fingerprint(base)
        if self._draws is not None:
            found["draws"] = f"by instance, seed {self._draws}"
        if self._labelled:
            found["losses"] = "of all answers' tokens"
        return found

    def answers(self, missing: Unanswered, team: ProcessGroup) -> Iterator[list[Answered]]:
        """A batch of answers at a time, of each part the longest prompts first.

        Raises:
            UserError: the loss of a held-out instance is not finite.
        """
        session, generator = self._opened
        with session.products():
            for part, records in missing:
                by_index = {record.index: record for record in records}
                share = team.share(longest_first([self._items[part.name, index] for index in by_index]))
                groups = batches(share, self._config.eval.batch_size)
                for batch, texts in zip(groups, generator.each(groups), strict=True):
                    losses = self._losses(session, part, batch)
                    yield [
                        Answered(part, by_index[item.index], text, losses.get(item.index))
                        for item, text in zip(batch, texts, strict=True)
                    ]

    def _losses(
        self, session: Session, part: Chosen, prompts: Sequence[Item]
    ) -> dict[int, tuple[float, int]]:
        """By index, nats and number of answer tokens of the held-out instances among a batch."""
        items = (
            [self._labelled[item.index] for item in prompts]
            if part.split == "heldout" and self._labelled
            else []
        )
        losses = session.answer_losses(items, self._draws) if items else []
        for item, (nll, _) in zip(items, losses, strict=True):
            if not math.isfinite(nll):
                raise UserError(
                    f"the loss of held-out record {item.index} (task {item.task}) is {nll}: the model has diverged; "
                    "train it again, with a lower train.learning_rate or train.precision=fp32"
                )
        return {item.index: loss for item, loss in zip(items, losses, strict=True)}

    @cached_property
    def _opened(self) -> tuple[Session, Generator]:
        config, run, base = self._config, self._run, self._base
        session = Session(base, run.dtype, config.eval.cache_features, run.adapter, self._routing)
        generator = Generator(
            session.model,
            base,
            session.features,
            config.eval.max_new_tokens,
            embeddings=session.embeddings,
            routing_seed=self._draws,
        )
        return session, generator
