"""Records, pictures and small tokenizers of every kind that language models have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from mixlora_cli.config import DataConfig
from mixlora_cli.data.chat import Chat
from mixlora_cli.data.template import Template

SHORT = Template(
    name="short",
    source=(
        "Hi. {% for message in messages %}{% if message['role'] == 'user' %}USER: {% for part in message['content'] %}"
        "{{ image_token ~ '\n' if part['type'] == 'image' else part['text'] }}{% endfor %} {% else %}"
        "ASSISTANT: {{ message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    bos=True,
    pictures_first=True,
)

CONTROL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<|im_start|>", "<|im_end|>"]

WORDS = {
    "Hi": 10, ".": 11, " USER": 12, "USER": 13, ":": 14, " ": 15, "\n": 16, "what": 17, " colour": 18,
    "?": 19, " ASSISTANT": 20, " red": 21, " and": 22, " blue": 23, " what": 24, " number": 25, " 7": 26,
}  # fmt: skip


def chat_with(
    tokenizer: PreTrainedTokenizerFast, template: Template = SHORT, num_image_tokens: int = 3
) -> Chat:
    """All that encoding needs of a model whose pictures take so many tokens."""
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=8,
        num_additional_image_tokens=num_image_tokens - 1,
        vision_feature_select_strategy="full",
        image_token="<image>",
    )
    return Chat(tokenizer, template, processor)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    special = [AddedToken(text, normalized=False, special=True) for text in CONTROL]
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    """One token a word with the space before it; ids are those of CONTROL and WORDS."""
    vocabulary = {text: number for number, text in enumerate(CONTROL)} | WORDS
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\s|[^\w\s]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return wrap(tokenizer)


CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. USER: what? ASSISTANT: red",
    "The assistant gives helpful, detailed, and polite answers to the user's questions. user assistant blue",
    "what number is written in the picture? the number 7, two words: café naïve",
]


@pytest.fixture(scope="session")
def byte_level() -> PreTrainedTokenizerFast:
    """BPE over bytes, as SmolLM2 and GPT-2 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=CONTROL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer)


def train_sentence_piece(*, legacy: bool) -> PreTrainedTokenizerFast:
    """BPE over characters with byte fallback and "\u2581" for a space, as LLaMA has it.

    Legacy puts a space before every stretch between control tokens, the newer form before the first one only.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.pre_tokenizer = metaspace
    byte_tokens = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=CONTROL + byte_tokens, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] in CONTROL]
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?=\u2581)"), behavior="isolated")
    else:
        tokenizer.pre_tokenizer = metaspace
    steps = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    return wrap(tokenizer)


@pytest.fixture(scope="session", params=["byte_level", "sentence_piece", "sentence_piece_legacy"])
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    if request.param == "byte_level":
        tokenizer: PreTrainedTokenizerFast = request.getfixturevalue("byte_level")
        return tokenizer
    return train_sentence_piece(legacy=request.param.endswith("legacy"))


@pytest.fixture(scope="session")
def word_chat(words: PreTrainedTokenizerFast) -> Chat:
    return chat_with(words)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, so that it neither reads nor writes the user's."""
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with red.png and blue.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 6), colour).save(folder / f"{colour}.png")
    return folder


def turns(*texts: str) -> dict[str, list[dict[str, str]]]:
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[n % 2], "value": text} for n, text in enumerate(texts)]}


def raw(image: str | None = "red.png", **changes: Any) -> dict[str, Any]:
    """A good record, and what is different in it."""
    question = "<image>\nwhat colour?" if image else "what colour?"
    record = {"id": "a", "task_name": "colour", "image": image, **turns(question, "red")}
    if image is None:
        del record["image"]
    return record | changes


@pytest.fixture
def make_data(tmp_path: Path, images: Path) -> Callable[..., DataConfig]:
    """Writes records (or text) as train.json and gives the configuration that reads them."""

    def make(records: list[Any] | str, **changes: Any) -> DataConfig:
        path = tmp_path / "train.json"
        path.write_text(records if isinstance(records, str) else json.dumps(records), encoding="utf-8")
        values: dict[str, Any] = {"name": "t", "source": "json", "train": str(path), "images": str(images)}
        return DataConfig(**(values | changes))

    return make
