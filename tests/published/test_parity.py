"""An imported adapter on a fresh base computes what the published code computes with the checkpoint's own tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import published_code as code
from mixlora_cli.models.networks import LinearLlava, LinearLlavaConfig
from mixlora_cli.models.tiny import build_tiny

RunImport = Callable[..., Path]


def inputs(num_instances: int = 2, length: int = 12) -> dict[str, Tensor]:
    """Instances of a picture (four tokens) and words; no padding."""
    ids = (torch.arange(num_instances * length) * 7 % 300 + 10).reshape(num_instances, length)
    ids[:, :4] = build_tiny().chat.image_token_ids[0]
    pixels = torch.linspace(-1, 1, num_instances * 3 * 16 * 16).reshape(num_instances, 3, 16, 16)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def logits(model: nn.Module, **more: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs(), **more).logits


def imported(folder: Path, base: Any = None) -> PeftModel:
    return PeftModel.from_pretrained(build_tiny().model if base is None else base, str(folder))


@pytest.mark.parametrize(
    ("cond_type", "options", "form"),
    [
        ("input_lora_a_param", {}, "released"),
        ("input_lora_a_param", {"cfs": "released"}, "released"),
        ("input_lora_a_param", {"cfs": "paper"}, "paper"),
        ("input", {}, "none"),
    ],
)
def test_logits(
    cond_type: str, options: dict[str, str], form: str, run_import: RunImport, tmp_path: Path
) -> None:
    tensors = code.state_dict(cond_type)
    folder = run_import(code.write(tmp_path / "c", tensors, code.arguments(cond_type)), **options)
    expected = logits(code.as_published(build_tiny().model, tensors, form))
    assert (expected - logits(build_tiny().model)).abs().max() > 1
    assert (logits(imported(folder)) - expected).abs().max() < 2e-4


def test_the_two_forms_of_cfs_differ_here() -> None:
    """Else the test above could not tell them apart."""
    tensors = code.state_dict()
    outputs = [logits(code.as_published(build_tiny().model, tensors, form)) for form in ("released", "paper")]
    assert (outputs[0] - outputs[1]).abs().max() > 0.1


def test_every_layer_has_the_published_choice(run_import: RunImport, checkpoint: Path) -> None:
    """All fourteen layers, from the very input that each of them saw."""
    tensors = code.state_dict()
    model = imported(run_import(checkpoint))
    seen: dict[str, Tensor] = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "mixlora_factors_a") and hasattr(module, "base_layer"):
            module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    logits(model)
    chosen = model.base_model.selections()
    assert len(chosen) == len(seen) == code.NUM_LAYERS * len(code.LINEARS)
    for name, selection in chosen.items():
        place = name.removeprefix("model.language_model.layers")
        for n, instance in enumerate(seen[name]):
            index_a, index_b = code.select(tensors, code.PREFIX + place, instance.mean(dim=0), "released")
            assert selection.index_a[n].tolist() == index_a
            assert selection.index_b[n].tolist() == index_b


def test_answers_are_routed_anew_at_each_token(run_import: RunImport, checkpoint: Path) -> None:
    """With its cache the published code reads one token at a time, and selects by that token alone."""
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }

    def scores(model: Any) -> Tensor:
        one = {name: tensor[:1] for name, tensor in inputs().items()}
        return torch.stack(model.generate(**one, **settings).scores)

    folder = run_import(checkpoint)
    expected = scores(code.as_published(build_tiny().model, code.state_dict(), "released"))
    assert len(expected) == 6
    assert (scores(imported(folder)) - expected).abs().max() < 2e-4
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"decode": "prefill"}))
    kept = scores(imported(folder))
    assert (kept[0] - expected[0]).abs().max() < 2e-4
    assert (kept[1] - expected[1]).abs().max() > 0.1


def test_selection_by_task(run_import: RunImport, tmp_path: Path) -> None:
    tensors = code.state_dict("task_embed")
    folder = run_import(code.write(tmp_path / "c", tensors, code.arguments("task_embed")))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["routing"], config["task_embedding_dim"], config["cfs"]) == ("task", code.HIDDEN, "none")
    task = torch.linspace(-1, 1, 2 * code.HIDDEN).reshape(2, code.HIDDEN)
    expected = logits(code.as_published(build_tiny().model, tensors, "none", task))
    assert (logits(imported(folder), task_embeddings=task) - expected).abs().max() < 2e-4


def test_selection_at_random(run_import: RunImport, tmp_path: Path) -> None:
    """Another generator draws, so no output is the same; the pools are."""
    tensors = code.state_dict("random")
    folder = run_import(code.write(tmp_path / "c", tensors, code.arguments("random")))
    model = imported(folder)
    assert (logits(model) - logits(model)).abs().max() > 0.1
    own = dict(model.named_parameters())
    assert not any("mixlora_router" in name for name in own)
    pool = own[
        "base_model.model.model.language_model.layers.1.mlp.down_proj.mixlora_factors_a.default.weight"
    ]
    raw = [tensors[f"{code.PREFIX}.1.mlp.down_proj.lora_A.default.{e}"] for e in range(code.FACTORS)]
    assert torch.equal(pool, torch.cat(raw))


def test_half_precision_is_kept_in_the_file_and_computed_in_fp32(
    run_import: RunImport, tmp_path: Path
) -> None:
    tensors = code.state_dict(dtype=torch.bfloat16)
    folder = run_import(code.write(tmp_path / "c", tensors))
    model = imported(folder)
    assert {p.dtype for name, p in model.named_parameters() if "mixlora_" in name} == {torch.float32}
    expected = logits(code.as_published(build_tiny().model, tensors, "released"))
    assert (logits(model) - expected).abs().max() < 2e-4
    numbers = sum(t.numel() for name, t in tensors.items() if "lora" in name or "projector" in name)
    assert (folder / "adapter_model.safetensors").stat().st_size < 2 * numbers + 20_000


def test_a_linear_projector_fits_the_base_of_llava_v1(run_import: RunImport, tmp_path: Path) -> None:
    def base() -> LinearLlava:
        tiny = build_tiny().model
        config = LinearLlavaConfig(**{**tiny.config.to_dict(), "model_type": "llava_linear"})
        config._attn_implementation = "eager"
        model = LinearLlava(config)
        wanted = {
            name: value for name, value in tiny.state_dict().items() if "multi_modal_projector" not in name
        }
        model.load_state_dict(wanted, strict=False)
        return model.eval()

    tensors = code.state_dict(projector="linear")
    folder = run_import(code.write(tmp_path / "c", tensors))
    expected = logits(code.as_published(base(), tensors, "released"))
    assert (logits(imported(folder, base())) - expected).abs().max() < 2e-4


def test_without_a_projector_the_base_keeps_its_own(run_import: RunImport, tmp_path: Path) -> None:
    tensors = code.state_dict(projector="none")
    folder = run_import(code.write(tmp_path / "c", tensors))
    expected = logits(code.as_published(build_tiny().model, tensors, "released"))
    assert (logits(imported(folder)) - expected).abs().max() < 2e-4
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] is None
