"""`mixlora train`: configuration in, run folder with a trained adapter out."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from mixlora_cli.config import TrainConfig, WandbConfig
from mixlora_cli.data.collate import Collator, Features, PixelLoader
from mixlora_cli.data.encode import EncodedDataset, encode_records
from mixlora_cli.data.loading import load_records
from mixlora_cli.launch import group_left_at_exit
from mixlora_cli.models.adapters import attach_adapter, num_parameters
from mixlora_cli.models.definitions import embedding_width, routing_to_train
from mixlora_cli.models.features import FeatureCache
from mixlora_cli.models.forward import choose_dtype, inputs_keep_their_dtype
from mixlora_cli.models.load import Base, build_base, require_prepared
from mixlora_cli.output import alone_in
from mixlora_cli.paths import require_cache
from mixlora_cli.store import write_errors
from mixlora_cli.training.arguments import build_arguments, loads_whole_weights
from mixlora_cli.training.callbacks import Interrupted, MetricsWriter, ProgressReport, StopAtSignal
from mixlora_cli.training.routing_stats import collapse_warning
from mixlora_cli.training.run_folder import RunFolder, read_metrics
from mixlora_cli.training.trainer import AdapterTrainer, dummy_image_for_text, tend_routing


def train(config: TrainConfig, base: Base | None = None) -> Path:
    """Train one adapter and return its run folder; `base` stands in for the model that the configuration names.

    The order of the steps is the order of their cost: what can be wrong is found before anything heavy is loaded.

    Raises:
        UserError: a mistake in the configuration, the data or the run folder; a loss that is not finite.
        Interrupted: SIGINT or SIGTERM came; a checkpoint is saved.
    """
    run = RunFolder(Path(config.output_dir))
    with alone_in(run.root, "training"):
        return _train(config, run, base)


def _train(config: TrainConfig, run: RunFolder, base: Base | None) -> Path:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where installed, guesses aloud
    console = Console(quiet=os.environ.get("RANK", "0") != "0", soft_wrap=True)
    checkpoint = run.open(config)
    _say_where_it_starts(config, run, checkpoint, console)
    if config.train.cache_features:
        require_cache()
    dtype = choose_dtype(config.train.precision)
    arguments = build_arguments(config, run, dtype)

    if base is None:
        require_prepared(config.model)
    with arguments.main_process_first(
        desc="records"
    ):  # what it finds about the pictures is kept for the others
        records = load_records(config.data, "train", config.seed)
    routing = routing_to_train(config, (record.task for record in records))
    # Weights that are trained themselves need their full precision; otherwise only the adapter does.
    with loads_whole_weights():
        base = base or build_base(config.model, torch.float32 if config.adapter.name == "full" else dtype)
    dataset = encode_records(records, base, config.data.max_length, config.data.on_error, "the training data")
    del records  # the dataset holds all that training needs, in a fraction of the memory
    embeddings = None if routing is None else routing.embeddings(base)
    if routing is not None:
        _warn_of_a_single_task(routing.definitions, config, console)
    # Here, so that the adapter's first values depend on the seed and on nothing done before.
    set_seed(config.seed)
    model = attach_adapter(
        base.model,
        config.adapter,
        config.routing,
        config.rank,
        config.factors,
        config.model.train_projector,
        embedding_width(embeddings),
    )

    stop, progress = StopAtSignal(), ProgressReport(console)
    callbacks: list[TrainerCallback] = [stop, MetricsWriter(run.metrics), progress]
    features: Features = (
        FeatureCache(base) if config.train.cache_features else PixelLoader(base.image_processor)
    )
    trainer = build_trainer(model, base, dataset, features, arguments, callbacks, embeddings=embeddings)
    tend_routing(trainer, config.routing, run.routing, console)
    if arguments.process_index:
        set_seed(config.seed + arguments.process_index)  # its own dropout
    trainer.accelerator.wait_for_everyone()  # until all have seen the run folder as it was
    with ExitStack() as stack:
        stack.enter_context(write_errors(run.root, lambda: _how_to_go_on(run)))
        if trainer.is_world_process_zero():
            run.begin(config, checkpoint)
        stack.callback(progress.close)
        stack.enter_context(_wandb(config.wandb, run.root))
        stack.enter_context(stop.listening())
        if dtype == torch.bfloat16:
            stack.enter_context(inputs_keep_their_dtype(model))
        with group_left_at_exit():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if stop.stopped:
            _say_how_to_resume(trainer, run, console)
            raise Interrupted(stop.stopped)
        trainer.save_model(str(run.adapter_draft))
        if trainer.is_world_process_zero():
            run.publish_adapter()
            run.finish(summarise(model, run))
    if trainer.is_world_process_zero():
        _say_result(run, console)
    return run.root


def build_trainer(
    model: nn.Module,
    base: Base,
    dataset: EncodedDataset,
    features: Features,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
    embeddings: Mapping[str, Tensor] | None = None,
) -> AdapterTrainer:
    """The Trainer with our collator, and with our progress report in place of its own.

    `embeddings` (d,) by task go with every batch for routing=task.
    """
    tokenizer = base.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=Collator(
            pad,
            features,
            with_indices=True,
            embeddings=embeddings,
            dummy_image=dummy_image_for_text(model, base, dataset, features, arguments),
        ),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def summarise(model: nn.Module, run: RunFolder) -> dict[str, Any]:
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
        **_routing_result(rows),
    }


def _routing_result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last look at the routing and what there is to warn of; nothing where none was taken."""
    looks = [row["routing"] for row in rows if "routing" in row]
    return {"routing": looks[-1], "routing_warning": collapse_warning(rows)} if looks else {}


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


def _how_to_go_on(run: RunFolder) -> str:
    """For a run that could not be written on."""
    newest = run.newest_checkpoint()
    if newest is None:
        return "there is no checkpoint yet; make room and start again with overwrite=true"
    return f"{newest.name} is intact; make room and continue with resume=auto"


def _say_where_it_starts(
    config: TrainConfig, run: RunFolder, checkpoint: Path | None, console: Console
) -> None:
    if config.resume == "auto":
        for torn, lacks in run.torn_checkpoints().items():
            console.print(
                f"{torn.name} is not complete, so it is passed over: {lacks}", markup=False, highlight=False
            )
    if checkpoint is not None:
        console.print(f"resuming from {checkpoint}", markup=False, highlight=False)
    elif config.resume is not None:
        console.print(
            f"no checkpoint in {config.output_dir} yet: starting new", markup=False, highlight=False
        )


def _warn_of_a_single_task(tasks: Collection[str], config: TrainConfig, console: Console) -> None:
    if len(tasks) == 1:
        console.print(
            f"warning: there is a single task, {next(iter(tasks))}: routing=task selects the same {config.rank} of "
            f"{config.factors} factors for every instance; routing=instance selects for each",
            markup=False,
            highlight=False,
        )


def _say_how_to_resume(trainer: AdapterTrainer, run: RunFolder, console: Console) -> None:
    console.print(
        f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, checkpoint saved; "
        f"to go on, give the same command with resume=auto:\n  mixlora train ... output_dir={run.root} resume=auto",
        markup=False,
        highlight=False,
    )


def _say_result(run: RunFolder, console: Console) -> None:
    result = run.read_result()
    if result.get("routing_warning"):
        console.print(f"warning: {result['routing_warning']}", markup=False, highlight=False)
    share = 100 * result["trainable_parameters"] / result["parameters"]
    console.print(
        f"done: {result['steps']} steps, loss {result['loss']:.4f}, {result['seconds'] / 60:.1f} minutes, "
        f"{result['tokens_per_second']:,.0f} tokens/s, {result['trainable_parameters']:,} trainable parameters "
        f"({share:.2f} %)\nadapter: {run.adapter}\nnext: mixlora eval run={run.root}",
        markup=False,
        highlight=False,
    )
