"""Every form of a conversation becomes turns with a marker for each picture, or is refused by name."""

from __future__ import annotations

import pytest

from mixlora_cli.data.problems import BadRecord, Kind
from mixlora_cli.data.records import Record, parse_record
from mixlora_cli.data.template import Turn

A = [Turn("human", "q"), Turn("gpt", "a")]
SYSTEM = Turn("system", "Be brief.")
TEXT, IMAGE = {"type": "text", "text": "q"}, {"type": "image"}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content="a", **more):
    return {"role": "assistant", "content": content, **more}


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": what} for who, what in turns]


TEXTS = [
    ({"messages": [user("q"), assistant()]}, A),
    ({"conversations": [user("q"), assistant()]}, A),
    ({"conversation": [user("q"), assistant()]}, A),
    ({"messages": said(("human", "q"), ("gpt", "a"))}, A),
    ({"conversations": said(("user", "q"), ("assistant", "a"))}, A),
    ({"messages": [user("q"), assistant(), user("r"), assistant("b")]}, [*A, Turn("human", "r"), Turn("gpt", "b")]),
    ({"messages": [user([TEXT, {"type": "text", "text": "?"}]), assistant(["a"])]}, [Turn("human", "q?"), A[1]]),
    ({"messages": [user([TEXT | {"image": None, "index": None}]), assistant(tool_calls=None)]}, A),
    ({"messages": [{"role": "system", "content": "Be brief."}, user("q"), assistant()]}, [SYSTEM, *A]),
    ({"messages": [{"role": "system", "content": ""}, user("q"), assistant()]}, A),
    ({"conversations": said(("system", "Be brief."), ("human", "q"), ("gpt", "a"))}, [SYSTEM, *A]),
    ({"conversations": said(("human", "q"), ("gpt", "a")), "system": "Be brief."}, [SYSTEM, *A]),
    ({"texts": [{"user": "q", "assistant": "a", "source": "x"}] * 2}, [*A, *A]),
    ({"prompt": "q", "completion": "a"}, A),
    ({"prompt": [user("q")], "completion": [assistant()]}, A),
    ({"instruction": "q", "output": "a"}, A),
    ({"instruction": "q", "input": "", "output": "a"}, A),
    ({"instruction": "Translate.", "input": "q", "output": "a"}, [Turn("human", "Translate.\nq"), A[1]]),
    ({"query": "q", "response": "a"}, A),
    ({"question": "q", "answer": "a"}, A),
    ({"prompt": "the first question again", "messages": [user("q"), assistant()]}, A),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "turns"), TEXTS)
def test_every_form_of_text_is_read(raw, turns) -> None:
    record = parse_record(0, raw, None)
    assert (record.conversation, record.images) == (tuple(turns), ())
    assert set(record.extra) <= {"prompt"}  # nothing that was read is kept twice


def test_what_is_not_read_is_kept_but_no_bytes(images) -> None:
    kept = {"score": 0.5, "meta": {"source": "x"}}
    raw = {
        "messages": [user("q"), assistant()],
        **kept,
        "image": "red.png",
        "mask": {"bytes": b"x"},
        "raw": [b"y"],
    }
    assert parse_record(0, raw, images).extra == kept


def read(images, raw) -> tuple[list[str], list[str]]:
    """Texts of the questions, and the names of the pictures."""
    record = parse_record(0, raw, images)
    return [turn.text for turn in record.conversation[::2]], [path.name for path in record.files]


def asked(*questions: str) -> list[dict[str, str]]:
    return said(*(turn for question in questions for turn in (("human", question), ("gpt", "a"))))


R, B = "red.png", "blue.png"
PICTURES = [
    ({"image": R, "conversations": asked("<image>\nq")}, ["<image>\nq"], [R]),
    ({"image": R, "conversations": asked("q <image>?")}, ["q <image>?"], [R]),
    ({"image": [R, B], "conversations": asked("<image> or <image>?")}, ["<image> or <image>?"], [R, B]),
    ({"images": [B, R], "conversations": asked("<image>q", "<image>r")}, ["<image>q", "<image>r"], [B, R]),
    ({"images": R, "conversations": asked("q", "r<image>")}, ["q", "r<image>"], [R]),
    ({"images": [R, R], "conversations": asked("<image><image>")}, ["<image><image>"], [R, R]),
    ({"image": R, "conversations": asked("q", "r")}, ["<image>\nq", "r"], [R]),
    ({"images": [R, B], "messages": [user("q"), assistant()]}, ["<image>\n<image>\nq"], [R, B]),
    ({"images": [R, B], "question": "q", "answer": "a"}, ["<image>\n<image>\nq"], [R, B]),
    ({"image": [R], "images": [R], "question": "q", "answer": "a"}, ["<image>\nq"], [R]),
    ({"images": [R], "messages": [user([IMAGE, TEXT]), assistant()]}, ["<image>q"], [R]),
    ({"images": [R, B], "messages": [user([TEXT, IMAGE]), assistant(), user([IMAGE]), assistant()]},
     ["q<image>", "<image>"], [R, B]),
    ({"images": [R, B], "messages": [user([IMAGE | {"index": 0}, IMAGE | {"index": 1}, TEXT | {"index": None}]),
                                     assistant()]}, ["<image><image>q"], [R, B]),
    ({"images": [{"path": R}, {"bytes": None, "path": B}], "messages": [user([TEXT, IMAGE, IMAGE]), assistant()]},
     ["q<image><image>"], [R, B]),
    *(({"messages": [user([IMAGE | {key: B}, TEXT]), assistant()]}, ["<image>q"], [B])
      for key in ("image", "path", "url")),
    ({"messages": [user([{"type": "image_url", "image_url": {"url": R}}, TEXT]), assistant()]}, ["<image>q"], [R]),
    ({"messages": [user([IMAGE | {"image": B}, IMAGE, TEXT]), assistant()], "image": R}, ["<image><image>q"], [B, R]),
    ({"messages": [user([IMAGE | {"image": R}, TEXT]), assistant()], "images": [IMAGE | {"image": R}]},
     ["<image>q"], [R]),
    ({"images": [], "messages": [user("q"), assistant()]}, ["q"], []),
    ({"image": {"url": "file://red.png"}, "question": "q", "answer": "a"}, ["<image>\nq"], [R]),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "questions", "pictures"), PICTURES)
def test_each_picture_has_its_marker(images, raw, questions, pictures) -> None:
    assert read(images, raw) == (questions, pictures)


def test_a_marker_is_added_to_the_first_question_behind_the_system_turn(images) -> None:
    raw = {"image": R, "messages": [{"role": "system", "content": "Be brief."}, user("q"), assistant()]}
    record = parse_record(0, raw, images)
    assert record.conversation[:2] == (SYSTEM, Turn("human", "<image>\nq"))
    assert record.num_added == 1
    assert parse_record(0, raw | {"messages": [user("<image>\nq"), assistant()]}, images).num_added == 0


def wrong(raw, images=None) -> tuple[Kind, str]:
    with pytest.raises(BadRecord) as caught:
        parse_record(0, raw, images)
    return caught.value.kind, caught.value.detail


TOOLS = ": calls of tools and reasoning are not read; leave such records out"
REFUSED = [
    ({"messages": "q"}, "messages must be a non-empty list of {from, value} or {role, content}"),
    ({"messages": [user("q"), assistant()], "conversations": asked("q")},
     "conversations and messages: a record has one conversation"),
    ({"messages": [user("q")]}, "the conversation must end with an answer from 'assistant'"),
    ({"messages": [user("q"), assistant(), user("r")]}, "the conversation must end with an answer from 'assistant'"),
    ({"messages": [{"role": "system", "content": "x"}]}, "the conversation must end with an answer from 'assistant'"),
    ({"messages": [user("q"), user("r"), assistant()]}, "turn 1 must be from 'assistant', got 'user'"),
    ({"messages": [assistant(), user("r"), assistant()]}, "turn 0 must be from 'user', got 'assistant'"),
    ({"messages": [user("q"), {"role": "system", "content": "x"}, assistant()]},
     "turn 1 must be from 'assistant', got 'system'"),
    ({"messages": [user("q"), {"role": ["x"], "content": "x"}]}, "turn 1 must be from 'assistant', got ['x']"),
    ({"messages": [user("q"), {"role": "tool", "content": "x"}]}, f"turn 1 is from 'tool'{TOOLS}"),
    ({"conversations": said(("human", "q"), ("function_call", "x"))}, f"turn 1 is from 'function_call'{TOOLS}"),
    ({"messages": [user("q"), assistant(None, tool_calls=[{"id": 1}])]}, f"turn 1 has tool_calls{TOOLS}"),
    ({"messages": [user("q"), assistant(reasoning_content="Hm.")]}, f"turn 1 has reasoning_content{TOOLS}"),
    ({"messages": [user("q"), assistant(None)]}, "turn 1 has no text in 'content'"),
    ({"messages": [user({"text": "q"}), assistant()]}, "turn 0 has no text in 'content'"),
    ({"messages": [user([{"type": "video", "video": "a.mp4"}]), assistant()]},
     "turn 0 has a part of type 'video'; text and image are read"),
    ({"messages": [user([{"type": "text", "text": None}]), assistant()]},
     "turn 0 has a part of type 'text'; text and image are read"),
    ({"messages": [user([7]), assistant()]}, "turn 0 has a part of type None; text and image are read"),
    ({"videos": ["a.mp4"], "messages": [user("<video>q"), assistant()]},
     "videos is not read, only text and pictures are"),
    ({"audio": {"bytes": b"x"}, "question": "q", "answer": "a"}, "audio is not read, only text and pictures are"),
    ({"image_bytes": b"x", "picture": {"bytes": b"x"}, "question": "q", "answer": "a"},
     "no image, but picture; the key is image"),
    ({"texts": [{"user": "q"}]}, "turn 1 has no text in 'content'"),
    ({"text": "a text alone"}, "no conversation: expected conversations, messages, conversation, texts, "
     "prompt + completion, instruction + output, query + response, question + answer; its keys are text"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "detail"), REFUSED)
def test_what_is_no_conversation_is_refused_by_name(raw, detail) -> None:
    assert wrong(raw) == (Kind.MALFORMED, detail)


NUMBERS = [
    ({"image": R, "conversations": asked("<image><image>q")}, "2 <image> for 1 image"),
    ({"images": [R, B], "conversations": asked("<image>q")}, "1 <image> for 2 images"),
    ({"images": [R, B], "messages": [user([IMAGE, TEXT]), assistant()]}, "1 <image> for 2 images"),
    ({"images": [R], "messages": [user([IMAGE, IMAGE, TEXT]), assistant()]}, "2 <image> for 1 image"),
    ({"messages": [user([IMAGE, TEXT]), assistant()]}, "1 <image> for 0 image"),
    ({"images": [R], "messages": [user([IMAGE | {"image": B}, TEXT]), assistant()]}, "1 <image> for 2 images"),
    ({"images": [R, B], "messages": [user([IMAGE | {"index": 1}, IMAGE | {"index": 0}, TEXT]), assistant()]},
     "a part with index 1 stands where picture 0 is due; list the pictures in the order of their places"),
    ({"messages": [{"role": "system", "content": "<image>"}, user("q"), assistant()], "image": R},
     "<image> in the system text of turn 0"),
    ({"messages": [user("q"), assistant([IMAGE, TEXT])], "image": R}, "<image> in the answer of turn 1"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "detail"), NUMBERS)
def test_markers_and_pictures_that_do_not_match(images, raw, detail) -> None:
    assert wrong(raw, images) == (Kind.IMAGE_MARKER, detail)


TASKS = [
    ({"task_name": "ocr"}, {}, "ocr"),
    ({}, {}, "unnamed"),
    ({"task_name": "ocr"}, {"task": "file"}, "file"),
    ({"source": "vqa", "task_name": "ocr"}, {"task": "file", "task_key": "source"}, "vqa"),
    ({"meta": {"task": {"name": "x"}}}, {"task_key": "meta.task.name"}, "x"),
    ({"meta.task": "x", "meta": {"task": "y"}}, {"task_key": "meta.task"}, "x"),
    ({"label": 7}, {"task_key": "label"}, "7"),
]


@pytest.mark.parametrize(("more", "arguments", "task"), TASKS)
def test_the_task_is_that_of_the_key_the_file_or_the_record(more, arguments, task) -> None:
    record: Record = parse_record(0, {"question": "q", "answer": "a", **more}, None, **arguments)
    assert record.task == task


NO_KEY = "no meta.task, which data.task_key names; its keys are question, answer, meta"


@pytest.mark.parametrize(
    ("more", "key", "detail"),
    [
        ({"meta": {"source": "x"}}, "meta.task", NO_KEY),
        ({"meta": "x"}, "meta.task", NO_KEY),
        ({"task": ["x"]}, "task", "task must be a non-empty string, got ['x']"),
        ({"task": True}, "task", "task must be a non-empty string, got True"),
    ],
)  # fmt: skip
def test_a_record_without_the_key_of_its_task(more, key, detail) -> None:
    with pytest.raises(BadRecord) as caught:
        parse_record(0, {"question": "q", "answer": "a", **more}, None, task="file", task_key=key)
    assert (caught.value.kind, caught.value.detail) == (Kind.MALFORMED, detail)
