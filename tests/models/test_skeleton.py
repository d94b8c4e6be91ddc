"""Published sizes, counted without memory: the models, and what adapters add to them."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torch import nn

from families import make_family
from mixlora_cli.config import AdapterConfig, ModelConfig, RoutingConfig, parse
from mixlora_cli.errors import UserError
from mixlora_cli.hydra_conf import by_size
from mixlora_cli.models.adapters import num_parameters
from mixlora_cli.models.load import build_base
from mixlora_cli.models.networks import LinearProjector
from mixlora_cli.models.skeleton import attach_to_skeleton, build_skeleton
from mixlora_cli.paths import conf_dir

V1 = ModelConfig("llava_v1_7b", "prepared")
V1_5_7B = ModelConfig("llava_1_5_7b", "hub", "llava-hf/llava-1.5-7b-hf")
V1_5_13B = ModelConfig("llava_1_5_13b", "hub", "llava-hf/llava-1.5-13b-hf")

LLAMA_7B, LLAMA_13B = 6_738_415_616, 13_015_864_320  # with 32,000 tokens
CLIP_224, CLIP_336 = 303_179_776, 303_507_456


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path))


def size(module: nn.Module) -> int:
    return num_parameters(module)[1]


@pytest.mark.parametrize(
    ("model", "llama", "width", "vision", "projector"),
    [
        (V1, LLAMA_7B, 4096, CLIP_224, 1024 * 4096 + 4096),
        (V1_5_7B, LLAMA_7B, 4096, CLIP_336, 1024 * 4096 + 4096 + 4096 * 4096 + 4096),
        (V1_5_13B, LLAMA_13B, 5120, CLIP_336, 1024 * 5120 + 5120 + 5120 * 5120 + 5120),
    ],
)
def test_published_sizes(model: ModelConfig, llama: int, width: int, vision: int, projector: int) -> None:
    skeleton = build_skeleton(model)
    rows = 2 * 64 * width  # 32,000 tokens padded to 32,064, in embedding and head
    assert size(skeleton.model.language_model) + size(skeleton.lm_head) == llama + rows
    assert size(skeleton.model.vision_tower) == vision
    assert size(skeleton.model.multi_modal_projector) == projector
    assert size(skeleton) == llama + rows + vision + projector
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}


def test_totals_in_one_place() -> None:
    assert [size(build_skeleton(model)) for model in (V1, V1_5_7B, V1_5_13B)] == [
        7_046_318_080,
        7_063_427_072,
        13_351_494_656,
    ]
    assert isinstance(build_skeleton(V1).model.multi_modal_projector, LinearProjector)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656),
        ("Qwen/Qwen3-VL-4B-Instruct", 4_437_815_808),
        ("Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696),
        ("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", 507_482_304),
        ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", 2_246_784_880),
        ("OpenGVLab/InternVL3-2B-hf", 2_088_957_440),
        ("google/gemma-3-4b-it", 4_300_079_472),
        ("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", 893_618_208),
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", 8_030_348_832),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
    ],
)
def test_parameters_are_those_that_the_hub_names(name: str, parameters: int) -> None:
    skeleton = build_skeleton(ModelConfig("published", "hub", name))
    assert size(skeleton) == parameters
    assert not any(parameter.requires_grad or not parameter.is_meta for parameter in skeleton.parameters())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "gemma3", "phi3"])
def test_a_folder_of_any_family_is_what_is_loaded(family: str, tmp_path: Path) -> None:
    folder = make_family(family, tmp_path / family)
    skeleton = build_skeleton(ModelConfig(family, "hub", str(folder)))
    real = type(skeleton).from_pretrained(folder)
    shapes = {name: parameter.shape for name, parameter in real.named_parameters()}
    assert {name: parameter.shape for name, parameter in skeleton.named_parameters()} == shapes


PRESETS = sorted(
    path.stem for path in (conf_dir() / "model").glob("*.yaml") if path.stem not in ("hf", "mini", "tiny")
)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_size_gives_the_defaults_of_its_parameters(preset: str) -> None:
    """Offline: neither the hub nor the package that carries a model is asked for."""
    settings = OmegaConf.load(conf_dir() / "model" / f"{preset}.yaml")
    values = OmegaConf.to_container(settings)
    assert isinstance(values, dict) and values["name"] == preset
    counted = size(build_skeleton(parse(ModelConfig, values))) / 1e9
    nominal, real = (
        by_size("small", "middle", "large", _root_=OmegaConf.create({"model": {"billions": billions}}))
        for billions in (values["billions"], counted)
    )
    assert nominal == real
    assert values["billions"] == pytest.approx(counted, rel=0.45)


def linears(hidden: int, intermediate: int) -> list[tuple[int, int]]:
    """(d_in, d_out) of one LLaMA layer: q, k, v, o, gate, up, down."""
    return [*[(hidden, hidden)] * 4, *[(hidden, intermediate)] * 2, (intermediate, hidden)]


def factors_of(layers: int, hidden: int, intermediate: int, num_factors: int) -> int:
    """Two pools for each linear layer: E (d_in + d_out)."""
    return layers * sum(num_factors * (d_in + d_out) for d_in, d_out in linears(hidden, intermediate))


def routers_of(layers: int, hidden: int, intermediate: int, num_factors: int, rank: int) -> int:
    """W_A and W_B, E d_in each, and W_AB, r d_in E (Eq. 5, 7)."""
    return layers * sum((2 + rank) * num_factors * d_in for d_in, _ in linears(hidden, intermediate))


def attached(model: ModelConfig, rank: int, factors: int, **adapter: str) -> tuple[int, int]:
    """(trainable, added) parameters."""
    skeleton = build_skeleton(model)
    before = size(skeleton)
    settings = AdapterConfig("mixlora", **adapter)  # type: ignore[arg-type]
    adapted = attach_to_skeleton(skeleton, settings, RoutingConfig("instance"), rank, factors)
    assert {parameter.device.type for parameter in adapted.parameters()} == {"meta"}
    trainable, total = num_parameters(adapted)
    return trainable, total - before


@pytest.mark.parametrize(
    ("model", "shape", "factors", "routers"),
    [
        (V1, (32, 4096, 11_008), 39_976_960, 109_314_048),
        (V1_5_7B, (32, 4096, 11_008), 39_976_960, 109_314_048),
        (V1_5_13B, (40, 5120, 13_824), 62_586_880, 171_048_960),
    ],
)
def test_mixlora_of_the_paper(
    model: ModelConfig, shape: tuple[int, int, int], factors: int, routers: int
) -> None:
    """E=16, r=4: as published only the factors are trained; straight_through trains the routers too."""
    assert (factors, routers) == (factors_of(*shape, 16), routers_of(*shape, 16, 4))
    assert attached(model, 4, 16) == (factors, factors + routers)
    assert attached(model, 4, 16, router_grad="straight_through") == (factors + routers, factors + routers)
    without_cfs = routers_of(*shape, 16, 0)
    assert attached(model, 4, 16, cfs="none") == (factors, factors + without_cfs)


def test_lora_and_a_trained_projector() -> None:
    shape = (32, 4096, 11_008)
    adapted = attach_to_skeleton(
        build_skeleton(V1),
        AdapterConfig("lora"),
        RoutingConfig("instance"),
        16,
        16,
        train_also=["multi_modal_projector"],
    )
    # LoRA of rank 16 has as many parameters as the pools of 16 factors.
    assert num_parameters(adapted)[0] == factors_of(*shape, 16) + 1024 * 4096 + 4096


def same_parameters(model: ModelConfig) -> None:
    skeleton, real = build_skeleton(model), build_base(model).model
    shapes = {name: parameter.shape for name, parameter in real.named_parameters()}
    assert {name: parameter.shape for name, parameter in skeleton.named_parameters()} == shapes
    assert num_parameters(skeleton) == num_parameters(real)


def test_tiny_is_what_is_built() -> None:
    same_parameters(ModelConfig("tiny", "tiny"))


@pytest.mark.slow
def test_mini_is_what_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIXLORA_CACHE")
    same_parameters(ModelConfig("mini", "mini", chat_template="smollm"))


def test_a_folder_is_read_and_nothing_else_is_guessed(tmp_path: Path) -> None:
    config = build_skeleton(V1).config
    config.text_config.num_hidden_layers = 2
    config.save_pretrained(tmp_path / "copy")
    copy = build_skeleton(ModelConfig("copy", "prepared", str(tmp_path / "copy")))
    assert len(copy.model.language_model.layers) == 2
    with pytest.raises(UserError, match=r"config\.json cannot be read; known without it: llava_v1_7b"):
        build_skeleton(ModelConfig("other", "prepared"))
