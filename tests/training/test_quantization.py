"""A base in four or eight bits: which layers, what they compute, and every command on it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from mixlora_cli.commands import COMMANDS
from mixlora_cli.config import (
    DataConfig,
    DeepspeedConfig,
    LaunchConfig,
    ModelConfig,
    RoutingConfig,
    TrainConfig,
)
from mixlora_cli.errors import UserError
from mixlora_cli.hydra_app import run_command
from mixlora_cli.launch import run_workers
from mixlora_cli.models import quantization
from mixlora_cli.models.adapters import attach_adapter, num_parameters
from mixlora_cli.models.load import LoadedModel, build_base
from mixlora_cli.models.quantization import load_weights
from mixlora_cli.models.session import Session, find_run
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.paths import conf_dir
from mixlora_cli.serving.models import twin
from mixlora_cli.training.run_folder import RunFolder, read_metrics
from mixlora_cli.training.train import train
from tiny_data import as_arguments, tiny_data

from .conftest import MakeConfig, adapter_weights, assert_same_bits

bnb = pytest.importorskip("bitsandbytes")

KINDS = ("nf4", "int8")
each_kind = pytest.mark.parametrize("kind", KINDS)


def _wide() -> LlavaForConditionalGeneration:
    """The tiny model with rows of whole blocks of 64 numbers."""
    config = build_tiny().model.config
    config.text_config.hidden_size, config.text_config.intermediate_size = 64, 128
    config.text_config.head_dim = 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small LLaVA, as anybody's lies on the disk."""
    base, folder = build_tiny(), tmp_path_factory.mktemp("llava")
    _wide().save_pretrained(folder)
    base.chat.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model with one matrix for embedding and output."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _model(folder: Path, kind: Any, **values: Any) -> ModelConfig:
    return ModelConfig(
        name="hf",
        source="hub",
        name_or_path=str(folder),
        attn_implementation="eager",
        chat_template="v1",
        quantization=kind,
        **values,
    )


def _is_quantised(module: nn.Module) -> bool:
    return isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)


def _dequantised(layer: Any) -> Tensor:
    """(d_out, d_in) fp32 that a layer's codes stand for."""
    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    scales = weight.SCB if weight.SCB is not None else layer.state.SCB
    return weight.data.float() * scales[:, None] / 127


def _plain(base: LoadedModel, folder: Path) -> LoadedModel:
    """The base with the same weights, whole again."""
    plain = build_base(_model(folder, "none"))
    for name, module in base.model.named_modules():
        if _is_quantised(module):
            plain.model.get_submodule(name).weight.data = _dequantised(module)
    return plain


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_only_the_decoders_linear_layers_are_quantised(
    folder: Path, llama: Path, kind: Any, dtype: torch.dtype
) -> None:
    per_block = {f"{part}.{n}_proj" for part, names in (("self_attn", "qkvo"),) for n in names}
    per_block |= {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    for source, auto, prefix in (
        (folder, AutoModelForImageTextToText, "model.language_model.layers"),
        (llama, AutoModelForCausalLM, "model.layers"),
    ):
        config = AutoConfig.from_pretrained(source)
        model = load_weights(auto, source, config, kind, dtype)
        found = {name for name, module in model.named_modules() if _is_quantised(module)}
        assert found == {f"{prefix}.{number}.{name}" for number in range(2) for name in per_block}
        others = [p for p in model.parameters() if p.is_floating_point()]
        assert {p.dtype for p in others} == {dtype}
        whole = load_weights(auto, source, config, "none", dtype)
        assert num_parameters(model) == (num_parameters(model)[0], num_parameters(whole)[1])
        for name, parameter in whole.named_parameters():
            if name.rpartition(".")[0] not in found:
                assert torch.equal(model.get_parameter(name), parameter)
        # Four bits keep 9 % of noise in normally distributed weights, eight bits less than 1 %.
        for name in found:
            weight = whole.get_submodule(name).weight.float()
            error = (_dequantised(model.get_submodule(name)) - weight).abs().mean() / weight.abs().mean()
            assert 0 < error < (0.11 if kind == "nf4" else 0.011)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def _batch() -> dict[str, Tensor]:
    ids = torch.randint(10, 300, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 8:], mask[1, 10:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _gradients(model: Any, checkpointing: bool = False) -> dict[str, Tensor]:
    """Of an adapter that does something, in training mode."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "factors_b" in name or "router" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch = _batch()
    model.train()(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@each_kind
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", ["lora", "mixlora"])
def test_gradients_are_those_on_the_weights_that_the_codes_stand_for(
    folder: Path, make_config: MakeConfig, kind: Any, adapter: str, checkpointing: bool
) -> None:
    config = make_config("unused", adapter, dropout=0.0)
    base = build_base(_model(folder, kind))
    found = []
    for each in (_plain(base, folder), base):
        torch.manual_seed(0)
        attach = (each.model, config.adapter, config.routing, config.rank, config.factors)
        found.append(_gradients(attach_adapter(*attach), checkpointing))
    expected, gradients = found
    assert gradients.keys() == expected.keys()
    assert len(expected) == 14 * 2
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-2
    for name, gradient in expected.items():
        assert gradients[name].dtype == torch.float32
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_four_bits_compute_the_same_with_and_without_a_gradient(folder: Path) -> None:
    """On a processor that multiplies bf16, bitsandbytes would go over to bf16 products that have no gradient."""
    for dtype in (torch.float32, torch.bfloat16):
        model: Any = build_base(_model(folder, "nf4"), dtype).model
        layer = model.model.language_model.layers[0].mlp.up_proj
        hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = F.linear(hidden, _dequantised(layer).to(dtype))
        codes = layer.weight.data.clone()
        with torch.no_grad():
            assert torch.equal(layer.eval()(hidden), expected)
        assert torch.equal(layer.train()(hidden.requires_grad_()), expected)
        layer.eval()(hidden).sum().backward()
        assert hidden.grad is not None
        assert torch.equal(layer.weight.data, codes)


def _routing(name: str) -> RoutingConfig:
    return RoutingConfig(name=name, health_every=0)


CASES = {"lora": ("lora", "instance"), "instance": ("mixlora", "instance"), "task": ("mixlora", "task")}


@pytest.fixture
def config(folder: Path, make_config: MakeConfig, tmp_path: Path) -> Any:
    """`config("nf4", "task")`: a training of twelve steps on the quantised base."""
    definitions = tmp_path / "definitions.json"
    definitions.write_text(json.dumps({f"task{n}": {"definition": f"Do task{n}."} for n in range(2)}))

    def make(kind: str, case: str, **values: Any) -> TrainConfig:
        adapter, routing = CASES[case]
        made = make_config(f"{kind}-{case}", adapter, dropout=0.0, **{"steps": 12, **values})
        data = replace(made.data, metadata=str(definitions))
        return replace(made, model=_model(folder, kind), routing=_routing(routing), data=data)

    return make


@each_kind
@pytest.mark.parametrize("case", CASES)
def test_it_learns_and_is_found_again(config: Any, kind: str, case: str) -> None:
    """The loss falls, no code of the base changes, the adapter alone is saved, and evaluation reads it the same way."""
    asked = config(kind, case)
    base = build_base(asked.model)
    codes = {name: p.data.clone() for name, p in base.model.named_parameters()}
    run = RunFolder(train(asked, base))

    losses = [row["loss"] for row in read_metrics(run.metrics)]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.5
    own = {name.replace(".base_layer.", "."): p for name, p in base.model.named_parameters()}
    assert [name for name, before in codes.items() if not torch.equal(own[name], before)] == []

    weights = adapter_weights(run.root)
    assert all("lora_" in name or "mixlora_" in name for name in weights)
    whole = num_parameters(build_base(replace(asked.model, quantization="none")).model)[1]
    result = run.read_result()
    assert result["parameters"] - result["trainable_parameters"] - whole == sum(
        weight.numel() for name, weight in weights.items() if "router" in name
    )

    found = find_run(str(run.root), ModelConfig(name="tiny", source="tiny"))
    assert found.model.quantization == kind
    again = build_base(found.model)
    assert again.fingerprint == build_base(asked.model).fingerprint
    assert again.fingerprint != build_base(replace(asked.model, quantization="none")).fingerprint
    routing = found.task_routing(asked.data, ["task0", "task1"])
    session = Session(again, torch.float32, False, found.adapter, routing)
    trained = base.model.eval()
    batch = _batch()
    if routing is not None:
        assert session.embeddings is not None
        batch["task_embeddings"] = torch.stack([session.embeddings[f"task{n % 2}"] for n in range(3)])
    with torch.no_grad():
        outputs = session.model(**batch).logits
        assert torch.equal(trained(**batch).logits, outputs)
        with session.model.disable_adapter():  # type: ignore[operator]
            assert not torch.equal(session.model(**batch).logits, outputs)


TASKS = ("counting", "naming")
COMMON = ["eval.limit=6", "eval.batch_size=4", "eval.max_new_tokens=3", "launch.nproc=1"]
ON_A_RUN = {
    "eval": [*COMMON, "eval.seen=true"],
    "export": ["export.instances=4", "export.rank=4", "export.max_new_tokens=3", "export.limit=4"],
    "interference": ["tasks=[counting,naming]", "interference.batches=3", "interference.batch_size=2"],
    "tsne": ["tsne.permutations=20", "tsne.sides=[a]", "tsne.layers=[1]"],
}


def _everything(root: Path, data: DataConfig) -> dict[str, Any]:
    """What each command finds out about a run: answers, static factors, cosines, selections."""
    for name, values in ON_A_RUN.items():
        command = [f"run={root}", *as_arguments(data), f"output_dir={root / name}", *values]
        assert run_command(COMMANDS[name], command) == 0
    rows = [json.loads(line) for line in (root / "eval" / "predictions.jsonl").read_text().splitlines()]
    average = json.loads((root / "interference" / "interference.json").read_text())["average"]
    selections = [pq.read_table(path).to_pydict() for path in sorted((root / "tsne").rglob("*.parquet"))]
    return {
        "answers": [row["prediction"] for row in rows[1:]],
        "static": load_file(next((root / "export").rglob("adapter_model.safetensors"))),
        "scores": [average[matrix]["mean"]["value"] for matrix in "AB"],
        "selections": selections,
    }


@pytest.mark.slow
@each_kind
def test_every_command_reads_it(
    folder: Path, make_config: MakeConfig, tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On four bits each finds what it finds on the weights that the codes stand for, whole again."""
    monkeypatch.setattr("mixlora_cli.analysis.selections.run.draw_all", lambda *_: [])
    monkeypatch.setattr("mixlora_cli.analysis.interference.run.draw_all", lambda *_: [])
    data = tiny_data(tmp_path / "data", train=TASKS * 8, heldout=TASKS * 8, unseen=TASKS * 8)
    config = replace(make_config("run", dropout=0.0, steps=8), model=_model(folder, kind), data=data)
    root = train(config)
    plain, base = tmp_path / "plain", build_base(config.model)
    shutil.copytree(folder, plain)
    _plain(base, folder).model.save_pretrained(plain)
    whole = tmp_path / "whole"
    shutil.copytree(root, whole)
    settings = OmegaConf.load(whole / "config.yaml")
    settings.model.update(quantization="none", name_or_path=str(plain))
    OmegaConf.save(settings, whole / "config.yaml")

    found, expected = _everything(root, data), _everything(whole, data)
    assert len(found["answers"]) == len(expected["answers"]) > 10
    assert found["static"].keys() == expected["static"].keys()
    if kind == "int8":  # whose products round the activations, too
        return
    assert found["answers"] == expected["answers"]
    assert found["selections"] == expected["selections"]
    for name, weight in expected["static"].items():
        torch.testing.assert_close(found["static"][name], weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        *(torch.tensor(each["scores"]) for each in (found, expected)), rtol=1e-4, atol=0
    )


def _zero(stage: int) -> DeepspeedConfig:
    return DeepspeedConfig(f"zero{stage}", {"zero_optimization": {"stage": stage}})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"adapter": "full"}, "model.quantization=nf4 freezes; choose lora or mixlora"),
        ({"adapter": "none"}, "model.quantization=nf4 freezes; choose lora or mixlora"),
        ({"deepspeed": _zero(3)}, "zero3 spreads the base's weights.*choose zero1, zero2 or none"),
        ({"model": ("tiny", "tiny")}, "model.quantization=nf4: model=tiny is made in memory"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_is_refused_when_the_configuration_is_read(
    config: Any, changes: dict[str, Any], reason: str
) -> None:
    whole = config("nf4", "lora")
    if "adapter" in changes:
        changes = {"adapter": replace(whole.adapter, name=changes["adapter"])}
    with pytest.raises(ValueError, match=reason):
        if "model" in changes:
            name, source = changes["model"]
            replace(whole.model, name=name, source=source)
        replace(whole, **changes)
    if "deepspeed" in changes:
        replace(whole, deepspeed=_zero(2))


def test_the_missing_package_is_named_before_data_is_read(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda _: None)
    monkeypatch.setattr("mixlora_cli.training.train.load_records", lambda *_: pytest.fail("read the data"))
    with pytest.raises(
        UserError, match=r"=int8 needs the package bitsandbytes: pip install 'mixlora-cli\[quant\]'"
    ):
        train(config("int8", "lora"))


def test_checkpoints_that_cannot_be_quantised_are_refused(folder: Path, llama: Path, tmp_path: Path) -> None:
    """One that is quantised already, whatever is asked for; rows that are no whole blocks; no linear layer."""
    config = AutoConfig.from_pretrained(llama)
    load_weights(AutoModelForCausalLM, llama, config, "nf4", torch.float32).save_pretrained(tmp_path / "nf4")
    saved = AutoConfig.from_pretrained(tmp_path / "nf4")
    for kind in ("none", "nf4"):
        with pytest.raises(
            UserError, match=r"is quantised already \(bitsandbytes\); give the checkpoint that"
        ):
            load_weights(AutoModelForCausalLM, tmp_path / "nf4", saved, kind, torch.float32)  # type: ignore[arg-type]

    narrow = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(narrow)
    model.save_pretrained(tmp_path / "narrow")
    with pytest.raises(UserError, match=r"q_proj of .* has 32 inputs, and without a GPU .* multiples of 64"):
        load_weights(AutoModelForCausalLM, tmp_path / "narrow", narrow, "nf4", torch.float32)
    load_weights(AutoModelForCausalLM, tmp_path / "narrow", narrow, "int8", torch.float32)


@pytest.mark.slow
def test_two_processes_equal_one(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own copy of the codes, also under ZeRO-2; a resumed run is the same bit for bit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    zero2 = DeepspeedConfig(**yaml.safe_load((conf_dir() / "deepspeed" / "zero2.yaml").read_text()))
    cases = [
        ("nf4", "instance", DeepspeedConfig()),
        ("int8", "lora", DeepspeedConfig()),
        ("nf4", "lora", zero2),
    ]
    together = []
    for kind, case, deepspeed in cases:
        alone = config(kind, case, steps=4, batch_size=6, save_every=2)
        own = replace(alone, train=replace(alone.train, batch_size=3), deepspeed=deepspeed)
        together.append(replace(own, output_dir=f"{alone.output_dir}-{deepspeed.name}-two"))
        train(alone)
    run_workers("distributed_runs:run_all", together, LaunchConfig(nproc=2))
    for asked in together:
        root = Path(asked.output_dir)
        losses, alone_losses, resumed = (
            [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]
            for folder in (root, Path(str(root).rsplit("-", 2)[0]), Path(f"{root}-resumed"))
        )
        assert losses == pytest.approx(alone_losses, abs=5e-6)
        assert resumed == losses[2:]
        assert abs(losses[-1] - losses[0]) > 0.05
        weights, alone_weights = adapter_weights(root), adapter_weights(Path(str(root).rsplit("-", 2)[0]))
        for name, expected in alone_weights.items():
            torch.testing.assert_close(weights[name], expected, atol=1e-5, rtol=0)
        assert_same_bits(weights, adapter_weights(Path(f"{root}-resumed")))


@each_kind
def test_a_second_model_over_the_same_weights_computes_the_same(folder: Path, kind: Any) -> None:
    base = build_base(_model(folder, kind))
    first, second = twin(base), twin(base)  # before any of them has run
    expected = build_base(_model(folder, kind)).model
    inputs = {"input_ids": torch.arange(5, 25)[None]}
    with torch.no_grad():
        wanted = expected(**inputs).logits
        for each in (second, base, twin(base), first, second):
            assert torch.equal(each.model(**inputs).logits, wanted)
    own = {p.data_ptr() for p in base.model.parameters()}
    assert {p.data_ptr() for p in first.model.parameters()} == own
