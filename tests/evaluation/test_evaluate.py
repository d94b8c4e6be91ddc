"""The whole way on a tiny model: answer, score, write; resume; run folders; routing by task and by chance."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixlora_cli.benchmarks.benchmark import Benchmark, Origin, Question
from mixlora_cli.benchmarks.metrics import InstanceScores, Measured, Metric
from mixlora_cli.benchmarks.registry import AVERAGED, BENCHMARKS, COLUMNS
from mixlora_cli.config import AdapterConfig, EvalConfig, RoutingConfig
from mixlora_cli.data.encode import Item
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation import scoring
from mixlora_cli.evaluation.evaluate import evaluate
from mixlora_cli.evaluation.predictions import Header, Key, read_predictions
from mixlora_cli.evaluation.results import read_results
from mixlora_cli.evaluation.scoring import score
from mixlora_cli.models.adapters import attach_adapter, save_adapter
from mixlora_cli.models.generate import Generator
from mixlora_cli.models.session import Session
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.stats import Estimate
from mixlora_cli.store import changed_parts
from tiny_runs import finished_run

NUM_UNSEEN = 41
"""Records of the fixture `data`."""
TASKS = ("mme", "pope", "textvqa", "vsr", "snli_ve", "cifar10", "cifar100", "mnist")
DEFINITIONS = {task: f"This is the task called {task}; read the picture and answer." for task in TASKS}
SEEN = {"naming": "Name the number.", "counting": "Count, and answer with a number."}


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that the model is asked to answer."""
    sizes: list[int] = []
    call = Generator.__call__

    def counting(self: Generator, items: Sequence[Item]) -> list[str]:
        sizes.append(len(items))
        return call(self, items)

    monkeypatch.setattr(Generator, "__call__", counting)
    return sizes


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("mixlora_cli.evaluation.local.build_base", fail)


def asked(config: EvalConfig, *benchmarks: str, **changes: object) -> EvalConfig:
    """The same with fewer benchmarks and other settings of `eval`."""
    return replace(config, eval=replace(config.eval, benchmarks=list(benchmarks) or None, **changes))  # type: ignore[arg-type]


def answers(config: EvalConfig) -> tuple[Header, dict[Key, str]]:
    contents = read_predictions(Path(config.output_dir) / "predictions.jsonl")
    assert contents.header is not None
    return contents.header, {p.key: p.prediction for p in contents.predictions}


def adapted(config: EvalConfig, folder: Path, routing: RoutingConfig) -> EvalConfig:
    """With an adapter whose factors matter so much that which are selected decides the answers."""
    settings = AdapterConfig(name="mixlora", dropout=0.0)
    model = attach_adapter(build_tiny().model, settings, routing, rank=2, factors=8)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "mixlora" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    save_adapter(model, folder)
    return replace(config, run=str(folder), adapter=settings)


def test_base_on_all_benchmarks(
    config: EvalConfig,
    generated: list[int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = []
    read = scoring.read_finished
    monkeypatch.setattr(scoring, "read_finished", lambda folder: reads.append(folder) or read(folder))
    results = evaluate(config)
    assert len(reads) == 1  # scores, tables and the report are all of one reading
    assert (sum(generated), max(generated)) == (NUM_UNSEEN, 8)
    folder = Path(config.output_dir)
    assert tuple(score.column for score in results.scores) == COLUMNS
    assert results.mean is not None
    assert results.scores[0].n == 8
    assert read_results(folder) == results == score(folder)
    contents = read_predictions(folder / "predictions.jsonl")
    assert contents.header is not None
    assert contents.header.count == NUM_UNSEEN
    assert contents.header.fingerprint["adapter"] == "none"
    assert results.about["label"] == "base"
    first = next(p for p in contents.predictions if p.index == 0)
    assert (first.benchmark, first.question, first.target) == ("mini_mme", "Is it yes?", "yes")
    assert (first.category, first.image_id) == ("count", "m0")
    shown = capsys.readouterr()
    assert "MMAvg" in shown.out
    assert f"answered {NUM_UNSEEN}/{NUM_UNSEEN}" in shown.err
    assert (folder / "report.html").is_file()


def test_a_killed_evaluation_continues_where_it_was(config: EvalConfig, generated: list[int]) -> None:
    whole = evaluate(config)
    path = Path(config.output_dir) / "predictions.jsonl"
    expected = answers(config)[1]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:21]) + lines[21][:-9])  # header, 20 answers, and most of another
    generated.clear()
    again = evaluate(replace(config, eval=replace(config.eval, batch_size=5)))
    assert sum(generated) == NUM_UNSEEN - 20
    assert (again.scores, again.mean) == (whole.scores, whole.mean)
    assert answers(config)[1] == expected
    generated.clear()
    evaluate(config)
    assert generated == []


def test_changed_decoding_and_changed_data_start_anew(
    config: EvalConfig, generated: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "unseen.json"
    records = json.loads(Path(str(config.data.unseen)).read_text())
    path.write_text(json.dumps(records))
    few = asked(replace(config, data=replace(config.data, unseen=str(path))), "mini_mnist")
    evaluate(few)
    other = asked(few, "mini_mnist", max_new_tokens=2)
    evaluate(other)
    assert "(decoding changed): kept as predictions.1.jsonl" in capsys.readouterr().err
    records[-1]["conversations"][1]["value"] = "9"
    path.write_text(json.dumps(records))
    assert evaluate(other).scores[0].n == 4
    assert "(data changed): kept as predictions.2.jsonl" in capsys.readouterr().err
    assert sum(generated) == 3 * 4


def test_limit_filter_and_seen(config: EvalConfig) -> None:
    results = evaluate(asked(config, "mini_pope", "mini_mme", limit=2, seen=True))
    # POPE: one image whole
    assert {score.column: score.n for score in results.scores} == {"MME": 2, "POPE": 3}
    assert results.mean is None
    assert results.seen is not None
    assert {task: part["n"] for task, part in results.seen.parts.items()} == {"counting": 2.0, "naming": 2.0}
    assert results.about["limit"] == 2


@pytest.mark.parametrize(("name", "label"), [("lora", "LoRA r=2"), ("mixlora", "MixLoRA E=6 r=2")])
def test_a_run_folder_is_evaluated_with_its_adapter(
    config: EvalConfig, generated: list[int], tmp_path: Path, name: str, label: str
) -> None:
    run = finished_run(tmp_path / "run", config.data, name)
    adapter = AdapterConfig(name="mixlora")  # `mixlora eval`'s default: the run folder knows better
    tuned = replace(config, run=str(run.root), adapter=adapter, output_dir=str(tmp_path / "eval"))
    assert evaluate(tuned).label == label
    evaluate(config)
    (base, of_base), (own, of_run) = answers(config), answers(tuned)
    assert of_base != of_run
    assert changed_parts(own.fingerprint, base.fingerprint) == ["adapter"]
    generated.clear()
    (run.adapter / "more.txt").write_text("the adapter's files change")
    evaluate(tuned)
    assert sum(generated) == NUM_UNSEEN


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"give one of the two", lambda c, runs: replace(c, adapter=AdapterConfig(name="none"))),
        (r"no such folder", lambda c, runs: replace(c, run=str(runs / "nowhere"))),
        (r"is no run folder: expected config.yaml", lambda c, runs: replace(c, run=str(runs))),
        (r"has not finished: continue it", lambda c, runs: replace(c, run=str(runs / "unfinished"))),
        (r"not a configuration that `mixlora train` wrote", lambda c, _: c),
        (
            r"Did you mean mini_cifar10\?",
            lambda c, _: asked(replace(c, run=None, adapter=AdapterConfig("none")), "mini_cifar1"),
        ),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_mistakes_are_said_before_a_model_is_built(
    message: str, change: Callable[[EvalConfig, Path], EvalConfig], config: EvalConfig, tmp_path: Path
) -> None:
    for name in ("unfinished", "garbled"):
        run = finished_run(tmp_path / name, config.data, "lora")
    run.config.write_text("model: 3\n")
    (tmp_path / "unfinished" / run.result.name).unlink()
    tuned = replace(config, run=str(run.root), adapter=AdapterConfig(name="mixlora"))
    if "Did you mean" in message:
        tuned = config
    with pytest.raises(UserError, match=message) as caught:
        evaluate(change(tuned, tmp_path))
    assert "\n" not in str(caught.value)


def test_a_benchmark_is_one_object(
    config: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it comes from, how it is asked and scored, what its scores add up to: nothing else has to know of it."""

    class Longest(InstanceScores):
        unit = "points"
        right_or_wrong = False

        def compute(self) -> Measured:
            most = max(self.by_index.values())
            return Measured(Estimate(most, 0.0, 9.0), {"all": {"n": float(len(self.by_index))}})

    toy = Benchmark(
        "toy",
        "Toy",
        Metric("toy", "length of the longest answer", lambda p: len(p.prediction), Longest),
        Origin(
            hub=("nobody/toy",),
            split="test",
            rows=3,
            columns=("image", "say"),
            ask=lambda row: Question(f"Say {row['say']}.", row["say"]),
        ),
    )
    monkeypatch.setitem(BENCHMARKS, "toy", toy)
    import datasets

    pictures = sorted(Path(str(config.data.images)).glob("*.png"))[:3]
    rows = [{"image": {"bytes": each.read_bytes(), "path": None}, "say": each.stem} for each in pictures]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "test.parquet"))
    results = evaluate(asked(config, "toy", "mini_mnist", sources={"toy": str(tmp_path)}))
    assert [each.column for each in results.scores] == ["MNIST", "Toy"]
    found, longest = (
        results.scores[1],
        max(len(text) for key, text in answers(config)[1].items() if key[1] == "toy"),
    )
    assert (found.value, found.low, found.high, found.n, found.unit) == (longest, 0.0, 9.0, 3, "points")
    assert (found.rule, found.parts) == ("length of the longest answer", {"all": {"n": 3.0}})
    asked_about = {
        p.question for p in read_predictions(Path(config.output_dir) / "predictions.jsonl").predictions
    }
    assert {"Say 0.", "Say 1.", "Say 2."} <= asked_about
    assert "Toy" not in COLUMNS and "Toy" not in AVERAGED


@pytest.fixture
def by_task(config: EvalConfig, tmp_path: Path) -> EvalConfig:
    """An adapter that routes by task, with definitions of the unseen tasks."""
    (tmp_path / "metadata.json").write_text(json.dumps(DEFINITIONS))
    data = replace(config.data, metadata=str(tmp_path / "metadata.json"))
    return adapted(replace(config, data=data), tmp_path / "adapter", RoutingConfig("task"))


def define(config: EvalConfig, definitions: dict[str, str]) -> None:
    Path(str(config.data.metadata)).write_text(json.dumps(definitions))


def test_answers_by_definition_do_not_depend_on_the_batch(by_task: EvalConfig, tmp_path: Path) -> None:
    evaluate(by_task)
    alone = asked(replace(by_task, output_dir=str(tmp_path / "alone")), batch_size=1, limit=2)
    evaluate(alone)
    header, together = answers(by_task)
    one_by_one = answers(alone)[1]
    assert len(together) == NUM_UNSEEN
    assert len(one_by_one) >= 16
    assert one_by_one == {key: together[key] for key in one_by_one}
    assert len(header.fingerprint["task definitions"]) == 16


def test_a_changed_definition_starts_anew_and_changes_answers(
    by_task: EvalConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = asked(by_task, "mini_vsr", "mini_textvqa")
    evaluate(tuned)
    before = answers(tuned)
    # Only definitions of evaluated tasks count.
    define(tuned, {**DEFINITIONS, "mnist": "Something else."})
    evaluate(tuned)
    assert answers(tuned) == before
    define(tuned, {**DEFINITIONS, "textvqa": "Read what is written."})
    capsys.readouterr()
    evaluate(tuned)
    assert "(task definitions changed): kept as predictions.1.jsonl" in capsys.readouterr().err
    after = answers(tuned)
    assert changed_parts(after[0].fingerprint, before[0].fingerprint) == ["task definitions"]
    changed = {key for key in before[1] if before[1][key] != after[1][key]}
    assert {benchmark for _, benchmark, _ in changed} == {"mini_textvqa"}


def test_seen_tasks_need_definitions_too(by_task: EvalConfig) -> None:
    few = asked(by_task, "mini_vsr", seen=True)
    with pytest.raises(UserError, match=r"2 of 3 tasks have none \(naming, counting\)"):
        evaluate(few)
    define(few, DEFINITIONS | SEEN)
    results = evaluate(few)
    assert results.seen is not None
    assert results.seen.n == 10


@pytest.mark.usefixtures("no_model")
def test_missing_definitions_are_said_before_a_model_is_built(by_task: EvalConfig) -> None:
    define(by_task, {task: text for task, text in DEFINITIONS.items() if task not in ("vsr", "mme")})
    with pytest.raises(UserError, match=r"2 of 8 tasks have none \(mme, vsr\): add them to .*metadata.json"):
        evaluate(by_task)
    with pytest.raises(UserError, match=r"8 of 8 tasks have none .* give data\.metadata=<file>"):
        evaluate(replace(by_task, data=replace(by_task.data, metadata=None)))
    (Path(str(by_task.run)) / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json: cannot be read"):
        evaluate(by_task)
    assert not Path(by_task.output_dir).exists()


def test_the_adapter_s_width_is_checked(by_task: EvalConfig) -> None:
    path = Path(str(by_task.run)) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_embedding_dim": 24}))
    with pytest.raises(UserError, match="read task embeddings of 24 features, but tiny gives 32"):
        evaluate(by_task)


@pytest.mark.parametrize("decode", ["prefill", "step"])
def test_random_draws_follow_the_seed_and_the_instance_alone(
    decode: str, config: EvalConfig, tmp_path: Path
) -> None:
    routing = RoutingConfig("random", decode=decode)  # type: ignore[arg-type]
    whole = asked(adapted(config, tmp_path / "adapter", routing), "mini_mnist", "mini_vsr", "mini_pope")

    def answered(config: EvalConfig, torchs_own_seed: int) -> tuple[Header, dict[Key, str]]:
        torch.manual_seed(torchs_own_seed)  # it must not matter
        evaluate(config)
        return answers(config)

    header, together = answered(whole, 0)
    assert len(together) == 17
    assert header.fingerprint["draws"] == "by instance, seed 0"
    alone = replace(whole, output_dir=str(tmp_path / "alone"), eval=replace(whole.eval, batch_size=1))
    by_one, one_by_one = answered(alone, 1)
    assert (changed_parts(by_one.fingerprint, header.fingerprint), one_by_one) == ([], together)
    other, by_other_seed = answered(replace(whole, output_dir=str(tmp_path / "other"), seed=1), 0)
    assert changed_parts(other.fingerprint, header.fingerprint) == ["draws"]
    assert sum(by_other_seed[key] != together[key] for key in together) > 8
    # What a killed evaluation left is continued to the same answers.
    path = Path(whole.output_dir) / "predictions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    assert answered(whole, 1)[1] == together


def test_routing_by_instance_depends_on_neither(config: EvalConfig, tmp_path: Path) -> None:
    few = asked(adapted(config, tmp_path / "adapter", RoutingConfig("instance")), "mini_mnist")
    evaluate(few)
    assert not {"draws", "task definitions"} & answers(few)[0].fingerprint.keys()


Losses = dict[Key, tuple[float, int]]


def losses(config: EvalConfig) -> Losses:
    """Of those that have one, by their keys."""
    found = read_predictions(Path(config.output_dir) / "predictions.jsonl").predictions
    return {p.key: (p.nll, p.tokens) for p in found if p.nll is not None and p.tokens is not None}


def nearly(expected: Losses) -> Losses:
    return {key: (pytest.approx(nll, rel=1e-5), tokens) for key, (nll, tokens) in expected.items()}


@pytest.mark.parametrize("routing", ["instance", "task", "random"])
def test_held_out_answers_have_losses_whatever_the_batch_and_the_interruption(
    routing: str, config: EvalConfig, tmp_path: Path
) -> None:
    (tmp_path / "metadata.json").write_text(json.dumps(DEFINITIONS | SEEN))
    config = replace(config, data=replace(config.data, metadata=str(tmp_path / "metadata.json")))
    run = adapted(config, tmp_path / "adapter", RoutingConfig(routing))
    whole = asked(run, "mini_mnist", seen=True)
    results = evaluate(whole)
    expected = losses(whole)
    assert {split for split, *_ in expected} == {"heldout"} and len(expected) == 10
    assert len({round(nll, 4) for nll, _ in expected.values()}) > 7
    assert results.loss is not None and results.loss == read_results(Path(whole.output_dir)).loss
    by_task = [[loss for (_, name, _), loss in expected.items() if name == task] for task in sorted(SEEN)]
    of_tasks = [sum(nll for nll, _ in each) / sum(tokens for _, tokens in each) for each in by_task]
    assert [part["loss"] for part in results.loss.parts.values()] == pytest.approx(of_tasks)
    assert results.loss.value == pytest.approx(sum(of_tasks) / 2)
    path = Path(whole.output_dir) / "predictions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        b"".join(lines[:8]) + lines[8][:-9]
    )  # three held-out ones are there, and most of another
    again = replace(whole, eval=replace(whole.eval, batch_size=3))
    assert evaluate(again).loss is not None
    assert losses(again) == nearly(expected)
    if routing == "random":
        other = replace(whole, seed=1, output_dir=str(tmp_path / "other"))
        evaluate(other)
        assert sum(losses(other)[key] != loss for key, loss in expected.items()) > 7


def test_a_file_from_before_there_were_losses_is_not_continued_without_them(
    config: EvalConfig, generated: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    few = asked(config, "mini_mnist", seen=True)
    evaluate(few)
    path = Path(few.output_dir) / "predictions.jsonl"
    header, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    del header["fingerprint"]["losses"]
    old = [{key: value for key, value in line.items() if key not in ("nll", "tokens")} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *old]))
    results = score(path.parent)  # as it is, it has answers alone
    assert results.seen is not None and results.loss is None
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *old[:9]]))
    assert evaluate(few).loss is not None
    assert "(losses changed): kept as predictions.1.jsonl" in capsys.readouterr().err
    unseen = asked(config, "mini_mnist")
    evaluate(unseen)
    assert "losses" not in answers(unseen)[0].fingerprint  # those of benchmarks alone go on as they did


def test_a_template_that_hides_answers_takes_the_losses_alone_and_says_why(
    config: EvalConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UserError("chat template odd changes the answers")

    monkeypatch.setattr("mixlora_cli.evaluation.local.encode_records", refuse)
    results = evaluate(asked(config, "mini_mnist", seen=True))
    assert results.seen is not None and results.seen.n == 10 and results.loss is None
    assert "held-out instances get no loss: chat template odd changes" in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_refused(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "answer_losses", lambda _, items, seed: [(float("nan"), 1) for _ in items])
    with pytest.raises(UserError, match=r"held-out record \d \(task \w+\) is nan: the model has diverged"):
        evaluate(asked(config, "mini_mnist", seen=True))
