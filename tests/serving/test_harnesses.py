"""What others' harnesses, and `mixlora eval` itself, get from a real server."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from mixlora_cli.config import AdapterConfig, DataConfig, EvalConfig, GenerationConfig, RoutingConfig
from mixlora_cli.data.template import Turn
from mixlora_cli.evaluation.evaluate import evaluate
from mixlora_cli.evaluation.predictions import Key, read_predictions
from mixlora_cli.models.generate import Decoding
from serving import Served, data_url, png, serving
from tiny_data import tiny_data
from tiny_runs import TINY, finished_run

KINDS = {"lora": "instance", "instance": "instance", "task": "task", "random": "random"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two tasks that the training knows, and two that it does not; all have definitions."""
    return tiny_data(
        tmp_path_factory.mktemp("data"),
        train=["counting", "reading"] * 4,
        heldout=["counting", "reading"] * 8,
        unseen=["naming", "comparing"] * 10,
    )


@pytest.fixture(scope="module")
def runs(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: finished_run(
            folder / name, data, "lora" if name == "lora" else "mixlora", routing, router_spread=50
        ).root
        for name, routing in KINDS.items()
    }


@pytest.fixture(scope="module")
def served(runs: dict[str, Path]) -> Iterator[Served]:
    with serving([*runs.values()]) as found:
        yield found


def answers(run: Path | None, data: DataConfig, folder: Path, **settings: object) -> dict[Key, str]:
    config = EvalConfig(
        model=TINY,
        adapter=AdapterConfig("none" if run is None else "mixlora"),
        routing=RoutingConfig("instance"),
        data=data,
        eval=GenerationConfig(max_new_tokens=6, seen=True, **settings),  # type: ignore[arg-type]
        output_dir=str(folder),
        run=None if run is None else str(run),
    )
    results = evaluate(config)
    assert results.label == {"base": "base"}.get(folder.name, results.label)
    found = read_predictions(folder / "predictions.jsonl").predictions
    return {each.key: each.prediction for each in found}


@pytest.mark.parametrize("name", ["base", *KINDS])
def test_a_server_s_answers_are_those_of_the_model_here(
    name: str, served: Served, runs: dict[str, Path], data: DataConfig, tmp_path: Path
) -> None:
    run = runs.get(name)
    here = answers(run, data, tmp_path / "here", cache_features=False)
    model = "base" if run is None else None
    there = answers(run, data, tmp_path / "there", server=f"{served.url}/v1", server_model=model)
    assert len(here) == 36 and len(set(here.values())) > 3
    assert there == here


PICTURES = [png(seed, (120, 90)) for seed in range(3)]


def as_jpeg(picture: bytes) -> bytes:
    """As VLMEvalKit sends every picture."""
    written = io.BytesIO()
    Image.open(io.BytesIO(picture)).save(written, "JPEG")
    return written.getvalue()


def vlmevalkit(
    url: str, model: str, parts: Sequence[str | bytes], system: str | None = None, **fields: object
) -> httpx.Response:
    """A request as VLMEvalKit sends it (`vlmeval/api/lmdeploy.py`, which `--base-url` takes)."""
    content: list[dict[str, object]] = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(as_jpeg(part), "image/jpeg")}}
        for part in parts
    ]
    messages: list[dict[str, object]] = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    payload = {"model": model, "messages": messages, "n": 1, "max_tokens": 6, "temperature": 0.0, **fields}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-admin"}
    return httpx.post(
        f"{url}/v1/chat/completions", headers=headers, content=json.dumps(payload).encode(), timeout=60
    )


QUESTIONS: dict[str, tuple[list[str | bytes], str | None]] = {
    "picture first": ([PICTURES[0], "What is it?\nA. a cat\nB. a dog\nAnswer with the letter."], None),
    "several": (["First ", PICTURES[0], "second ", PICTURES[1], "third ", PICTURES[2], "differ?"], None),
    "system": ([PICTURES[1], "Is it red? Answer yes or no."], "You are a judge."),
    "text": (["How many legs has a dog?"], None),
}


@pytest.mark.parametrize("model", ["base", "lora", "instance", "task"])
def test_vlmevalkit_s_requests_get_the_answers_of_the_model(model: str, served: Served) -> None:
    """Four at once, as it asks by itself (`--api-nproc 4`)."""
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(vlmevalkit, served.url, model, *question) for question in QUESTIONS.values()]
    responses = [each.result() for each in asked]
    assert [each.status_code for each in responses] == [200] * 4, [each.text for each in responses]
    texts = [json.loads(each.text)["choices"][0]["message"]["content"].strip() for each in responses]
    expected = []
    for parts, system in QUESTIONS.values():
        text = "".join(part if isinstance(part, str) else "<image>" for part in parts)
        turns = [*([Turn("system", system)] if system else []), Turn("human", text)]
        pictures = [as_jpeg(part) for part in parts if isinstance(part, bytes)]
        question = served.models[model].prepare(turns, pictures)
        (answer,) = served.models[model].write([question], [Decoding(6)])
        expected.append(answer.text)
    assert texts == expected and len(set(texts)) > 1


def test_vlmevalkit_s_own_length_is_refused_in_one_line(served: Served) -> None:
    """`--max-tokens` is 32,768 unless it is given."""
    response = vlmevalkit(served.url, "base", ["Hello"], max_tokens=2**15)
    assert response.status_code == 400 and "max_tokens=32768: at most" in response.json()["error"]["message"]
