"""A checkpoint that is not complete or contradicts itself is refused, with the tensor or setting that shows it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import published_code as code
from mixlora_cli.config import ImportConfig
from mixlora_cli.errors import UserError
from mixlora_cli.models.adapters import load_adapter
from mixlora_cli.models.tiny import build_tiny

RunImport = Callable[..., Path]
Refuses = Callable[..., None]
Change = Callable[[dict[str, Tensor]], Any]
Q0, UP1 = f"{code.PREFIX}.0.self_attn.q_proj", f"{code.PREFIX}.1.mlp.up_proj"
EXTRA = "cmoa_loarB_extra_selector"
PROJECTOR = "base_model.model.model.mm_projector"


def drop(part: str) -> Change:
    """Take away all tensors whose names hold `part`."""
    return lambda t: [t.pop(name) for name in list(t) if part in name]


def put(name: str, *shape: int) -> Change:
    return lambda t: t.update({name: torch.ones(shape)})


def spoil(name: str) -> Change:
    return lambda t: t[name].view(-1)[0].fill_(float("nan"))


def plain_lora(t: dict[str, Tensor]) -> None:
    drop(f"{Q0}.")(t)
    t[f"{Q0}.lora_A.default.0"] = t[f"{Q0}.lora_B.default.0"] = torch.ones(3, 32)


def wider_selectors(t: dict[str, Tensor]) -> None:
    drop("")(t)
    for name, tensor in code.state_dict("input").items():
        t[name] = torch.cat([tensor] * 2, dim=1) if "selector" in name else tensor


def without_last_layer(t: dict[str, Tensor]) -> None:
    for part in ("lora_", "cmoa_"):
        for name in [name for name in t if name.startswith(f"{code.PREFIX}.1.") and part in name]:
            del t[name]


CHANGES: dict[str, tuple[Change, str]] = {
    "gap": (drop(f"{Q0}.lora_A.default.3"), r"layers\.0\.self_attn\.q_proj\.lora_A: factor 3 is missing, "),
    "last of one pool": (drop(f"{UP1}.lora_B.default.7"), r"layers\.1\.mlp\.up_proj: 8 factors of A, but 7 of B"),
    "pool": (drop(f"{UP1}.lora_B"), r"layers\.1\.mlp\.up_proj\.lora_B: no factors"),
    "last of both": (
        lambda t: (drop(f"{UP1}.lora_A.default.7")(t), drop(f"{UP1}.lora_B.default.7")(t)),
        r"up_proj: .* has shape \(8, 32\), expected \(7, width\)",
    ),
    "layer": (drop(".layers.0."), r"layers\.0\.mlp\.down_proj: no factors, though other layers have some \(7 such"),
    "linear": (drop(UP1), r"layers\.1\.mlp\.up_proj: no factors, though other layers have some \(1 such"),
    "odd factor": (put(f"{UP1}.lora_A.default.4", 1, 31), r"up_proj\.lora_A\.4 has shape \(1, 31\), expected "),
    "transposed factor": (put(f"{UP1}.lora_A.default.0", 32, 1), r"lora_A\.0 has shape \(32, 1\)"),
    "scalar factor": (put(f"{UP1}.lora_A.default.0"), r"lora_A\.0 has shape \(\)"),
    "router": (drop(f"{UP1}.cmoa_selector"), r"\.mlp\.up_proj: selectors conditional_router_b, router_ab; expected"),
    "all routers of a layer": (drop(f"{UP1}.cmoa"), r"up_proj: routers none, but router_a, router_ab, router_b in "),
    "router's width": (
        put(f"{UP1}.{EXTRA}.loraB_selector.weight", 8, 31),
        r"the selectors of A and B read 32 and 31 features",
    ),
    "rank": (
        put(f"{UP1}.{EXTRA}.loraA_param2loraB_selector.weight", 8, 64),
        r"layers\.1\.mlp\.up_proj: rank 2, but 3 in layers\.0\.mlp\.down_proj",
    ),
    "no rank": (put(f"{UP1}.{EXTRA}.loraA_param2loraB_selector.weight", 8, 65), r"65 columns .* a multiple of d_in=32"),
    "shared choice": (lambda t: (drop(EXTRA)(t), drop("loraB_selector")(t)), r"independent_rank=False"),
    "not a number": (spoil(f"{UP1}.lora_B.default.2"), r"up_proj\.lora_B\.2 has values that are no finite numbers"),
    "integers": (
        lambda t: t.update({f"{Q0}.lora_A.default.0": torch.ones(1, 32, dtype=torch.int8)}),
        r"lora_A\.0 has type torch\.int8, expected floating-point",
    ),
    "projector's shape": (put(f"{PROJECTOR}.2.weight", 31, 32), r"the projector makes 31 features, .* has 32"),
    "projector's layers": (put(f"{PROJECTOR}.4.weight", 32, 32), r"the projector has layers 0, 2, 4; expected"),
    "projector's weight": (drop(f"{PROJECTOR}.2.weight"), r"has a bias but no weight"),
    "projector's values": (spoil(f"{PROJECTOR}.2.bias"), r"the projector's values are not all finite"),
    "plain LoRA in the first layers": (plain_lora, r"a layer with plain LoRA \(mix_start_layer or"),
    "selectors of two things": (wider_selectors, r"read 128 features, its input has 64; .* cannot be imported"),
    "last layer": (without_last_layer, r"^num_hidden_layers: 1 in the tensors, but 2 in the frozen base's tensors; "),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_tensors(name: str, refuses: Refuses, tmp_path: Path) -> None:
    change, expected = CHANGES[name]
    tensors = code.state_dict()
    change(tensors)
    refuses(code.write(tmp_path / "c", tensors), expected)


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({"n_experts": 16}, {}, r"^factors: 8 in the tensors, but 16 in cmoa_args\.bin; one of the two is not"),
        ({"n_selected": 4}, {}, r"^rank: 3 in the tensors, but 4 in cmoa_args\.bin"),
        ({}, {"rank": 2}, r"^rank: 3 in the tensors, but 2 in --rank"),
        ({}, {"factors": 9}, r"^factors: 8 in the tensors, but 9 in --factors"),
        ({}, {"alpha": 17}, r"^alpha: 17 in --alpha, but 16 in cmoa_args\.bin"),
        ({"lora_alpha": "16"}, {}, r"^lora_alpha='16' in cmoa_args\.bin: must be a number"),
        ({"lora_alpha": -1}, {}, r"alpha=-1: must be > 0"),
        ({"cond_type": "input"}, {}, r"^cond_type=input \(cmoa_args\.bin\), but the selectors' .* those of input_"),
        ({}, {"cond_type": "random"}, r"^cond_type: random in --cond-type, but input_lora_a_param in cmoa_args\.bin"),
        ({"cond_type": "task_def"}, {}, r"^cond_type=task_def \(cmoa_args\.bin\): can be imported: input, "),
        ({"cond_type": 3}, {}, r"^cond_type=3 in cmoa_args\.bin: must be a word"),
        ({"used_scored_weight": True}, {}, r"^used_scored_weight=True in cmoa_args\.bin: mixlora has only .*=False"),
        ({"independent_rank": False}, {}, r"^independent_rank=False"),
        ({"mix_mm_projector": True}, {}, r"^mix_mm_projector=True"),
        ({"mix_start_layer": 4}, {}, r"^mix_start_layer=4"),
        ({"ifs_weight": 0.5}, {}, r"^ifs_weight=0\.5 in cmoa_args\.bin: mixlora has only ifs_weight=1"),
    ],
)  # fmt: skip
def test_settings(
    changes: dict[str, Any], options: dict[str, Any], expected: str, refuses: Refuses, tmp_path: Path
) -> None:
    folder = code.write(tmp_path / "c", namespace=code.arguments(**changes))
    refuses(folder, expected, **options)


def test_json_files_are_compared_too(refuses: Refuses, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"num_hidden_layers": 3, "hidden_size": 32}))
    refuses(checkpoint, r"^num_hidden_layers: 2 in the tensors, but 3 in config\.json")
    (checkpoint / "config.json").write_text("{")
    refuses(checkpoint, r"config\.json: cannot be read as JSON")
    (checkpoint / "config.json").unlink()
    (checkpoint / "adapter_config.json").write_text(json.dumps({"r": 3, "n_experts": 8, "lora_alpha": 8}))
    refuses(checkpoint, r"^alpha: 16 in cmoa_args\.bin, but 8 in adapter_config\.json")


def test_what_the_tensors_and_adapter_config_tell_needs_no_arguments(
    refuses: Refuses, run_import: RunImport, tmp_path: Path
) -> None:
    folder = code.write(tmp_path / "c", code.state_dict("input"))
    (folder / "cmoa_args.bin").unlink()
    refuses(folder, r"^rank: not known, cmoa_args\.bin is missing; give --rank$")
    refuses(folder, r"^alpha: not known, .*; give --alpha; .* 2 \* factors = 16$", rank=3)
    refuses(
        folder,
        r"^--cfs=paper: this checkpoint has no CFS router",
        rank=3,
        alpha=16.0,
        cfs="paper",
    )
    published = {
        "peft_type": "LORA",
        "r": 3,
        "n_experts": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "cond_type": "input",
    }
    (folder / "adapter_config.json").write_text(json.dumps(published))
    config = json.loads((run_import(folder) / "adapter_config.json").read_text())
    chosen = {
        key: config[key] for key in ("r", "factors", "alpha", "dropout", "cfs", "routing", "pool", "decode")
    }
    assert chosen == {
        "r": 3, "factors": 8, "alpha": 16, "dropout": 0.1,
        "cfs": "none", "routing": "instance", "pool": "all", "decode": "step",
    }  # fmt: skip
    assert (config["peft_type"], config["router_grad"]) == ("MIXLORA", "none")


def test_fewer_linear_layers(run_import: RunImport, tmp_path: Path) -> None:
    tensors = code.state_dict()
    drop(".mlp.")(tensors)
    config = json.loads((run_import(code.write(tmp_path / "c", tensors)) / "adapter_config.json").read_text())
    assert config["target_modules"].endswith(r"\.(k_proj|o_proj|q_proj|v_proj)")


def test_options(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, expected in (
        ({"rank": 0}, r"^--rank=0: must be > 0$"),
        ({"alpha": float("nan")}, r"^--alpha=nan: must be > 0$"),
        ({"cfs": "none"}, r"^--cfs=none: must be one of released, paper$"),
        ({"folder": tmp_path / "nowhere"}, r"nowhere: no such folder; expected the output folder of"),
        (
            {"folder": checkpoint / "cmoa_args.bin"},
            r"cmoa_args\.bin: is a file; give the folder that it lies in",
        ),
        ({"output": checkpoint}, r"^--output=.*checkpoint: already exists; name another folder or delete it"),
    ):
        with pytest.raises(ValueError, match=expected):
            ImportConfig(**({"folder": checkpoint} | wrong))
    monkeypatch.chdir(checkpoint)
    assert ImportConfig(Path(".")).destination == Path("runs/imported/checkpoint")


def test_a_last_layer_without_an_adapter_is_seen_by_config_json_else_it_is_said_that_nothing_tells(
    refuses: Refuses, run_import: RunImport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = code.state_dict()
    without_last_layer(tensors)
    own = {
        name: t for name, t in tensors.items() if any(p in name for p in ("lora_", "cmoa_", "mm_projector"))
    }
    folder = code.write(tmp_path / "c", own)
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    refuses(folder, r"^num_hidden_layers: 1 in the tensors, but 2 in config\.json; ")
    (folder / "config.json").unlink()
    adapter = run_import(folder)
    told = "not known     how many decoder layers the base has, without config.json"
    assert told in capsys.readouterr().out
    with pytest.raises(UserError, match=r"has no weights for model\.language_model\.layers\.1\."):
        load_adapter(build_tiny().model, adapter)
    shutil.rmtree(adapter)
    run_import(code.write(tmp_path / "confirmed"))
    assert "not known" not in capsys.readouterr().out
