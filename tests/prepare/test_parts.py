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
from mixlora_cli.prepare import parts as parts_module
from mixlora_cli.prepare.parts import find_part
from mixlora_cli.prepare.run import prepare

from .standins import VISION_WIDTH, WIDTH, Parts

SHARD = "pytorch_model-00002-of-00002.bin"
MODEL = ModelConfig("llava_v1_7b", "prepared")
Damage = Callable[[Path], object]


class Evil:
    """Unpickled by a careless reader, it would make a folder."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("/tmp/mixlora-was-here",)


@pytest.fixture
def copy(parts: Parts, tmp_path: Path) -> dict[str, str]:
    """The options of a copy that a test may damage."""
    shutil.copytree(parts.language_model.parent, tmp_path / "parts")
    return {key: str(tmp_path / "parts" / Path(path).name) for key, path in parts.options.items()}


def config(**changes: object) -> Damage:
    file = "config.json"
    return lambda folder: (folder / file).write_text(
        json.dumps(json.loads((folder / file).read_text()) | changes)
    )


def cut(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:2000])


def remove(pattern: str) -> Damage:
    return lambda folder: [file.unlink() for file in list(folder.glob(pattern))]


def spoil(folder: Path) -> None:
    weights = torch.load(folder / SHARD, weights_only=True)
    weights["lm_head.weight"][3, 4] = torch.nan
    torch.save(weights, folder / SHARD)


def without_a_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: w for name, w in weights.items() if "vision_model.encoder.layers.1" not in name}
    save_file(kept, folder / "model.safetensors")


def projector(changes: dict[str, torch.Tensor | None]) -> Damage:
    weights = {name: tensor for name, tensor in (GOOD | changes).items() if tensor is not None}
    return lambda folder: torch.save(weights, folder / "mm_projector.bin")


NAMES = ("mm_projector.weight", "mm_projector.bias")
GOOD = {NAMES[0]: torch.ones(WIDTH, VISION_WIDTH), NAMES[1]: torch.ones(WIDTH)}
NONE = dict.fromkeys(NAMES)
REFUSED: dict[str, list[tuple[Damage, str]]] = {
    "language_model": [
        (shutil.rmtree, "^prepare.language_model=.*no such file or folder; give one with config.json, "),
        (remove("config.json"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (config(model_type="gpt2"), "is a gpt2 model; expected .*llama"),
        (config(tie_word_embeddings=True), "tied to its embedding"),
        (config(num_hidden_layers=3), "weight files lack .*layers.2"),
        (config(num_hidden_layers=1), "does not call for"),
        (config(intermediate_size=65), r"has shape .*calls for \(.*65"),
        (remove(SHARD), f"index.json: names {SHARD}, which does not lie beside it"),
        (cut(SHARD), f"{SHARD}: broken or cut short .*; copy or download it again"),
        (lambda folder: torch.save({"lm_head.weight": Evil()}, folder / SHARD), f"{SHARD}: refused, to read it .*run"),
        (lambda folder: torch.save([1, 2], folder / SHARD), "holds a list, expected tensors by name"),
        (lambda folder: (folder / "pytorch_model.bin.index.json").write_text("[]"), "index.json: holds a list, "),
        (spoil, "lm_head.weight holds values that are not finite"),
        (remove("pytorch*"), "has no weights: expected one of model.safetensors, "),
        (remove("tokenizer.model"), "has no tokenizer: expected tokenizer.model"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"junk" * 9), "its tokenizer cannot be read"),
    ],
    "vision_tower": [
        (config(model_type="llama"), "is a llama model; expected CLIP"),
        (cut("model.safetensors"), "model.safetensors: broken or cut short"),
        (without_a_layer, "weight files lack .*encoder.layers.1"),
        (remove("preprocessor_config.json"), "preprocessor_config.json is missing"),
    ],
    "projector": [
        (projector(NONE | {f"model.mm_projector.{i}.weight": torch.ones(2, 2) for i in (0, 2)}), "several layers, as"),
        (projector({"model.embed_tokens.weight": torch.ones(3, WIDTH)}), "mm_use_im_start_end"),
        (projector({NAMES[1]: None}), "expected mm_projector.weight and mm_projector.bias"),
        (projector({NAMES[1]: torch.ones(40)}), r"bias \(40,\), .* 24 features go to .* 32: .*other models"),
        (projector({NAMES[1]: torch.full((WIDTH,), torch.inf)}), "linear_1.bias holds values that are not finite"),
        (projector(NONE), "found nothing"),
        (remove("*.bin"), "mm_projector.bin is not in this folder"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("part", "number"), [(part, n) for part in REFUSED for n in range(len(REFUSED[part]))]
)
def test_what_is_refused(part: str, number: int, copy: dict[str, str], tmp_path: Path) -> None:
    damage, message = REFUSED[part][number]
    damage(Path(copy[part]))
    output = tmp_path / "models" / "out"
    with pytest.raises(UserError, match=message) as error:
        prepare(PrepareConfig(model=MODEL, prepare=PrepareOptions(output=str(output), **copy)))
    told = str(error.value)
    assert told.startswith(f"prepare.{part}={copy[part]}: ") and "\n" not in told
    assert [path.name for path in output.parent.iterdir() if not path.name.endswith(".lock")] == []
    assert not Path("/tmp/mixlora-was-here").exists()


def test_projector_without_the_model_prefix_and_as_a_file(copy: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "other-name.bin"
    weights = {name: tensor.half() for name, tensor in GOOD.items()}
    torch.save(weights, file, _use_new_zipfile_serialization=False)
    options = PrepareOptions(output=str(tmp_path / "out"), **(copy | {"projector": str(file)}))
    (folder,) = prepare(PrepareConfig(model=MODEL, prepare=options))
    stored = load_file(folder / "model.safetensors")["model.multi_modal_projector.linear_1.weight"]
    assert torch.equal(stored, weights["mm_projector.weight"])


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
        return [DryRunFileInfo("c0ffee", 10**15, "a.bin", "", False, True)]

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
    reason = r"owner/other: cannot be downloaded: no route to the hub; .* local copy"
    with pytest.raises(UserError, match=reason):
        find_part("prepare.projector", "owner/other", ("*.bin",))


@pytest.mark.parametrize("source", ["./missing", "/missing/file.bin", "name-without-owner", "a/b/c"])
def test_what_is_no_hub_id_must_exist(source: str) -> None:
    with pytest.raises(UserError, match=f"{re.escape(source)}: no such file or folder"):
        find_part("prepare.projector", source, ("*.bin",))
