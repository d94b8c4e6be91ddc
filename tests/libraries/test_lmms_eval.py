"""The model `mixlora` of lmms-eval answers as `mixlora eval` does, in any batch, with each kind of adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Image, Value
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from mixlora_cli.config import AdapterConfig, DataConfig, EvalConfig, GenerationConfig, RoutingConfig
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.evaluate import evaluate
from mixlora_cli.evaluation.predictions import read_predictions
from mixlora_cli.models.generate import Decoding
from mixlora_cli.serving.lmms_eval import MixLora
from tiny_data import tiny_data
from tiny_runs import TINY, finished_run

pytestmark = pytest.mark.slow

TASK = """
task: little
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {records}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.pictures
doc_to_text: !function functions.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 5, until: [], do_sample: false, temperature: 0, num_beams: 1}}
process_results: !function functions.score
metric_list:
  - {{metric: letters, aggregation: mean, higher_is_better: true}}
"""
FUNCTIONS = """
def pictures(doc):
    return [] if doc["image"] is None else [doc["image"].convert("RGB")]

def question(doc):
    return doc["question"]

def score(doc, answers):
    return {"letters": float(len(answers[0]))}
"""
NUM = 12
DEFINITION = "Say what it is."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lmms")


@pytest.fixture(scope="module")
def data(folder: Path) -> DataConfig:
    """Twelve unseen records of the task "little", and the same as a task of lmms-eval in `folder`/task."""
    data = tiny_data(folder / "data", unseen=["little"] * NUM)
    rows = []
    for record in json.loads(Path(str(data.unseen)).read_text()):
        question, answer = (turn["value"] for turn in record["conversations"])
        image = Path(str(data.images)) / record["image"] if "image" in record else None
        picture = None if image is None else {"bytes": image.read_bytes(), "path": None}
        rows.append({"image": picture, "question": question, "answer": answer})
    kinds = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_list(rows, features=kinds).to_parquet(str(folder / "little.parquet"))
    (folder / "task").mkdir()
    (folder / "task" / "little.yaml").write_text(TASK.format(records=folder / "little.parquet"))
    (folder / "task" / "functions.py").write_text(FUNCTIONS)
    (folder / "definitions.json").write_text(json.dumps({"little": DEFINITION}))
    return replace(data, metadata=str(folder / "definitions.json"))


@pytest.fixture(scope="module")
def runs(folder: Path, data: DataConfig) -> dict[str, Path]:
    made = {
        name: finished_run(folder / name, data, adapter, routing)
        for name, adapter, routing in (
            ("lora", "lora", "instance"),
            ("instance", "mixlora", "instance"),
            ("task", "mixlora", "task"),
        )
    }
    return {name: run.root for name, run in made.items()}


def our_own(data: DataConfig, run: Path | None, folder: Path) -> list[str]:
    """What `mixlora eval` answers."""
    config = EvalConfig(
        model=TINY,
        adapter=AdapterConfig("none" if run is None else "mixlora"),
        routing=RoutingConfig("instance"),
        data=data,
        eval=GenerationConfig(max_new_tokens=5, cache_features=False),
        output_dir=str(folder),
        run=None if run is None else str(run),
    )
    evaluate(config)
    found = read_predictions(folder / "predictions.jsonl").predictions
    return [each.prediction for each in sorted(found, key=lambda each: each.index)]


@pytest.fixture
def theirs(folder: Path, data: DataConfig) -> Any:
    """What lmms-eval gets from the model for `--model_args`."""

    def answers(arguments: str, **options: Any) -> list[str]:
        found = simple_evaluate(
            model="mixlora",
            model_args=arguments,
            tasks=["little"],
            task_manager=TaskManager(include_path=str(folder / "task"), include_defaults=False),
            **{"batch_size": 1, "limit": -1, **options},
        )
        samples = sorted(found["samples"]["little"], key=lambda each: each["doc_id"])
        letters = found["results"]["little"]["letters,none"]
        texts = [each["filtered_resps"][0] for each in samples]
        assert letters == pytest.approx(sum(map(len, texts)) / len(texts))
        return texts

    return answers


@pytest.mark.parametrize("name", ["base", "lora", "instance", "task"])
def test_answers_are_those_of_mixlora_eval(
    name: str, data: DataConfig, runs: dict[str, Path], theirs: Any, folder: Path, tmp_path: Path
) -> None:
    run = runs.get(name)
    expected = our_own(data, run, tmp_path)
    assert len(expected) == NUM and len(set(expected)) > 1
    arguments = "base=tiny" if run is None else f"run={run}"
    arguments += f",definitions={folder / 'definitions.json'}" if name == "task" else ""
    assert theirs(f"{arguments},batch_size=5") == expected
    if name == "instance":
        assert theirs(arguments) == expected  # one at a time


def test_the_command_in_two_processes(
    data: DataConfig, runs: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "lmms_eval", "--model", "mixlora", "--batch_size", "4"]
    command += ["--model_args", f"run={runs['instance']}", "--tasks", "little", "--log_samples"]
    command += ["--include_path", str(folder / "task"), "--output_path", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0 and "|little|" in ended.stdout.replace(" ", ""), ended.stdout + ended.stderr
    (samples,) = (tmp_path / "out").rglob("*samples_little.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    assert [line["filtered_resps"] for line in lines] == our_own(data, runs["instance"], tmp_path / "own")


@pytest.fixture(scope="module")
def model(runs: dict[str, Path]) -> MixLora:
    return MixLora(run=str(runs["instance"]))


def request(messages: Any, **settings: Any) -> Instance:
    arguments = ("context", lambda _: messages, settings, 0, "little", "test")
    return Instance("generate_until", arguments, 0, {"task": "little", "doc_id": 0, "repeats": 1})


def asked(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Decoding(1024)),
        ({"max_new_tokens": 7, "until": ["\n\n", ""], "do_sample": False}, Decoding(7, stop=("\n\n",))),
        ({"temperature": 0, "top_p": 0, "do_sample": True, "until": "."}, Decoding(1024, stop=(".",))),
        ({"temperature": 0.7, "do_sample": False, "num_beams": 1}, Decoding(1024)),
        ({"temperature": 0.7, "top_p": 0.9, "seed": 3}, Decoding(1024, 0.7, 0.9, 3)),
        ({"do_sample": True, "image_aspect_ratio": "pad", "top_k": None}, Decoding(1024, 1.0)),
    ],
)
def test_how_answers_are_decoded(settings: dict[str, Any], expected: Decoding, model: MixLora) -> None:
    assert model._decoding(request(asked("What?"), **settings)) == expected


def test_a_stop_text_ends_the_answer(model: MixLora) -> None:
    model.task_dict = {"little": {"test": [None]}}
    (whole,) = model.generate_until([request(asked("What is it?"), max_new_tokens=6)])
    stop = whole.text[1:3]
    (short,) = model.generate_until([request(asked("What is it?"), max_new_tokens=6, until=[stop])])
    assert short.text == whole.text[: whole.text.index(stop)].strip()
    assert (whole.token_counts.output_tokens, len(whole.text) > 3) == (6, True)


@pytest.mark.parametrize(
    ("message", "messages", "settings"),
    [
        (
            r"little: generation_kwargs num_beams=3, top_k=5: not done here",
            asked("a"),
            {"num_beams": 3, "top_k": 5},
        ),
        (r"top_p=0: must be in \(0, 1\]", asked("a"), {"temperature": 1, "top_p": 0}),
        (r"little, test 0: a message from tool", [{"role": "tool", "content": "a"}], {}),
        (
            r"little, test 0: a message has video",
            [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}],
            {},
        ),
        (r"little, test 0: a text with <image> in it", asked("Is <image> it?"), {}),
        (
            r"little, test 0: .*no\.png: .*No such file",
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "url": "no.png"}, {"type": "text", "text": "a"}],
                }
            ],
            {},
        ),
        (
            r"little, test 0: a conversation is at most one system turn",
            [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
            {},
        ),
    ],
)
def test_what_cannot_be_done_is_refused(
    message: str, messages: Any, settings: dict[str, Any], model: MixLora
) -> None:
    model.task_dict = {"little": {"test": [None]}}
    with pytest.raises(UserError, match=message) as caught:
        model.generate_until([request(messages, max_new_tokens=2, **settings)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"give run=<folder.*or base=<model>", {}),
        (r"--batch_size auto: must be a number", {"base": "tiny", "batch_size": "auto"}),
        (r"--device cuda:0: the model is on cpu", {"base": "tiny", "device": "cuda:0"}),
        (r"definitions: base does not select by the task", {"base": "tiny", "definitions": "{definitions}"}),
        (r"run=nowhere", {"run": "nowhere"}),
        (r"model=nothing|nothing", {"base": "nothing"}),
        (r"unknown_key", {"base": "tiny", "unknown_key": 1}),
    ],
)
def test_mistakes_in_the_arguments(
    message: str, arguments: dict[str, Any], folder: Path, data: DataConfig
) -> None:
    arguments = {
        key: str(value).format(definitions=folder / "definitions.json") for key, value in arguments.items()
    }
    with pytest.raises(UserError, match=message) as caught:
        MixLora(**arguments)
    assert "\n" not in str(caught.value)


def test_what_is_not_done_says_so(model: MixLora) -> None:
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="generate_until"):
            method([])
