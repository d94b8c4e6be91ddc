"""Hugging Face's `Trainer` with our loss, our order of records and our adapter files; the loop is its own."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, gather_object
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    PreTrainedModel,
    Trainer,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from mixlora_cli.config import RoutingConfig
from mixlora_cli.data.collate import Collator
from mixlora_cli.data.encode import EncodedDataset, Item, StreamedDataset
from mixlora_cli.errors import UserError, cut
from mixlora_cli.method.config import MixLoraConfig
from mixlora_cli.method.context import RoutingContext
from mixlora_cli.method.model import MixLoraModel
from mixlora_cli.models.adapters import (
    TRAINED_WEIGHTS,
    frozen_towers,
    load_trained_weights,
    save_adapter,
)
from mixlora_cli.models.forward import labelled_pass, matrix_products_in, token_loss
from mixlora_cli.store import sync_files
from mixlora_cli.training.arguments import gather_weights, start_fsdp
from mixlora_cli.training.routing_stats import RoutingHealth
from mixlora_cli.training.run_folder import publish_checkpoint, temp_checkpoints

"""In the name of every router's weight."""


class AdapterTrainer(Trainer):
    """Trains a `PeftModel` or a bare model on encoded or streamed items, batched by `Collator(with_indices=True)`."""

    # What compute_loss returns is already divided by the label tokens of the whole accumulated step.
    loss_is_scaled_for_ga = True
    health: RoutingHealth | None = None
    """Watches the routing, where there is one."""
    balance: BalanceLoss | None = None
    """Spreads the use of factors by a loss, where that is asked for."""
    _temp: Path | None = None
    """Where the Trainer is to write the checkpoint that it is about."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        # The Trainer counts a step's label tokens only for models whose own loss takes the number, which not all do.
        self.model_accepts_loss_kwargs = True
        self._finite = FiniteGuard()
        if self.args.fsdp:
            assert isinstance(self.model, nn.Module)
            start_fsdp(self.accelerator, self.args, self.model)
            self.is_fsdp_enabled = True

    def tend_routing(self, routing: RoutingConfig, path: Path, console: Console) -> None:
        """For a MixLoRA model, what `routing` asks for: a balance loss, and reports into `path`."""
        model = getattr(self.model, "base_model", None)
        if not isinstance(model, MixLoraModel):
            return
        if routing.balance_loss:
            self.balance = BalanceLoss(model.context, routing.balance_loss)
        # Its tasks and its probe come from all records.
        if routing.health_every and model.decoder_layers() and isinstance(self.train_dataset, EncodedDataset):
            self.health = RoutingHealth(self, model, routing.health_every, path, console)
            self.add_callback(self.health)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum of the answer tokens' cross entropies over `num_items_in_batch` (all processes, all accumulated batches).

        Plus the batch's share of the balance loss, where there is one.

        Raises:
            UserError: the loss is NaN or infinite; names the step and the records.
        """
        indices = inputs.pop("indices", None)
        outputs, targets = self.read(model, inputs)
        if self.health is not None and indices is not None:
            # Now: gradient checkpointing will run the layers again.
            self.health.observe(indices)
        num_tokens = len(targets) if num_items_in_batch is None else num_items_in_batch
        loss = token_loss(outputs.logits, targets, num_tokens)
        self._finite.check_loss(loss, indices, self.state.global_step + 1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count is global, but gradients are averaged over processes: undo that average.
            loss = loss * self.accelerator.num_processes
        if self.balance is not None:
            loss = loss + self.balance.share(self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    def read(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
        """Run a batch: the outputs, with logits (n, vocabulary), and the n tokens that they should predict."""
        inputs.pop("indices", None)
        unwrapped = self.accelerator.unwrap_model(model)
        base = unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped
        assert isinstance(base, PreTrainedModel)
        # `model.train()` reached frozen towers too; statistics or dropout there would change their features.
        for module in frozen_towers(base):
            module.eval()
        is_mixlora = isinstance(getattr(self.model, "base_model", None), MixLoraModel)
        outputs, _, targets = labelled_pass(model, inputs, base.get_output_embeddings(), is_mixlora)
        return outputs, targets

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Accelerate lets autocast choose the products' types in a wrapped model's forward pass, but not in FSDP2's."""
        return self.accelerator.autocast() if self.is_fsdp_enabled else nullcontext()

    @property
    def products(self) -> torch.dtype:
        """The number format of the matrix products."""
        return torch.bfloat16 if self.args.bf16 else torch.float32

    @torch.no_grad()
    def log_probabilities(self, batch: dict[str, Tensor]) -> Tensor:
        """Of a batch's n labelled tokens (n,), in eval mode; the mode is put back."""
        assert self.model is not None
        model: nn.Module = self.model
        was_training = model.training
        model.eval()
        inputs: Any = self._prepare_inputs(batch)
        with matrix_products_in(model, self.products, self.args.device.type):
            outputs, targets = self.read(model, inputs)
        model.train(was_training)
        found: Tensor = outputs.logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return found

    def calibrate(self, items: Sequence[Item]) -> None:
        """Take the statistics of a MixLoRA adapter with `normalize`, before anything is trained.

        Each process reads the same items, or of a stream its own; all get what the first one has found.

        Raises:
            UserError: there are fewer than two, or for router_init=tasks fewer than two tasks.
        """
        tuner, collate = getattr(self.model, "base_model", None), self.data_collator
        assert isinstance(tuner, MixLoraModel) and isinstance(collate, Collator)
        if len(items) < 2:
            raise UserError(
                f"routing.normalize=true needs two training records at least; there are {len(items)}"
            )
        tasks = [item.task for item in items]
        config = tuner.peft_config["default"]
        assert isinstance(config, MixLoraConfig)
        if config.router_init == "tasks" and len(set(tasks)) < 2:
            raise UserError(
                f"routing.router_init=tasks tells tasks apart, and all training records are of {cut(tasks[0])}; say "
                "with data.task_key how they name their task, or give routing.router_init=clusters, which needs none"
            )
        tuner.to(self.args.device)  # where DeepSpeed or FSDP would bring it themselves, later
        padded, size = replace(collate, packed=False), self.args.per_device_train_batch_size
        with tuner.calibrated(tasks=tasks):
            for start in range(0, len(items), size):
                self.log_probabilities(padded(items[start : start + size]))
        for tensor in tuner.calibrated_tensors() if self.accelerator.num_processes > 1 else ():
            tensor.copy_(broadcast(tensor.contiguous()))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log also what the routing does; `loss` stays that of the answers alone."""
        if "loss" in logs:
            if self.balance is not None:
                logs["balance_loss"] = self.accelerator.reduce(self.balance.read(), "mean").item()
                logs["loss"] -= self.balance.weight * logs["balance_loss"]
            if self.health is not None:
                logs.update(self.health.report(self.state.global_step))
        super().log(logs, start_time)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of a step's gradient, before it is used.

        Raises:
            UserError: it is NaN or infinite; names the step and the records.
        """
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        self._finite.check_gradient(norm, self.state.global_step + 1)
        return norm

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's own; of streamed items, which are this process's alone, they are not shared out once more."""
        if not isinstance(self.train_dataset, StreamedDataset):
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset, batch_size=self.args.train_batch_size, collate_fn=self.data_collator
        )

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        """The Trainer's own sampler (random or length-grouped), with an order that depends on seed and epoch alone.

        Left alone it draws from the global generator, whose state in a later epoch depends on everything before it:
        a resumed run would see other batches. And it would read the lengths from items that are dictionaries.
        """
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length" and isinstance(dataset, EncodedDataset):
            together = (
                self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            )
            sampler: Any = LengthGroupedSampler(together, lengths=dataset.lengths)
        else:
            sampler = super()._get_train_sampler(dataset)
        return None if sampler is None else _SeededByEpoch(sampler, self.args.seed)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter from the first process, gathered from all of them where DeepSpeed or FSDP spread it."""
        # ZeRO-3 may have asked for weights of the next step already, and those cannot be gathered once more.
        offload = getattr(getattr(self.model_wrapped, "optimizer", None), "parameter_offload", None)
        if offload is not None:
            offload.get_param_coordinator().release_and_reset_all(offload.module)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            assert self.model is not None
            self._save(output_dir, gather_weights(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's own, written beside and put in its place when every process is done and the disk has it."""
        checkpoints = Path(str(self.args.output_dir))
        self._temp = temp_checkpoints(checkpoints)
        checkpoint = self._temp / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.local_process_index == 0:
                sync_files(checkpoint)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                publish_checkpoint(checkpoint, checkpoints, keep=self.args.save_total_limit)
            self.accelerator.wait_for_everyone()
        except BaseException:
            shutil.rmtree(self._temp, ignore_errors=True)  # its room may be needed
            raise
        finally:
            self._temp = None

    def _get_output_dir(self, trial: Any) -> str:
        """Asked by the Trainer for the folder of its checkpoints; it deletes old ones there, too."""
        return super()._get_output_dir(trial) if self._temp is None else str(self._temp)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the adapter alone: the frozen base is where it came from. Called for checkpoints by the Trainer."""
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            save_adapter(self.accelerator.unwrap_model(self.model), folder, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Counterpart of `_save`; PEFT adapters, and all that FSDP spread, load as the Trainer does it."""
        target = model or self.model
        assert target is not None
        folder = Path(resume_from_checkpoint)
        if (folder / TRAINED_WEIGHTS).is_file() and not self.is_fsdp_enabled:
            load_trained_weights(target, folder)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class _SeededByEpoch(Sampler[int]):
    """Wraps a sampler that has a `generator`; the Trainer calls `set_epoch` before each epoch."""

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler = sampler
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(self.sampler)


class BalanceLoss:
    """`weight` times the mean of the batches' `RoutingContext.balance_loss`, over all that a step accumulates.

    It keeps trained routers from using few factors only.
    """

    def __init__(self, context: RoutingContext, weight: float) -> None:
        self.weight = weight
        self._context = context
        self._sum: Tensor | None = None
        self._num_steps = 0.0
        context.collect_balance = True

    def share(self, num_batches: int) -> Tensor:
        """What the forward pass that has just run adds to its loss.

        Losses of a step's batches are added up, and gradients are averaged over processes: a share of 1 / num_batches
        makes this the mean over both. (The answers' loss is a sum over the step's tokens instead.)

        Args:
            num_batches: batches that the present step accumulates on each process.
        """
        loss: Tensor = self._context.balance_loss()
        seen = loss.detach() / num_batches
        self._sum = seen if self._sum is None else self._sum + seen
        self._num_steps += 1 / num_batches
        return loss * (self.weight / num_batches)

    def read(self) -> Tensor:
        """Unweighted mean over the steps of this process since the last call."""
        assert self._sum is not None
        mean = self._sum / self._num_steps
        self._sum, self._num_steps = None, 0.0
        return mean


class FiniteGuard:
    """Looks at every loss and every step's gradient: a run in which one is no number stops, and names the records."""

    def __init__(self) -> None:
        self._records: list[int | None] = []

    def check_loss(self, loss: Tensor, indices: Tensor | None, step: int) -> None:
        """Look at the loss of one batch.

        Args:
            indices: positions of the batch's records in the data; None where the collator gives none.
            step: the step that is being done, from 1.

        Raises:
            UserError: the loss is NaN or infinite.
        """
        records = [None] if indices is None else indices.tolist()
        self._records += records
        if not torch.isfinite(loss):
            raise _not_finite(f"loss is {loss.item()}", step, "the batch of ", records)

    def check_gradient(self, norm: Tensor | float | None, step: int) -> None:
        """Look at the norm of a whole step's gradient, the same one in all processes; starts the next step.

        Raises:
            UserError: it is NaN or infinite, for which DeepSpeed gives -1.
        """
        records, self._records = self._records, []
        if norm is None or (math.isfinite(norm) and norm >= 0):
            return
        value = "not finite" if norm < 0 else float(norm)
        raise _not_finite(f"the gradient's norm is {value}", step, "", gather_object(records))


def _not_finite(what: str, step: int, where: str, records: list[int | None]) -> UserError:
    names = ", ".join("?" if record is None else str(record) for record in records)
    return UserError(
        f"{what} at step {step}, in {where}records {names}: training stopped; "
        "lower train.learning_rate, or look at these records (counted from 0 in their file)"
    )
