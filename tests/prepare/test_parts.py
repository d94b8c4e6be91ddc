"""Parts that are missing, damaged, hostile or of another model are refused with the reason; hub files are chosen."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import DryRunFileInfo
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from mixlora_cli.config import ModelConfig, PrepareConfig, PrepareOptions
from mixlora_cli.errors import UserError
from mixlora_cli.prepare import disk
from mixlora_cli.prepare import parts as parts_module
from mixlora_cli.prepare.parts import find_part
from mixlora_cli.prepare.run import prepare

from .standins import VISION_WIDTH, WIDTH, Parts, make_parts

SHARD = "pytorch_model-00002-of-00002.bin"
INDEX = "pytorch_model.bin.index.json"
Damage = Callable[[Path], object]


class Evil:
    """Unpickled by a careless reader, it would make a folder."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("/tmp/mixlora-was-here",)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def copy(whole: Parts, tmp_path: Path) -> dict[str, str]:
    """The options of a copy that a test may damage."""
    shutil.copytree(whole.language_model.parent, tmp_path / "parts")
    return {key: str(tmp_path / "parts" / Path(path).name) for key, path in whole.options.items()}


def refused(options: dict[str, str], tmp_path: Path) -> str:
    output = tmp_path / "models" / "out"
    model = ModelConfig("llava_v1_7b", "prepared")
    with pytest.raises(UserError) as error:
        prepare(PrepareConfig(model=model, prepare=PrepareOptions(output=str(output), **options)))
    assert [path.name for path in output.parent.iterdir() if not path.name.endswith(".lock")] == []
    assert "\n" not in str(error.value)
    return str(error.value)


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_bin(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = torch.load(file, weights_only=True)
    change(weights)
    torch.save(weights, file)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def name_a_file_elsewhere(folder: Path) -> None:
    edit_json(folder / INDEX, weight_map={"lm_head.weight": "../../secret.bin"})


def spoil(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"][3, 4] = torch.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "prepare.language_model=.*no such file or folder"),
        (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (
            lambda folder: edit_json(folder / "config.json", model_type="gpt2"),
            "is a gpt2 model; expected .*llama",
        ),
        (lambda folder: edit_json(folder / "config.json", tie_word_embeddings=True), "tied to its embedding"),
        (
            lambda folder: edit_json(folder / "config.json", num_hidden_layers=3),
            "weight files lack .*layers.2",
        ),
        (lambda folder: edit_json(folder / "config.json", num_hidden_layers=1), "does not call for"),
        (
            lambda folder: edit_json(folder / "config.json", intermediate_size=65),
            r"has shape .*calls for \(.*65",
        ),
        (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing, one of 2 files"),
        (lambda folder: cut(folder / SHARD), f"{SHARD} cannot be read .*fetch it again"),
        (lambda folder: (folder / SHARD).write_bytes(b""), f"{SHARD} cannot be read"),
        (lambda folder: torch.save({"lm_head.weight": Evil()}, folder / SHARD), f"{SHARD} cannot be read"),
        (lambda folder: torch.save([1, 2], folder / SHARD), "does not hold tensors by name"),
        (lambda folder: edit_bin(folder / SHARD, spoil), "lm_head.weight holds values that are not finite"),
        (name_a_file_elsewhere, r"names '../../secret.bin', which is not a file beside it"),
        (lambda folder: (folder / INDEX).write_text("[]"), "index.json cannot be read"),
        (lambda folder: [file.unlink() for file in folder.glob("pytorch*")], "has no weights"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "has no tokenizer: expected tokenizer.model"),
        (
            lambda folder: (folder / "tokenizer.model").write_bytes(b"junk" * 9),
            "its tokenizer cannot be read",
        ),
    ],
)
def test_language_model(damage: Damage, message: str, copy: dict[str, str], tmp_path: Path) -> None:
    damage(Path(copy["language_model"]))
    told = refused(copy, tmp_path)
    assert told.startswith(f"prepare.language_model={copy['language_model']}: ")
    assert re.search(message, told), told
    assert not Path("/tmp/mixlora-was-here").exists()


def without_a_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: w for name, w in weights.items() if "vision_model.encoder.layers.1" not in name},
        folder / "model.safetensors",
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: edit_json(folder / "config.json", model_type="llama"),
            "is a llama model; expected CLIP",
        ),
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors cannot be read"),
        (without_a_layer, "weight files lack .*encoder.layers.1"),
        (
            lambda folder: (folder / "preprocessor_config.json").unlink(),
            "preprocessor_config.json is missing",
        ),
    ],
)
def test_vision_tower(damage: Damage, message: str, copy: dict[str, str], tmp_path: Path) -> None:
    damage(Path(copy["vision_tower"]))
    told = refused(copy, tmp_path)
    assert told.startswith("prepare.vision_tower=") and re.search(message, told), told


GOOD = {"mm_projector.weight": torch.ones(WIDTH, VISION_WIDTH), "mm_projector.bias": torch.ones(WIDTH)}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {f"model.mm_projector.{i}.weight": torch.ones(2, 2) for i in (0, 2)},
            "several layers, as LLaVA-1.5's",
        ),
        (GOOD | {"model.embed_tokens.weight": torch.ones(3, WIDTH)}, "mm_use_im_start_end"),
        (
            {"mm_projector.weight": GOOD["mm_projector.weight"]},
            "expected mm_projector.weight and mm_projector.bias",
        ),
        (
            GOOD | {"mm_projector.bias": torch.ones(40)},
            r"bias \(40,\), .* 24 features go to .* 32: .*other models",
        ),
        (GOOD | {"mm_projector.bias": torch.full((WIDTH,), torch.inf)}, "^prepare.projector=.* not finite"),
        ({}, "found nothing"),
    ],
)
def test_projector(
    weights: dict[str, torch.Tensor], message: str, copy: dict[str, str], tmp_path: Path
) -> None:
    torch.save(weights, Path(copy["projector"]) / "mm_projector.bin")
    told = refused(copy, tmp_path)
    assert re.search(message, told), told


def test_projector_without_the_model_prefix_and_as_a_file(copy: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "other-name.bin"
    torch.save(
        {name: tensor.half() for name, tensor in GOOD.items()}, file, _use_new_zipfile_serialization=False
    )
    options = PrepareOptions(output=str(tmp_path / "out"), **(copy | {"projector": str(file)}))
    (folder,) = prepare(PrepareConfig(model=ModelConfig("llava_v1_7b", "prepared"), prepare=options))
    stored = load_file(folder / "model.safetensors")["model.multi_modal_projector.linear_1.weight"]
    assert torch.equal(stored, GOOD["mm_projector.weight"].half())


def test_a_folder_with_something_else_is_left_alone(copy: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    options = PrepareOptions(output=str(tmp_path / "out"), **copy)
    with pytest.raises(UserError, match="holds something else than a prepared model"):
        prepare(PrepareConfig(model=ModelConfig("llava_v1_7b", "prepared"), prepare=options))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_small_disk_is_noticed_before_writing(
    copy: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)
    assert "writing the assembled model needs 0.0 GB in" in refused(copy, tmp_path)


def listed(*names: str) -> list[DryRunFileInfo]:
    return [DryRunFileInfo("c0ffee", 10**9, name, "", False, True) for name in names]


@pytest.mark.parametrize(
    ("there", "fetched"),
    [
        (("config.json", "a.bin", "a.bin.index.json"), ["config.json", "a.bin", "a.bin.index.json"]),
        (("config.json", "a.bin", "a.bin.index.json", "m.safetensors"), ["config.json", "m.safetensors"]),
        (("config.json", "onnx/config.json"), ["config.json"]),
    ],
)
def test_only_the_files_needed_are_downloaded(
    there: tuple[str, ...], fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, object]] = []

    def snapshot(repository: str, **options: object) -> object:
        calls.append(options)
        return listed(*there) if options.get("dry_run") else str(tmp_path)

    monkeypatch.setattr(parts_module, "snapshot_download", snapshot)
    part = find_part("prepare.projector", "owner/name", ("config.json", "*.bin"))
    assert part.path == tmp_path
    assert calls[0]["allow_patterns"] == ["config.json", "*.bin"]
    assert (calls[1]["allow_patterns"], calls[1]["revision"]) == (fetched, "c0ffee")


def test_a_download_that_does_not_fit_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def snapshot(repository: str, **options: object) -> object:
        calls.append(options.get("dry_run"))
        return listed(*(f"{number}.bin" for number in range(10**6)))

    monkeypatch.setattr(parts_module, "snapshot_download", snapshot)
    with pytest.raises(UserError, match=r"downloading owner/name needs 1000000\.0 GB"):
        find_part("prepare.projector", "owner/name", ("*.bin",))
    assert calls == [True]


def test_without_network_what_was_downloaded_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(repository: str, **options: object) -> object:
        if options.get("local_files_only") and repository == "owner/known":
            return str(tmp_path)
        raise LocalEntryNotFoundError("no route to the hub.\nmore")

    monkeypatch.setattr(parts_module, "snapshot_download", snapshot)
    assert find_part("prepare.projector", "owner/known", ("*.bin",)).path == tmp_path
    with pytest.raises(
        UserError, match=r"owner/other: cannot be downloaded: no route to the hub; .* local copy"
    ):
        find_part("prepare.projector", "owner/other", ("*.bin",))


@pytest.mark.parametrize("source", ["./missing", "/missing/file.bin", "name-without-owner", "a/b/c"])
def test_what_is_no_hub_id_must_exist(source: str) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        find_part("prepare.projector", source, ("*.bin",))


@pytest.mark.parametrize("name", ["mini", "tiny"])
def test_models_that_need_no_preparation(name: str) -> None:
    with pytest.raises(UserError, match=f"model={name} needs no preparation"):
        prepare(PrepareConfig(model=ModelConfig(name, name)))  # type: ignore[arg-type]
