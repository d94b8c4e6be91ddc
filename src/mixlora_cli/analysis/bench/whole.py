"""How each part is measured, and the whole model in the forms that are compared.

Base, LoRA on it and MixLoRA on it share one set of frozen weights.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from mixlora_cli.analysis.bench.counters import (
    Measurement,
    Variant,
    count_operations,
    free_bytes,
    interleave,
    peak_bytes,
    resting_bytes,
    saved_bytes,
)
from mixlora_cli.analysis.bench.layers import DTYPES, Bench, LayerCase, build_bench, into_published_form
from mixlora_cli.benchmarks.metrics import MME, POPE, VQA
from mixlora_cli.benchmarks.registry import BENCHMARKS, FROM_THE_PAPER
from mixlora_cli.config import AdapterConfig, BenchConfig, OptimConfig, Part, TrainConfig
from mixlora_cli.data.collate import Features, PixelLoader, generation_collator
from mixlora_cli.data.encode import EncodedDataset, Item, encode_prompts, encode_records
from mixlora_cli.data.loading import load_records
from mixlora_cli.evaluation.predictions import FILE_NAME, Header, Prediction, open_predictions
from mixlora_cli.evaluation.scoring import score
from mixlora_cli.method.model import MixLoraModel
from mixlora_cli.models.adapters import attach_adapter
from mixlora_cli.models.features import choose_features
from mixlora_cli.models.forward import choose_dtype, label_positions, matrix_products_in
from mixlora_cli.models.generate import Generator, batches
from mixlora_cli.models.load import LoadedModel, build_base
from mixlora_cli.training.arguments import build_arguments
from mixlora_cli.training.run_folder import RunFolder
from mixlora_cli.training.train import build_trainer

AdapterName = Literal["lora", "mixlora", "mixlora_trained", "none"]
"""mixlora_trained: with routers that learn."""
Answering = Callable[[Sequence[Item]], list[str]]
"""Of one batch of prompts, in order, as `mixlora eval` makes them."""
NUM_BATCHES = 4
"""Batches that the training steps take in turn."""
ADAPTERS: tuple[AdapterName, ...] = ("lora", "mixlora")
BASE, BATCHED, ONE_BY_ONE = "base", "batched", "one_by_one"
ONE_BY_ONE_PUBLISHED = "one_by_one_published"
PLAIN_LOOP = "plain_loop"
SCORING = "scoring"
SAME_ANSWERS = "same_answers"
"""Answers that are those of the base."""
PUBLISHED_COPIES = 4
"""(B, d_in, d_out) tensors alive at once in the published form: matrices, their gradient, working space for both."""


def measure(case: Measurement, whole: WholeModel) -> Measurement:
    """Measure one case on `whole.device`."""
    return _MEASURES[case.part](case, whole)


def _layer(case: Measurement, whole: WholeModel) -> Measurement:
    bench = _bench(case, whole.device)
    return replace(case, seconds=interleave(bench.variants(), case.rounds, whole.device))


def _operations(case: Measurement, whole: WholeModel) -> Measurement:
    """Operations and bytes kept for the backward pass of each variant of a layer."""
    bench = _bench(case, whole.device)
    counts = {}
    for name, model in bench.models.items():
        bench.clear(name)
        operations = count_operations(partial(bench.forward, name), bench.gradient)
        bench.clear(name)
        counts[name] = {
            "forward_flops": operations.forward,
            "backward_flops": operations.backward,
            "saved_bytes": saved_bytes(partial(bench.forward, name), model),
        }
    return replace(case, counts=counts)


def _bench(case: Measurement, device: torch.device) -> Bench:
    sizes = {name: case.number(name) for name in ("d_in", "d_out", "batch", "tokens", "rank", "seed")}
    layer = LayerCase(**sizes, dtype=str(case.case["dtype"]))
    # The published form's matrices, one for each instance, need room.
    matrices = layer.batch * layer.d_in * layer.d_out * DTYPES[layer.dtype].itemsize
    published_fits = PUBLISHED_COPIES * matrices < free_bytes(device)
    return build_bench(layer, case.number("factors"), case.pools, device, published_fits)


def _memory(case: Measurement, whole: WholeModel) -> Measurement:
    counts: dict[str, dict[str, int]] = {}
    for name in ADAPTERS:
        step = whole.step(name, case.number("batch_size"))
        counts[name] = {**_bytes_of(step, whole), "saved_bytes": saved_bytes(step.loss, step.model)}
    return replace(case, counts=counts)


def _bytes_of(step: TrainingStep, whole: WholeModel) -> dict[str, int]:
    step()  # the optimizer makes its state in its first step
    step.optimizer.zero_grad(set_to_none=True)
    resting = resting_bytes(step.resting())
    peak = peak_bytes(step, whole.device)
    step.optimizer.zero_grad(set_to_none=True)
    return {"resting_bytes": resting, "step_bytes": peak, "peak_bytes": resting + peak}


def _timed(
    case: Measurement, whole: WholeModel, runs: Mapping[str, Callable[[], object]], **counted: Any
) -> Measurement:
    variants = {name: Variant(run) for name, run in runs.items()}
    return replace(case, seconds=interleave(variants, case.rounds, whole.device), **counted)


def _step(case: Measurement, whole: WholeModel) -> Measurement:
    return _timed(case, whole, {name: whole.step(name, case.number("batch_size")) for name in ADAPTERS})


def _generation(case: Measurement, whole: WholeModel) -> Measurement:
    items = whole.prompts(case.number("batch_size"))
    tokens = case.number("max_new_tokens")
    models: dict[str, Answering] = {BASE: whole.generator("none", tokens)}
    models |= {name: whole.generator(name, tokens) for name in ADAPTERS}
    answers = {name: answering(items) for name, answering in models.items()}
    # Untrained adapters change nothing; where rounding makes an answer longer, its time says less.
    counts = {
        name: {SAME_ANSWERS: sum(map(str.__eq__, texts, answers[BASE]))} for name, texts in answers.items()
    }
    runs = {name: partial(answering, items) for name, answering in models.items()}
    return _timed(case, whole, runs, counts=counts)


def _evaluation(case: Measurement, whole: WholeModel) -> Measurement:
    """MixLoRA answers all instances in batches, one at a time, and one at a time in the published code's form.

    Beside it LoRA answers in the batched loop that people write.
    """
    items, tokens = whole.prompts(case.number("instances")), case.number("max_new_tokens")
    answering, published = (whole.generator("mixlora", tokens, published=form) for form in (False, True))
    size = case.number("batch_size")
    grouped, alone = batches(items, size), [[item] for item in items]
    plain, given = whole.plain_generator(tokens), [items[at : at + size] for at in range(0, len(items), size)]
    runs = {
        PLAIN_LOOP: lambda: [plain(group) for group in given],
        BATCHED: lambda: [answering(group) for group in grouped],
        ONE_BY_ONE: lambda: [answering(group) for group in alone],
        ONE_BY_ONE_PUBLISHED: lambda: [published(group) for group in alone],
    }
    return _timed(case, whole, runs)


def _peers(case: Measurement, whole: WholeModel) -> Measurement:
    from mixlora_cli.analysis.bench.peers import peers  # which builds on this file

    steps = peers(whole, case.number("batch_size"))
    return _timed(case, whole, steps, counts={name: _bytes_of(step, whole) for name, step in steps.items()})


def _scoring(case: Measurement, whole: WholeModel) -> Measurement:
    """Scores of stored answers, with their intervals, from the file to `results.json`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_predictions(folder, case.number("predictions"), case.number("seed"))
        return _timed(case, whole, {SCORING: partial(score, folder)})


_MEASURES: dict[Part, Callable[[Measurement, WholeModel], Measurement]] = {
    "layer": _layer,
    "operations": _operations,
    "memory": _memory,
    "step": _step,
    "peers": _peers,
    "generation": _generation,
    "evaluation": _evaluation,
    "scoring": _scoring,
}


def write_predictions(folder: Path, count: int, seed: int) -> None:
    """`count` answers to the paper's eight benchmarks in turn, right and wrong, as `mixlora eval` writes them."""
    header = Header({"made up": str(seed)}, count, {"label": "made up"})
    with open_predictions(folder / FILE_NAME, header) as writer:
        writer.append(list(_predictions(count, random.Random(seed))))


def _predictions(count: int, rng: random.Random) -> Iterator[Prediction]:
    labels = tuple(f"label {number}" for number in range(10))
    for number in range(count):
        benchmark = BENCHMARKS[FROM_THE_PAPER[number % len(FROM_THE_PAPER)]]
        pair = number // len(FROM_THE_PAPER) // 2
        yes_no = benchmark.metric in (MME, POPE)
        choices = ("yes", "no") if yes_no else labels
        target = rng.choice(choices)
        yield Prediction(
            split="unseen",
            index=number,
            benchmark=benchmark.name,
            id=f"{benchmark.name}-{number}",
            question="What is the object in the image? Please only answer a single object.",
            target=target,
            prediction=f"It is {rng.choice(choices)}." if rng.random() < 0.5 else target,
            category=f"part {pair % 14}" if yes_no else "",
            image_id=f"image {pair}" if yes_no else "",
            answers=(target,) * 10 if benchmark.metric is VQA else (),
            labels=() if yes_no or benchmark.metric is VQA else labels,
        )


class WholeModel:
    """The base with its data; `adapted` gives as many models as are asked for, which share the frozen weights."""

    def __init__(self, config: BenchConfig, device: torch.device) -> None:
        self._config = config
        self.rank, self.factors, self.seed = config.rank, config.factors, config.seed
        self.targets = config.adapter.target_modules
        self.device = device
        self.dtype = choose_dtype(config.bench.precision)

    @cached_property
    def base(self) -> LoadedModel:
        base = build_base(self._config.model, self.dtype)
        module: nn.Module = base.model
        module.to(self.device)
        return base

    @cached_property
    def features(self) -> Features:
        """Pictures through the frozen tower, kept on disk as in training, where their features can be kept."""
        return choose_features(self.base, cached=True)

    def adapted(self, name: AdapterName) -> PreTrainedModel | PeftModel:
        """A new adapter on the base; untrained, so that it answers what the base answers."""
        _ = self.features  # changes the base, so it comes first
        set_seed(self._config.seed)
        adapted = attach_adapter(
            sharing_weights(self.base.model),
            self._adapter(name),
            self._config.routing,
            self._config.rank,
            self._config.factors,
            picture_tokens=self.base.chat.image_token_ids,
        )
        tuner = getattr(adapted, "base_model", None)
        if isinstance(tuner, MixLoraModel):
            tuner.skip_calibration()
        return adapted

    def _adapter(self, name: AdapterName) -> AdapterConfig:
        if name == "mixlora_trained":
            return replace(self._config.adapter, router_grad="straight_through")
        return self._config.adapter if name == "mixlora" else AdapterConfig(name=name)

    def prompts(self, count: int) -> list[Item]:
        """A seeded sample of the held-out records, as prompts; of the training records where there are none."""
        data = self._config.data
        split: Literal["heldout", "train"] = (
            "train" if data.source == "json" and data.heldout is None else "heldout"
        )
        chosen = _sample(load_records(data, split), count, self._config.seed)
        return list(encode_prompts(chosen, self.base.chat, data.on_error).items)

    def step(
        self,
        name: AdapterName,
        batch_size: int,
        kind: type[TrainingStep] | None = None,
        model: nn.Module | None = None,
    ) -> TrainingStep:
        """Steps of a new adapter, or of `model` in its place; `kind`: made in another way than ours."""
        data, seed = self._config.data, self._config.seed
        chosen = _sample(load_records(data, "train", seed), NUM_BATCHES * batch_size, seed)
        dataset = encode_records(chosen, self.base.chat, data.max_length, data.on_error)
        config = TrainConfig(
            model=self._config.model,
            adapter=self._adapter(name),
            routing=self._config.routing,
            data=data,
            train=OptimConfig(batch_size=batch_size),
            rank=self._config.rank,
            factors=self._config.factors,
            output_dir="",
            seed=seed,
        )
        return (kind or TrainingStep)(self, model or self.adapted(name), dataset, config)

    def generator(self, name: AdapterName, max_new_tokens: int, published: bool = False) -> Answering:
        """Answers of a new adapter; `published`: in the published code's form, for one instance at a time."""
        model = self.adapted(name)
        if published:
            into_published_form(model)
        generator = Generator(model, self.base, self.features, max_new_tokens)

        def answers(items: Sequence[Item]) -> list[str]:
            with matrix_products_in(model, self.dtype, self.device.type):
                return generator(items)

        return answers

    def plain_generator(self, max_new_tokens: int) -> Answering:
        """Answers of a new LoRA as people write it: left-padded pixels and tokens into `generate`, and nothing else."""
        model, chat = self.adapted("lora").eval(), self.base.chat
        collate = generation_collator(chat, PixelLoader(chat))
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
        settings |= {"eos_token_id": chat.ends, "pad_token_id": chat.pad}

        @torch.inference_mode()
        def answers(items: Sequence[Item]) -> list[str]:
            batch = {name: tensor.to(self.device) for name, tensor in collate(items).items()}
            with self.autocast():
                tokens: Tensor = model.generate(**batch, **settings)
            written = tokens[:, batch["input_ids"].shape[1] :]
            return list(chat.tokenizer.batch_decode(written, skip_special_tokens=True))

        return answers

    def autocast(self) -> AbstractContextManager[None]:
        """What people write around a forward pass for products in bf16."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


class TrainingStep:
    """Called, it makes one optimizer step on the next batch: forward, loss, backward, clipping, AdamW."""

    def __init__(
        self, whole: WholeModel, model: nn.Module, dataset: EncodedDataset, config: TrainConfig
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:  # the Trainer insists on one; nothing is written to it
            arguments = build_arguments(config, RunFolder(Path(folder)), whole.dtype)
            trainer = build_trainer(model, whole.base, dataset, whole.features, arguments, [])
        self.whole = whole
        self.model = model.train()
        self.trainer = trainer
        self.optimizer = trainer.create_optimizer()
        self._max_norm = config.train.max_grad_norm
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        size = config.train.batch_size
        starts = range(0, len(dataset) - size + 1, size) or [0]
        collate: Any = trainer.data_collator
        batches = (
            collate([dataset[at] for at in range(start, min(start + size, len(dataset)))]) for start in starts
        )
        self._batches = [
            {name: tensor.to(whole.device) for name, tensor in batch.items()} for batch in batches
        ]
        self._taken = 0

    @property
    def batch(self) -> dict[str, Tensor]:
        """That of the next step."""
        return dict(self._batches[self._taken % len(self._batches)])

    def loss(self) -> Tensor:
        batch, whole = self.batch, self.whole
        num_tokens = len(label_positions(batch["labels"])[1])
        with matrix_products_in(self.model, whole.dtype, whole.device.type):
            loss: Tensor = self.trainer.compute_loss(self.model, batch, num_items_in_batch=num_tokens)
        return loss

    def backward(self) -> Tensor:
        """Leave the gradients of the loss, which is returned."""
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def __call__(self) -> float:
        """One step; returns its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.backward()
        nn.utils.clip_grad_norm_(self._trained, self._max_norm)
        self.optimizer.step()
        self._taken += 1
        return loss.item()

    def resting(self) -> list[Tensor]:
        """What is allocated between two steps: weights and the optimizer's state."""
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        tensors = [value for value in state if isinstance(value, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *tensors]


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules around the same parameters and buffers: an adapter on it leaves `model` as it is."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _sample(records: Sequence[Any], count: int, seed: int) -> list[Any]:
    return random.Random(seed).sample(list(records), min(count, len(records)))
