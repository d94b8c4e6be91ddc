"""TRL's trainers train MixLoRA: the loss falls, what is saved generates what the trained model generates.

Packed rows and padding-free batches give the loss and the gradients of the same texts in rows of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from method_models import build_llama
from peft import PeftModel
from torch import Tensor
from word_tokenizer import random_words, word_tokenizer

from mixlora_cli import MixLoraConfig
from mixlora_cli.analysis.bench.peers import peers
from mixlora_cli.analysis.bench.whole import WholeModel
from mixlora_cli.config import BenchConfig, BenchSettings, ModelConfig
from tiny_data import tiny_data

pytestmark = pytest.mark.slow

STEPS = 9
TEXTS = 6
"""Each step reads them all, so the loss has to fall."""
NEW = 6
CLOSE = 1e-6
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "w3 {% generation %}{{ message['content'] }} </s>{% endgeneration %}"
    "{% else %}w4 {{ message['content'] }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}w3 {% endif %}"
)


def texts() -> Dataset:
    return Dataset.from_list([{"text": random_words(n, 4 + n)} for n in range(TEXTS)])


def conversations() -> Dataset:
    rows = [
        [
            {"role": "user", "content": random_words(n, 3 + n)},
            {"role": "assistant", "content": random_words(50 + n, 2 + n)},
        ]
        for n in range(TEXTS)
    ]
    return Dataset.from_list([{"messages": row} for row in rows])


def preferences() -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": random_words(n, 5),
                "chosen": f" {random_words(20, 3)}",
                "rejected": f" {random_words(40, 4)}",
            }
            for n in range(TEXTS)
        ]
    )


def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": random_words(n, 4 + n % 3)} for n in range(TEXTS)])


def even_words(completions: list[str], **_: Any) -> list[float]:
    """A reward: the share of words with an even number."""
    return [sum(word[-1] in "02468" for word in text.split()) / 4 for text in completions]


def adapter(**fields: Any) -> MixLoraConfig:
    # With the usual alpha of 16 random factors outweigh so small a model, and nine steps lead anywhere.
    return MixLoraConfig(
        **{"r": 2, "factors": 8, "alpha": 1, "task_type": "CAUSAL_LM", "init_weights": False, **fields}
    )


@dataclass(frozen=True)
class Case:
    """A trainer, its data, its own settings and the adapter's fields."""

    trainer: str
    data: Callable[[], Dataset]
    settings: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)


PROMPT = {"pool": "prompt"}
LEARN = {"router_grad": "straight_through"}
PACKED = {"packing": True, "max_length": 32}
ASSISTANT = {"assistant_only_loss": True}
CASES = {
    "sft": Case("SFT", texts),
    "sft-learning": Case("SFT", texts, fields=LEARN),
    "sft-packing": Case("SFT", texts, PACKED),
    "sft-padding_free": Case("SFT", texts, {"padding_free": True, "max_length": None}),
    "sft-assistant_only": Case("SFT", conversations, ASSISTANT, PROMPT),
    "sft-packing-assistant": Case("SFT", conversations, PACKED | ASSISTANT, PROMPT),
    "dpo": Case("DPO", preferences),
    "dpo-prompt": Case("DPO", preferences, fields=PROMPT | LEARN),
    "grpo": Case("GRPO", prompts, {"num_generations": 3, "max_completion_length": 4}, PROMPT),
}


def build_trainer(case: Case, folder: Path) -> Any:
    arguments = getattr(trl, f"{case.trainer}Config")(
        output_dir=str(folder),
        per_device_train_batch_size=TEXTS,
        max_steps=STEPS,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        seed=0,
        dataloader_pin_memory=False,
        **case.settings,
    )
    torch.manual_seed(2)
    return getattr(trl, f"{case.trainer}Trainer")(
        model=build_llama(),
        args=arguments,
        train_dataset=case.data(),
        processing_class=word_tokenizer(TEMPLATE),
        peft_config=adapter(**case.fields),
        **({"reward_funcs": even_words} if case.trainer == "GRPO" else {}),
    )


def generate(model: Any) -> Tensor:
    prompts = [random_words(1, 6), random_words(2, 3)]
    ids = word_tokenizer()(prompts, return_tensors="pt", padding=True, padding_side="left")
    return model.eval().generate(
        input_ids=ids["input_ids"],
        attention_mask=ids["attention_mask"],
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        eos_token_id=2,  # TRL writes it into the model's own settings
    )


@pytest.fixture(params=CASES)
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, dict[str, Tensor], Path]]:
    """A trainer that has trained, its adapter's weights before, and its folder."""
    trainer = build_trainer(CASES[request.param], tmp_path)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    yield trainer, before, tmp_path


def test_it_learns_and_what_is_saved_generates_the_same(
    trained: tuple[Any, dict[str, Tensor], Path],
) -> None:
    trainer, before, folder = trained
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == STEPS and torch.tensor(losses).isfinite().all()
    if trainer.args.__class__.__name__ != "GRPOConfig":  # its loss is about zero at each new sample
        assert losses[-1] < losses[0] - 0.05
    own = dict(trainer.model.named_parameters())
    assert all("mixlora_" in name for name in before)
    assert [
        name for name, weight in before.items() if "factors_b" in name and torch.equal(own[name], weight)
    ] == []
    expected = generate(trainer.model)
    trainer.save_model(str(folder / "adapter"))
    again = PeftModel.from_pretrained(build_llama(), str(folder / "adapter"))
    assert torch.equal(generate(again), expected)
    assert not torch.equal(generate(build_llama()), expected)  # the adapter has a part in it


@pytest.mark.parametrize("name", ["sft-packing", "sft-padding_free", "sft-packing-assistant"])
@pytest.mark.parametrize("router_grad", ["none", "straight_through"])
def test_a_packed_batch_is_its_texts_alone(name: str, router_grad: str, tmp_path: Path) -> None:
    """One batch of the trainer's own, in fp64: its loss and gradients against those of each text in a row."""
    case = CASES[name]
    case = replace(case, fields=case.fields | {"router_grad": router_grad})
    trainer = build_trainer(case, tmp_path)
    model = trainer.model.double().train()
    packed = next(iter(trainer.get_train_dataloader()))
    starts = (packed["position_ids"][0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], packed["input_ids"].shape[1]]
    assert len(packed["input_ids"]) == 1 and len(starts) > 2

    def learn(batches: list[dict[str, Tensor]]) -> tuple[float, dict[str, Tensor]]:
        """The mean loss over all labelled tokens."""
        model.zero_grad()
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            loss = model(**batch, num_items_in_batch=count, use_cache=False).loss
            loss.backward()
            total += loss.item()
        return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    alone = [
        {"input_ids": packed["input_ids"][:, a:b], "labels": packed["labels"][:, a:b].clone()}
        for a, b in zip(starts, ends, strict=True)
    ]
    together = {k: v for k, v in packed.items() if k in ("input_ids", "labels", "position_ids")}
    together["labels"] = together["labels"].clone()
    together["labels"][:, starts] = -100  # nothing predicts a text's first token
    loss, gradients = learn([together])
    expected_loss, expected = learn(alone)
    assert loss == pytest.approx(expected_loss, abs=CLOSE)
    assert gradients.keys() == expected.keys()
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(
            gradients[name], gradient, atol=CLOSE, rtol=CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_step_that_is_timed_beside_others_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    config = BenchConfig(
        model=ModelConfig(name="tiny", source="tiny"),
        data=tiny_data(tmp_path, train=["counting", "reading"] * 4),
        bench=BenchSettings(precision="fp32"),
        output_dir="",
        rank=2,
    )
    steps = peers(WholeModel(config, torch.device("cpu")), 2)
    for _ in range(3):
        losses, gradients = [], []
        for name in ("peft_loop", "trl"):
            torch.manual_seed(0)  # of dropout
            losses.append(steps[name]())
            gradients.append([p.grad for p in steps[name].model.parameters() if p.requires_grad])
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert len(gradients[0]) == 28
