"""A model here that answers: a base, alone or with a trained run's adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from mixlora_cli.config import EvalConfig
from mixlora_cli.data.encode import Item, encode_prompts
from mixlora_cli.data.records import Record
from mixlora_cli.evaluation.fingerprint import prompt_digest
from mixlora_cli.evaluation.instances import Chosen, Unanswered
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
        self.label, self.model = run.label, self._base.name

    def usable(self, part: Chosen) -> list[Record]:
        """Records whose prompts can be encoded. Raises UserError where one cannot and `data.on_error` is "stop"."""
        on_error, source = self._config.data.on_error, f"the {part.name} data"
        items = {item.index: item for item in encode_prompts(part.records, self._base.chat, on_error, source)}
        self._items |= {(part.name, index): item for index, item in items.items()}
        return [record for record in part.records if record.index in items]

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
        if run.selects_by == "chance":
            found["draws"] = f"by instance, seed {config.seed}"
        return found

    def answers(self, missing: Unanswered, team: ProcessGroup) -> Iterator[list[tuple[Chosen, Record, str]]]:
        """A batch of answers at a time, of each part the longest prompts first."""
        session, generator = self._opened
        with session.products():
            for part, records in missing:
                by_index = {record.index: record for record in records}
                share = team.share(longest_first([self._items[part.name, index] for index in by_index]))
                for batch in batches(share, self._config.eval.batch_size):
                    answered = zip(batch, generator(batch), strict=True)
                    yield [(part, by_index[item.index], answer) for item, answer in answered]

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
            routing_seed=config.seed if run.selects_by == "chance" else None,
        )
        return session, generator
