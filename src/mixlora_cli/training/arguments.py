"""Our configuration in the words of Hugging Face's `TrainingArguments`."""

from __future__ import annotations

import torch
from transformers import SchedulerType, TrainingArguments

from mixlora_cli.config import TrainConfig
from mixlora_cli.errors import UserError
from mixlora_cli.training.accumulation import accumulation
from mixlora_cli.training.deepspeed import start_deepspeed
from mixlora_cli.training.run_folder import RunFolder


def build_arguments(config: TrainConfig, run: RunFolder, dtype: torch.dtype) -> TrainingArguments:
    """Arguments of a run; nothing is left to the Trainer's defaults that changes what is computed.

    Several processes find one another in here.

    Raises:
        UserError: `train.scheduler` is unknown, or `train.effective_batch` cannot be split.
    """
    numbers = config.train
    schedulers = [kind.value for kind in SchedulerType]
    if numbers.scheduler not in schedulers:
        raise UserError(f"train.scheduler={numbers.scheduler}: must be one of {', '.join(schedulers)}")
    gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints),
        num_train_epochs=numbers.epochs,
        max_steps=-1 if numbers.steps is None else numbers.steps,
        per_device_train_batch_size=numbers.batch_size,
        gradient_accumulation_steps=accumulation(numbers),
        train_sampling_strategy="group_by_length" if numbers.group_by_length else "random",
        optim="adamw_torch",
        learning_rate=numbers.learning_rate,
        lr_scheduler_type=numbers.scheduler,
        warmup_steps=numbers.warmup_ratio,  # below 1 it is a share of all steps
        weight_decay=numbers.weight_decay,
        max_grad_norm=numbers.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        tf32=True if _has_tf32() else None,
        use_cpu=not gpu,
        seed=config.seed,
        data_seed=config.seed,
        activation_checkpointing=numbers.gradient_checkpointing,
        # The reentrant kind needs inputs that require a gradient, and a frozen embedding's output does not.
        activation_checkpointing_kwargs={"use_reentrant": False} if numbers.gradient_checkpointing else None,
        save_strategy="steps",
        save_steps=numbers.save_every,
        save_total_limit=numbers.keep_checkpoints,
        logging_strategy="steps",
        logging_steps=numbers.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not finite stops the run instead
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,  # the collator gives exactly what is needed
        dataloader_num_workers=numbers.workers,
        dataloader_pin_memory=gpu,
        disable_tqdm=True,
        log_level="error",  # its warnings speak of arguments that a user of ours never gave
        report_to=[] if config.wandb.mode == "disabled" else ["wandb"],
        run_name=config.wandb.name or run.root.name,
        deepspeed=start_deepspeed(config),
        # Every trained weight gets a gradient in every batch: factors that nobody selects one of zero.
        ddp_find_unused_parameters=False,
    )
    # Several GPUs visible to one process would make the Trainer replicate the model in threads (DataParallel), which
    # loses hooks and is slow; several GPUs are used by several processes.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _has_tf32() -> bool:
    """fp32 products (routers, norms of the gradient) run in TF32, as in the paper, where the GPU has it."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
