"""`mixlora train`: configuration in, run folder with a trained adapter out."""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from mixlora_cli.config import TrainConfig, WandbConfig
from mixlora_cli.data.collate import Collator, DummyImage, Features, build_dummy_image
from mixlora_cli.data.definitions import HOW_MADE, asked_questions, load_definitions
from mixlora_cli.data.encode import IGNORE, EncodedDataset, Item, StreamedDataset, encode_records
from mixlora_cli.data.loading import definitions_file, load_records
from mixlora_cli.data.records import Record
from mixlora_cli.errors import UserError
from mixlora_cli.launch import group_left_at_exit
from mixlora_cli.method.targets import output_layer
from mixlora_cli.models.adapters import attach_adapter, num_parameters, outside_of_decoder
from mixlora_cli.models.definitions import routing_to_train
from mixlora_cli.models.features import choose_features, has_fixed_features
from mixlora_cli.models.forward import choose_dtype, inputs_keep_their_dtype
from mixlora_cli.models.load import LoadedModel, build_base, require_prepared
from mixlora_cli.output import alone_in
from mixlora_cli.paths import require_cache
from mixlora_cli.progress import say
from mixlora_cli.routers import ROUTERS
from mixlora_cli.store import temp_of, write_errors, write_json
from mixlora_cli.training.arguments import build_arguments, loads_whole_weights
from mixlora_cli.training.callbacks import Interrupted, Report, StopAtSignal
from mixlora_cli.training.routing_stats import routing_result
from mixlora_cli.training.run_folder import RunFolder, newest_complete, publish_adapter, read_metrics
from mixlora_cli.training.trainer import AdapterTrainer


def train(config: TrainConfig, base: LoadedModel | None = None) -> Path:
    """Train one adapter and return its run folder; `base` stands in for the model that the configuration names.

    The order of the steps is the order of their cost: what can be wrong is found before anything heavy is loaded.

    Raises:
        UserError: a mistake in the configuration, the data or the run folder; a loss that is not finite.
        Interrupted: SIGINT or SIGTERM came; a checkpoint is saved.
    """
    run = RunFolder(Path(config.output_dir))
    with alone_in(run.root, "training"):
        _train(config, run, base)
    return run.root


def _train(config: TrainConfig, run: RunFolder, base: LoadedModel | None) -> None:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where installed, guesses aloud
    console = Console(quiet=os.environ.get("RANK", "0") != "0", soft_wrap=True)
    checkpoint = run.open(config)
    _say_where_it_starts(run, config.resume, checkpoint, console)
    if config.train.cache_features:
        require_cache()
    dtype = choose_dtype(config.train.precision)
    arguments = build_arguments(config, run, dtype)

    if base is None:
        require_prepared(config.model)
    records: list[Record] = []
    if not config.data.streaming:
        # What the first process finds about the pictures is kept for the others.
        with arguments.main_process_first(desc="records"):
            records = load_records(config.data, "train", config.seed)
    routing = None
    if config.adapter.name == "mixlora" and ROUTERS[config.routing.name].source == "task":
        # Of streamed records nobody knows the tasks yet: they have to be among those of the file.
        tasks = (
            load_definitions(config.data) if config.data.streaming else (record.task for record in records)
        )
        routing = routing_to_train(config.data, tasks, config.routing.encoder, records)
        if definitions_file(config.data) is None:
            count = len(routing.definitions)
            say(
                f"data.metadata=null: the {count} tasks are defined by {HOW_MADE} ({run.definitions})",
                console,
            )
    elif (config.adapter.name, config.data.source) == ("mixlora", "json"):
        count = len({record.task for record in records})
        if config.routing.name == "instance" and config.routing.router_init == "random" and count > 1:
            say(
                f"note: {count} tasks are named; docs/findings.md has adapter=mixlora_plus ahead there",
                console,
            )
    # Weights that are trained themselves need their full precision; otherwise only the adapter does.
    with loads_whole_weights():
        base = base or build_base(config.model, torch.float32 if config.adapter.name == "full" else dtype)
    dataset: EncodedDataset | StreamedDataset
    if config.data.streaming:
        dataset = StreamedDataset(
            config.data,
            base.chat,
            config.seed,
            arguments.process_index,
            arguments.world_size,
            None if routing is None else routing.definitions,
        )
    else:
        dataset = encode_records(
            records, base.chat, config.data.max_length, config.data.on_error, "the training data"
        )
    questions = None if routing is None else asked_questions(records)
    del records  # the dataset holds all that training needs, in a fraction of the memory

    embeddings = None if routing is None else routing.embeddings(base)
    if embeddings is not None and len(embeddings) == 1:
        say(
            f"warning: there is a single task, {next(iter(embeddings))}: routing=task selects the same {config.rank} "
            f"of {config.factors} factors for every instance; routing=instance selects for each",
            console,
        )
    # Here, so that the adapter's first values depend on the seed and on nothing done before.
    set_seed(config.seed)
    model = attach_adapter(
        base.model,
        config.adapter,
        config.routing,
        config.rank,
        config.factors,
        config.model.train_also,
        None if embeddings is None else len(next(iter(embeddings.values()))),
        base.chat.image_token_ids,
    )

    stop, report = StopAtSignal(), Report(run.metrics, console)
    if config.train.cache_features and has_fixed_features(base):
        require_frozen_tower(base)
    features = choose_features(base, config.train.cache_features)
    trainer = build_trainer(
        model,
        base,
        dataset,
        features,
        arguments,
        [stop, report],
        embeddings=embeddings,
        packed=config.train.packing,
    )
    if config.train.packing:
        require_packing(trainer, list(islice(dataset, _LOOKED_AT)))
    if config.adapter.name == "mixlora" and config.routing.normalize:
        by_task = config.routing.router_init == "tasks"
        trainer.calibrate(_sample(dataset, config.seed, by_task))
    if config.train.compile:
        say("train.compile=true: the first steps compile the language model, which takes minutes", console)
        base.model.get_decoder().compile()
    trainer.tend_routing(config.routing, run.routing, console)
    if arguments.process_index:
        set_seed(config.seed + arguments.process_index)  # its own dropout
    trainer.accelerator.wait_for_everyone()  # until all have seen the run folder as it was
    with ExitStack() as stack:
        stack.enter_context(write_errors(run.root, lambda: _how_to_go_on(run)))
        if trainer.is_world_process_zero():
            run.begin(config, checkpoint)
            if routing is not None:
                write_json(run.definitions, routing.definitions)
                write_json(run.questions, questions)
        stack.callback(report.close)
        stack.enter_context(_wandb(config.wandb, run.root))
        stack.enter_context(stop.listening())
        if dtype == torch.bfloat16:
            stack.enter_context(inputs_keep_their_dtype(model))
        with group_left_at_exit():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if stop.stopped:
            say(
                f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, checkpoint saved; to go "
                "on, give the same command with resume=auto:\n"
                f"  mixlora train ... output_dir={run.root} resume=auto",
                console,
            )
            raise Interrupted(stop.stopped)
        temp = temp_of(run.adapter)
        trainer.save_model(str(temp))
        if trainer.is_world_process_zero():
            publish_adapter(temp, run.adapter)
            write_json(run.result, _summary(model, run))
    if trainer.is_world_process_zero():
        _say_result(run, config.data.source, console)


def build_trainer(
    model: nn.Module,
    base: LoadedModel,
    dataset: EncodedDataset | StreamedDataset,
    features: Features,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
    embeddings: Mapping[str, Tensor] | None = None,
    packed: bool = False,
) -> AdapterTrainer:
    """The Trainer with our collator, and with our progress report in place of its own.

    `embeddings` (d,) by task go with every batch for routing=task; `packed` batches are one row.
    """
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=Collator(
            base.chat,
            features,
            with_indices=True,
            embeddings=embeddings,
            dummy_image=dummy_image_for_text(model, base, dataset, features, arguments),
            packed=packed,
        ),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def require_frozen_tower(base: LoadedModel) -> None:
    """Do nothing where the tower, whose features are kept, gives a picture the same ones after every step.

    Raises:
        UserError: something in it is trained.
    """
    trained = [n for n, p in base.model.model.vision_tower.named_parameters() if p.requires_grad]
    if trained:
        raise UserError(
            "train.cache_features=true computes each picture's features once, and vision_tower."
            f"{trained[0]} is to be trained ({len(trained)} weights of the tower in all): give "
            "train.cache_features=false (and eval.cache_features=false to `mixlora eval`), or leave the tower out"
        )


def dummy_image_for_text(
    model: nn.Module,
    base: LoadedModel,
    dataset: EncodedDataset | StreamedDataset,
    features: Features,
    arguments: TrainingArguments,
) -> DummyImage | None:
    """A dummy image where a text-only batch can occur and would leave out weights that processes share; else None.

    Without it a process would wait for another's projector, or under ZeRO-3 for its part of the tower.
    """
    if base.chat.processor is None:
        return None
    # A text-only batch gives a parameter of projector or tower no gradient.
    outside = [
        each for each in outside_of_decoder(base.model).values() if each is not output_layer(base.model)
    ]
    trained_beside_the_language_model = any(
        parameter.requires_grad for module in outside for parameter in module.parameters()
    )
    deepspeed = getattr(arguments, "hf_deepspeed_config", None)
    shared = trained_beside_the_language_model or (deepspeed is not None and deepspeed.is_zero3())
    if shared and (isinstance(dataset, StreamedDataset) or any(not item.images for item in dataset.items)):
        return build_dummy_image(base.chat, features)
    return None


_CALIBRATED = 256
"""Training instances whose descriptions give the statistics of routing.normalize."""
_OF_A_TASK = 8
"""That many at least of each task, where the tasks are to be told apart."""


def _sample(dataset: EncodedDataset | StreamedDataset, seed: int, by_task: bool) -> list[Item]:
    """Instances as training meets them, drawn from all or the first of a stream; `by_task`, as many of each task."""
    if isinstance(dataset, StreamedDataset):
        drawn: Iterable[Item] = islice(dataset, _CALIBRATED * _OF_A_TASK if by_task else _CALIBRATED)
    else:
        drawn = (dataset[place] for place in random.Random(seed).sample(range(len(dataset)), len(dataset)))
    if not by_task:
        return list(islice(drawn, _CALIBRATED))
    found: dict[str, list[Item]] = defaultdict(list)
    for item in drawn:
        found[item.task].append(item)
    count = max(_OF_A_TASK, _CALIBRATED // max(len(found), 1))
    return [item for items in found.values() for item in items[:count]]


_LOOKED_AT = 200
"""Instances among which the shortest are looked for."""
_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.01}
"""Largest difference of an answer token's log probability in packed and padded rows, by the type of the products."""


def require_packing(trainer: AdapterTrainer, items: Sequence[Item]) -> None:
    """Do nothing where the model keeps the instances of a row apart.

    What is looked at, before anything is trained, are the shortest instances with and without pictures: each has the
    log probabilities of a padded row, first in its row or behind another.

    Raises:
        UserError: it does not, or batches without pictures need a blank one.
    """
    collate = trainer.data_collator
    assert isinstance(collate, Collator)
    if collate.dummy_image is not None:
        raise UserError(
            "train.packing=true: batches without pictures get a blank one behind their rows here, which packed rows "
            "have no place for; set train.packing=false, or leave the records without pictures out"
        )
    by_length = sorted(items, key=lambda item: item.length)
    pictured, texts = ([item for item in by_length if bool(item.images) == has][:2] for has in (True, False))
    for other in (*pictured[:1], *texts[:1]):
        unlabelled = replace(other, labels=[IGNORE] * other.length)
        for item in (*pictured[-1:], *texts[-1:]):
            padded, alone, before, behind = (
                trainer.log_probabilities(replace(collate, packed=packed)(row))
                for packed, row in (
                    (False, [item]),
                    (True, [item]),
                    (True, [item, unlabelled]),
                    (True, [unlabelled, item]),
                )
            )
            # Each pair is computed with the same shapes.
            difference = max((padded - alone).abs().max().item(), (before - behind).abs().max().item())
            if not difference <= _DIFFERENCE[trainer.products]:
                raise UserError(
                    "train.packing=true: this model does not keep the instances of a row apart (an answer's log "
                    f"probability changes by {difference:.2g}); set train.packing=false"
                )


@contextmanager
def _wandb(config: WandbConfig, root: Path) -> Iterator[None]:
    """Settings that the Trainer's wandb callback reads; the tracked run ends with ours, so a sweep has many."""
    if config.mode == "disabled":
        yield
        return
    settings = {"WANDB_MODE": config.mode, "WANDB_PROJECT": config.project, "WANDB_DIR": str(root)}
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        import wandb

        wandb.finish()
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def _summary(model: nn.Module, run: RunFolder) -> dict[str, Any]:
    """What `result.json` says of a finished run; loss is that of the last logged steps, speed that of the whole run."""
    rows = read_metrics(run.metrics)
    last = rows[-1]
    trainable, total = num_parameters(model)
    return {
        "steps": last["step"],
        "epochs": last["epoch"],
        "loss": last["loss"],
        "seconds": last["seconds"],
        "tokens": last["tokens"],
        "tokens_per_second": round(last["tokens"] / max(last["seconds"], 1e-9), 1),
        "trainable_parameters": trainable,
        "parameters": total,
        "adapter": str(run.adapter.relative_to(run.root)),
        **routing_result(rows),
    }


def _say_where_it_starts(
    run: RunFolder, resume: str | None, checkpoint: Path | None, console: Console
) -> None:
    if resume == "auto":
        for incomplete, lacks in newest_complete(run.checkpoints)[1].items():
            say(f"{incomplete.name} is not complete, so it is passed over: {lacks}", console)
    if checkpoint is not None:
        say(f"resuming from {checkpoint}", console)
    elif resume is not None:
        say(f"no checkpoint in {run.root} yet: starting new", console)


def _how_to_go_on(run: RunFolder) -> str:
    """For a run that could not be written on."""
    newest = run.newest_checkpoint()
    if newest is None:
        return "there is no checkpoint yet; make room and start again with overwrite=true"
    return f"{newest.name} is intact; make room and continue with resume=auto"


def _say_result(run: RunFolder, source: str, console: Console) -> None:
    result = run.read_result()
    # A text model could do nothing with the built-in pictures; data of your own has its own questions.
    follows = {"mini": f"eval run={run.root}", "mini_text": f"eval run={run.root} data=mini_text"}
    also = f", or mixlora eval run={run.root} data={source} data.heldout=FILE eval.seen=true"
    if result.get("routing_warning"):
        say(f"warning: {result['routing_warning']}", console)
    share = 100 * result["trainable_parameters"] / result["parameters"]
    say(
        f"done: {result['steps']} steps, loss {result['loss']:.4f}, {result['seconds'] / 60:.1f} minutes, "
        f"{result['tokens_per_second']:,.0f} tokens/s, {result['trainable_parameters']:,} trainable parameters "
        f"({share:.2f} %)\nadapter: {run.adapter}\nnext: mixlora {follows.get(source, f'ask run={run.root}{also}')}",
        console,
    )
