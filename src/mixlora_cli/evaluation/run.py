"""`mixlora eval`: answer the unseen tasks (and held-out instances of the seen ones), score, print, write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel

from mixlora_cli.config.schema import EvalConfig, GenerationConfig
from mixlora_cli.data.batches import Item, encode_prompts
from mixlora_cli.data.collate import Features, PixelLoader
from mixlora_cli.data.loading import load_records, locate_files
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.evaluation.benchmarks import choose
from mixlora_cli.evaluation.fingerprint import adapter_digest, prompt_digest, records_digest, relative_image
from mixlora_cli.evaluation.generate import Generator, batches
from mixlora_cli.evaluation.predictions import (
    FILE_NAME,
    Header,
    Prediction,
    PredictionWriter,
    open_predictions,
)
from mixlora_cli.evaluation.progress import answer_progress
from mixlora_cli.evaluation.results import Results
from mixlora_cli.evaluation.sampling import benchmark_of, category_of, grouped, limited
from mixlora_cli.evaluation.scoring import score
from mixlora_cli.evaluation.subject import Subject, find_subject
from mixlora_cli.evaluation.table import print_comparison
from mixlora_cli.models.adapters import load_adapter
from mixlora_cli.models.base import Base
from mixlora_cli.models.build import build_base
from mixlora_cli.models.features import FeatureCache
from mixlora_cli.models.prepared import require_prepared
from mixlora_cli.models.task_routing import TaskRouting, routing_of_adapter
from mixlora_cli.training.precision import choose_dtype, matrix_products_in
from mixlora_cli.training.run_folder import versions

EvalSplit = Literal["unseen", "heldout"]


@dataclass(frozen=True)
class Work:
    """One split's instances: the records, by `Record.index`, and their encoded prompts."""

    split: EvalSplit
    images: Path | None
    records: dict[int, Record]
    items: Sequence[Item]


def evaluate(config: EvalConfig) -> Results:
    """Evaluate as `config` says; everything lands in `config.output_dir`. Continues what an earlier call left
    unfinished.

    Raises UserError for a run folder, benchmark or data that cannot be evaluated, before a model is loaded.
    """
    console = Console(stderr=True)
    subject = find_subject(config)
    require_prepared(subject.model)
    chosen = choose_records(config)
    folder = Path(config.output_dir).expanduser()
    tasks = (record.task for records in chosen.values() for record in records)
    routing = routing_of_adapter(subject.adapter, config.data, tasks)

    dtype = choose_dtype(subject.precision)
    base = build_base(subject.model, dtype)
    work = [_encoded(split, records, base, config) for split, records in chosen.items()]
    header = _header(config, subject, base, dtype, work, routing)
    with open_predictions(folder / FILE_NAME, header, announce=lambda text: _say(console, text)) as writer:
        if len(writer.done) < header.count:
            features = _features(base, config.eval)
            embeddings = None if routing is None else routing.embeddings(base)  # before the adapter is there
            model = _on_device(
                base.model if subject.adapter is None else load_adapter(base.model, subject.adapter)
            )
            with matrix_products_in(model, dtype, model.device.type):
                generator = Generator(
                    model, base, features, config.eval.max_new_tokens, embeddings=embeddings
                )
                try:
                    _answer_all(work, generator, writer, config.eval, header.count, console)
                except KeyboardInterrupt:
                    _say(console, f"stopped at {len(writer.done)}/{header.count}: the same command continues")
                    raise

    results = score(folder)
    print_comparison([(results.label, results)])
    _say(console, f"predictions and results are in {folder}")
    return results


def choose_records(config: EvalConfig) -> dict[EvalSplit, list[Record]]:
    """The records of each split that `eval.benchmarks`, `eval.seen` and `eval.limit` ask for."""
    data, wanted = config.data, config.eval.benchmarks
    chosen: dict[EvalSplit, list[Record]] = {}
    only_seen = config.eval.seen and (wanted == [] or (data.source == "json" and data.unseen is None))
    if not only_seen:
        groups = grouped(load_records(data, "unseen"), benchmark_of)
        names = choose(wanted, list(groups))
        chosen["unseen"] = [record for name in names for record in groups[name]]
    if config.eval.seen:
        chosen["heldout"] = load_records(data, "heldout")
    return {split: limited(records, config.eval.limit, config.seed) for split, records in chosen.items()}


def _encoded(split: EvalSplit, records: Sequence[Record], base: Base, config: EvalConfig) -> Work:
    encoded = encode_prompts(records, base, config.data.on_error, source=f"the {split} data")
    images = locate_files(config.data, split).images
    return Work(split, images, {record.index: record for record in records}, encoded.items)


def _header(
    config: EvalConfig,
    subject: Subject,
    base: Base,
    dtype: torch.dtype,
    work: Sequence[Work],
    routing: TaskRouting | None,
) -> Header:
    digests = (records_digest([part.records[i.index] for i in part.items], part.images) for part in work)
    fingerprint = {
        "model": base.fingerprint,
        "number format": str(dtype).removeprefix("torch."),
        "adapter": adapter_digest(subject.adapter),
        "data": " ".join(f"{part.split}:{digest}" for part, digest in zip(work, digests, strict=True)),
        "prompt": prompt_digest(base),
        "pictures": "tower features, cached in fp16" if config.eval.cache_features else "pixels",
        "decoding": f"greedy, at most {config.eval.max_new_tokens} tokens",
    }
    if routing is not None:
        fingerprint["task definitions"] = routing.fingerprint(base)
    about: Mapping[str, Any] = {
        "label": subject.label,
        "model": base.name,
        "run": None if subject.run is None else str(subject.run),
        "limit": config.eval.limit,
        "seed": config.seed,
        "versions": versions(),
    }
    return Header(fingerprint, sum(len(part.items) for part in work), about)


def _features(base: Base, settings: GenerationConfig) -> Features:
    """Pictures as the model takes them; the cache changes `base.model`, so it comes before the adapter."""
    return FeatureCache(base) if settings.cache_features else PixelLoader(base.image_processor)


def _on_device(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    module: torch.nn.Module = model
    if torch.cuda.is_available():
        module.cuda()
    return model


def _answer_all(
    work: Sequence[Work],
    generator: Generator,
    writer: PredictionWriter,
    settings: GenerationConfig,
    total: int,
    console: Console,
) -> None:
    """Answer what the file does not have yet, batch by batch, each on the disk before the next begins."""
    with answer_progress(console, len(writer.done), total) as advance:
        for part in work:
            missing = [item for item in part.items if (part.split, item.index) not in writer.done]
            for batch in batches(missing, settings.batch_size):
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
        split=work.split,
        index=record.index,
        benchmark=benchmark_of(record),
        id=record.id,
        question=question.text.replace(IMAGE_MARKER, "").strip(),
        target=target.text.strip(),
        prediction=answer,
        category=category_of(record),
        image_id=str(extra.get("image_id", "")),
        answers=tuple(map(str, extra.get("answers") or ())),
        labels=tuple(map(str, extra.get("labels") or ())),
        image=relative_image(record, work.images),
    )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
