"""Files are read as data: whatever is broken, missing or hostile is named in one line, and nothing is ever run."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import published_code as code

RunImport = Callable[..., Path]
Refuses = Callable[..., None]


class Hostile:
    """Runs a shell command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_the_pickle_here_is_dangerous(tmp_path: Path) -> None:
    """Else the tests below could not fail."""
    pickle.loads(pickle.dumps(Hostile(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "non_lora_trainables.bin", "mm_projector.bin"])
def test_a_hostile_pickle_is_not_run(
    file: str, form: str, refuses: Refuses, checkpoint: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    content = {"model.layers.0.self_attn.q_proj.lora_A.default.0": Hostile(marker)}
    if form == "bare":
        with (checkpoint / file).open("wb") as stream:
            pickle.dump(content, stream, protocol=2)
    else:
        torch.save(content, checkpoint / file, _use_new_zipfile_serialization=form == "zip")
    refuses(checkpoint, rf"{file}: refused, to read it (posix\.system|code) would have to run")
    assert not marker.exists()


def test_hostile_arguments_are_not_run_and_options_replace_them(
    refuses: Refuses,
    run_import: RunImport,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    marker = tmp_path / "ran"
    torch.save(Hostile(marker), checkpoint / "cmoa_args.bin")
    refuses(
        checkpoint,
        r"alpha: not known, .*cmoa_args\.bin: refused, .*; give --alpha; the published .* 16$",
    )
    folder = run_import(checkpoint, alpha=code.ALPHA)
    assert not marker.exists()
    assert "cmoa_args.bin: refused" in capsys.readouterr().out
    assert json.loads((folder / "adapter_config.json").read_text())["alpha"] == code.ALPHA


def test_a_file_cut_short_and_a_pointer_in_its_place(refuses: Refuses, checkpoint: Path) -> None:
    path = checkpoint / "pytorch_model.bin"
    content = path.read_bytes()
    for share in (0.9, 0.3, 0.0):
        path.write_bytes(content[: int(share * len(content))])
        refuses(checkpoint, r"pytorch_model\.bin: broken or cut short \(\d+ bytes\): .*; copy or download")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n")
    refuses(checkpoint, r"only a Git LFS pointer.*git lfs pull")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.ones(2)], r"holds a list, expected tensors by name"),
        (torch.ones(2), r"holds a Tensor, expected tensors by name"),
        ({"model.layers.0.self_attn.q_proj.lora_A.default.0": "text"}, r"lora_A\.default\.0 is a str, expected"),
        ({"model.layers.0.self_attn.q_proj.weight": torch.ones(2)}, r"no factors among its 1 tensors"),
        ({"model.layers.0.self_attn.q_proj.lora_A.default.0": torch.ones(0)}, r"is empty.*ZeRO-3.*zero_to_fp32\.py"),
        ({"x.q_proj.lora_A.weight": torch.ones(2, 2)}, r"this is plain LoRA"),
        ({"model.layers.0.self_attn.q_proj.lora_B.default.weight": torch.ones(2, 2)}, r"this is plain LoRA"),
        ({"mixlora.layers.0.mlp.gate.weight": torch.ones(2, 2)}, r"another method that is called MixLoRA"),
        ({"x.q_proj.mixlora_factors_a.weight": torch.ones(2, 2)}, r"this is an adapter of mixlora itself"),
        ({"model.mm_projector.lora_A.default.0": torch.ones(1, 2)}, r"the projector itself is adapted"),
        (
            {"model.layers.0.mlp.up_proj.cmoa_loarB_extra_selector.loraA_choice_embed.weight": torch.ones(1, 2)},
            r"lora_a_choice\), which mixlora does not have",
        ),
        ({"model.layers.0.mlp.up_proj.lora_C.default.0": torch.ones(1, 2)}, r"lora_C.*: expected only factors and"),
    ],
)  # fmt: skip
def test_other_contents(content: Any, expected: str, refuses: Refuses, checkpoint: Path) -> None:
    torch.save(content, checkpoint / "pytorch_model.bin")
    refuses(checkpoint, expected)


def test_folders_without_a_checkpoint(refuses: Refuses, run_import: RunImport, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    refuses(folder, r"no checkpoint here, expected pytorch_model\.bin, .*training code$")
    (folder / "zero_to_fp32.py").touch()
    refuses(folder, r"sharded by DeepSpeed: run the zero_to_fp32\.py")
    for step in (477, 1431, 954):
        (folder / f"checkpoint-{step}").mkdir()
    refuses(folder, rf"such as {re.escape(str(folder))}/checkpoint-1431$")


def weights_of(run_import: RunImport, folder: Path) -> dict[str, torch.Tensor]:
    adapter = run_import(folder)
    weights = load_file(adapter / "adapter_model.safetensors")
    shutil.rmtree(adapter)
    return weights


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_all_ways_to_save_give_the_same_adapter(
    refuses: Refuses, run_import: RunImport, checkpoint: Path, tmp_path: Path
) -> None:
    """Whole, legacy format, safetensors, shards of both kinds, and adapter and the rest in two files."""
    tensors = code.state_dict()
    expected = weights_of(run_import, checkpoint)
    assert len(expected) == 14 * 5 + 4
    main = checkpoint / "pytorch_model.bin"

    torch.save(tensors, main, _use_new_zipfile_serialization=False)
    assert same(weights_of(run_import, checkpoint), expected)

    main.unlink()
    save_file(tensors, checkpoint / "model.safetensors")
    assert same(weights_of(run_import, checkpoint), expected)
    (checkpoint / "model.safetensors").unlink()

    shard_of = {name: f"pytorch_model-{number % 3}.bin" for number, name in enumerate(tensors)}
    for file in set(shard_of.values()):
        torch.save({name: tensors[name] for name, of in shard_of.items() if of == file}, checkpoint / file)
    index = checkpoint / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    assert same(weights_of(run_import, checkpoint), expected)
    (checkpoint / "pytorch_model-1.bin").unlink()
    refuses(checkpoint, r"names pytorch_model-1\.bin, which does not lie beside it")
    index.unlink()

    factors = {name.replace(".default", ""): t for name, t in tensors.items() if ".lora_" in name}
    torch.save(factors, checkpoint / "adapter_model.bin")
    refuses(checkpoint, r"no selectors among the tensors: adapter_model\.bin lacks them")
    others = {name: t for name, t in tensors.items() if "selector" in name}
    torch.save(others, checkpoint / "non_lora_trainables.bin")
    projector = {name: t for name, t in tensors.items() if "mm_projector" in name}
    torch.save(
        {name[len("base_model.model.") :]: t for name, t in projector.items()},
        checkpoint / "mm_projector.bin",
    )
    assert same(weights_of(run_import, checkpoint), expected)


def test_the_main_file_decides_what_a_second_one_also_has(run_import: RunImport, checkpoint: Path) -> None:
    """As the published loader does, which reads pytorch_model.bin alone."""
    expected = weights_of(run_import, checkpoint)
    other = {
        name: t + 1 for name, t in code.state_dict().items() if "mm_projector" in name or "selector" in name
    }
    torch.save(other, checkpoint / "mm_projector.bin")
    torch.save(other, checkpoint / "non_lora_trainables.bin")
    assert same(weights_of(run_import, checkpoint), expected)


@pytest.mark.parametrize("shard", ["../elsewhere.bin", "/tmp/elsewhere.bin"])
def test_an_index_cannot_lead_elsewhere(shard: str, refuses: Refuses, checkpoint: Path) -> None:
    (checkpoint / "pytorch_model.bin").rename(checkpoint.parent / "elsewhere.bin")
    (checkpoint / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(code.state_dict(), shard)})
    )
    refuses(checkpoint, r"elsewhere\.bin, which does not lie beside it")
