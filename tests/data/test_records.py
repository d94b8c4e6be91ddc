"""What is read as a record, and what each bad one is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixlora_cli.data.problems import BadRecord, Kind
from mixlora_cli.data.records import Record, parse_record
from mixlora_cli.data.template import Turn
from mixlora_cli.errors import cut

from .conftest import raw, turns

EMPTY_LIST = "conversations must be a non-empty list of {from, value} or {role, content}"
NO_CONVERSATION = (
    "no conversation: expected conversations, messages, conversation, texts, prompt + completion, "
    "instruction + output, query + response, question + answer; its keys are "
)
NO_PICTURE = "a picture must be a relative path, base64 or bytes, got"
ON_THE_WEB = ": a web address; download the picture and give its path"
NO_BYTES = "bytes in the record that are no picture (UnidentifiedImageError)"
NO_BASE64 = ": neither a path nor base64 of a picture"
TWO_KEYS = "image and images name different pictures; give one of the keys"


def mistake(record: Any, images: Path | None) -> tuple[Kind, str]:
    with pytest.raises(BadRecord) as caught:
        parse_record(0, record, images)
    return caught.value.kind, caught.value.detail


def test_a_good_record(images) -> None:
    assert parse_record(3, raw(benchmark="mini_mme", answers=["red"]), images) == Record(
        index=3,
        id="a",
        task="colour",
        images=(images / "red.png",),
        conversation=(Turn("human", "<image>\nwhat colour?"), Turn("gpt", "red")),
        extra={"benchmark": "mini_mme", "answers": ["red"]},
    )
    parsed = parse_record(3, turns("hello", "hi"), None)  # of plain LLaVA files
    assert (parsed.id, parsed.task, parsed.images) == ("3", "unnamed", ())
    assert parse_record(0, raw(**turns("<image>", "red")), images).conversation[0].text == "<image>"


MALFORMED = [
    ({"conversations": []}, EMPTY_LIST),
    ({"conversations": None}, f"{NO_CONVERSATION}id, task_name, image, conversations"),
    ({"conversations": ["x"]}, "turn 0 must be from 'human', got None"),
    ({"conversations": [{"from": "gpt", "value": "x"}]}, "turn 0 must be from 'human', got 'gpt'"),
    ({"conversations": [{"from": "human"}]}, "turn 0 has no text in 'value'"),
    (turns("<image>\nq"), "the conversation must end with an answer from 'gpt'"),
    (turns("<image>\nq", "a", " \n", "b"), "the question of turn 2 is empty"),
    ({"task_name": 7}, "task_name must be a non-empty string, got 7"),
    ({"task_name": ["x" * 300]}, f"task_name must be a non-empty string, got ['{'x' * 75}..."),
    ({"image": ""}, f"{NO_PICTURE} ''"),
    ({"image": [None]}, f"{NO_PICTURE} None"),
    ({"image": 7}, f"{NO_PICTURE} 7"),
    ({"image": "a\0b"}, f"{NO_PICTURE} 'a\\x00b'"),
    ({"image": {}}, f"{NO_PICTURE} {{}}"),
    ({"image": {"bytes": None, "path": ""}}, f"{NO_PICTURE} {{'bytes': None, 'path': ''}}"),
    ({"image": {"id": "x" * 300}}, f"{NO_PICTURE} {{'id': '{'x' * 69}..."),
    ({"image": "https://a.b/c.png"}, f"https://a.b/c.png{ON_THE_WEB}"),
    ({"image": {"url": f"http://{'a' * 300}"}}, f"http://{'a' * 70}...{ON_THE_WEB}"),
    ({"images": ["blue.png"]}, TWO_KEYS),
    ({"images": ["red.png", "blue.png"]}, TWO_KEYS),
    *(
        ({"image": None, key: value}, f"no image, but {key}; the key is image")
        for key, value in {
            "image_path": "red.png",
            "Image": "red.png",
            "img_paths": ["red.png"],
            "imageUrl": "http://a",
        }.items()
    ),
]
OTHERS = [
    (turns("<image>\nq", " \n"), Kind.EMPTY_ANSWER, "turn 1"),
    (turns("<image>\nq", "<image>"), Kind.IMAGE_MARKER, "<image> in the answer of turn 1"),
    (turns("<image><image>\nq", "a"), Kind.IMAGE_MARKER, "2 <image> for 1 image"),
    ({"image": None, **turns("<image>\nq", "a")}, Kind.IMAGE_MARKER, "1 <image> for 0 image"),
    ({"image": "green.png"}, Kind.MISSING_IMAGE, "green.png"),
    ({"image": "g" * 300}, Kind.MISSING_IMAGE, "g" * 77 + "..."),
    ({"image": "."}, Kind.MISSING_IMAGE, ". is not a file"),
    ({"image": f"data:image/png;base64,{'A' * 300}"}, Kind.CORRUPT_IMAGE, f"225 {NO_BYTES}"),
    ({"image": {"bytes": "x" * 301}}, Kind.CORRUPT_IMAGE, f"{'x' * 77}...: not base64 ("),
    (
        {"image": f"data:image/png,{'A' * 300}"},
        Kind.CORRUPT_IMAGE,
        f"data:image/png,{'A' * 62}...{NO_BASE64}",
    ),
    ({"image": "A" * 5000}, Kind.CORRUPT_IMAGE, f"{'A' * 77}...{NO_BASE64}"),
    (turns("<image>\nq", "nice \ud83d"), Kind.NOT_UNICODE, "lone surrogate U+D83D in conversations"),
    (turns("<image>\nq\udc00", "a"), Kind.NOT_UNICODE, "lone surrogate U+DC00 in conversations"),
    ({"image": "p\ud83d.png"}, Kind.NOT_UNICODE, "lone surrogate U+D83D in image"),
    ({"task_name": "\udfff"}, Kind.NOT_UNICODE, "lone surrogate U+DFFF in task_name"),
    ({"answers": [{"answer": "\ud800"}]}, Kind.NOT_UNICODE, "lone surrogate U+D800 in answers"),
    ({"\ud800": 1}, Kind.NOT_UNICODE, "lone surrogate U+D800 in \\ud800"),
]


@pytest.mark.parametrize(
    ("changes", "kind", "detail"),
    [*((changes, Kind.MALFORMED, detail) for changes, detail in MALFORMED), *OTHERS],
)
def test_a_bad_record_says_what_is_wrong(images, changes, kind, detail) -> None:
    found, told = mistake(raw(**changes), images)
    assert (found, told[: len(detail)] if detail.endswith("(") else told) == (kind, detail)


def test_a_record_that_is_no_object(images) -> None:
    assert mistake("red", images) == (Kind.MALFORMED, "expected an object, got str")


@pytest.mark.parametrize(
    "text",
    ["\u200b", "\ufeff", "\0", "\xa0", "\u2060\u200e\t", "\u3164", "\u2800", "\ufe0f", "\x7f\x1b", "\u2028"],
)
def test_a_text_that_shows_nothing_is_empty(images, text) -> None:
    assert mistake(raw(**turns("<image>\nq", text)), images) == (Kind.EMPTY_ANSWER, "turn 1")
    asked = raw(**turns("<image>\nq", "a", text, "b"))
    assert mistake(asked, images) == (Kind.MALFORMED, "the question of turn 2 is empty")
    full = raw(**turns("<image>\nq", f"{text}7{text}"))
    assert parse_record(0, full, images).conversation[1].text == f"{text}7{text}"


@pytest.mark.parametrize("answer", ["?", "\u00e9", "\U0001f600", "\ue000", "\u0301", "-"])
def test_an_answer_that_shows_something_is_one(images, answer) -> None:
    assert parse_record(0, raw(**turns("<image>\nq", answer)), images).conversation[1].text == answer


@pytest.mark.parametrize(
    ("changes", "image", "extra"),
    [
        ({"image": None, "images": ["red.png"]}, "red.png", {}),
        ({"image": "red.png", "images": ["red.png"]}, "red.png", {}),
        ({"image_path": "x/red.png", "Image": "red"}, "red.png", {"image_path": "x/red.png", "Image": "red"}),
        ({"image": None, "images": [], **turns("q", "a")}, None, {}),
        ({"image": None, "images": None, **turns("q", "a")}, None, {}),
        ({"image": None, "image_id": "7", **turns("q", "a")}, None, {"image_id": "7"}),
        ({"image": None, "image_path": "", **turns("q", "a")}, None, {"image_path": ""}),
    ],
)
def test_the_keys_that_may_name_a_picture(images, changes, image, extra) -> None:
    record = parse_record(0, raw(**changes), images)
    assert (record.images, record.extra) == (() if image is None else (images / image,), extra)


def test_paths_that_leave_the_image_folder_and_those_that_stay(images) -> None:
    secret = images.parent / "secret.png"
    secret.write_bytes(b"x")
    (images / "link.png").symlink_to(secret)
    (images / "up").symlink_to(images.parent)
    (images / "alias.png").symlink_to(images / "red.png")
    (images / "sub").mkdir()
    for name in ("../secret.png", "link.png", "up/secret.png", "a/../../secret.png"):
        told = f"{name} leads to {secret}, outside {images}"
        assert mistake(raw(image=name), images) == (Kind.ESCAPING_IMAGE, told)
    absolute = f"{cut(f'{images}/red.png')} is absolute, expected a path relative to {images}"
    assert mistake(raw(image=f"{images}/red.png"), images) == (Kind.ESCAPING_IMAGE, absolute)
    for name in ("alias.png", "sub/../red.png", "./red.png"):
        assert parse_record(0, raw(image=name), images).images == (images / name,)
