"""The server answers as the models do, together or one by one, and refuses in OpenAI's words."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from mixlora_cli.config import DataConfig
from mixlora_cli.data.template import Turn
from mixlora_cli.models.generate import Decoding
from serving import Served, data_url, png, serving, serving_models, user
from tiny_data import tiny_data
from tiny_runs import finished_run

NAMES = ("lora", "instance", "task")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[Path]:
    """A LoRA adapter, and MixLoRA adapters that select by the prompt and by the task."""
    data: DataConfig = tiny_data(folder / "data", train=["counting", "reading"] * 4)
    made = [
        finished_run(folder / "lora", data, adapter="lora"),
        finished_run(folder / "instance", data, router_spread=50),
        finished_run(folder / "task", data, routing="task", router_spread=50),
    ]
    return [run.root for run in made]


@pytest.fixture(scope="module")
def served(runs: list[Path], folder: Path) -> Iterator[Served]:
    pictures = folder / "pictures"
    pictures.mkdir()
    (pictures / "a b.png").write_bytes(png(7))
    (folder / "secret.png").write_bytes(png(8))
    with serving(runs, images=str(pictures), body_mb=1.0, pictures=3, max_new_tokens=2000) as found:
        yield found


LONG = 800


@pytest.fixture(scope="module")
def endless(served: Served) -> dict[str, Any]:
    """A question that the MixLoRA adapter answers with as many tokens as it may."""
    for number in range(40):
        question = {"role": "user", "content": f"Go on and on {number}"}
        response = served.ask(question, model="instance", max_tokens=LONG).json()
        if response["usage"]["completion_tokens"] == LONG:
            return question
    raise AssertionError("every answer ends early")


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_each_model_answers_by_its_name_as_it_does_alone(served: Served) -> None:
    answers = {}
    for name in ("base", *NAMES):
        model = served.models[name]
        definition = "Do reading." if name == "task" else None
        question = model.prepare([Turn("human", "<image>\nWhat is it?")], [png(1)], definition=definition)
        fields = {} if definition is None else {"definition": definition}
        answers[name] = served.text(user("What is it?", png(1)), model=name, **fields)
        assert answers[name] == model.write([question], [Decoding(6)])[0].text
    assert len(set(answers.values())) == 4


def test_requests_that_come_together_are_answered_together_each_as_alone(served: Served) -> None:
    """Greedy, with and without pictures, streamed or not, on models by turns: bit for bit."""
    asked = [
        {
            "messages": [user("What is it? " + "red dog " * (number % 7), *[png(number)] * (number % 3))],
            "model": ("base", *NAMES)[number % 4],
            "max_tokens": 1 + number % 9,
            "temperature": 0.8 if number % 5 == 4 else 0,
            "seed": number,
        }
        for number in range(48)
    ]

    def ask(fields: dict[str, Any], stream: bool) -> str:
        response = served.client.post("/v1/chat/completions", json={**fields, "stream": stream})
        assert response.status_code == 200, response.text
        if not stream:
            return str(response.json()["choices"][0]["message"]["content"])
        return "".join(event["choices"][0]["delta"].get("content", "") for event in events(response))

    alone = [ask(fields, False) for fields in asked]
    before = served.engine.metrics.batches._sum.get()
    with ThreadPoolExecutor(48) as pool:
        together = list(pool.map(lambda pair: ask(pair[1], pair[0] % 2 == 0), enumerate(asked)))
    assert together == alone
    assert len(set(alone)) > 30
    batches = served.client.get("/metrics").text
    count = float(re.search(r"mixlora_batch_size_count (\S+)", batches)[1])  # type: ignore[index]
    assert served.engine.metrics.batches._sum.get() - before == 48 and count < 48 + 48


def test_the_openai_client_reads_what_is_sent(served: Served) -> None:
    client = OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)
    assert [model.id for model in client.models.list()] == ["base", *NAMES]
    messages: Any = [{"role": "system", "content": "Be short."}, user("What is it?", png(1))]
    whole = client.chat.completions.create(model="lora", messages=messages, max_tokens=5, temperature=0)
    assert whole.usage is not None and whole.usage.completion_tokens == 5
    assert whole.choices[0].finish_reason == "length"
    parts = list(
        client.chat.completions.create(
            model="lora", messages=messages, max_tokens=5, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert parts[-1].usage == whole.usage and parts[-2].choices[0].finish_reason == "length"
    assert text != served.text(
        user("What is it?", png(1)), model="lora", max_tokens=5
    )  # without the system turn


def test_what_a_reply_says_of_the_factors(served: Served) -> None:
    question = user("What is it?", png(1))

    def about(model: str, **fields: Any) -> dict[str, Any]:
        return dict(served.ask(question, model=model, **fields).json()["mixlora"])

    base = about("base", factors=True)
    assert base == {"model": "base", "selected_by": None, "task": None, "factors": None, "alike": None}
    assert about("instance")["factors"] is None  # nobody asked
    found = about("instance", factors=True)
    assert found["selected_by"] == "tokens"
    factors = found["factors"]
    assert len(factors["layers"]) == len(factors["a"]) == len(factors["b"]) > 6
    assert all(len(set(row)) == 2 and set(row) <= set(range(6)) for row in factors["a"] + factors["b"])
    streamed = events(served.ask(question, model="instance", factors=True, stream=True))
    assert streamed[0]["mixlora"] == found and all("mixlora" not in event for event in streamed[1:])

    by_task = about("task", task="reading", factors=True)
    assert (by_task["selected_by"], by_task["task"]) == ("task", "reading")
    by_text = about("task", definition="Do reading.", factors=True)
    assert (by_text["selected_by"], by_text["task"]) == ("definition", None)
    assert by_text["factors"] == by_task["factors"] != about("task", task="counting", factors=True)["factors"]
    assert about("task")["selected_by"] == "question"
    known = served.client.get("/v1/models/task").json()["mixlora"]
    assert known["tasks"] == ["counting", "reading"] and (known["rank"], known["factors"]) == (2, 6)
    profile = served.client.get("/v1/models/task/factors").json()
    place = profile["layers"].index(factors["layers"][0])
    number = profile["tasks"].index("reading")
    for factor in by_task["factors"]["a"][0]:
        assert [number, 1.0] in profile["a"][place][factor]
    assert served.client.get("/v1/models/lora/factors").status_code == 404
    # A task is wholly like itself.
    assert by_task["alike"][0] == ["reading", 1.0] and by_task["alike"][1][0] == "counting"
    assert about("task", task="reading")["alike"] is None


def test_pictures_may_lie_in_the_servers_folder_and_nowhere_else(served: Served, folder: Path) -> None:
    def ask(url: str) -> httpx.Response:
        part = {"type": "image_url", "image_url": url}
        return served.ask({"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]})

    expected = served.text(user("What is it?", png(7)))
    for url in ("file:///a%20b.png", f"file://{folder}/pictures/a%20b.png"):
        assert ask(url).json()["choices"][0]["message"]["content"] == expected
    for url in (
        "file:///../secret.png",
        f"file://{folder}/secret.png",
        "file:///etc/passwd",
        "file:///none.png",
    ):
        refused = ask(url)
        assert refused.status_code == 400 and "no such picture" in refused.json()["error"]["message"]


def test_an_answer_ends_before_its_stop_text(served: Served, endless: Any) -> None:
    whole = served.text(endless, model="instance", max_tokens=20)
    fields: dict[str, Any] = {"model": "instance", "max_tokens": 20, "stop": [whole[3:5], "never"]}
    response = served.ask(endless, **fields).json()
    assert response["choices"][0]["finish_reason"] == "stop"
    assert response["choices"][0]["message"]["content"] == whole[: whole.index(whole[3:5])].strip()


TEXT = {"role": "user", "content": "What is it?"}
PICTURE = {"type": "image_url", "image_url": {"url": data_url(png())}}


def content(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def pictured(data: bytes | str, kind: str = "image/png") -> dict[str, Any]:
    url = data if isinstance(data, str) else data_url(data, kind)
    return content({"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"})


def long_picture() -> bytes:
    return png(0, (1, 60000))


WHOLE: Any = object()
BAD: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b"{", 400, "the body is not JSON"),
    "nothing": (b"", 400, "the body is not JSON"),
    "no object": (b"[1]", 400, "the body is a list, expected an object"),
    "no number": (b'{"model": "base", "messages": [], "temperature": NaN}', 400, "messages"),
    "deep": (b"[" * 100_000, 400, "the body is not JSON"),
    "bytes": (b"\xff\xfe\x00", 400, "the body is not JSON"),
    "half a character": (b'{"model": "\\ud83d"}', 400, "which is no text"),
    "no messages": ({"messages": WHOLE}, 400, "messages is missing"),
    "empty messages": ({"messages": []}, 400, "messages=a list"),
    "a text for messages": ({"messages": "Hello"}, 400, 'messages="Hello": input should be a valid list'),
    "a number for a text": ({"messages": [{"role": "user", "content": 5}]}, 400, r"messages\[0\]\.content=5"),
    "an unknown role": (
        {"messages": [{"role": "robot", "content": "a"}]},
        400,
        r"messages\[0\]\.role=\"robot\"",
    ),
    "an unknown part": (content({"type": "video"}), 400, r"messages\[0\]\.content\[0\]"),
    "a part without text": (content({"type": "text"}), 400, r"messages\[0\]\.content\[0\]\.text is missing"),
    "an empty question": ({"messages": [{"role": "user", "content": " "}]}, 400, "the last message is empty"),
    "two questions": ({"messages": [TEXT, TEXT]}, 400, "questions and answers in turn"),
    "an answer at the end": (
        {"messages": [TEXT, {"role": "assistant", "content": "a"}]},
        400,
        "ends with a question",
    ),
    "a system turn within": (
        {"messages": [TEXT, {"role": "system", "content": "a"}]},
        400,
        "at most one system turn",
    ),
    "a picture in a system turn": (
        {"messages": [{"role": "system", "content": [PICTURE]}, TEXT]},
        400,
        "only a user's message may hold a picture",
    ),
    "the picture's marker": (
        {"messages": [{"role": "user", "content": "<image> what?"}]},
        400,
        "send the picture itself",
    ),
    "a control token": ({"messages": [{"role": "user", "content": "a</s>b"}]}, 400, "'</s>' in a human turn"),
    "no model": ({"model": WHOLE}, 400, "model is missing"),
    "an unknown model": ({"model": "lara"}, 404, r"model=lara: no such model here; did you mean lora\?"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens=0: input should be greater than or equal to 1"),
    "fewer tokens": ({"max_tokens": -5}, 400, "max_tokens=-5"),
    "tokens as a text": ({"max_tokens": "6"}, 400, 'max_tokens="6": input should be a valid integer'),
    "a switch for a number": ({"max_tokens": True}, 400, "max_tokens=true"),
    "too many tokens": ({"max_tokens": 10**9}, 400, "max_tokens=1000000000: at most 19"),
    "both limits": ({"max_completion_tokens": 4}, 400, "say the same"),
    "a cold answer": ({"temperature": -1}, 400, "temperature=-1: input should be greater than or equal to 0"),
    "no likely token": ({"top_p": 0}, 400, "top_p=0"),
    "two answers": ({"n": 2}, 400, "n=2"),
    "an empty stop": ({"stop": ["a", ""]}, 400, "stop: an empty text"),
    "stops of numbers": ({"stop": [1]}, 400, r"stop\[0\]=1"),
    "probabilities": ({"logprobs": True}, 400, "logprobs=true: not supported here"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools=.*not supported here"),
    "JSON answers": (
        {"response_format": {"type": "json_object"}},
        400,
        "response_format=.*not supported here",
    ),
    "an unknown field": ({"max_token": 5}, 400, r"max_token: unknown field; did you mean max_tokens\?"),
    "a task without routing by task": ({"task": "reading"}, 400, "task: base does not select by the task"),
    "an unknown task": (
        {"model": "task", "task": "raeding"},
        400,
        r"task=raeding: no such task; did you mean reading\?",
    ),
    "task and definition": (
        {"model": "task", "task": "reading", "definition": "a"},
        400,
        "give one of the two",
    ),
    "a picture that is none": (pictured(b"hello"), 400, "not a picture that can be read"),
    "half a picture": (pictured(png(0, (64, 64))[:900]), 400, "not a picture that can be read"),
    "damaged base64": (pictured("data:image/png;base64,AAA"), 400, "its base64 is damaged"),
    "no base64": (pictured("data:image/png,abc"), 400, "expected data:image/png;base64"),
    "a path": (pictured("/etc/passwd"), 400, "expected a data URL"),
    "a page": (pictured("https://example.com/a.png"), 400, "not fetched from URLs here"),
    "a long picture": (pictured(long_picture()), 400, "1 x 60000 pixels; one side may be at most 200 times"),
    "many pictures": (content(*[PICTURE] * 4, {"type": "text", "text": "a"}), 400, "more than 3 pictures"),
    "a huge body": ({"user": "x" * 1_100_000}, 413, "larger than 1 MB"),
    "a long prompt": (
        {"messages": [{"role": "user", "content": "dog " * 5000}]},
        400,
        "the prompt has .* at most 2047",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_its_status_and_one_clear_message(served: Served, name: str) -> None:
    change, status, message = BAD[name]
    if isinstance(change, bytes):
        response = served.client.post("/v1/chat/completions", content=change)
    else:
        body = {"model": "base", "messages": [TEXT], "max_tokens": 6, **change}
        body = {key: value for key, value in body.items() if value is not WHOLE}
        response = served.client.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (status, "invalid_request_error"), error
    assert re.search(message, error["message"]), error["message"]
    assert "\n" not in error["message"] and len(error["message"]) < 400
    assert set(error) == {"message", "type", "param", "code"}


def test_the_server_goes_on_after_bad_requests(served: Served) -> None:
    assert served.text(user("What is it?", png(1))) == served.text(user("What is it?", png(1)))
    assert served.client.get("/health").json() == {
        "status": "ok", "models": ["base", *NAMES], "waiting": 0, "running": 0,
        "limits": {"body_mb": 1.0, "pictures": 3, "pixels": 25_000_000},
    }  # fmt: skip


def test_other_addresses_and_methods(served: Served) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/", 405),
    ):
        response = served.client.request(method, path)
        assert response.status_code == status and path in response.json()["error"]["message"]


def test_pages_of_other_sites_are_refused(served: Served) -> None:
    body = {"model": "base", "messages": [TEXT], "max_tokens": 1}
    for headers, status in (
        ({"Origin": "https://evil.example"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": served.url}, 200),
        ({}, 200),
    ):
        assert served.client.post("/v1/chat/completions", json=body, headers=headers).status_code == status


def test_a_key_is_asked_for_where_there_is_one(served: Served) -> None:
    with serving_models({"base": served.models["base"]}, key="s3cret") as guarded:
        assert guarded.client.get("/health").status_code == 200
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer schlüssel".encode("latin-1")},
        ):
            for path in ("/v1/models", "/metrics"):
                response = guarded.client.get(path, headers=headers)  # type: ignore[arg-type]
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        client = OpenAI(base_url=f"{guarded.url}/v1", api_key="s3cret", max_retries=0)
        assert [model.id for model in client.models.list()] == ["base"]


def wait_until(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_full_queue_says_when_to_come_again(served: Served, endless: Any) -> None:
    models = {"instance": served.models["instance"]}
    with (
        serving_models(models, queue=2, batch_size=1, max_new_tokens=2000) as small,
        ThreadPoolExecutor(3) as pool,
    ):
        held = [pool.submit(small.ask, endless, model="instance", max_tokens=LONG)]
        wait_until(lambda: small.engine.load == {"waiting": 0, "running": 1})
        held += [pool.submit(small.ask, endless, model="instance") for _ in range(2)]
        wait_until(lambda: small.engine.load["waiting"] == 2)
        refused = small.ask(TEXT, model="instance")
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["Retry-After"]) >= 1
        assert [each.result().status_code for each in held] == [200] * 3
        assert small.ask(TEXT, model="instance").status_code == 200


def test_all_requests_together_may_be_too_large(served: Served) -> None:
    with serving_models({"base": served.models["base"]}, total_mb=0.01) as small:
        refused = small.ask(TEXT, user="x" * 20_000)
        assert refused.status_code == 429 and refused.headers["Retry-After"] == "5"
        for _ in range(3):  # what was held is let go
            assert small.ask(TEXT, user="x" * 8_000).status_code == 200


def test_a_batch_takes_no_more_pictures_than_fit(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixlora_cli.serving.engine.BATCH_PIXELS", 3 * 16 * 16)
    with serving_models({"base": served.models["base"]}, gather=0.5) as small:
        numbers = [1, 1, 1, 1, 4, 0, 0]  # pictures of each request

        def ask(pictures: int) -> int:
            return small.ask(user("What?", *[png(1)] * pictures), max_tokens=1).status_code

        with ThreadPoolExecutor(7) as pool:
            assert list(pool.map(ask, numbers)) == [200] * 7
        assert small.engine.metrics.batches._sum.get() == 7
        text = small.client.get("/metrics").text
        assert float(re.search(r"mixlora_batch_size_count (\S+)", text)[1]) >= 3  # type: ignore[index]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_place(served: Served, endless: Any, stream: bool) -> None:
    written = served.engine.metrics.tokens.labels("instance", "answer")._value
    before = written.get()
    body = {"model": "instance", "messages": [endless], "max_tokens": LONG, "stream": stream}
    address = f"{served.url}/v1/chat/completions"
    if stream:
        with httpx.stream("POST", address, json=body, timeout=30) as response:
            next(response.iter_bytes())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(address, json=body, timeout=0.3)
    wait_until(lambda: served.engine.load == {"waiting": 0, "running": 0})
    assert 0 < written.get() - before < LONG  # it did not go on to its end


def test_an_answer_that_takes_too_long_is_given_up(served: Served, endless: Any) -> None:
    models = {"instance": served.models["instance"]}
    with serving_models(models, timeout=0.3, max_new_tokens=2000) as hasty:
        long = {"model": "instance", "max_tokens": LONG}
        response = hasty.ask(endless, **long)
        assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
        streamed = hasty.ask(endless, stream=True, **long)
        # As a status, where no token came in time; else at the end of the stream.
        told = streamed.json() if streamed.status_code == 504 else events(streamed)[-1]
        assert told["error"]["code"] == "timeout"
        assert hasty.ask(TEXT, model="instance", max_tokens=1).status_code == 200


def test_one_request_that_fails_does_not_take_others_with_it(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = served.models["instance"]
    generate = model._generator._collate
    broken = model.prepare([Turn("human", "Break!")]).item.input_ids

    def collate(items: Any) -> Any:
        if any(item.input_ids == broken for item in items):
            raise RuntimeError("out of luck")
        return generate(items)

    questions = [{"role": "user", "content": text} for text in ("One?", "Break!", "Two?", "Three?", "Four?")]
    alone = [served.text(each, model="instance") for each in questions]
    monkeypatch.setattr(model._generator, "_collate", collate)
    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(lambda each: served.ask(each, model="instance"), questions))
    assert [response.status_code for response in found] == [200, 500, 200, 200, 200]
    assert "the model failed" in found[1].json()["error"]["message"]
    assert "out of luck" not in found[1].text and "out of luck" in capsys.readouterr().err
    answers = [each.json()["choices"][0]["message"]["content"] for each in found if each.status_code == 200]
    assert answers == [text for number, text in enumerate(alone) if number != 1]


@pytest.mark.slow
def test_sigterm_lets_running_requests_end_and_refuses_new_ones(
    runs: list[Path], endless: Any, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "mixlora_cli.cli", "serve", f"run={runs[1]}", "model=tiny", "0"]
    more = ["serve.max_new_tokens=2000", "serve.factors=false"]
    environment = {**os.environ, "MIXLORA_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *more], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        said = ""
        while not (found := re.search(r"serving base, instance: (http://\S+)", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        drained = threading.Thread(target=process.stderr.read)
        drained.start()
        with httpx.Client(base_url=found[1], timeout=60) as client, ThreadPoolExecutor(4) as pool:
            body = {"model": "instance", "messages": [endless], "max_tokens": LONG}
            running = [pool.submit(client.post, "/v1/chat/completions", json=body) for _ in range(4)]
            wait_until(lambda: client.get("/health").json()["running"] > 0)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: client.get("/health").status_code == 503)
            refused = client.post("/v1/chat/completions", json=body)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping"
            assert int(refused.headers["Retry-After"]) >= 1
            ended = [each.result() for each in running]
        assert [each.json()["usage"]["completion_tokens"] for each in ended] == [LONG] * 4
        assert process.wait(30) == 0
        drained.join()
    finally:
        process.kill()
