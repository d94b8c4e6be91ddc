"""What is measured on the meta device against what a small LLaVA really saves and computes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import (
    CLIPVisionConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from families import make_family
from mixlora_cli.analysis.bench.counters import Operations, count_operations, saved_bytes
from mixlora_cli.analysis.meta_picture import picture_inputs
from mixlora_cli.analysis.meta_step import MetaStep
from mixlora_cli.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RoutingConfig,
    TrainConfig,
)
from mixlora_cli.models.adapters import attach_adapter
from mixlora_cli.models.forward import head_sees_only, inputs_keep_their_dtype, token_loss
from mixlora_cli.models.skeleton import build_skeleton

BATCH, LENGTH, LABELS = 3, 48, 5
RANK, FACTORS, LAYERS, VOCABULARY = 4, 16, 3, 160
ROUTED_LAYERS = ((64, 64), (64, 32), (64, 32), (64, 64), (64, 176), (64, 176), (176, 64))
LOG_PROBABILITIES = BATCH * LABELS * VOCABULARY * 4
TOLERANCE = 0.03


def small_llava(attention: str, family: Any = LlamaConfig) -> LlavaForConditionalGeneration:
    """Three layers with grouped keys and values; no two sizes are alike."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            projection_dim=16,
        ),
        text_config=family(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        ),
        image_token_index=5,
        image_seq_length=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


def configured(attention: str = "eager", routing: str = "instance", **adapter: Any) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(name="small", source="tiny", attn_implementation=attention),
        adapter=AdapterConfig(**adapter),
        routing=RoutingConfig(name=routing),  # type: ignore[arg-type]
        data=DataConfig(name="mini", source="mini"),
        train=OptimConfig(),
        rank=RANK,
        factors=FACTORS,
        output_dir="out",
    )


def with_checkpointing(config: TrainConfig) -> TrainConfig:
    return replace(config, train=replace(config.train, gradient_checkpointing=True))


def on_meta(config: TrainConfig, family: Any = LlamaConfig) -> MetaStep:
    with torch.device("meta"):
        return MetaStep(small_llava("eager", family), config)


class Reality:
    """A small model with an adapter on the CPU, and one text batch with padding."""

    def __init__(
        self,
        config: TrainConfig,
        bf16: bool = False,
        family: Any = LlamaConfig,
        base: PreTrainedModel | None = None,
        **more: Tensor,
    ) -> None:
        base = small_llava(config.model.attn_implementation, family) if base is None else base
        if bf16 and config.adapter.name != "full":
            base = base.to(torch.bfloat16)
        self.bf16 = bf16
        adapted: Any = attach_adapter(base, config.adapter, config.routing, RANK, FACTORS)
        self.model: nn.Module = adapted.train()
        if config.train.gradient_checkpointing:
            adapted.activation_checkpointing_enable({"use_reentrant": False})
        self.inputs = {
            "input_ids": torch.randint(6, VOCABULARY, (BATCH, LENGTH)),
            "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
            **more,
        }
        self.inputs["attention_mask"][0, :7] = 0
        self.labelled = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        self.labelled[:, -LABELS:] = True

    def loss(self) -> Tensor:
        """As in training: logits of the labelled tokens alone."""
        base: Any = getattr(self.model, "get_base_model", lambda: self.model)()
        autocast = torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext()
        with autocast, inputs_keep_their_dtype(self.model), head_sees_only(base.lm_head, self.labelled):
            logits = self.model(**self.inputs, use_cache=False).logits
        return token_loss(logits, torch.zeros(len(logits), dtype=torch.long), 1.0)

    def operations(self) -> Operations:
        """torch's own count."""
        return count_operations(self.loss, torch.ones(()))


@pytest.fixture
def dropout_as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask of a byte a number; the CPU's has the type of the activations."""

    def dropout(values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(values, p, training)[0] if training and p else values

    monkeypatch.setattr(F, "dropout", dropout)


@pytest.mark.usefixtures("dropout_as_on_gpus")
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("adapter", "dropout"),
    [("lora", 0.05), ("lora", 0.0), ("mixlora", 0.05), ("mixlora", 0.0), ("full", 0.0)],
)
def test_bytes_are_those_that_autograd_saves(
    adapter: str, dropout: float, attention: str, bf16: bool
) -> None:
    config = configured(attention, name=adapter, dropout=dropout)
    found, _ = on_meta(config).kept_bytes(BATCH, LENGTH, 2 if bf16 else 4, checkpointing=False)
    if adapter == "full" and bf16:
        # Autocast's copies of the weights, which the plan counts as weights.
        found += 2 * LAYERS * sum(inputs * outputs for inputs, outputs in ROUTED_LAYERS)
    real = Reality(config, bf16)
    assert found + LOG_PROBABILITIES == pytest.approx(saved_bytes(real.loss, real.model), rel=TOLERANCE)


@pytest.mark.parametrize("adapter", ["lora", "mixlora"])
def test_checkpointing_keeps_the_stream_between_layers(adapter: str) -> None:
    config = with_checkpointing(configured(name=adapter))
    step, real = on_meta(config), Reality(config)
    found, _ = step.kept_bytes(BATCH, LENGTH, 4, checkpointing=True)
    assert found + LOG_PROBABILITIES == pytest.approx(saved_bytes(real.loss, real.model), rel=TOLERANCE)
    assert found < 0.2 * step.kept_bytes(BATCH, LENGTH, 4, checkpointing=False)[0]


STRAIGHT = {"name": "mixlora", "router_grad": "straight_through"}


@pytest.mark.parametrize(
    ("fields", "routing", "checkpointing"),
    [
        *(
            ({"name": name, "dropout": 0.05}, "instance", way)
            for name in ("lora", "mixlora")
            for way in (0, 1)
        ),
        *(({"name": "full"}, "instance", way) for way in (0, 1)),
        ({"name": "mixlora", "dropout": 0.0}, "instance", 1),
        ({"name": "mixlora", "cfs": "none"}, "instance", 0),
        ({"name": "mixlora"}, "random", 0),
        (STRAIGHT, "instance", 0),
    ],
)
def test_operations_are_those_that_torch_counts(
    fields: dict[str, Any], routing: str, checkpointing: int
) -> None:
    config = configured(routing=routing, **fields)
    config = with_checkpointing(config) if checkpointing else config
    found, real = on_meta(config).operations(LENGTH, LABELS), Reality(config).operations()
    assert BATCH * found.forward == pytest.approx(real.forward, rel=1e-3)
    assert BATCH * (found.backward + found.recomputation) == pytest.approx(real.backward, rel=0.01)
    assert (found.recomputation > 0) == checkpointing


@pytest.mark.parametrize("family", [Qwen2Config, Qwen3Config, Gemma3TextConfig])
@pytest.mark.parametrize("adapter", ["mixlora", "full"])
def test_other_language_models_are_measured_as_well(family: Any, adapter: str) -> None:
    config = configured(name=adapter, dropout=0.0)
    step, real = on_meta(config, family), Reality(config, family=family)
    found, _ = step.kept_bytes(BATCH, LENGTH, 4, checkpointing=False)
    assert found + LOG_PROBABILITIES == pytest.approx(saved_bytes(real.loss, real.model), rel=TOLERANCE)
    operations, counted = step.operations(LENGTH, LABELS), real.operations()
    assert BATCH * operations.forward == pytest.approx(counted.forward, rel=1e-3)
    assert BATCH * operations.backward == pytest.approx(counted.backward, rel=0.01)


FAMILIES = ("qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "gemma3", "llava_next", "phi3")
"""Of `families`: positions in three dimensions, deep pictures, tiles, layers of two kinds, joined products."""


@pytest.fixture(scope="module", params=FAMILIES)
def of_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = make_family(request.param, tmp_path_factory.mktemp("families") / request.param)
    config = configured("eager", name="mixlora", dropout=0.0)
    model = ModelConfig(request.param, "hub", str(folder), attn_implementation="eager")
    return replace(config, model=model)


def real_model(config: TrainConfig) -> PreTrainedModel:
    kind = type(build_skeleton(config.model))
    model: PreTrainedModel = kind.from_pretrained(config.model.name_or_path, attn_implementation="eager")
    return model


def test_every_family_is_measured(of_family: TrainConfig) -> None:
    step, base = MetaStep(build_skeleton(of_family.model), of_family), real_model(of_family)
    text = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    more = {"token_type_ids": text} if of_family.model.name == "gemma3" else {}
    real = Reality(of_family, base=base, **more)
    found, counted = step.operations(LENGTH, LABELS), real.operations()
    assert BATCH * found.forward == pytest.approx(counted.forward, rel=1e-3)
    assert BATCH * found.backward == pytest.approx(counted.backward, rel=0.01)
    kept, _ = step.kept_bytes(BATCH, LENGTH, 4, checkpointing=False)
    logits = BATCH * LABELS * base.get_output_embeddings().out_features * 4  # type: ignore[union-attr]
    assert kept + logits == pytest.approx(saved_bytes(real.loss, real.model), rel=TOLERANCE)


def test_the_vision_side_of_every_family_is_what_it_computes(of_family: TrainConfig) -> None:
    step, model = MetaStep(build_skeleton(of_family.model), of_family), real_model(of_family)
    picture, seen = step.picture, any("vision" in name for name in vars(model.config))
    assert step.unseen is None and (picture is not None) == seen
    if picture is None:
        return
    inputs, tokens = picture_inputs(of_family.model, model.config)
    leaf = torch.zeros((), requires_grad=True)
    features: list[Tensor] = []

    def look() -> Tensor:
        read: Any = model.requires_grad_(False).get_image_features(**inputs)
        features.extend(leaf for leaf in tree_leaves(read.pooler_output) if isinstance(leaf, Tensor))
        return features[0].sum() + leaf

    assert picture.operations.total == count_operations(look, torch.ones(())).total
    places = sum(tensor.shape[:-1].numel() for tensor in features)
    assert picture.tokens == tokens and places <= picture.tokens <= 1.5 * places + 4


def test_a_frozen_base_saves_the_weight_gradients() -> None:
    frozen, trained = (on_meta(configured(name=name)).operations(LENGTH, LABELS) for name in ("lora", "full"))
    assert frozen.backward < 1.25 * frozen.forward
    assert trained.backward == pytest.approx(2 * trained.forward, rel=0.01)


def test_the_published_form_multiplies_every_token_with_ba() -> None:
    """2 d_in d_out (r + S) operations a layer instead of 2 S r (d_in + d_out), and twice that in the backward pass."""
    step = on_meta(with_checkpointing(configured(name="mixlora", dropout=0.0)))
    ours, theirs = (step.operations(LENGTH, LABELS, published=form) for form in (False, True))
    more = (
        2
        * LAYERS
        * sum(
            inputs * outputs * (RANK + LENGTH) - LENGTH * RANK * (inputs + outputs)
            for inputs, outputs in ROUTED_LAYERS
        )
    )
    head = 2 * LABELS * VOCABULARY * 64
    assert theirs.forward - ours.forward == more
    assert theirs.backward - ours.backward == pytest.approx(2 * more, rel=0.02)
    assert theirs.recomputation == theirs.forward - head
    assert theirs.vision == ours.vision


def test_the_routers_of_tasks_read_embeddings() -> None:
    """2 E d more operations a layer for what A's and B's routers read in the place of the layer's own input."""
    by_task, by_instance = (
        on_meta(configured(routing=routing, name="mixlora")).operations(LENGTH, LABELS).forward
        for routing in ("task", "instance")
    )
    assert by_task - by_instance == LAYERS * 2 * 2 * FACTORS * sum(64 - inputs for inputs, _ in ROUTED_LAYERS)


@pytest.mark.parametrize(("cached", "trained"), [(False, False), (True, False), (True, True)])
def test_vision_is_tower_and_projector(cached: bool, trained: bool) -> None:
    config = configured(name="lora")
    config = replace(
        config,
        model=replace(config.model, train_also=["multi_modal_projector"] if trained else []),
        train=replace(config.train, cache_features=cached),
    )
    model: Any = small_llava("eager").requires_grad_(False).model
    projector = model.multi_modal_projector.requires_grad_(trained)
    leaf = torch.zeros((), requires_grad=True)
    expected = count_operations(
        lambda: (
            projector(torch.zeros(1, 4, 32)).sum()
            + leaf
            + (0.0 if cached else model.vision_tower(torch.zeros(1, 3, 28, 28)).last_hidden_state.sum())
        ),
        torch.ones(()),
    )
    assert on_meta(config).operations(LENGTH, LABELS).vision == expected.total
