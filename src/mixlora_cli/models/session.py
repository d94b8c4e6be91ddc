"""A trained run on its base: first what is known of it without a model, then the model, ready to read batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixlora_cli.config import DataConfig, ModelConfig, parse
from mixlora_cli.data.collate import Collator, Features, generation_collator
from mixlora_cli.data.definitions import ASKED, asked_questions, definitions_of, trained_definitions
from mixlora_cli.data.encode import Item
from mixlora_cli.data.loading import definitions_file, load_records
from mixlora_cli.data.text_files import read_json
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.fingerprint import adapter_digest
from mixlora_cli.method.config import PEFT_TYPE, MixLoraConfig
from mixlora_cli.method.model import MixLoraModel
from mixlora_cli.method.selection import Selection
from mixlora_cli.models.adapters import load_adapter, unload_adapter
from mixlora_cli.models.definitions import ADAPTER_CONFIG, TaskRouting
from mixlora_cli.models.features import choose_features
from mixlora_cli.models.forward import (
    choose_dtype,
    labelled_pass,
    matrix_products_in,
    token_loss,
)
from mixlora_cli.models.load import LoadedModel, require_prepared
from mixlora_cli.routers import ROUTERS
from mixlora_cli.training.run_folder import RunFolder, as_written_now

BASE_LABEL = "base"
ADAPTER = "default"
"""PEFT's name for the adapter that `load_adapter` puts on."""


@dataclass(frozen=True)
class Run:
    """A finished run, a bare adapter folder, or the base alone: what can be known before a model loads."""

    label: str
    """Its row's name in tables: "base", "LoRA r=4", "MixLoRA E=16 r=4"."""
    model: ModelConfig
    adapter: Path | None = None
    """Folder of the adapter, or of the model's own trained weights; None for the base alone."""
    root: Path | None = None
    """The run folder, or the bare adapter folder."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    data: DataConfig | None = None
    """The training's; None where that is not known."""

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the training, on this machine."""
        return choose_dtype(self.precision)

    @cached_property
    def digest(self) -> str:
        """Digest of the adapter's files; "none" for the base alone."""
        return adapter_digest(self.adapter)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The PEFT adapter's `adapter_config.json`; empty where there is none.

        Raises:
            UserError: it cannot be read.
        """
        path = None if self.adapter is None else self.adapter / ADAPTER_CONFIG
        if path is None or not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read as an adapter's configuration ({error})") from None

    @property
    def routing(self) -> str | None:
        """How a MixLoRA adapter selects, a key of `ROUTERS`; None for everything else."""
        return str(self.settings.get("routing")) if self.settings.get("peft_type") == PEFT_TYPE else None

    @property
    def selects_by(self) -> Literal["tokens", "task", "chance"] | None:
        """What a MixLoRA adapter's choice of factors depends on; None for everything else."""
        return ROUTERS[self.routing].source if self.routing in ROUTERS else None

    def task_routing(self, data: DataConfig, tasks: Iterable[str]) -> TaskRouting | None:
        """What routing=task reads for these tasks; None where the adapter does not route by task.

        Raises:
            UserError: a task has no definition.
        """
        if self.selects_by != "task":
            return None
        has_file = self.data is not None and definitions_file(self.data) is not None
        made = None if has_file else self.definitions or None
        return self._routing(definitions_of(data, tasks, made))

    @property
    def trained_routing(self) -> TaskRouting | None:
        """What routing=task reads for the tasks that the training defined; None as with `task_routing`."""
        return None if self.selects_by != "task" else self._routing(self.definitions)

    def _routing(self, definitions: Mapping[str, str]) -> TaskRouting:
        settings = self.settings
        return TaskRouting(definitions, settings.get("task_encoder"), settings.get("task_embedding_dim"))

    @cached_property
    def definitions(self) -> Mapping[str, str]:
        """Definition of each task that the training had one of; empty where none are known.

        Raises:
            UserError: they cannot be read.
        """
        path = None if self.root is None else RunFolder(self.root).definitions
        if path is not None and path.is_file():
            return dict(read_json(path, "the definitions of a training"))
        return {} if self.data is None else trained_definitions(self.data)

    @cached_property
    def questions(self) -> Mapping[str, Sequence[str]]:
        """Some questions of each task that the training asked; empty where they are not known.

        Raises:
            UserError: they cannot be read.
        """
        path = None if self.root is None else RunFolder(self.root).questions
        if path is not None and path.is_file():
            return dict(read_json(path, "the questions of a training"))
        with suppress(UserError):  # an earlier version kept none, and its data may have gone
            if self.data is not None:
                some = replace(self.data, max_per_task=self.data.max_per_task or 4 * ASKED, on_error="skip")
                return asked_questions(load_records(some, "train"))
        return {}


def find_run(path: str | None, model: ModelConfig, loads: bool = True) -> Run:
    """The run or PEFT adapter in a folder; a bare adapter is put on `model`, and None is `model` alone.

    Args:
        path: the folder.
        model: the base of what brings none.
        loads: whether the base is to be loaded here.

    Raises:
        UserError: the folder is missing or is no run, its run has not finished, or the model is not prepared.
    """
    run = (
        Run(BASE_LABEL, model)
        if path is None
        else _in_folder(RunFolder(Path(path).expanduser()), path, model)
    )
    if loads:
        require_prepared(run.model)
    return run


def _in_folder(folder: RunFolder, path: str, model: ModelConfig) -> Run:
    if not folder.root.is_dir():
        raise UserError(f"run={path}: no such folder; expected the run folder that `mixlora train` printed")
    if not folder.started:
        if (folder.root / ADAPTER_CONFIG).is_file():
            return Run(folder.root.name, model, folder.root, folder.root)
        raise UserError(
            f"run={path} is no run folder: expected config.yaml in it, as `mixlora train` writes, "
            "or adapter_config.json"
        )
    if not folder.finished:
        raise UserError(
            f"run={folder.root} has not finished: continue it with "
            f"`mixlora train ... output_dir={folder.root} resume=auto`"
        )
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(folder.config), resolve=True)
        return Run(
            label=label_of(config),
            model=parse(ModelConfig, as_written_now(config["model"])),
            adapter=folder.adapter,
            root=folder.root,
            precision=config["train"]["precision"],
            data=parse(DataConfig, config["data"]) if "data" in config else None,
        )
    except Exception as error:  # whatever became of the file
        reason = " ".join(str(error).split())
        raise UserError(
            f"{folder.config} is not a configuration that `mixlora train` wrote: {reason}"
        ) from error


def label_of(config: Mapping[str, Any]) -> str:
    """Short name of what a run with this configuration trains."""
    name = config["adapter"]["name"]
    if name == "lora":
        return f"LoRA r={config['rank']}"
    if name == "mixlora":
        routing = config["routing"]["name"]
        suffix = "" if routing == "instance" else f" {routing}"
        start = config["routing"].get("router_init", "random")
        if start != "random":
            suffix += {"tasks": " plus"}.get(start, f" {start}")
        elif config["adapter"].get("pairing") == "tied":
            suffix += " tied"
        return f"MixLoRA E={config['factors']} r={config['rank']}{suffix}"
    return str(name)


def find_mixlora(
    path: str, model: ModelConfig, own_weights: str, other_kind: str
) -> tuple[Run, Path, MixLoraConfig]:
    """The finished MixLoRA adapter of `find_run`, its folder and its configuration.

    Args:
        own_weights: what to say of a run that trained the model's own weights.
        other_kind: what to say of an adapter of another kind; "{folder}" stands for its folder.

    Raises:
        UserError: there is none.
    """
    run = find_run(path, model)
    assert run.adapter is not None
    if not run.settings:
        raise UserError(f"run={path} trained the model's own weights: {own_weights}")
    if run.routing is None:
        reason = other_kind.format(folder=run.adapter)
        raise UserError(f"run={path} holds a {run.settings.get('peft_type')} adapter, which {reason}")
    return run, run.adapter, MixLoraConfig.from_pretrained(str(run.adapter))


def about_mixlora(run: Run, adapter: MixLoraConfig) -> dict[str, Any]:
    """What the result files of a measurement say of the adapter."""
    names = {"factors": "factors", "rank": "r", "routing": "routing", "decode": "decode"}
    return {"digest": run.digest, **{name: getattr(adapter, key) for name, key in names.items()}}


def refuse_adapter_folder(folder: Path) -> None:
    """Raise UserError where a command's own files would mix with a trained adapter's."""
    if RunFolder(folder).started or (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"output_dir={folder} holds a trained adapter; give a folder of its own")


class Session:
    """A base, alone or with an adapter, in eval mode and on the device, and how batches are put to it."""

    model: PreTrainedModel | PeftModel

    def __init__(
        self,
        base: LoadedModel,
        dtype: torch.dtype,
        cache_features: bool,
        adapter: Path | None = None,
        routing: TaskRouting | None = None,
    ) -> None:
        """Open an adapter on a base that none was put on before.

        Args:
            base: of `build_base`, loaded in `dtype`.
            dtype: of the matrix products.
            cache_features: read pictures as features of the frozen tower, which are kept on the disk.
            adapter: `Run.adapter`.
            routing: of `Run.task_routing`.
        """
        # The cache changes the model, and definitions are read without an adapter: both come before it.
        self.features: Features = choose_features(base, cache_features)
        self._embeddings = None if routing is None else routing.embeddings(base)
        self.base, self.dtype = base, dtype
        self.put_on(adapter)

    def put_on(self, adapter: Path | None, config: PeftConfig | None = None) -> None:
        """Let the base, on which is none, have the adapter of a folder; `config` stands in for the adapter's own."""
        base = self.base.model
        self.model = base if adapter is None else load_adapter(base, adapter, config)
        module: nn.Module = self.model
        if torch.cuda.is_available():
            module.to("cuda")  # `cuda()` refuses eight bits, though they are there already

    def take_off(self) -> None:
        """Make the base again what it was without its PEFT adapter."""
        assert isinstance(self.model, PeftModel)
        unload_adapter(self.model)
        self.model = self.base.model

    @property
    def tuner(self) -> MixLoraModel | None:
        """The MixLoRA adapter that is on; None without one, or with one of another kind."""
        tuner = self.model.base_model if isinstance(self.model, PeftModel) else None
        return tuner if isinstance(tuner, MixLoraModel) else None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def embeddings(self) -> Mapping[str, Tensor] | None:
        """What the adapter selects by with routing=task: (d,) by task; None where it does not."""
        return None if self.tuner is None else self._embeddings

    @property
    def collator(self) -> Collator:
        """Batches with labels, as training reads them."""
        return Collator(self.base.chat, self.features, embeddings=self.embeddings)

    def products(self) -> AbstractContextManager[None]:
        """Inside, the model computes as in training: bf16 products over fp32 adapters, or plain fp32."""
        return matrix_products_in(self.model, self.dtype, self.device.type)

    def label_logits(
        self, items: Sequence[Item], routing_seed: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One forward pass; to be called inside `products`.

        Args:
            items: with labels.
            routing_seed: as the `Generator` takes it.

        Returns:
            Logits (n, V) of the n labelled tokens, where they are predicted (B, S), and which tokens they are (n,).
        """
        inputs = self._on_device(replace(self.collator, routing_seed=routing_seed)(items))
        head = self.base.model.get_output_embeddings()
        outputs, predicts, targets = labelled_pass(self.model, inputs, head, self.tuner is not None)
        return outputs.logits, predicts, targets

    def loss(self, items: Sequence[Item]) -> Tensor:
        """What training minimises on these items, taken as a whole optimizer step; with its graph where enabled."""
        with self.products():
            logits, _, targets = self.label_logits(items)
            return token_loss(logits, targets, len(targets))

    def answer_losses(
        self, items: Sequence[Item], routing_seed: int | None = None
    ) -> list[tuple[float, int]]:
        """What `loss` pools: of each item the negative log-likelihood of its labelled tokens, and how many these are.

        In nats, summed over the item's answers. Other items in the batch change nothing but the rounding. To be called
        inside `products`; `routing_seed` as in `label_logits`.
        """
        with torch.inference_mode():
            logits, predicts, targets = self.label_logits(items, routing_seed)
            of_tokens = F.cross_entropy(logits.float(), targets, reduction="none").double().cpu()
            counts: list[int] = predicts.sum(dim=1).tolist()
        return [(float(own.sum()), len(own)) for own in torch.split(of_tokens, counts)]

    def selections(self, prompts: Sequence[Item]) -> dict[str, Selection]:
        """By layer name: the factors (B, r) that generation has selected for B prompts at its first new token."""
        assert self.tuner is not None
        collate = generation_collator(self.base.chat, self.features, self.embeddings)
        batch = self._on_device(collate(prompts))
        with torch.inference_mode(), self.products():
            # One token's logits: the head is the widest product, and nobody reads it.
            self.model(**batch, logits_to_keep=1, use_cache=False)
        return self.tuner.selections(ADAPTER)

    def _on_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}
