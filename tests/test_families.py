"""Today's model families from the command line to an answer: tiny models of their real classes and processors.

Each family is trained for two steps on records with no, one and two pictures, saved, opened again and evaluated by the
commands that a user gives; everything else here looks at what they left.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from families import FAMILIES, WRONG, make_family, make_wrong
from mixlora_cli.commands import COMMANDS
from mixlora_cli.config import AdapterConfig, ModelConfig, RoutingConfig
from mixlora_cli.data.collate import Collator, PixelLoader, build_dummy_image
from mixlora_cli.data.encode import IGNORE, Item, encode, encode_prompt, verify_labels
from mixlora_cli.data.loading import load_records
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import Turn
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.predictions import read_predictions
from mixlora_cli.hydra_app import run_command
from mixlora_cli.models.adapters import attach_adapter, outside_of_decoder
from mixlora_cli.models.forward import labelled_pass, token_loss
from mixlora_cli.models.generate import Generator
from mixlora_cli.models.load import LoadedModel, build_base, build_chat
from mixlora_cli.models.session import Session, find_run
from mixlora_cli.training.run_folder import read_metrics

NEEDS = {"smolvlm": "num2words", "pixtral": "torchvision", "mistral3": "torchvision"}
"""Packages without which transformers makes no processor of these families, and the commands name them."""
KEYS: dict[str, list[str]] = {
    "llava": ["model.chat_template=v1"],
    "llava_onevision": ["model.chat_template=onevision"],
    "qwen3": ["model.template_options={enable_thinking: false}"],
    "qwen3_moe": ["model.template_options={enable_thinking: false}"],
}
"""What the command line says beside model=hf model.name_or_path=FOLDER."""
ONE_ANSWER = ("qwen3", "qwen3_moe")
"""Families whose template writes an earlier answer otherwise than the last one."""


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


READY = [name for name in FAMILIES if name not in NEEDS or _has(NEEDS[name])]
WITH_PICTURES = [name for name in READY if FAMILIES[name].pictures]


def _data(root: Path, pictures: bool, turns: int) -> list[str]:
    """Records of two tasks with no, one and two pictures of several sizes; the last has two questions."""
    noise = random.Random(0)
    (root / "images").mkdir(parents=True)
    for number, (width, height) in enumerate([(40, 24), (16, 16), (20, 50), (33, 31)]):
        pixels = noise.randbytes(width * height * 3)
        Image.frombytes("RGB", (width, height), pixels).save(root / "images" / f"{number}.png")
    asked = [
        ([], ["Is there a dog? Answer yes or no.", "yes"]),
        (["0.png"], ["What is <image> there?", "a red circle"]),
        (["1.png", "2.png"], ["<image>How many dots are in\n<image>\nthe two?", "seven and 5"]),
        (
            ["3.png"],
            ["<image>\nWhat color is it?", "blue, a square", "Is it left <image>\n?", "no"][: 2 * turns],
        ),
    ]
    asked[3][0].extend(["0.png"] if turns > 1 else [])
    records = []
    for number, (files, texts) in enumerate(asked):
        said = [text if pictures else text.replace("<image>", "") for text in texts]
        record = {
            "id": str(number),
            "task_name": ["counting", "naming"][number % 2],
            "benchmark": "all of them",
            "conversations": [
                {"from": ["human", "gpt"][place % 2], "value": text} for place, text in enumerate(said)
            ],
        }
        records.append(record | ({"image": files} if pictures and files else {}))
    (root / "data.json").write_text(json.dumps(records))
    return [
        "data=json",
        *(f"data.{key}={root}/data.json" for key in ("train", "unseen")),
        f"data.images={root}/images",
    ]


@dataclass(frozen=True)
class Case:
    """A family's folder, the data, and the run that was trained on it."""

    family: str
    folder: Path
    data: list[str]
    run: Path
    before_saving: list[str]
    """Answers of the model that the training left in memory."""

    @cached_property
    def base(self) -> LoadedModel:
        """A fresh one, without adapter."""
        return build_base(self.model)

    @property
    def model(self) -> ModelConfig:
        """Of the run."""
        return find_run(str(self.run), ModelConfig("hf", "hub", str(self.folder))).model

    @cached_property
    def session(self) -> Session:
        """The run, opened."""
        return Session(build_base(self.model), torch.float32, False, self.run / "adapter")

    @cached_property
    def records(self) -> list[Record]:
        """All of them."""
        from mixlora_cli.config import DataConfig

        paths = dict(argument.removeprefix("data.").split("=", 1) for argument in self.data[1:])
        return load_records(DataConfig(name="json", source="json", **paths), "train", 0)

    @property
    def items(self) -> list[Item]:
        """Encoded for training."""
        return [encode(record, self.base.chat) for record in self.records]

    @property
    def prompts(self) -> list[Item]:
        """Encoded for generation."""
        return [encode_prompt(record, self.base.chat) for record in self.records]


def _run(command: str, *arguments: str) -> int:
    return run_command(COMMANDS[command], arguments)


def _train(family: str, folder: Path, data: list[str], run: Path, *keys: str) -> int:
    return _run(
        "train",
        *["model=hf", f"model.name_or_path={folder}", *KEYS.get(family, []), *data, *keys],
        *["factors=6", "rank=2", "adapter.router_grad=straight_through", "adapter.dropout=0"],
        *[
            f"output_dir={run}",
            "train.precision=fp32",
            "train.steps=2",
            "train.learning_rate=0.01",
            "train.log_every=1",
        ],
    )


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """`mixlora train` of a family on a folder of its own."""
    name, root = request.param, tmp_path_factory.mktemp(request.param)
    folder = make_family(name, root / "model")
    data = _data(root, bool(FAMILIES[name].pictures), 1 if name in ONE_ANSWER else 2)
    kept: dict[str, Any] = {}

    def attach(model: Any, *arguments: Any) -> Any:
        kept["model"] = attach_adapter(model, *arguments)
        # large routers and updates, else two steps would hardly change an answer
        generator = torch.Generator().manual_seed(0)
        for key, parameter in kept["model"].named_parameters():
            if parameter.requires_grad and ("router" in key or "factors_b" in key):
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        return kept["model"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixlora_cli.training.train.attach_adapter", attach)
        patch.setenv("MIXLORA_CACHE", str(root / "cache"))
        assert _train(name, folder, data, root / "run", "train.batch_size=4", "train.accumulation=1") == 0
        made = Case(name, folder, data, root / "run", [])
        generate = Generator(kept["model"], made.base, PixelLoader(made.base.chat), max_new_tokens=8)
        made.before_saving.extend(generate(made.prompts))
        yield made


def each_family(names: Sequence[str] = READY) -> Any:
    """The test once for each of the families."""
    return pytest.mark.parametrize("case", names, indirect=True, scope="module")


def _messages(record: Record, pictures_first: bool) -> list[dict[str, Any]]:
    """A record's turns but the last as a person writes them for transformers: text, picture, text."""
    pictures = [{"type": "image", "image": Image.open(file).convert("RGB")} for file in record.files]
    messages: list[dict[str, Any]] = []
    for turn in record.conversation[:-1]:
        first, *rest = turn.text.split("<image>")
        parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
        for text in rest:
            parts += [{"type": "image"}, {"type": "text", "text": text}]
        messages.append({"role": {"human": "user", "gpt": "assistant"}[turn.role], "content": parts})
    if pictures_first:
        for message in messages:
            text = "".join(part["text"] for part in message["content"] if part["type"] == "text")
            message["content"] = [{"type": "text", "text": text}]
        messages[0]["content"] = [*pictures, *messages[0]["content"]]
    for message in messages:  # white space at the ends of a turn is nobody's
        texts = [part for part in message["content"] if part["type"] == "text"]
        texts[-1]["text"] = texts[-1]["text"].rstrip()
        texts[0]["text"] = texts[0]["text"].lstrip()
        if not texts[0]["text"]:
            texts[1]["text"] = texts[1]["text"].lstrip()
        message["content"] = [part for part in message["content"] if part.get("text") != ""]
        for part in message["content"]:
            if part == {"type": "image"}:
                part.update(pictures.pop(0))
    return messages


@each_family()
def test_a_prompt_is_what_the_models_own_processor_makes_of_it(case: Case) -> None:
    chat = case.base.chat
    template = {"chat_template": chat.template.source, **chat.template.options}
    for record, item in zip(case.records, case.prompts, strict=True):
        messages = _messages(record, chat.template.pictures_first)
        asked = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        if chat.processor is None:
            texts = [{"role": each["role"], "content": each["content"][0]["text"]} for each in messages]
            expected = chat.tokenizer.apply_chat_template(texts, tokenize=True, **asked, **template)
        else:
            expected = chat.processor.apply_chat_template(messages, tokenize=True, **asked, **template)
        found = Collator(chat, PixelLoader(chat), with_labels=False)([item])
        if (
            not record.images
        ):  # a processor says of a text without pictures what kind its tokens are, or does not
            expected = {key: value for key, value in expected.items() if key in found}
        assert set(found) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=0, msg=f"{key} of {record.id}")


@each_family()
def test_a_saved_run_opens_to_the_same_answers_whatever_is_in_a_batch(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))
    answers = {}
    for size, subject in ((1, f"run={case.run}"), (4, f"run={case.run}"), (4, "adapter=none")):
        whole = [*["eval", *case.data], subject, f"output_dir={tmp_path / f'{size}{subject[:3]}'}"]
        model = ["model=hf", f"model.name_or_path={case.folder}", *KEYS.get(case.family, [])]
        assert _run(*whole, *model, "eval.max_new_tokens=8", f"eval.batch_size={size}") == 0
        rows = read_predictions(tmp_path / f"{size}{subject[:3]}" / "predictions.jsonl").predictions
        answers[size, subject[:3]] = [row.prediction for row in sorted(rows, key=lambda row: row.index)]
    assert answers[1, "run"] == answers[4, "run"] == case.before_saving
    assert answers[4, "run"] != answers[4, "ada"]
    assert len(set(case.before_saving)) > 1  # the inputs matter


def _logits(case: Case, items: Sequence[Item], padding: Any = "right") -> list[Tensor]:
    """Of every token of every item."""
    chat = case.base.chat
    batch = Collator(chat, PixelLoader(chat), padding, with_labels=False)(items)
    logits = case.session.model(**batch).logits
    return [row[mask.bool()] for row, mask in zip(logits, batch["attention_mask"], strict=True)]


@each_family()
def test_neighbours_and_the_side_of_padding_change_nothing(case: Case) -> None:
    with torch.no_grad():
        alone = [_logits(case, [item])[0] for item in case.items]
        for padding in ("right", "left"):
            together = _logits(case, case.items, padding)
            for found, expected in zip(together, alone, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    chosen = case.session.selections(case.prompts)
    differing = [
        name for name, each in chosen.items() if len({tuple(row) for row in each.index_a.tolist()}) > 1
    ]
    assert len(differing) > len(chosen) / 4  # else routing could not have gone wrong


@each_family(WITH_PICTURES)
def test_a_picture_matters_and_a_text_is_read_alike_with_and_without_neighbours_that_have_one(
    case: Case,
) -> None:
    one = case.items[1]
    with torch.no_grad():
        other = Item(one.input_ids, one.labels, case.items[1].images, one.task, one.index)
        plain = _logits(case, [one])[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PixelLoader, "__call__", _darker(PixelLoader.__call__))
            assert not torch.allclose(_logits(case, [other])[0][-1], plain[-1], atol=1e-2)


def _darker(load: Any) -> Any:
    def loaded(*arguments: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = load(*arguments)
        return found | {"pixel_values": 0.5 * found["pixel_values"].flip(-1)}

    return loaded


@each_family()
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(case: Case) -> None:
    model = attach_adapter(
        build_base(case.model).model,
        AdapterConfig("mixlora", dropout=0.0, router_grad="straight_through"),
        RoutingConfig("instance"),
        2,
        6,
    ).train()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and "factors_b" in key:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    chat, head = case.base.chat, model.get_output_embeddings()

    def learn() -> tuple[Tensor, dict[str, Tensor]]:
        batch = Collator(chat, PixelLoader(chat))(case.items)
        outputs, _, targets = labelled_pass(model, {**batch, "use_cache": False}, head, True)
        loss = token_loss(outputs.logits, targets, len(targets))
        model.zero_grad()
        loss.backward()
        return loss.detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}

    loss, gradients = learn()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, found = learn()
    torch.testing.assert_close(again, loss)
    assert found.keys() == gradients.keys()
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-4
    for key, gradient in gradients.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-7)


@each_family()
def test_a_batch_trains_as_its_instances_do_one_by_one(case: Case, tmp_path: Path) -> None:
    one_by_one = ["train.batch_size=1", "train.accumulation=4"]
    assert _train(case.family, case.folder, case.data, tmp_path / "run", *one_by_one) == 0
    found, expected = (read_metrics(run / "metrics.jsonl") for run in (tmp_path / "run", case.run))
    assert len(found) == len(expected) == 2
    for row, other in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-4), key
    assert expected[0]["grad_norm"] > 0.01
    assert expected[0]["loss"] < 10  # of a model that guesses among some 350 tokens: one token's, not a sum


@each_family()
def test_the_adapter_stays_in_the_language_model_unless_it_is_asked_elsewhere(case: Case) -> None:
    adapted = {
        name.split(".mixlora_")[0] for name, _ in case.session.model.named_parameters() if "mixlora_" in name
    }
    model = case.session.base.model
    decoder = next(name for name, module in model.named_modules() if module is model.get_decoder())
    assert len(adapted) >= 8
    assert all(f".{decoder}." in f"{name}." for name in adapted)
    beside = [name for name in outside_of_decoder(model) if "lm_head" not in name]
    assert bool(beside) == bool(FAMILIES[case.family].pictures)
    if not beside:
        return
    base = build_base(case.model).model
    trained = attach_adapter(base, AdapterConfig("mixlora"), RoutingConfig("instance"), 2, 6, [beside[-1]])
    learned = {name for name, p in trained.named_parameters() if p.requires_grad and "mixlora_" not in name}
    assert learned and all(beside[-1] in name for name in learned)


@each_family(WITH_PICTURES)
def test_the_blank_picture_of_a_batch_of_texts_changes_nothing(case: Case) -> None:
    """Where processes share a tower or a projector, every batch runs it."""
    chat = case.base.chat
    load = PixelLoader(chat)
    plain = Collator(chat, load, with_labels=False)([case.items[0]])
    joined = Collator(chat, load, with_labels=False, dummy_image=build_dummy_image(chat, load))(
        [case.items[0]]
    )
    length = plain["input_ids"].shape[1]
    assert joined["input_ids"].shape[1] > length
    assert "pixel_values" in joined
    with torch.no_grad():
        expected, found = (case.session.model(**batch).logits[:, :length] for batch in (plain, joined))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WRONG)
def test_models_that_write_no_answers_are_refused_by_what_they_hold(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_wrong(name, tmp_path / "model")
    data = _data(tmp_path, pictures=False, turns=1)
    capsys.readouterr()
    assert (
        _run("train", "model=hf", f"model.name_or_path={folder}", *data, f"output_dir={tmp_path / 'run'}")
        == 2
    )
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    assert f"model.name_or_path={folder}" in said
    assert "vision-language" in said
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("llava", "no control token"),
        ("llava_onevision", "otherwise than"),
        ("qwen3", "enable_thinking: false"),
    ],
)
def test_templates_that_cannot_be_trained_with_are_refused_with_a_way_out(
    name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_family(name, tmp_path / "model")
    data = _data(tmp_path, pictures=bool(FAMILIES[name].pictures), turns=1)
    capsys.readouterr()
    assert (
        _run("train", "model=hf", f"model.name_or_path={folder}", *data, f"output_dir={tmp_path / 'run'}")
        == 2
    )
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    assert says in said
    assert "model.chat_template=" in said


@pytest.mark.parametrize("name", [name for name in NEEDS if name not in READY])
def test_a_family_that_needs_a_package_says_which(name: str, tmp_path: Path) -> None:
    folder = make_family(name, tmp_path / "model")
    with pytest.raises(UserError, match=f"(?i){NEEDS[name]}.*; install it with pip$"):
        build_base(ModelConfig("hf", "hub", str(folder)))


def test_each_family_is_in_the_page_of_models(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    for name in FAMILIES:
        (held,) = json.loads((make_family(name, tmp_path / name) / "config.json").read_text())[
            "architectures"
        ]
        assert f"| `{held}` |" in page, name
    for keys in KEYS.values():
        assert all(key in page for key in keys)
    assert all(package in page for package in NEEDS.values())


@pytest.mark.parametrize("name", ONE_ANSWER)
def test_a_template_that_changes_earlier_answers_is_refused_and_chatml_is_not(
    name: str, tmp_path: Path
) -> None:
    folder = make_family(name, tmp_path / "model")
    said = [("human", "What is it?"), ("gpt", "a circle"), ("human", "Is it red?"), ("gpt", "no")]
    turns = tuple(Turn(role, text) for role, text in said)  # type: ignore[arg-type]
    record = Record(0, "0", "naming", (), turns)
    own = ModelConfig("hf", "hub", str(folder), template_options={"enable_thinking": False})
    with pytest.raises(UserError, match=r"otherwise than .*model\.chat_template=v1, smollm"):
        encode(record, build_chat(own))
    chat = build_chat(ModelConfig("hf", "hub", str(folder), chat_template="smollm"))
    item = encode(record, chat)
    verify_labels(item, record, chat)
    learnt = [token for token, label in zip(item.input_ids, item.labels, strict=True) if label != IGNORE]
    assert chat.tokenizer.decode(learnt) == "a circle<|im_end|>no<|im_end|>"
