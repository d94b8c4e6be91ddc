"""`mixlora eval`: answer the unseen tasks (and held-out instances of the seen ones), score, print, write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel

from mixlora_cli.config import EvalConfig, GenerationConfig
from mixlora_cli.data.collate import Features, PixelLoader
from mixlora_cli.data.encode import Item, encode_prompts
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.evaluation.done import Key
from mixlora_cli.evaluation.fingerprint import adapter_digest, prompt_digest, records_digest, relative_image
from mixlora_cli.evaluation.generate import Generator, batches, longest_first
from mixlora_cli.evaluation.instances import (
    Chosen,
    check_pairs,
    check_targets,
    choose_instances,
    declared,
    notes,
)
from mixlora_cli.evaluation.predictions import (
    FILE_NAME,
    Header,
    Prediction,
    PredictionWriter,
)
from mixlora_cli.evaluation.progress import answer_progress
from mixlora_cli.evaluation.references import label_set, references
from mixlora_cli.evaluation.results import Results, read_results
from mixlora_cli.evaluation.sampling import benchmark_of, category_of
from mixlora_cli.evaluation.scoring import score
from mixlora_cli.evaluation.shards import open_team_predictions, take_in_shards
from mixlora_cli.evaluation.subject import Subject, find_subject
from mixlora_cli.evaluation.table import print_comparison
from mixlora_cli.launch import Team, joined
from mixlora_cli.models.adapters import load_adapter
from mixlora_cli.models.definitions import TaskRouting, routes_by_chance, routing_of_adapter
from mixlora_cli.models.features import FeatureCache, pictures_from
from mixlora_cli.models.forward import choose_dtype, matrix_products_in
from mixlora_cli.models.load import Base, build_base, require_prepared
from mixlora_cli.output import alone_in
from mixlora_cli.paths import require_cache
from mixlora_cli.report.finish import finish
from mixlora_cli.training.run_folder import versions


@dataclass(frozen=True)
class Work:
    """One file's instances: the records, by `Record.index`, and their encoded prompts."""

    chosen: Chosen
    records: dict[int, Record]
    items: Sequence[Item]

    @property
    def answered(self) -> list[Record]:
        """Records whose prompts could be encoded."""
        return [self.records[item.index] for item in self.items]

    def key(self, item: Item) -> Key:
        """That of the prediction which answers the item."""
        return self.chosen.split, benchmark_of(self.records[item.index]), item.index


def evaluate(config: EvalConfig) -> Results:
    """Evaluate as `config` says; everything lands in `config.output_dir`. Continues what an earlier call left
    unfinished.

    In one of several processes that were started together it answers its share; all return the same results.

    Raises UserError for a run folder, benchmark or data that cannot be evaluated, before a model is loaded.
    """
    folder = Path(config.output_dir).expanduser()
    with alone_in(folder, "evaluation"):
        return _evaluate(config, folder)


def _evaluate(config: EvalConfig, folder: Path) -> Results:
    with joined() as team:
        console = Console(stderr=True, quiet=not team.leads)
        _answer(config, folder, team, console)
        team.wait()
        if team.leads:
            take_in_shards(folder / FILE_NAME)
            results = score(folder)
            print_comparison([(results.label, results)])
            _say(console, f"predictions and results are in {folder}")
        team.wait()
        if not team.leads:
            return read_results(folder)
    return finish(folder, config.judge, config.seed)


def _answer(config: EvalConfig, folder: Path, team: Team, console: Console) -> None:
    """Have every instance of this process's share answered in a predictions file."""
    if config.eval.cache_features:
        require_cache()
    subject = find_subject(config)
    require_prepared(subject.model)
    with team.leader_first():
        chosen = choose_instances(config)
    for part in chosen:
        check_targets(part, config)
    for note in notes(chosen):
        _say(console, note)
    tasks = (record.task for part in chosen for record in part.records)
    routing = routing_of_adapter(subject.adapter, config.data, tasks)

    dtype = choose_dtype(subject.precision)
    with team.leader_first():
        base = build_base(subject.model, dtype)
    work = [_encoded(part, base, config) for part in chosen]
    for each in work:  # again: encoding may have left out one of two
        check_pairs(each.chosen, each.answered, config.eval.sources or {})
    routing_seed = config.seed if routes_by_chance(subject.adapter) else None
    header = _header(config, subject, base, dtype, work, routing, routing_seed)
    with open_team_predictions(folder / FILE_NAME, header, team, lambda text: _say(console, text)) as writer:
        if len(writer.done) == header.count:
            return
        features = _features(base, config.eval)
        embeddings = None if routing is None else routing.embeddings(base)  # before the adapter is there
        model = _on_device(
            base.model if subject.adapter is None else load_adapter(base.model, subject.adapter)
        )
        with matrix_products_in(model, dtype, model.device.type):
            generator = Generator(
                model,
                base,
                features,
                config.eval.max_new_tokens,
                embeddings=embeddings,
                routing_seed=routing_seed,
            )
            try:
                _answer_share(work, generator, writer, config.eval, team, console)
            except KeyboardInterrupt:
                _say(console, f"stopped at {len(writer.done)}/{header.count}: the same command continues")
                raise


def _encoded(part: Chosen, base: Base, config: EvalConfig) -> Work:
    encoded = encode_prompts(part.records, base, config.data.on_error, source=f"the {part.name} data")
    return Work(part, {record.index: record for record in part.records}, encoded.items)


def _header(
    config: EvalConfig,
    subject: Subject,
    base: Base,
    dtype: torch.dtype,
    work: Sequence[Work],
    routing: TaskRouting | None,
    routing_seed: int | None,
) -> Header:
    digests = (records_digest(part.answered, part.chosen.images) for part in work)
    fingerprint = {
        "model": base.fingerprint,
        "number format": str(dtype).removeprefix("torch."),
        "adapter": adapter_digest(subject.adapter),
        "data": " ".join(f"{part.chosen.name}:{digest}" for part, digest in zip(work, digests, strict=True)),
        "prompt": prompt_digest(base),
        "pictures": pictures_from(config.eval.cache_features),
        "decoding": f"greedy, at most {config.eval.max_new_tokens} tokens",
    }
    if routing is not None:
        fingerprint["task definitions"] = routing.fingerprint(base)
    if routing_seed is not None:
        fingerprint["draws"] = f"by instance, seed {routing_seed}"
    return Header(fingerprint, sum(len(part.items) for part in work), _about(config, subject, base, work))


def _about(config: EvalConfig, subject: Subject, base: Base, work: Sequence[Work]) -> Mapping[str, Any]:
    chosen = [part.chosen for part in work]
    answered = Counter(part.key(item)[:2] for part in work for item in part.items)
    available: dict[tuple[str, str], int] = {
        (part.split, name): count for part in chosen for name, count in part.counts.items()
    }
    return {
        "label": subject.label,
        "model": base.name,
        "run": None if subject.run is None else str(subject.run),
        "limit": config.eval.limit,
        "seed": config.seed,
        "sample": {
            name: {"answered": n, "of": available[split, name]} for (split, name), n in answered.items()
        },
        "images": {name: str(part.images) for part in chosen for name in part.counts if part.images},
        "sources": {part.name: dict(part.about) for part in chosen if part.about},
        "benchmarks": declared(chosen, config.eval.sources or {}),
        "versions": versions(),
    }


def _features(base: Base, settings: GenerationConfig) -> Features:
    """Pictures as the model takes them; the cache changes `base.model`, so it comes before the adapter."""
    return FeatureCache(base) if settings.cache_features else PixelLoader(base.image_processor)


def _on_device(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    module: torch.nn.Module = model
    if torch.cuda.is_available():
        module.cuda()
    return model


def _answer_share(
    work: Sequence[Work],
    generator: Generator,
    writer: PredictionWriter,
    settings: GenerationConfig,
    team: Team,
    console: Console,
) -> None:
    """Answer this process's share of what no file has yet, batch by batch, each on the disk before the next begins."""
    missing = [(part, [item for item in part.items if part.key(item) not in writer.done]) for part in work]
    shares = [(part, team.share(longest_first(items))) for part, items in missing]
    own = sum(len(items) for _, items in shares)
    done = len(writer.done) if team.size == 1 else 0
    verb = ("answering", "answered")
    if team.size > 1:
        verb = ("answering", f"first of {team.size} processes: answered")
    with answer_progress(console, done, done + own, verb) as advance:
        for part, items in shares:
            for batch in batches(items, settings.batch_size):
                answers = generator(batch)
                writer.append(
                    [_prediction(part, item, answer) for item, answer in zip(batch, answers, strict=True)]
                )
                advance(len(batch))


def _prediction(work: Work, item: Item, answer: str) -> Prediction:
    record = work.records[item.index]
    extra = record.extra
    *_, question, target = record.conversation
    return Prediction(
        split=work.chosen.split,
        index=record.index,
        benchmark=benchmark_of(record),
        id=record.id,
        question=question.text.replace(IMAGE_MARKER, "").strip(),
        target=target.text.strip(),
        prediction=answer,
        category=category_of(record),
        image_id=str(extra.get("image_id", "")),
        answers=references(extra),
        labels=label_set(extra),
        image=relative_image(record, work.chosen.images),
    )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
