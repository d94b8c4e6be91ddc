"""LLaVA-v1 assembled from stand-ins of its parts: computes what the parts compute, loads, trains, answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from mixlora_cli.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PrepareConfig,
    PrepareOptions,
    RoutingConfig,
    TrainConfig,
)
from mixlora_cli.data.collate import PixelLoader
from mixlora_cli.data.encode import encode_prompt, encode_records
from mixlora_cli.data.loading import load_records
from mixlora_cli.errors import UserError
from mixlora_cli.models.adapters import load_adapter
from mixlora_cli.models.features import FeatureCache
from mixlora_cli.models.generate import Generator
from mixlora_cli.models.load import LoadedModel, build_base
from mixlora_cli.models.networks import LinearLlava
from mixlora_cli.models.skeleton import build_skeleton
from mixlora_cli.prepare.llava_v1 import open_llava_v1, write_llava_v1
from mixlora_cli.prepare.parts import Part
from mixlora_cli.prepare.run import prepare
from mixlora_cli.training.train import train

from .standins import IMAGE_SIZE, NUM_PATCHES, VOCABULARY, WIDTH, Parts

NUM_ROWS = 384
PROJECTOR = "model.multi_modal_projector"


@pytest.fixture(scope="module")
def folder(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("models") / "llava-v1-7b"
    options = PrepareOptions(output=str(output), **parts.options)
    return prepare(
        PrepareConfig(model=ModelConfig("llava_v1_7b", "prepared", chat_template="v1"), prepare=options)
    )[0]


@pytest.fixture
def base(folder: Path) -> LoadedModel:
    return build_base(ModelConfig("assembled", "hub", str(folder), chat_template="v1"))


def batch(base: LoadedModel) -> tuple[Tensor, Tensor]:
    """Two instances with a picture each: ids (2, S), pixels (2, 3, H, W)."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, VOCABULARY, (2, 9), generator=generator)
    image = torch.full((2, len(base.chat.picture_tokens)), base.chat.image_token_ids[0])
    ids = torch.cat([text[:, :3], image, text[:, 3:]], dim=1)
    return ids, torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def by_hand(parts: Parts, ids: Tensor, pixels: Tensor, image_token_id: int) -> Tensor:
    """Logits (2, S, vocabulary) of the parts themselves, put together in plain steps."""
    layers = parts.clip.vision_model(pixels, output_hidden_states=True).hidden_states
    patches = layers[-2][:, 1:]
    projected = patches @ parts.weight.T + parts.bias
    is_image = ids == image_token_id
    embeddings = parts.llama.model.embed_tokens(ids.masked_fill(is_image, 0))
    for row in range(len(ids)):
        embeddings[row, is_image[row]] = projected[row]
    return parts.llama(inputs_embeds=embeddings).logits


def test_it_computes_what_its_parts_compute(parts: Parts, base: LoadedModel) -> None:
    assert (len(base.chat.picture_tokens), base.chat.image_token_ids[0]) == (NUM_PATCHES, VOCABULARY)
    ids, pixels = batch(base)
    with torch.inference_mode():
        expected = by_hand(parts, ids, pixels, base.chat.image_token_ids[0])
        got = base.model(input_ids=ids, pixel_values=pixels).logits
        other = base.model(input_ids=ids, pixel_values=pixels.flip(0)).logits
    assert expected.std() > 0.1
    assert (other[..., :VOCABULARY] - expected).abs().max() > 0.1  # the pictures matter
    torch.testing.assert_close(got[..., :VOCABULARY], expected, atol=1e-5, rtol=1e-5)
    assert got.shape[-1] == NUM_ROWS
    mean = expected.mean(dim=-1, keepdim=True).expand(-1, -1, NUM_ROWS - VOCABULARY)
    torch.testing.assert_close(got[..., VOCABULARY:], mean, atol=1e-5, rtol=1e-5)


def test_the_projector_is_one_layer_in_memory_and_on_disk(
    parts: Parts, base: LoadedModel, folder: Path
) -> None:
    assert isinstance(base.model, LinearLlava)
    names = [name for name, _ in base.model.named_parameters() if PROJECTOR in name]
    assert names == [f"{PROJECTOR}.linear_1.weight", f"{PROJECTOR}.linear_1.bias"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {name for name in file.keys() if PROJECTOR in name}  # noqa: SIM118 (not a mapping)
        assert torch.equal(file.get_tensor(f"{PROJECTOR}.linear_1.weight"), parts.weight)
    assert stored == set(names)


def test_shards_hold_the_same_as_one_file(parts: Parts, folder: Path, tmp_path: Path) -> None:
    opened = [Part(key, value, Path(value)) for key, value in parts.options.items()]
    output = tmp_path / "output"  # pytest's own folder is private
    output.mkdir()
    write_llava_v1(open_llava_v1(*opened), output, shard_bytes=60_000)
    files = list(output.glob("model-0000*.safetensors"))
    assert len(files) > 3
    assert {file.stat().st_mode for file in files} == {(output / "config.json").stat().st_mode}
    one = build_base(ModelConfig("one", "hub", str(folder), chat_template="v1")).model.state_dict()
    many = build_base(ModelConfig("many", "hub", str(output), chat_template="v1")).model.state_dict()
    assert [name for name in one if not torch.equal(one[name], many[name])] == []
    assert one.keys() == many.keys()


def test_the_tokenizer_reads_as_sentencepiece_and_knows_the_image(parts: Parts, base: LoadedModel) -> None:
    original = sentencepiece.SentencePieceProcessor(str(parts.language_model / "tokenizer.model"))
    for text in ("A chat USER: ", "What is\nin it?", "naïve – 日本 🦊", "two  spaces "):
        assert base.tokenizer(text, add_special_tokens=False)["input_ids"] == original.encode(text)
    assert base.tokenizer.convert_tokens_to_ids("<image>") == VOCABULARY
    special = (base.tokenizer.bos_token_id, base.tokenizer.eos_token_id, base.tokenizer.pad_token_id)
    assert special == (1, 2, 0)
    # LLaVA tokenises what follows a picture on its own, and sentencepiece puts a space before it.
    ids = base.tokenizer("USER: <image>\nWhat", add_special_tokens=False)["input_ids"]
    assert ids == [*original.encode("USER: "), VOCABULARY, *original.encode("\nWhat")]


def test_a_saved_copy_is_the_same_model(base: LoadedModel, folder: Path, tmp_path: Path) -> None:
    base.model.save_pretrained(tmp_path)
    for file in folder.glob("*token*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "processor_config.json").write_bytes((folder / "processor_config.json").read_bytes())
    copy = build_base(ModelConfig("copy", "hub", str(tmp_path), chat_template="v1"))
    ids, pixels = batch(base)
    with torch.inference_mode():
        expected = base.model(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(
            copy.model(input_ids=ids, pixel_values=pixels).logits, expected, atol=0, rtol=0
        )
    assert copy.model.generation_config.suppress_tokens == list(range(VOCABULARY, NUM_ROWS))


@pytest.mark.parametrize("suppressed", [True, False])
def test_rows_without_a_token_are_never_generated(base: LoadedModel, suppressed: bool) -> None:
    with torch.no_grad():  # so that each of them would win
        base.model.lm_head.weight[VOCABULARY:] = 100 * base.model.lm_head.weight[:64]
    if not suppressed:
        base.model.generation_config.suppress_tokens = None
    ids, pixels = batch(base)
    tokens = base.model.generate(
        input_ids=ids, pixel_values=pixels, max_new_tokens=4, do_sample=True, eos_token_id=2
    )
    generated = tokens[:, ids.shape[1] :]
    assert (generated < VOCABULARY).all() == suppressed


def test_the_skeleton_has_the_same_parameters(base: LoadedModel, folder: Path) -> None:
    skeleton = build_skeleton(ModelConfig("llava_v1_7b", "prepared", str(folder), chat_template="v1"))
    assert {name: p.shape for name, p in skeleton.named_parameters()} == {
        name: p.shape for name, p in base.model.named_parameters()
    }
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))
    records = []
    for number, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (20, 16 + number), colour).save(tmp_path / f"{number}.png")
        turns = [
            {"from": "human", "value": "Which colour is it?\n<image>"},
            {"from": "gpt", "value": f"{colour} {colour}"},
        ]
        records.append(
            {"id": str(number), "task_name": "t", "image": f"{number}.png", "conversations": turns}
        )
    file = tmp_path / "train.json"
    file.write_text(json.dumps(records))
    return DataConfig(name="json", source="json", train=str(file), images=str(tmp_path))


def train_config(model: ModelConfig, data: DataConfig, output: Path) -> TrainConfig:
    return TrainConfig(
        model=model,
        adapter=AdapterConfig("mixlora", dropout=0.0),
        routing=RoutingConfig("instance"),
        data=data,
        train=OptimConfig(steps=3, batch_size=2, learning_rate=1e-2, precision="fp32", log_every=1),
        rank=2,
        factors=4,
        output_dir=str(output),
    )


def test_it_trains_with_its_projector_and_answers(
    folder: Path, base: LoadedModel, data: DataConfig, tmp_path: Path
) -> None:
    model = ModelConfig(
        "llava_v1_7b", "prepared", str(folder), chat_template="v1", train_also=["multi_modal_projector"]
    )
    run = train(train_config(model, data, tmp_path / "run"))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3

    before = base.model.model.multi_modal_projector.linear_1.weight.clone()
    adapted = load_adapter(base.model, run / "adapter")
    trained = dict(adapted.named_parameters())
    weight = next(
        p for name, p in trained.items() if "modules_to_save" in name and name.endswith("linear_1.weight")
    )
    assert weight.shape == (WIDTH, before.shape[1]) and not torch.equal(weight, before)
    assert any(p.abs().max() > 0 for name, p in trained.items() if "factors_b" in name)

    records = load_records(data, "train", 0)
    items = encode_records(records, base.chat, None, "stop", "test")
    answers = [
        Generator(adapted, base, features, max_new_tokens=5)(list(items))
        for features in (FeatureCache(base, tmp_path / "features"), PixelLoader(base.chat))
    ]
    assert answers[0] == answers[1] and len(answers[0]) == len(records)
    prompt = encode_prompt(records[0], base.chat).input_ids
    assert prompt.count(base.chat.image_token_ids[0]) == NUM_PATCHES


def test_training_without_preparation_names_the_command(data: DataConfig, tmp_path: Path) -> None:
    config = train_config(ModelConfig("llava_v1_7b", "prepared", chat_template="v1"), data, tmp_path / "run")
    with pytest.raises(UserError, match=r"models/llava-v1-7b: .*`mixlora prepare model=llava_v1_7b`"):
        train(config)
    assert not (tmp_path / "run").exists()
