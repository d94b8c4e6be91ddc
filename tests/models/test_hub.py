"""Any LLaVA-class folder loads; what is none is refused in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

from families import make_family
from mixlora_cli.config import ModelConfig
from mixlora_cli.errors import UserError
from mixlora_cli.models.load import build_base, build_chat
from mixlora_cli.models.tiny import build_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, folder = build_tiny(), tmp_path_factory.mktemp("llava")
    base.model.save_pretrained(folder)
    base.chat.processor.save_pretrained(folder)
    return folder


def _config(path: Path, **changes: str) -> ModelConfig:
    return ModelConfig(name="hf", source="hub", name_or_path=str(path), **{"chat_template": "v1", **changes})


def test_a_saved_checkpoint_gives_the_same_logits(folder: Path) -> None:
    original, loaded = build_tiny(), build_base(_config(folder))
    assert (len(loaded.chat.picture_tokens), loaded.chat.image_token_ids[0]) == (
        len(original.chat.picture_tokens),
        original.chat.image_token_ids[0],
    )
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(
        [[original.chat.image_token_ids[0]] * len(original.chat.picture_tokens) + [30, 31, 32]]
    )
    with torch.inference_mode():
        expected = original.model(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(loaded.model(input_ids=ids, pixel_values=pixels).logits, expected)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer.encode("a cat") == original.tokenizer.encode("a cat")


def test_other_weights_have_another_fingerprint(folder: Path, tmp_path: Path) -> None:
    base = build_tiny()
    with torch.no_grad():
        base.model.lm_head.weight += 1
    base.model.save_pretrained(tmp_path)
    for file in folder.glob("*"):
        if not (tmp_path / file.name).exists():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert build_base(_config(folder)).fingerprint == build_base(_config(folder)).fingerprint
    assert build_base(_config(folder)).fingerprint != build_base(_config(tmp_path)).fingerprint


def test_other_preprocessing_has_another_fingerprint(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*"):
        shutil.copy2(file, tmp_path / file.name)
    same = build_base(_config(tmp_path)).fingerprint
    assert same == build_base(_config(folder)).fingerprint
    settings = tmp_path / "processor_config.json"
    changed = json.loads(settings.read_text())
    changed["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    settings.write_text(json.dumps(changed))
    assert build_base(_config(tmp_path)).fingerprint != same


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({**BertConfig().to_dict(), "architectures": ["BertModel"]})
    )
    with pytest.raises(
        UserError, match=r"holds BertModel \(model_type bert\); expected a vision-language model"
    ):
        build_base(_config(tmp_path))


def test_a_folder_without_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="cannot be loaded"):
        build_base(_config(tmp_path))


def test_options_of_the_processor_change_a_pictures_tokens(tmp_path: Path) -> None:
    folder = make_family("qwen2_5_vl", tmp_path / "qwen")

    def picture(options: dict[str, Any] | None) -> str:
        config = ModelConfig(name="hf", source="hub", name_or_path=str(folder), picture_options=options)
        return build_chat(config).probe[1]

    edges = [{"size": {"shortest_edge": 64, "longest_edge": side * side}} for side in (32, 64)]
    few, many = (len(picture(options)) for options in edges)
    assert few < many
    with pytest.raises(UserError, match=r"^model\.picture_options=\{'pixels': 9\}: .*unexpected keyword"):
        picture({"pixels": 9})
