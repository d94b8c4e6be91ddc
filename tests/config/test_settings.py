"""Types are taken strictly and paths must exist; messages name the key, the value and what is allowed."""

from dataclasses import FrozenInstanceError, asdict, field, replace
from pathlib import Path
from types import new_class
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from mixlora_cli.config import ModelConfig, Settings, Text, TrainConfig, load, parse
from mixlora_cli.config.settings import (
    Flag,
    Integer,
    NotNegative,
    Number,
    PositiveNumber,
    all_keys,
    unknown_key,
)
from mixlora_cli.errors import UserError

SHAPES = Literal["round", "square"]


class Inner(Settings, at="inner"):
    size: NotNegative
    kind: SHAPES = "round"

    def __post_init__(self) -> None:
        self.require(self.size != 7, "size", "seven is taken")


class Outer(Settings):
    inner: Inner
    ratio: Number = 0.5
    name: Text | None = None
    words: list[Text] | None = None
    extra: dict[Text, object] = field(default_factory=dict)
    loud: Flag = False


class Maybe(Settings):
    inner: Inner | None = None


def one_key(hint: Any) -> Any:
    """A class of settings with one key of that type."""
    return new_class("One", (Settings,), {}, lambda body: body.update(__annotations__={"key": hint}))


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, Integer, 3),
        (3, Number, 3.0),
        (1e-3, Number, 1e-3),
        ("a", Text, "a"),
        (2024, Text, "2024"),
        (True, Flag, True),
        (None, Integer | None, None),
        (7, Integer | None, 7),
        ("square", SHAPES, "square"),
        (["a", 1], list[Text], ["a", "1"]),
        ({"a": {"b": 1}}, dict[Text, object], {"a": {"b": 1}}),
    ],
)
def test_accepted(value: Any, hint: Any, expected: Any) -> None:
    result = parse(one_key(hint), {"key": value}).key
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("four", Integer, "key=four: must be an integer"),
        (1.5, Integer, "key=1.5: must be an integer"),
        (True, Integer, "key=true: must be an integer"),
        (True, Number, "key=true: must be a number"),
        (float("nan"), Number, "key=nan: must be a number"),
        (float("inf"), Number, "key=inf: must be a number"),
        ("1e-3", Number, "key=1e-3: must be a number"),
        (1, Flag, "key=1: must be true or false"),
        (None, Integer, "key=null: must be an integer"),
        ("", Integer | None, "key='': must be an integer or null"),
        ([1], Integer, "key=[1]: must be an integer"),
        ({"a": 1}, Text, "key={a:1}: must be a text"),
        (1e5, Text | None, "key=100000.0: must be a text or null; quote it to make it one, e.g. 'key=\"1e5\"'"),
        ("sqare", SHAPES, "key=sqare: must be one of round, square; did you mean square?"),
        ("a", list[Text] | None, "key=a: must be a list like [a,b] or null"),
        ([["a"]], list[Text], "key[0]=[a]: must be a text"),
        (3, Inner, "key=3: must be a group of keys: size, kind"),
        (0, PositiveNumber | None, "key=0: must be > 0 or null"),
    ],
)  # fmt: skip
def test_refused(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(one_key(hint), {"key": value})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("config_class", "values", "message"),
    [
        (Outer, {}, "inner is missing: does your configuration start with `defaults: [train, _self_]` "
                    "(or eval, align), and does each group option have its `name`?"),
        (Outer, {"inner": {"size": 1, "knd": "round"}},
         "inner.knd=round: unknown key; allowed here: inner.size, inner.kind; did you mean inner.kind?"),
        (Outer, {"inner": {"size": -1}}, "inner.size=-1: must be >= 0"),
        (Outer, {"inner": {"size": 7}}, "inner.size=7: seven is taken"),
        (Outer, {"inner": {"size": 1}, "size": 2},
         "size=2: unknown key; allowed here: inner, ratio, name, words, extra, loud; did you mean inner.size?"),
        (Outer, {"inner": {"size": 1}, 2: 3}, "2=3: unknown key; allowed here: inner, ratio, name, words, extra, loud"),
        (Maybe, {"inner": {"size": 3, "colour": "red"}},
         "inner.colour=red: unknown key; allowed here: inner.size, inner.kind"),
    ],
)  # fmt: skip
def test_mistakes_are_named_by_their_dotted_key(
    config_class: type, values: dict[Any, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        parse(config_class, values)
    assert str(caught.value) == message


def test_groups_are_nested_frozen_dataclasses() -> None:
    outer = parse(Outer, {"inner": {"size": 3}, "ratio": 1, "words": ["x"]})
    assert outer == Outer(Inner(3), 1.0, None, ["x"])
    assert replace(outer, inner=Inner(4)).inner.size == 4
    assert asdict(outer)["inner"] == {"size": 3, "kind": "round"}
    assert (parse(Maybe, {"inner": None}), parse(Maybe, {"inner": {"size": 3}})) == (
        Maybe(None),
        Maybe(Inner(3)),
    )
    with pytest.raises(FrozenInstanceError):
        outer.ratio = 2.0  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"^inner\.size=-1: must be >= 0$"):
        Inner(-1)
    with pytest.raises(ValueError, match=r"^model\.source=moon: must be one of mini"):
        ModelConfig("a", "moon")  # type: ignore[arg-type]


def test_keys_are_listed_with_their_groups() -> None:
    assert all_keys(Outer) == ["inner", "inner.size", "inner.kind", "ratio", "name", "words", "extra", "loud"]
    assert all_keys(Maybe) == ["inner", "inner.size", "inner.kind"]
    assert unknown_key("zzz", "1", ["rank", "seed"]) == "zzz=1: unknown key; allowed here: rank, seed"


def values(**groups: Any) -> dict[str, Any]:
    """A complete training configuration as plain values."""
    return {
        "model": {"name": "tiny", "source": "tiny"},
        "adapter": {"name": "lora"},
        "routing": {"name": "instance"},
        "data": {"name": "mini", "source": "mini"},
        "train": {},
        "rank": 2,
        "factors": 4,
        "output_dir": "runs/x",
        **groups,
    }


def with_key(key: str, value: Any) -> dict[str, Any]:
    """The complete configuration with one dotted key changed."""
    changed = (
        values(data={"name": "json", "source": "json", "train": "my.json"}) if key[:4] == "data" else values()
    )
    group, _, name = key.rpartition(".")
    (changed[group] if group else changed)[name] = value
    if key == "model.name_or_path":
        changed["model"]["source"] = "hub"
    if key == "routing.encoder":
        changed["routing"]["name"] = "task"
    return changed


def refusal(given: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        load(TrainConfig, given)
    return str(caught.value)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.json").write_text("[]")
    (tmp_path / "images").mkdir()
    return tmp_path


def test_dictconfig_and_plain_values_give_the_same() -> None:
    plain = load(TrainConfig, values(output_dir="runs/${model.name}-${rank}"))
    assert load(TrainConfig, OmegaConf.create(values(output_dir="runs/tiny-2"))) == plain
    assert (plain.rank, plain.factors, plain.train.batch_size) == (2, 4, 16)


CHECKPOINT = "must be a Hugging Face id or an existing folder with a config.json"
REFUSED = [
    ("output_dir", "${nope}", "output_dir: Interpolation key 'nope' not found"),
    ("rank", "???", "rank is missing: give rank=<an integer>"),
    ("data.train", "nope.json", "data.train=nope.json: must be an existing file; looked in {here}"),
    ("data.train", "/nope.json", "data.train=/nope.json: must be an existing file"),
    ("data.train", "images", "data.train=images: must be an existing file; this is a folder"),
    ("data.train", {"ocr": "my.json", "vqa": "nope.json"},
     "data.train={{ocr:my.json,vqa:nope.json}}: vqa: must be an existing file; looked in {here}"),
    ("data.train", {"ocr": {"file": "images", "weight": 2}},
     "data.train={{ocr:{{file:images,weight:2}}}}: ocr: must be an existing file; this is a folder"),
    *(("data.train", {"ocr": entry}, f"data.train={{{{ocr:{shown}}}}}: ocr: must be a file or "
       "{{file: a.json, weight: 2.0}}, the weight in (0, 1000)")
      for entry, shown in (({"file": "my.json", "weight": 0}, "{{file:my.json,weight:0}}"),
                           ({"file": "my.json", "weight": "x"}, "{{file:my.json,weight:x}}"),
                           ({"path": "my.json"}, "{{path:my.json}}"))),
    ("data.train", {}, "data.train={{}}: must name at least one file"),
    ("data.train", ["my.json"], "data.train=[my.json]: must be a file, or a mapping like {{task: file}} or "
     "{{task: {{file: a.json, weight: 2.0}}}}"),
    ("data.heldout", {"ocr": {"file": "my.json", "weight": 2.0}},
     "data.heldout={{ocr:{{file:my.json,weight:2.0}}}}: weights are for data.train alone; only {{task: file}}"),
    ("data.heldout", "nope.json", "data.heldout=nope.json: must be an existing file; looked in {here}"),
    ("data.unseen", "nope.json", "data.unseen=nope.json: must be an existing file; looked in {here}"),
    ("data.metadata", "nope.json", "data.metadata=nope.json: must be an existing file; looked in {here}"),
    ("data.images", "nope", "data.images=nope: must be an existing folder; looked in {here}"),
    ("data.images", "my.json", "data.images=my.json: must be an existing folder; this is a file"),
    ("output_dir", "my.json", "output_dir=my.json: must be a folder, or a name that is free; this is a file"),
    ("output_dir", "/dev/null", "output_dir=/dev/null: must be a folder, or a name that is free; this is a file"),
    ("resume", "nope", "resume=nope: must be an existing folder; looked in {here}"),
    *(("model.name_or_path", name, f"model.name_or_path={name}: {CHECKPOINT}")
      for name in ("./nope", "/nope/model", "models/llava/7b", "images")),
    ("routing.encoder", "./nope", f"routing.encoder=./nope: {CHECKPOINT}"),
    ("model.chat_template", "smolm",
     "model.chat_template=smolm: must be one of v1, smollm, onevision, or a Jinja file or null"),
    ("adapter.dropout", 1.0, "adapter.dropout=1.0: must be in [0, 1)"),
    ("adapter.alpha", 0, "adapter.alpha=0: must be > 0 or null"),
    ("adapter.target_modules", "(", "adapter.target_modules=(: must be a regular expression or null"),
    ("train.steps", 0, "train.steps=0: must be > 0 or null"),
    ("train.warmup_ratio", 1.0, "train.warmup_ratio=1.0: must be in [0, 1)"),
    ("train.weight_decay", -0.1, "train.weight_decay=-0.1: must be >= 0"),
    ("train.workers", -1, "train.workers=-1: must be >= 0"),
    ("data.max_length", 8, "data.max_length=8: must be >= 16"),
    ("data.tasks", [], "data.tasks=[]: must name at least one task, or be null for all"),
    ("routing", {"name": "instance", "encoder": "gpt2"},
     "routing.encoder=gpt2: routing=instance reads no task definitions; only null"),
    ("seed", -1, "seed=-1: must be in [0, 2^32)"),
    ("adapter.name", "mixlora", "rank=8: must be <= factors=4, because rank factors are selected out of the pool"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "message"), REFUSED)
def test_a_configuration_is_refused_in_one_line(key: str, value: Any, message: str, here: Path) -> None:
    given = with_key(key, value)
    if key == "adapter.name":
        given["rank"] = 8
    assert refusal(given) == message.format(here=here)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.images", "images"),
        ("resume", "auto"),
        ("model.name_or_path", "llava-hf/llava-1.5-7b-hf"),  # hub ids are not looked for on the disk
        ("model.name_or_path", "gpt2"),
        ("model.name_or_path", "local"),
        ("routing.encoder", "gpt2"),
        ("seed", 2**32 - 1),
        ("rank", 8),  # LoRA has no pool
    ],
)
def test_a_configuration_is_accepted(key: str, value: Any, here: Path) -> None:
    (here / "local").mkdir()
    (here / "local" / "config.json").write_text("{}")
    config: Any = load(TrainConfig, with_key(key, value))
    for part in key.split("."):
        config = getattr(config, part)
    assert config == value


def test_home_is_expanded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    data = {"name": "json", "source": "json", "train": "~/my.json", "images": "~/images"}
    config = load(TrainConfig, values(data=data, output_dir="~/out"))
    assert (config.data.train, config.data.images, config.output_dir) == tuple(
        str(here / name) for name in ("my.json", "images", "out")
    )


@pytest.mark.parametrize(
    ("source", "key", "value", "fixed"),
    [
        ("mini", "chat_template", "v1", "smollm"),
        ("mini", "attn_implementation", "sdpa", "eager"),
        ("tiny", "attn_implementation", "sdpa", "eager"),
    ],
)
def test_what_a_built_in_model_does_not_heed_is_refused(
    source: str, key: str, value: str, fixed: str
) -> None:
    model = {"name": source, "source": source, "chat_template": "smollm"}
    told = f"model.{key}={value}: model={source} has the {key} {fixed}; leave it away, or take another model"
    assert refusal(values(model=model | {key: value})) == told
    assert getattr(load(TrainConfig, values(model=model | {key: fixed})).model, key) == fixed
