"""Exactly the wanted parameters train, in fp32, and what was saved is found again."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from mixlora_cli.config import AdapterConfig, RoutingConfig
from mixlora_cli.errors import UserError
from mixlora_cli.models.adapters import attach_adapter, load_adapter, num_parameters, save_adapter
from mixlora_cli.models.tiny import build_tiny

RANK, FACTORS = 2, 4
LINEARS = 2 * 7
# (d_in, d_out) of q, k, v, o, gate, up, down in the tiny model.
SHAPES = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
POOLS = 2 * FACTORS * sum(d_in + d_out for d_in, d_out in SHAPES)
ROUTERS = 2 * sum(2 * FACTORS * d_in + RANK * d_in * FACTORS for d_in, _ in SHAPES)


def attach(
    name: str, dtype: torch.dtype = torch.float32, train_projector: bool = False, router_grad: str = "none"
) -> nn.Module:
    torch.manual_seed(0)
    return attach_adapter(
        build_tiny(dtype=dtype).model,
        AdapterConfig(name=name, router_grad=router_grad),  # type: ignore[arg-type]
        RoutingConfig(name="instance"),
        RANK,
        FACTORS,
        ["multi_modal_projector"] if train_projector else [],
    )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def disturb(model: nn.Module) -> None:
    """Stand-in for training: every trainable value moves."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def logits(model: nn.Module) -> torch.Tensor:
    """Two instances of a picture and twenty tokens."""
    ids = torch.arange(40).reshape(2, 20) + 10
    ids[:, :4] = model.config.image_token_id
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize(
    ("name", "weights", "size"),
    [
        ("lora", "lora_[AB]", 2 * sum(RANK * (d_in + d_out) for d_in, d_out in SHAPES)),
        ("mixlora", "mixlora_factors_[ab]", POOLS),
    ],
)
def test_every_linear_of_the_language_model_trains(name: str, weights: str, size: int) -> None:
    model = attach(name)
    names = trainable(model)
    pattern = rf".*language_model\.layers\.\d\.(self_attn|mlp)\.\w+_proj\.{weights}\.default\.weight"
    assert len(names) == 2 * LINEARS
    assert all(re.fullmatch(pattern, name) for name in names)
    assert num_parameters(model)[0] == size
    config = model.peft_config["default"]
    assert config.lora_alpha == 2 * RANK if name == "lora" else config.scaling == 2 * FACTORS / RANK


def test_mixlora_trains_its_routers_too_where_they_get_a_gradient() -> None:
    assert num_parameters(attach("mixlora", router_grad="straight_through"))[0] == POOLS + ROUTERS


def test_full_trains_the_language_model_without_head_tower_projector_and_none_nothing() -> None:
    model = attach("full")
    everything = {name for name, _ in model.named_parameters()}
    assert set(trainable(model)) == {name for name in everything if name.startswith("model.language_model.")}
    assert {"lm_head.weight", "model.multi_modal_projector.linear_1.weight"} <= everything
    assert trainable(attach("none")) == {}


@pytest.mark.parametrize("name", ["lora", "mixlora", "full", "none"])
def test_train_projector_adds_exactly_the_projector(name: str) -> None:
    without, with_it = attach(name), attach(name, train_projector=True)
    added = [p.numel() for n, p in trainable(with_it).items() if "multi_modal_projector" in n]
    assert sum(added) == 16 * 32 + 32 + 32 * 32 + 32
    assert num_parameters(with_it)[0] == num_parameters(without)[0] + sum(added)


@pytest.mark.parametrize("name", ["lora", "mixlora", "full"])
def test_trainable_weights_are_fp32_in_a_bf16_base(name: str) -> None:
    model = attach(name, torch.bfloat16, train_projector=True)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    frozen = [p for n, p in model.named_parameters() if not p.requires_grad and "mixlora_" not in n]
    assert {p.dtype for p in frozen} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "train_projector"),
    [(name, whole) for name in ("lora", "mixlora", "full") for whole in (False, True)] + [("none", True)],
)
def test_round_trip(name: str, train_projector: bool, tmp_path: Path) -> None:
    model = attach(name, train_projector=train_projector)
    untrained = logits(model)
    disturb(model)
    expected = logits(model)
    assert (expected - untrained).abs().max() > 1e-3
    save_adapter(model, tmp_path)

    loaded = load_adapter(build_tiny().model, tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize(
    ("name", "size"), [("lora", 2 * sum(RANK * (i + o) for i, o in SHAPES)), ("mixlora", POOLS + ROUTERS)]
)
def test_peft_files_hold_the_adapter_alone(name: str, size: int, tmp_path: Path) -> None:
    model = attach(name)
    assert isinstance(model, PeftModel)
    save_adapter(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert (tmp_path / "adapter_config.json").is_file()
    assert sum(tensor.numel() for tensor in saved.values()) == size


@pytest.mark.parametrize("name", ["lora", "mixlora"])
@pytest.mark.parametrize("target", ["nowhere", r".*language_model\.norm"])
def test_targets_that_cannot_be_adapted_are_named(name: str, target: str) -> None:
    adapter = AdapterConfig(name=name, target_modules=target)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"^adapter\.target_modules={re.escape(target)}: \w.*$"):
        attach_adapter(build_tiny().model, adapter, RoutingConfig(name="instance"), RANK, FACTORS)


def test_an_empty_folder_and_an_alien_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter here"):
        load_adapter(build_tiny().model, tmp_path)
    save_adapter(attach("full"), tmp_path)
    smaller = build_tiny().model
    smaller.model.language_model.norm.weight = nn.Parameter(torch.ones(16))
    with pytest.raises(UserError, match=r"trained on another model: 1 weights do not fit.*norm\.weight"):
        load_adapter(smaller, tmp_path)


@pytest.mark.parametrize("name", ["lora", "mixlora"])
def test_an_adapter_has_to_have_all_layers_of_its_base_and_no_others(name: str, tmp_path: Path) -> None:
    save_adapter(attach(name), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    layer = "model.language_model.layers.1.self_attn.q_proj"
    fewer = {key: tensor for key, tensor in whole.items() if ".layers.1." not in key}
    save_file(fewer, file)
    with pytest.raises(
        UserError, match=rf"has no weights for {re.escape(layer)} \({len(whole) // 2} weights in all\)"
    ):
        load_adapter(build_tiny().model, tmp_path)

    more = {key.replace(".layers.1.", ".layers.7."): tensor.clone() for key, tensor in whole.items()}
    save_file(whole | more, file)
    with pytest.raises(
        UserError, match=r"the model has no layer for model\.language_model\.layers\.7\.\w+\.\w+ "
    ):
        load_adapter(build_tiny().model, tmp_path)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_files_have_the_permissions_that_the_umask_says(name: str, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_adapter(attach(name), tmp_path)
    finally:
        os.umask(before)
    (file,) = tmp_path.glob("*.safetensors")
    assert file.stat().st_mode & 0o777 == 0o640


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"
Weights = dict[str, torch.Tensor]
NO_WEIGHTS: dict[str, tuple[Callable[[bytes, Weights], bytes | Weights | None], str]] = {
    # what becomes of the file, and what is said; {first} is the first weight of {count}
    "missing": (lambda content, weights: None, r"{folder}: {name} is missing: |{folder}: no adapter here"),
    "cut": (lambda content, weights: content[:-100], r"{folder}/{name}: the adapter's file is damaged: "),
    "pointer": (
        lambda content, weights: LFS,
        r"{folder}/{name}: only a Git LFS pointer, not the weights; run `git lfs pull` in its folder$",
    ),
    "spread": (  # as ZeRO-3's shards look from one process
        lambda content, weights: {key: torch.zeros(0) for key in weights},
        r"{folder}/{name}: {count} of {count} weights have size 0, the first is {first}: ZeRO-3 had spread ",
    ),
    "one empty": (
        lambda content, weights: weights | {next(iter(weights)): torch.zeros(0)},
        r"{folder}/{name}: 1 of {count} weights have size 0, the first is {first}:",
    ),
}


@pytest.mark.parametrize("name", ["lora", "mixlora", "full"])
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_a_file_without_weights_is_refused_with_the_cause(name: str, kind: str, tmp_path: Path) -> None:
    save_adapter(attach(name), tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    change, said = NO_WEIGHTS[kind]
    content = change(file.read_bytes(), weights)
    file.unlink()
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        save_file(content, file)
    with pytest.raises(UserError) as stop:
        load_adapter(build_tiny().model, tmp_path)
    values = {"folder": tmp_path, "name": file.name, "count": len(weights), "first": next(iter(weights))}
    pattern = said.format(**{key: re.escape(str(value)) for key, value in values.items()})
    assert re.match(pattern, str(stop.value)), stop.value


def test_weights_of_another_size_are_named(tmp_path: Path) -> None:
    save_adapter(attach("lora"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(key for key in weights if "lora_A" in key)
    save_file(weights | {name: torch.zeros(RANK, 31)}, file)
    with pytest.raises(UserError, match=r"does not fit the model: .*: size mismatch for .*lora_A.*\[2, 31\]"):
        load_adapter(build_tiny().model, tmp_path)


def test_weights_in_the_older_format_still_load(tmp_path: Path) -> None:
    model = attach("lora")
    disturb(model)
    expected = logits(model)
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "adapter_model.bin")
    file.unlink()
    assert torch.equal(logits(load_adapter(build_tiny().model, tmp_path)), expected)
