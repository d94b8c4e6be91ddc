"""The judge `openai` against a server on this machine that misbehaves."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judging_server import FakeJudge, eval_folder, honest, prediction

from mixlora_cli.config import JudgeConfig
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.scoring import score
from mixlora_cli.judging import prompt
from mixlora_cli.judging.judge import judge_answers
from mixlora_cli.judging.replies import all_replies
from openai_server import Body, Handler, hang_up, sleepy, status


def content(data: Any) -> Callable[[Handler, Body], None]:
    return lambda handler, _: handler.reply(200, data)


def hang_up_half_way(handler: Handler, _: Body) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def numbers(folder: Path) -> tuple[float, int, int]:
    (judged,) = score(folder).judged
    (found,) = judged.scores
    return found.value, found.n, found.unparsed


def num_replies(folder: Path) -> int:
    return sum(len(stored.replies) for stored in all_replies(folder))


def test_a_well_behaved_server(folder: Path, server: FakeJudge) -> None:
    judge_answers(folder, server.config)
    assert numbers(folder) == (pytest.approx(100 * 8 / 12), 12, 0)
    assert set(server.paths) == {"/v1/completions"}
    body = min(server.bodies, key=lambda body: len(body["prompt"]))
    assert {name: body[name] for name in ("model", "temperature", "max_tokens")} == {
        "model": "some/judge",
        "temperature": 0,
        "max_tokens": 8,
    }
    whole = prompt.fill(prompt.TEMPLATE, "What is in picture 0?", "cat", "dog")
    assert whole in [body["prompt"] for body in server.bodies]
    judge_answers(folder, server.config)  # nothing is asked twice
    assert len(server.bodies) == 12


def test_chat_sends_the_same_words_as_messages(folder: Path, server: FakeJudge) -> None:
    judge_answers(folder, server.configured(api="chat", extra={"max_tokens": None, "seed": 1}))
    assert numbers(folder)[0] == pytest.approx(100 * 8 / 12)
    assert set(server.paths) == {"/v1/chat/completions"}
    body = server.bodies[0]
    assert "max_tokens" not in body and body["seed"] == 1
    system, user = (message["content"] for message in body["messages"])
    assert f"{system} USER: {user} ASSISTANT:".startswith(prompt.SYSTEM) and user.startswith("Decide if")


@pytest.mark.parametrize(
    "trouble",
    [
        status(500),
        status(503),
        status(429, Retry_After="0"),
        hang_up,
        hang_up_half_way,
        content(b"<html>busy</html>"),
        content(b'{"choices": [{"te'),
        content({"id": 1}),
        content({"choices": []}),
        content({"choices": [{}]}),
        content({"choices": [{"text": 7}]}),
        content([1, 2]),
    ],
    ids=lambda action: getattr(action, "__name__", "?"),
)
def test_trouble_that_passes_changes_nothing(
    trouble: Callable[[Handler, Body], None], folder: Path, server: FakeJudge
) -> None:
    server.plan = [trouble, honest, trouble, trouble]
    judge_answers(folder, server.config)
    assert numbers(folder) == (pytest.approx(100 * 8 / 12), 12, 0)
    assert len(server.bodies) == 12 + 3


def test_a_slow_server_is_asked_again_after_the_timeout(folder: Path, server: FakeJudge) -> None:
    server.plan = [sleepy]
    judge_answers(folder, server.configured(timeout=0.2))
    assert numbers(folder)[1:] == (12, 0)
    assert len(server.bodies) == 13
    assert 0.2 <= server.times[1] - server.times[0] < 1.0


def test_it_waits_as_long_as_the_server_asks(folder: Path, server: FakeJudge) -> None:
    server.plan = [status(429, Retry_After="0.5")]
    judge_answers(folder, server.config)
    assert server.times[1] - server.times[0] >= 0.5


def test_requests_run_at_once_and_no_more_than_allowed(tmp_path: Path, server: FakeJudge) -> None:
    folder = eval_folder(tmp_path, [prediction(n, "cat") for n in range(24)])

    def slow(handler: Handler, body: Body) -> None:
        time.sleep(0.05)
        honest(handler, body)

    server.then = slow
    judge_answers(folder, server.configured(concurrency=6))
    assert numbers(folder) == (100.0, 24, 0)
    assert 3 <= server.most_at_once <= 6


def test_replies_that_decide_nothing_are_counted_and_wrong(folder: Path, server: FakeJudge) -> None:
    server.plan = [lambda handler, _: handler.say("Maybe"), lambda handler, _: handler.say(None)]
    server.then = lambda handler, _: handler.say("Yes")
    judge_answers(folder, server.config)
    assert numbers(folder) == (pytest.approx(100 * 10 / 12), 12, 2)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_server_that_dies_loses_nothing(folder: Path, server: FakeJudge, concurrency: int) -> None:
    settings = server.configured(concurrency=concurrency, retries=1)
    server.plan, server.then = [honest] * 5, hang_up
    with pytest.raises(UserError, match=r"the same command asks only what is missing") as error:
        judge_answers(folder, settings)
    assert "127.0.0.1" in str(error.value) and "\n" not in str(error.value)
    assert num_replies(folder) == 5
    assert score(folder).judged == ()  # an unfinished benchmark has no score
    asked = len(server.bodies)
    assert asked < 5 + 2 * 12  # it did not try every question on a dead server

    server.then = honest  # it is back
    judge_answers(folder, settings)
    assert numbers(folder) == (pytest.approx(100 * 8 / 12), 12, 0)
    assert len(server.bodies) == asked + 7


def test_no_server_at_all(folder: Path, server: FakeJudge) -> None:
    with pytest.raises(UserError, match="ConnectError"):
        judge_answers(folder, server.configured(base_url="http://127.0.0.1:1/v1", retries=1))
    judge_answers(folder, server.config)  # the server's address is no part of the key
    assert numbers(folder)[1] == 12 and len(all_replies(folder)) == 1


@pytest.mark.parametrize(("code", "hint"), [(401, "OPENAI_API_KEY"), (404, "judge.model")])
def test_what_fails_every_request_stops_at_once(
    code: int, hint: str, folder: Path, server: FakeJudge
) -> None:
    server.plan, server.then = [honest, honest], status(code)
    with pytest.raises(UserError, match=hint):
        judge_answers(folder, server.config)
    assert len(server.bodies) <= 4 and num_replies(folder) == 2


def test_a_refused_question_stops_or_counts_as_unparsed(folder: Path, server: FakeJudge) -> None:
    server.plan = [status(400)]
    with pytest.raises(UserError, match=r"refused 1 questions.*judge\.on_refusal=unparsed"):
        judge_answers(folder, server.config)
    assert num_replies(folder) == 11  # all others were asked, none twice
    assert len(server.bodies) == 12
    server.plan = [status(400)]
    judge_answers(folder, server.configured(on_refusal="unparsed"))
    assert numbers(folder)[1:] == (12, 1)


def test_the_key_comes_from_the_environment_and_into_no_file(
    folder: Path, server: FakeJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-17")
    judge_answers(folder, server.config)
    score(folder)
    assert set(server.keys) == {"Bearer sk-secret-17"}
    assert all(b"sk-secret-17" not in path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://[::1/v1"])
def test_an_address_that_is_none(url: str, folder: Path) -> None:
    with pytest.raises(UserError, match=r"judge\.base_url"):
        judge_answers(folder, JudgeConfig("openai", model="m", base_url=url, retries=0))


def test_other_settings_ask_anew_and_old_replies_stay(folder: Path, server: FakeJudge) -> None:
    judge_answers(folder, server.config)
    server.then = lambda handler, _: handler.say("Yes")
    judge_answers(folder, server.configured(model="other"))
    first, second = score(folder).judged
    assert {first.title, second.title} == {"judge (openai)", "other (openai)"}
    by_title = {judged.title: judged for judged in (first, second)}
    found = by_title["other (openai)"].agreement
    assert (found["judge (openai)"].share, found["judge (openai)"].n) == (pytest.approx(100 * 8 / 12), 12)
    assert found["exact"].share == pytest.approx(100 * 8 / 12)
    content = json.loads((folder / "results.json").read_text())
    assert content["judged"][0]["judge"]["prompt"] == prompt.DIGEST
