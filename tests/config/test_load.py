"""Values that need the file system: paths must exist, before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mixlora_cli.config import TrainConfig, load
from mixlora_cli.errors import UserError


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


def refusal(**groups: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(TrainConfig, values(**groups))
    return str(caught.value)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.json").write_text("[]")
    (tmp_path / "images").mkdir()
    return tmp_path


def test_dictconfig_and_plain_values_give_the_same() -> None:
    plain = load(TrainConfig, values())
    assert load(TrainConfig, OmegaConf.create(values())) == plain
    assert (plain.rank, plain.factors, plain.train.batch_size) == (2, 4, 16)


def test_interpolations_are_resolved_or_named() -> None:
    assert load(TrainConfig, values(output_dir="runs/${model.name}-${rank}")).output_dir == "runs/tiny-2"
    assert refusal(rank="???") == "rank is missing: give rank=<an integer>"
    assert refusal(output_dir="${nope}") == "output_dir: Interpolation key 'nope' not found"


def test_existing_files_and_folders_pass(here: Path) -> None:
    data = {"name": "json", "source": "json", "train": "my.json", "images": str(here / "images")}
    assert load(TrainConfig, values(data=data)).data.images == str(here / "images")


def test_home_is_expanded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    data = {"name": "json", "source": "json", "train": "~/my.json", "images": "~/images"}
    config = load(TrainConfig, values(data=data, output_dir="~/out"))
    assert (config.data.train, config.data.images, config.output_dir) == tuple(
        str(here / name) for name in ("my.json", "images", "out")
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train", "nope.json", "data.train=nope.json: must be an existing file; looked in {here}"),
        ("train", "/nope.json", "data.train=/nope.json: must be an existing file"),
        ("train", "images", "data.train=images: must be an existing file; this is a folder"),
        ("heldout", "nope.json", "data.heldout=nope.json: must be an existing file; looked in {here}"),
        ("unseen", "nope.json", "data.unseen=nope.json: must be an existing file; looked in {here}"),
        ("metadata", "nope.json", "data.metadata=nope.json: must be an existing file; looked in {here}"),
        ("images", "nope", "data.images=nope: must be an existing folder; looked in {here}"),
        ("images", "my.json", "data.images=my.json: must be an existing folder; this is a file"),
    ],
)
def test_data_paths(key: str, value: str, message: str, here: Path) -> None:
    data = {"name": "json", "source": "json", "train": "my.json", key: value}
    assert refusal(data=data) == message.format(here=here)


def test_output_dir_and_resume(here: Path) -> None:
    assert refusal(output_dir="my.json") == (
        "output_dir=my.json: must be a folder, or a name that is free; this is a file"
    )
    assert refusal(resume="nope") == f"resume=nope: must be an existing folder; looked in {here}"
    assert load(TrainConfig, values(resume="auto")).resume == "auto"


@pytest.mark.parametrize("name", ["./nope", "/nope/model", "models/llava/7b", "images"])
def test_checkpoint_that_looks_like_a_path(name: str) -> None:
    model = {"name": "hf", "source": "hub", "name_or_path": name}
    assert refusal(model=model) == (
        f"model.name_or_path={name}: must be a Hugging Face id or an existing folder with a config.json"
    )


@pytest.mark.parametrize("name", ["llava-hf/llava-1.5-7b-hf", "gpt2"])
def test_hub_ids_are_not_looked_for_on_disk(name: str) -> None:
    model = {"name": "hf", "source": "hub", "name_or_path": name}
    assert load(TrainConfig, values(model=model)).model.name_or_path == name


def test_local_checkpoint(here: Path) -> None:
    (here / "images" / "config.json").write_text("{}")
    model = {"name": "hf", "source": "hub", "name_or_path": "images"}
    assert load(TrainConfig, values(model=model)).model.name_or_path == "images"


def test_encoder_of_task_definitions_is_an_id_or_a_checkpoint() -> None:
    assert refusal(routing={"name": "task", "encoder": "./nope"}) == (
        "routing.encoder=./nope: must be a Hugging Face id or an existing folder with a config.json"
    )
    assert refusal(routing={"name": "instance", "encoder": "gpt2"}) == (
        "routing.encoder=gpt2: routing=instance reads no task definitions; only null"
    )
    assert load(TrainConfig, values(routing={"name": "task", "encoder": "gpt2"})).routing.encoder == "gpt2"


def test_template_is_one_of_ours() -> None:
    model = {"name": "tiny", "source": "tiny", "template": "smolm"}
    assert refusal(model=model) == "model.template=smolm: must be one of v1, smollm; did you mean smollm?"


@pytest.mark.parametrize(
    ("group", "key", "value", "message"),
    [
        ("adapter", "dropout", 1.0, "adapter.dropout=1.0: must be in [0, 1)"),
        ("adapter", "alpha", 0, "adapter.alpha=0: must be > 0 or null"),
        ("adapter", "target_modules", "(", "adapter.target_modules=(: must be a regular expression"),
        ("train", "steps", 0, "train.steps=0: must be > 0 or null"),
        ("train", "warmup_ratio", 1.0, "train.warmup_ratio=1.0: must be in [0, 1)"),
        ("train", "weight_decay", -0.1, "train.weight_decay=-0.1: must be >= 0"),
        ("train", "workers", -1, "train.workers=-1: must be >= 0"),
        ("data", "max_length", 8, "data.max_length=8: must be >= 16"),
    ],
)
def test_values_out_of_range(group: str, key: str, value: Any, message: str) -> None:
    assert refusal(**{group: {**values()[group], key: value}}) == message


def test_seed_is_one_that_every_generator_takes() -> None:
    assert refusal(seed=-1) == "seed=-1: must be in [0, 2^32)"
    assert load(TrainConfig, values(seed=2**32 - 1)).seed == 2**32 - 1


def test_rank_may_exceed_factors_only_without_a_pool() -> None:
    assert load(TrainConfig, values(rank=8)).rank == 8
    assert refusal(rank=8, adapter={"name": "mixlora"}) == (
        "rank=8: must be <= factors=4, because rank factors are selected out of the pool"
    )


@pytest.mark.parametrize(
    ("source", "key", "value", "fixed"),
    [
        ("mini", "template", "v1", "smollm"),
        ("mini", "attn_implementation", "sdpa", "eager"),
        ("tiny", "attn_implementation", "sdpa", "eager"),
    ],
)
def test_what_a_built_in_model_does_not_heed_is_refused(
    source: str, key: str, value: str, fixed: str
) -> None:
    model = {"name": source, "source": source, "template": "smollm"}
    told = f"model.{key}={value}: model={source} has the {key} {fixed}; leave it away, or take another model"
    assert refusal(model=model | {key: value}) == told
    assert getattr(load(TrainConfig, values(model=model | {key: fixed})).model, key) == fixed
