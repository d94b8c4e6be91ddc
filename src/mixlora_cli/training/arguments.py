"""Our configuration in the words of Hugging Face's `TrainingArguments`, and what DeepSpeed needs around the Trainer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import SchedulerType, TrainingArguments
from transformers.utils import logging

from mixlora_cli.config import OptimConfig, TrainConfig
from mixlora_cli.errors import UserError
from mixlora_cli.launch import launched_processes
from mixlora_cli.models.adapters import frozen_towers
from mixlora_cli.training.run_folder import RunFolder


def build_arguments(config: TrainConfig, run: RunFolder, dtype: torch.dtype) -> TrainingArguments:
    """Arguments of a run; nothing is left to the Trainer's defaults that changes what is computed.

    Several processes find one another in here.

    Raises:
        UserError: `train.scheduler` is unknown, `train.effective_batch` cannot be split, or DeepSpeed cannot start.
    """
    numbers = config.train
    schedulers = [kind.value for kind in SchedulerType]
    if numbers.scheduler not in schedulers:
        raise UserError(f"train.scheduler={numbers.scheduler}: must be one of {', '.join(schedulers)}")
    gpu = torch.cuda.is_available()
    settings = config.deepspeed.config
    if settings is not None:
        settings = _start_deepspeed(
            config.deepspeed.name, settings, config.deepspeed.stage, numbers.cache_features
        )
    if numbers.fsdp and launched_processes() == 1:
        raise UserError(
            "train.fsdp=true spreads weights over processes, and this is a single one: add launch.nproc=<one for each "
            "GPU>, or give train.fsdp=false"
        )
    for switch in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        os.environ.pop(switch, None)  # left behind by an earlier job of a sweep
    logging.set_verbosity_error()  # its warnings speak of arguments that a user of ours never gave
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints),
        num_train_epochs=numbers.epochs,
        max_steps=-1 if numbers.steps is None else numbers.steps,
        per_device_train_batch_size=numbers.batch_size,
        gradient_accumulation_steps=accumulation(numbers),
        train_sampling_strategy="group_by_length" if numbers.group_by_length else "random",
        optim="adamw_torch_fused",
        learning_rate=numbers.learning_rate,
        lr_scheduler_type=numbers.scheduler,
        warmup_steps=numbers.warmup_ratio,  # below 1 it is a share of all steps
        weight_decay=numbers.weight_decay,
        max_grad_norm=numbers.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        # fp32 products (routers, norms of the gradient) run in TF32, as in the paper, where the GPU has it.
        tf32=True if gpu and torch.cuda.get_device_capability()[0] >= 8 else None,
        use_cpu=not gpu,
        seed=config.seed,
        data_seed=config.seed,
        **_checkpointing(numbers.gradient_checkpointing),
        save_strategy="steps",
        save_steps=numbers.save_every,
        save_total_limit=numbers.keep_checkpoints,
        logging_strategy="steps",
        logging_steps=numbers.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not finite stops the run instead
        include_num_input_tokens_seen="all" if numbers.packing else "non_padding",
        remove_unused_columns=False,  # the collator gives exactly what is needed
        dataloader_num_workers=numbers.workers,
        dataloader_pin_memory=gpu,
        disable_tqdm=True,
        log_level="error",
        report_to=[] if config.wandb.mode == "disabled" else ["wandb"],
        run_name=config.wandb.name or run.root.name,
        deepspeed=settings,
        fsdp=True if numbers.fsdp else None,  # type: ignore[arg-type]  # declared as its older values
        # Every trained weight gets a gradient in every batch: factors that nobody selects one of zero.
        ddp_find_unused_parameters=False,
    )
    # Several GPUs visible to one process would make the Trainer replicate the model in threads (DataParallel), which
    # loses hooks and is slow; several GPUs are used by several processes.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Under the name that this transformers has for it: Python 3.10 gets releases that have the older one alone."""
    name = "activation_checkpointing"
    if name not in TrainingArguments.__dataclass_fields__:
        name = "gradient_checkpointing"
    # The reentrant kind needs inputs that require a gradient, and a frozen embedding's output does not.
    return {name: wanted, f"{name}_kwargs": {"use_reentrant": False} if wanted else None}


def accumulation(numbers: OptimConfig, world_size: int | None = None) -> int:
    """`train.accumulation`, or what `train.effective_batch` makes of it for this many processes.

    Args:
        world_size: processes; None takes what the launcher put into the environment, 1 without launcher.

    Raises:
        UserError: `train.effective_batch` cannot be split.
    """
    if numbers.effective_batch is None:
        return numbers.accumulation
    processes = launched_processes() if world_size is None else world_size
    return accumulation_for(numbers.effective_batch, numbers.batch_size, processes)


def accumulation_for(effective_batch: int, batch_size: int, world_size: int) -> int:
    """Forward passes that each process does per optimizer step, so that the step sees `effective_batch` instances.

    Args:
        effective_batch: instances per optimizer step, over all processes.
        batch_size: instances per process and forward pass.
        world_size: processes, one for each GPU.

    Raises:
        UserError: they do not divide; names the nearest splits that do.
    """
    together = batch_size * world_size
    if effective_batch % together == 0:
        return effective_batch // together
    possible = []  # changes of a single number, each as near as can be
    if effective_batch % world_size == 0:
        near = _nearest_divisors(effective_batch // world_size, batch_size)
        possible.append(f"train.batch_size={' or '.join(map(str, near))}")
    if effective_batch % batch_size == 0:
        near = _nearest_divisors(effective_batch // batch_size, world_size)
        possible.append(f"{' or '.join(map(str, near))} processes")
    below = effective_batch // together * together
    near = [size for size in (below, below + together) if size > 0]
    possible.append(f"train.effective_batch={' or '.join(map(str, near))}")
    raise UserError(
        f"train.effective_batch={effective_batch}: cannot be split over {world_size} processes with "
        f"train.batch_size={batch_size}, a multiple of {together} is needed; the nearest possible ones: "
        f"{', or '.join(possible)}"
    )


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    """The next divisor of `number` below `wanted` and the next above, where there are such."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return [n for n in divisors if n < wanted][-1:] + [n for n in divisors if n > wanted][:1]


def _start_deepspeed(name: str, settings: dict[str, Any], stage: int, cache_features: bool) -> dict[str, Any]:
    """Join the processes under DeepSpeed, before the Trainer's arguments do it otherwise: nothing is compiled.

    Returns:
        The settings for the Trainer, fit for this machine.
    """
    if stage == 3 and cache_features:
        raise UserError(
            f"deepspeed={name} spreads the vision tower over the processes, which then cannot compute "
            "features one by one: set train.cache_features=false"
        )
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"deepspeed={name} needs the package deepspeed: pip install 'mixlora-cli[deepspeed]'"
        ) from error
    if "RANK" not in os.environ:
        raise UserError(
            f"deepspeed={name}: start it with `mixlora train`, torchrun or deepspeed; "
            "this process belongs to no group"
        )
    deepspeed.utils.logger.setLevel("ERROR")
    # DeepSpeed's use of old names is not the user's to mend.
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    if torch.cuda.is_available():
        return dict(settings)
    # Its shared-memory kernels would be compiled for a minute or more, or fail without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    fit: dict[str, Any] = _without_pinned_memory(settings)
    return fit


def _without_pinned_memory(value: Any) -> Any:
    """A machine without GPU has no memory to pin for it."""
    if isinstance(value, dict):
        return {
            key: False if key == "pin_memory" else _without_pinned_memory(child)
            for key, child in value.items()
        }
    return value


@contextmanager
def loads_whole_weights() -> Iterator[None]:
    """Inside, transformers builds models whole on every process also under ZeRO-3, which spreads them later.

    Spread from the start, neither the adapter nor a trained projector could be made from the base's weights.
    """
    from transformers.integrations import deepspeed as integration

    before = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = before


def start_fsdp(accelerator: Accelerator, arguments: TrainingArguments, model: nn.Module) -> None:
    """Let FSDP2 gather the decoder block by block, and leave alone what is frozen beside the decoder.

    A tower whose blocks were gathered one by one would wait for ever for a process whose batch has no picture, and the
    cache of features calls it by itself. Weights are gathered in their own type, for bf16 products choose theirs by
    autocast here as everywhere: routers stay in fp32.
    """
    state: Any = accelerator.state
    if state.distributed_type != DistributedType.FSDP:  # left out without a word where there is no GPU
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    plugin = state.fsdp_plugin
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = base.get_decoder()
    plugin.ignored_modules = frozen_towers(base)
    whole = set(getattr(base, "_no_split_modules", None) or ())
    blocks = {type(module).__name__ for module in decoder.modules()} & whole
    plugin.transformer_cls_names_to_wrap = sorted(blocks)
    plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole fp32 copies of the adapter's and all trained weights; every process has to ask, the first one gets them.

    And the adapter's buffers, which every process has whole.

    DeepSpeed trains copies of the weights in fp32, of which the model's own are roundings (bf16) or parts (ZeRO-3).
    Its own gathering, and FSDP's, leave out what is not trained: frozen routers, without which an adapter is another
    one.
    """
    keep = torch.distributed.get_rank() == 0
    prefix: str | None = model.base_model.prefix if isinstance(model, PeftModel) else None  # type: ignore[assignment]
    gathered = {}
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad or (prefix is not None and prefix in name)):
            continue
        weight = parameter.full_tensor() if isinstance(parameter, DTensor) else _of_deepspeed(parameter)
        if keep:
            # ZeRO-3 leaves nothing in the parameter's place.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            gathered[name] = weight.detach().float().cpu().reshape(shape).clone()
    for name, buffer in model.named_buffers() if keep else ():
        if prefix is not None and prefix in name:
            gathered[name] = buffer.detach().float().cpu().clone()
    return gathered


def _of_deepspeed(parameter: nn.Parameter) -> Tensor:
    """The fp32 copy that DeepSpeed trains, or the whole of what it does not train; any shape."""
    import deepspeed

    full: Tensor | None = (
        deepspeed.utils.safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    )
    if full is not None:
        return full
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()
