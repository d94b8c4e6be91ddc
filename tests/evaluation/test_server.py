"""`eval.server=URL`: what a server is asked, how its answers are kept and scored, and what may go wrong with it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from mixlora_cli import launch
from mixlora_cli.config import AdapterConfig, EvalConfig, LaunchConfig, RequestsConfig
from mixlora_cli.data.images import opened
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.compare import compare, read_group
from mixlora_cli.evaluation.evaluate import evaluate
from mixlora_cli.evaluation.predictions import Header, Key, read_predictions
from mixlora_cli.evaluation.results import Results, read_results
from mixlora_cli.evaluation.server import data_url
from mixlora_cli.models.session import find_run
from openai_server import Body, FakeServer, Handler, hang_up, sleepy, status
from tiny_runs import finished_run

NUM_UNSEEN = 41
"""Records of the fixture `data`."""


def echo(handler: Handler, body: Body) -> None:
    """ " yes " to some, by the question; the same question always gets the same answer."""
    text = json.dumps(body["messages"])
    handler.say(" yes " if len(text) % 2 else "no")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    fake = FakeServer(echo)
    with fake.listening(monkeypatch):
        yield fake


@pytest.fixture(autouse=True)
def no_model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here needs a model."""
    monkeypatch.setattr("mixlora_cli.evaluation.local.build_base", None)


def asking(
    config: EvalConfig, fake: FakeServer, model: str | None = "some/vlm", **changes: Any
) -> EvalConfig:
    """The same, asked of the server; `changes` are of `eval.requests` where it has them, else of `eval`."""
    requests = {key: changes.pop(key) for key in [*changes] if key in RequestsConfig.__dataclass_fields__}
    quick = {"concurrency": 1, "timeout": 5.0, "retries": 3, "first_wait": 0.01, **requests}
    settings = {"server": fake.url, "server_model": model, "requests": RequestsConfig(**quick), **changes}
    return replace(config, eval=replace(config.eval, **settings))


def answers(config: EvalConfig) -> tuple[Header, dict[Key, str]]:
    contents = read_predictions(Path(config.output_dir) / "predictions.jsonl")
    assert contents.header is not None
    return contents.header, {p.key: p.prediction for p in contents.predictions}


def own_data(config: EvalConfig, folder: Path, *records: Body) -> EvalConfig:
    raws = [{"id": f"r{n}", "benchmark": "mini_mnist", **record} for n, record in enumerate(records)]
    (folder / "own.json").write_text(json.dumps(raws))
    return replace(config, data=replace(config.data, unseen=str(folder / "own.json"), heldout=None))


def turns(*texts: str) -> list[Body]:
    roles = ("human", "gpt") * len(texts)
    return [{"from": role, "value": text} for role, text in zip(roles, texts, strict=False)]


def test_a_row_as_of_a_model_here(
    config: EvalConfig, server: FakeServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = asking(config, server, concurrency=4)
    results = evaluate(asked)
    assert results.label == "some/vlm" and results == read_results(Path(config.output_dir))
    assert len(server.bodies) == NUM_UNSEEN and set(server.paths) == {"/v1/chat/completions"}
    assert results.mean is not None and results.mean.n == NUM_UNSEEN - 8
    header, found = answers(asked)
    assert len(found) == NUM_UNSEEN and set(found.values()) == {"yes", "no"}  # without the space around
    assert {name: header.fingerprint[name] for name in ("server", "model")} == {
        "server": server.url,
        "model": "some/vlm",
    }
    assert "some/vlm" in capsys.readouterr().out
    assert (Path(config.output_dir) / "report.html").is_file()
    other = asking(replace(config, output_dir=str(tmp_path / "other")), server, model="another")
    evaluate(other)
    (comparison,) = compare([read_group(asked.output_dir), read_group(other.output_dir)])
    assert {line.difference.value for line in comparison.lines if line.difference} == {0.0}
    assert comparison.second.label == "another"


def test_what_is_sent(config: EvalConfig, server: FakeServer, tmp_path: Path) -> None:
    """System turns, earlier turns and pictures at their places in the text, as files; greedy."""
    asked = own_data(
        config,
        tmp_path,
        {"image": "0.png", "conversations": turns("<image>\nWhich digit?", "7")},
        {
            "images": ["1.png", "2.png"],
            "conversations": [
                {"from": "system", "value": "Be brief. "},
                *turns("Is <image> like <image>?", "no", " Why? ", "size"),
            ],
        },
        {"conversations": turns("How many legs has a dog?", "4")},
    )
    evaluate(asking(asked, server, extra={"seed": 3}))

    def picture(number: int) -> Body:
        data = (Path(str(config.data.images)) / f"{number}.png").read_bytes()
        return {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"},
        }

    def text(words: str) -> Body:
        return {"type": "text", "text": words}

    first = [{"role": "user", "content": [picture(0), text("Which digit?")]}]
    second = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [text("Is "), picture(1), text(" like "), picture(2), text("?")]},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "Why?"},
    ]
    third = [{"role": "user", "content": "How many legs has a dog?"}]
    assert server.bodies == [
        {"model": "some/vlm", "messages": messages, "temperature": 0, "max_tokens": 4, "seed": 3}
        for messages in (first, second, third)
    ]


def test_a_null_takes_a_field_out(config: EvalConfig, server: FakeServer) -> None:
    extra = {"max_tokens": None, "max_completion_tokens": 9}
    evaluate(asking(config, server, benchmarks=["mini_mnist"], extra=extra))
    assert server.bodies[0].keys() == {"model", "messages", "temperature", "max_completion_tokens"}


@pytest.mark.parametrize("kind", ["jpeg", "palette", "sixteen bits", "on its side", "tiff", "bytes"])
def test_a_picture_goes_as_its_file_where_every_reader_sees_the_same_in_it(kind: str, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8))
    path, options = tmp_path / "x.png", {}
    if kind == "jpeg":
        path = tmp_path / "x.jpg"
    elif kind == "palette":
        image = image.quantize(8)
    elif kind == "sixteen bits":
        image = Image.fromarray(np.arange(54, dtype=np.uint16).reshape(6, 9) * 1000)
    elif kind == "on its side":
        path, options = tmp_path / "x.jpg", {"exif": Image.Exif()}
        options["exif"][ExifTags.Base.Orientation] = 6
    elif kind == "tiff":
        path = tmp_path / "x.tif"
    image.save(path, **options)
    picture = path.read_bytes() if kind == "bytes" else path
    head, _, data = data_url(picture).partition(";base64,")
    sent = base64.b64decode(data)
    as_it_is = kind in ("jpeg", "bytes")
    assert head == ("data:image/jpeg" if kind == "jpeg" else "data:image/png")
    assert (sent == path.read_bytes()) == as_it_is
    with Image.open(io.BytesIO(sent)) as seen:
        assert np.array_equal(np.asarray(seen.convert("RGB")), np.asarray(opened(picture)))


def test_it_continues_where_it_was(
    config: EvalConfig, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = asking(config, server, retries=0)
    server.plan, server.then = [echo] * 11, hang_up
    with pytest.raises(UserError, match=r"unanswered after up to 0 retries.*asks only what is missing"):
        evaluate(whole)
    assert len(answers(whole)[1]) == 11
    asked, server.then = len(server.bodies), echo
    assert asked <= 11 + 3  # it did not try every instance on a dead server
    evaluate(whole)
    assert len(server.bodies) == asked + NUM_UNSEEN - 11
    assert "continuing: 11 of 41" in capsys.readouterr().err
    evaluate(asking(config, server, concurrency=8))  # nothing is asked twice
    assert len(server.bodies) == asked + NUM_UNSEEN - 11
    alone = FakeServer(echo, url=server.url)
    evaluate(asking(config, alone, retries=0))  # nor is a server needed for that


@pytest.mark.parametrize(
    ("changed", "changes"),
    [
        ("model", {"model": "another"}),
        ("decoding", {"max_new_tokens": 5}),
        ("decoding", {"extra": {"top_k": 1}}),
        ("server", {"server": "http://localhost:{port}/v1"}),
    ],
)
def test_other_answers_are_not_mixed_in(
    changed: str,
    changes: Body,
    config: EvalConfig,
    server: FakeServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    first = asking(config, server, benchmarks=["mini_mnist"])
    evaluate(first)
    port = server.url.rpartition(":")[2].removesuffix("/v1")
    changes = {key: value.format(port=port) if key == "server" else value for key, value in changes.items()}
    evaluate(asking(config, server, benchmarks=["mini_mnist"], **changes))
    assert f"({changed} changed): kept as predictions.1.jsonl" in capsys.readouterr().err
    assert len(server.bodies) == 8


def test_a_password_and_a_key_go_into_no_file(
    config: EvalConfig, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-17")
    asked = asking(config, server, benchmarks=["mini_mnist"])
    evaluate(asked)
    assert set(server.keys) == {"Bearer sk-secret-17"}
    named = asking(
        config, server, benchmarks=["mini_mnist"], server=server.url.replace("//", "//me:hidden-18@")
    )
    evaluate(named)  # the same place: nothing is asked anew
    assert len(server.bodies) == 4
    files = [path.read_bytes() for path in Path(config.output_dir).rglob("*") if path.is_file()]
    assert len(files) > 3 and not any(b"sk-secret-17" in each or b"hidden-18" in each for each in files)


@pytest.mark.parametrize("trouble", [status(500), status(429, Retry_After="0"), hang_up, status(503), sleepy])
def test_trouble_that_passes_changes_nothing(
    trouble: Any, config: EvalConfig, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.plan = [trouble, echo, trouble, trouble]
    few = asking(config, server, benchmarks=["mini_mnist"], timeout=0.5)
    evaluate(few)
    assert len(server.bodies) == 4 + 3
    assert len(answers(few)[1]) == 4 and "" not in answers(few)[1].values()
    assert capsys.readouterr().err.count("trying again, up to 3 times") == 1


def test_a_server_on_this_machine_is_asked_without_a_proxy(
    config: EvalConfig, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_PROXY")
    for name in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    evaluate(asking(config, server, benchmarks=["mini_mnist"], retries=0))
    assert len(server.bodies) == 4


def test_it_waits_as_long_as_the_server_asks(config: EvalConfig, server: FakeServer) -> None:
    server.plan = [status(429, Retry_After="0.4")]
    evaluate(asking(config, server, benchmarks=["mini_mnist"]))
    assert server.times[1] - server.times[0] >= 0.4


def filtered(handler: Handler, _: Body) -> None:
    handler.say(None, "content_filter")


@pytest.mark.parametrize("refusal", [status(400), status(413), filtered])
def test_a_refused_instance_stops_or_counts_as_an_empty_answer(
    refusal: Any, config: EvalConfig, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.plan = [refusal]
    few = asking(config, server, benchmarks=["mini_mnist"])
    with pytest.raises(UserError, match=r"refused 1 instances.*eval\.requests\.on_refusal=empty"):
        evaluate(few)
    assert len(answers(few)[1]) == 3  # all others were asked
    server.plan = [refusal]
    evaluate(asking(config, server, benchmarks=["mini_mnist"], on_refusal="empty"))
    assert list(answers(few)[1].values()).count("") == 1
    assert "1 of 4 answers of the server are empty" in capsys.readouterr().err


def test_refusing_everything_stops_soon(config: EvalConfig, server: FakeServer) -> None:
    server.then = status(400)
    with pytest.raises(UserError, match=r"refused 3 instances; the last said: HTTP 400"):
        evaluate(asking(config, server))
    assert len(server.bodies) <= 4


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"ConnectError.*\bAll other replies are kept", {"server": "http://127.0.0.1:1/v1", "retries": 0}),
        (r"HTTP 404.*check eval\.server \(it ends in /v1\), eval\.server_model", {"then": status(404)}),
        (
            r"HTTP 404.*eval\.server_model; its models are small, large",
            {"then": status(404), "models": [{"id": "small"}, {"id": "large"}]},
        ),
        (r"HTTP 401.*is OPENAI_API_KEY set", {"then": status(401)}),
        (r"eval\.server=localhost:8000", {"server": "localhost:8000"}),
        (r"eval\.server=http://\[::1/v1: .*expected http://host:port/v1", {"server": "http://[::1/v1"}),
        (r"does not list its models; give eval\.server_model=", {"model": None}),
        (
            r"has small, large; give eval\.server_model=",
            {"model": None, "models": [{"id": "small"}, {"id": "large"}]},
        ),
        (
            r"cannot be asked for its models: ConnectError.*check eval\.server",
            {"model": None, "server": "http://127.0.0.1:1/v1", "retries": 0},
        ),
        (
            r"a reply without its text",
            {"then": lambda handler, _: handler.reply(200, b"<html>"), "retries": 0},
        ),
    ],
)
def test_mistakes_are_one_line(message: str, change: Body, config: EvalConfig, server: FakeServer) -> None:
    server.then, server.models = change.pop("then", echo), change.pop("models", None)
    with pytest.raises(UserError, match=message) as caught:
        evaluate(asking(config, server, **change))
    assert "\n" not in str(caught.value)
    assert len(server.bodies) <= 4  # it did not ask everything first


def test_the_only_model_need_not_be_named(config: EvalConfig, server: FakeServer) -> None:
    server.models = [{"id": "org/only"}]
    results = launch.evaluate(asking(config, server, model=None, benchmarks=["mini_mnist"]))
    assert results.label == "org/only" == server.bodies[0]["model"]


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (
            r"eval\.server_model=x: is a model of the server in eval\.server",
            lambda c: {"eval": replace(c.eval, server=None)},
        ),
        (r"launch\.nproc=2: a server is asked by one process", lambda _: {"launch": LaunchConfig(nproc=2)}),
        (
            r"launch\.nnodes=2: a server is asked by one process",
            lambda _: {"launch": LaunchConfig(nnodes=2, rdzv_endpoint="a:1")},
        ),
    ],
)
def test_keys_that_do_not_go_together(
    message: str, change: Callable[[EvalConfig], Body], config: EvalConfig, server: FakeServer
) -> None:
    asked = asking(config, server, model="x")
    with pytest.raises(ValueError, match=message):
        replace(asked, **change(asked))


def served(config: EvalConfig, name: str = "own", **other: str) -> Body:
    """What `mixlora serve` lists of a run."""
    run = find_run(config.run, config.model)
    own = {"label": run.label, "digest": run.digest, **other}
    return {"id": name, "object": "model", "owned_by": "mixlora", "mixlora": own}


@pytest.fixture
def by_task(config: EvalConfig, tmp_path: Path) -> EvalConfig:
    """A finished run that routes by task; its data has a definition of each unseen task."""
    names = ("mme", "pope", "textvqa", "vsr", "snli_ve", "cifar10", "cifar100", "mnist")
    (tmp_path / "metadata.json").write_text(json.dumps({name: f"This is {name}." for name in names}))
    data = replace(config.data, metadata=str(tmp_path / "metadata.json"))
    run = finished_run(tmp_path / "own", data, routing="task")
    adapter = AdapterConfig(name="mixlora")
    return replace(config, data=data, run=str(run.root), adapter=adapter, output_dir=str(run.root / "eval"))


def test_a_run_that_routes_by_task_sends_definitions(by_task: EvalConfig, server: FakeServer) -> None:
    server.models = [{"id": "base"}, served(by_task)]
    few = asking(by_task, server, model=None, benchmarks=["mini_mnist", "mini_vsr"])
    results: Results = evaluate(few)
    assert results.label == "MixLoRA E=6 r=2 task"
    assert [body["definition"] for body in server.bodies].count("This is mnist.") == 4
    assert {body["definition"] for body in server.bodies} == {"This is mnist.", "This is vsr."}
    assert {body["model"] for body in server.bodies} == {"own"}
    assert len(answers(few)[0].fingerprint["adapter"]) == 16


@pytest.mark.parametrize(
    ("message", "models"),
    [
        (r"is none of `mixlora serve`; start `mixlora serve run=", lambda _: [{"id": "own"}]),
        (r"is none of `mixlora serve`", lambda _: None),
        (r"has other; start `mixlora serve run=", lambda config: [served(config, "other")]),
        (
            r"\(MixLoRA E=6 r=2 task\): own at .* is another adapter \(LoRA r=2\); give eval\.server_model",
            lambda config: [served(config, label="LoRA r=2", digest="0" * 16)],
        ),
    ],
)
def test_a_run_that_the_server_has_not(
    message: str, models: Callable[[EvalConfig], list[Body] | None], by_task: EvalConfig, server: FakeServer
) -> None:
    server.models = models(by_task)
    with pytest.raises(UserError, match=message) as caught:
        evaluate(asking(by_task, server, model=None))
    assert "\n" not in str(caught.value) and server.bodies == []


def test_random_routing_needs_the_seed_that_servers_draw_with(
    config: EvalConfig, server: FakeServer, tmp_path: Path
) -> None:
    run = finished_run(tmp_path / "own", config.data, routing="random")
    by_chance = replace(config, run=str(run.root), adapter=AdapterConfig(name="mixlora"), seed=1)
    with pytest.raises(UserError, match=r"seed=1: a server draws the factors of .* with seed 0"):
        evaluate(asking(by_chance, server, model=None))


def test_a_server_gives_no_losses_and_it_is_said(
    config: EvalConfig, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    results = evaluate(asking(config, server, benchmarks=["mini_mnist"], seen=True))
    assert results.seen is not None and results.seen.n == 10 and results.loss is None
    said = "held-out instances get no loss: a server does not tell how likely a given answer is"
    assert capsys.readouterr().err.count(said) == 1
