"""Real rows of MNIST and CIFAR, wrong and partial copies, pictures that the user fetches, benchmarks of one's own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from foolbox_rows import foolbox_pictures, foolbox_rows, table
from mixlora_cli.benchmarks import registry as ask
from mixlora_cli.benchmarks.benchmark import Origin
from mixlora_cli.benchmarks.registry import BENCHMARKS, CIFAR10, CIFAR100, DIGITS
from mixlora_cli.benchmarks.rows import from_lines
from mixlora_cli.benchmarks.sources import Instances, open_benchmark, sourced
from mixlora_cli.config import EvalConfig
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.evaluate import evaluate
from mixlora_cli.evaluation.instances import choose_instances
from mixlora_cli.evaluation.predictions import read_predictions
from mixlora_cli.evaluation.scoring import score

LABELS = {"mnist": DIGITS, "cifar10": CIFAR10, "cifar100": CIFAR100}
HUB_NAMES = {"crab": "cra"}
"""Where the hub's name of a class is not ours: `uoft-cs/cifar100` has a misprint in class 26."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(name: str, place: object = None, **options: Any) -> Instances:
    return open_benchmark(name, {} if place is None else {name: str(place)}, **options)


def refused(message: str, name: str, place: object = None, **options: Any) -> str:
    """What is said about a source that cannot be had, in one line."""
    with pytest.raises(UserError, match=message) as caught:
        opened(name, place, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def from_source(config: EvalConfig, name: str, place: object, **changes: Any) -> EvalConfig:
    return replace(config, eval=replace(config.eval, sources={name: str(place)}, **changes))


def laid_out(folder: Path, name: str, rows: list[dict[str, Any]], named: bool = True) -> Path:
    """Two parquet files as in a clone of the hub's repository."""
    names = [HUB_NAMES.get(label, label).replace(" ", "_") for label in LABELS[name]] if named else None
    (folder / name / "data").mkdir(parents=True)
    for part in range(2):
        file = folder / name / "data" / f"test-{part:05d}-of-00002.parquet"
        table(name, rows[10 * part :][:10], names).to_parquet(str(file))
    return folder / name


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
@pytest.mark.parametrize("named", [True, False])
def test_a_clone_of_the_hub_becomes_records(name: str, named: bool, tmp_path: Path) -> None:
    folder = laid_out(tmp_path, name, foolbox_rows(name), named)
    found = open_benchmark(name, {name: str(folder)})
    records = [json.loads(line) for line in found.records.read_text().splitlines()]
    assert (found.rows, found.left_out, len(records)) == (20, 0, 20)
    for record, (file, number) in zip(records, foolbox_pictures(name), strict=True):
        question, answer = record["conversations"]
        assert answer["value"] == LABELS[name][number]
        assert record["labels"] == list(LABELS[name])
        assert (found.images / record["image"]).read_bytes() == file.read_bytes()
        thing = "number" if name == "mnist" else "object"
        assert question["value"] == (
            f"<image>\nWhat is the {thing} in the image? Please only answer a single {thing} in "
            f"{', '.join(LABELS[name])}."
        )
    before = found.records.stat().st_mtime_ns
    assert open_benchmark(name, {name: str(folder)}) == found
    assert found.records.stat().st_mtime_ns == before  # not made again


def test_what_foolbox_s_classes_are() -> None:
    """Numbers in file names are the hub's: names of some of the classes."""
    assert {number for _, number in foolbox_pictures("mnist")} <= set(range(10))
    assert (len(CIFAR100), CIFAR100[26], CIFAR100[47]) == (100, "crab", "maple tree")
    assert (CIFAR100[0], CIFAR100[99], CIFAR10[9]) == ("apple", "worm", "truck")


def test_a_single_file_and_a_saved_data_set_are_the_same(tmp_path: Path) -> None:
    data = table("mnist", foolbox_rows("mnist"), list(DIGITS))
    data.to_parquet(str(tmp_path / "digits.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"test": data, "train": data.select([0])}).save_to_disk(str(tmp_path / "splits"))
    found = [opened("mnist", tmp_path / path) for path in ("digits.parquet", "saved", "splits")]
    assert len({each.records.read_text() for each in found}) == 1


def test_the_whole_way_from_parquet_to_scores(
    config: EvalConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("cifar10", "cifar100", "mnist")
    sources = {name: str(laid_out(tmp_path, name, foolbox_rows(name))) for name in names}
    whole = replace(config, eval=replace(config.eval, sources=sources))
    results = evaluate(whole)
    assert {each.column: each.n for each in results.scores} == {"CIFAR-10": 20, "CIFAR-100": 20, "MNIST": 20}
    assert "mnist: " in (said := capsys.readouterr().err)
    assert "has 20 rows, the whole split 10000" in said
    assert results.about["sources"]["mnist"]["rows"] == 20
    assert results.about["sample"]["mnist"] == {"answered": 20, "of": 20}
    path = Path(config.output_dir) / "predictions.jsonl"
    mnist = [p for p in read_predictions(path).predictions if p.benchmark == "mnist"]
    images = Path(results.about["images"]["mnist"])
    assert all((images / p.image).is_file() for p in mnist)
    # Answers as a good model gives them, in the same file: the score follows.
    lines = path.read_text().splitlines()
    right = [json.loads(line) for line in lines[1:]]
    for number, line in enumerate(sorted(right, key=lambda line: (line["benchmark"], line["index"]))):
        line["prediction"] = (
            f"The answer is {line['target'].upper()}." if number % 20 < 15 else "I see nothing"
        )
    path.write_text("\n".join([lines[0], *map(json.dumps, right)]) + "\n")
    assert {each.column: each.value for each in score(path.parent).scores} == {
        "CIFAR-10": 75.0, "CIFAR-100": 75.0, "MNIST": 75.0
    }  # fmt: skip


def test_a_limit_takes_labels_evenly_and_is_said(config: EvalConfig, tmp_path: Path) -> None:
    place = laid_out(tmp_path, "mnist", foolbox_rows("mnist"))
    results = evaluate(from_source(config, "mnist", place, limit=8))
    assert results.about["sample"]["mnist"] == {"answered": 8, "of": 20}
    answered = read_predictions(Path(config.output_dir) / "predictions.jsonl").predictions
    present = {number for _, number in foolbox_pictures("mnist")}
    assert len({p.target for p in answered}) == min(8, len(present))
    with pytest.raises(UserError, match="mini_mnist and mnist are both the column MNIST"):
        evaluate(from_source(config, "mnist", place, benchmarks=["mini_mnist", "mnist"]))


def parquet(path: Path, rows: list[dict[str, Any]], names: str = "0123456789") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table("mnist", rows, list(names)).to_parquet(str(path))
    return path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), r"=.*copy: no such file or folder; expected a copy of ylecun/mnist"),
        (
            ("readme.txt",),
            r"is another folder: expected test-00000-of-00001\.parquet .* it has readme\.txt",
        ),
        (
            ("train-00000-of-00001.parquet",),
            r"is another folder: .* it has train-00000-of-00001\.parquet",
        ),
        (
            ("test-00000-of-00003.parquet", "test-00002-of-00003.parquet"),
            r"is partial: 2 of 3 parts of the test split are there, test-00001-of-00003 is the first missing",
        ),
        (("a/test.parquet", "b/test.parquet"), r"2 of its folders have a test split; name one of"),
    ],
)
def test_copies_of_something_else_say_what_they_are(
    files: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    for name in files:
        parquet(tmp_path / "copy" / name, foolbox_rows("mnist")[:2])
    refused(message, "mnist", tmp_path / "copy")


def test_bad_files_say_what_they_are(tmp_path: Path) -> None:
    whole = parquet(tmp_path / "cut" / "test.parquet", foolbox_rows("mnist"))
    refused(r"this is not cifar10: its rows lack img; they have image, label", "cifar10", whole)
    whole.write_bytes(whole.read_bytes()[:-200])
    refused(r"test\.parquet cannot be read", "mnist", tmp_path / "cut")
    whole.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(r"Git LFS pointer, not the data; run `git lfs pull`", "mnist", tmp_path / "cut")
    letters = parquet(tmp_path / "letters" / "test.parquet", foolbox_rows("mnist"), "abcdefghij")
    refused(r"this is not mnist: column label has the labels a, b, c", "mnist", letters)


@pytest.mark.parametrize(
    ("given_as", "category", "message"),
    [
        ("mme", "adversarial", r"the category 'adversarial'; this looks like pope; expected .*OCR"),
        ("pope", "OCR", r"the category 'OCR'; this looks like mme; expected one of adversarial"),
        ("mme", "cats", r"the category 'cats'; expected one of existence, count"),
    ],
)
def test_a_copy_of_another_benchmark_with_the_same_columns_is_refused(
    given_as: str, category: str, message: str, tmp_path: Path, cache: Path
) -> None:
    picture = foolbox_rows("mnist")[0]["image"]
    own = {"mme": "scene", "pope": "popular"}[given_as]
    table = datasets.Dataset.from_list(
        [
            {"question_id": "1", "image": picture, "question": "Is it?", "answer": "Yes", "category": each}
            for each in (own, category)
        ]
    )
    table.to_parquet(str(tmp_path / "test.parquet"))
    refused(f"not {given_as}: row 1 has {message}", given_as, tmp_path / "test.parquet")
    assert not list((cache / "benchmarks" / given_as).iterdir())  # nothing half-built stays
    table.select([0]).to_parquet(str(tmp_path / "test.parquet"))
    assert opened(given_as, tmp_path / "test.parquet").rows == 1


def test_the_commit_is_that_of_the_library_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    table("mnist", foolbox_rows("mnist"), list("0123456789")).save_to_disk(str(tmp_path / commit))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.load_from_disk(str(tmp_path / commit))
    )
    assert open_benchmark("mnist", {}).source == f"hub:ylecun/mnist@newest test, commit {commit}"


def test_the_hub_s_names_are_tried_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load(name: str, split: str, revision: str | None) -> Any:
        asked.append((name, split))
        if name == "lmms-lab/MME" or len(asked) > 4:
            raise ConnectionError("no network\nhere")
        picture = foolbox_rows("mnist")[0]["image"]
        about = {"question_id": "scene/1.jpg", "category": "scene", "image": picture}
        both = [{**about, "question": f"Is it {word}?", "answer": word} for word in ("Yes", "No")]
        return datasets.Dataset.from_list(both).cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = open_benchmark("mme", {})
    assert asked == [("lmms-lab/MME", "test"), ("lmms-lab-encoder/MME", "test")]
    assert found.source == "hub:lmms-lab-encoder/MME@newest test, commit unknown"
    first = json.loads(found.records.read_text().splitlines()[0])
    assert (first["image_id"], first["category"], first["conversations"][1]["value"]) == (
        "scene/1.jpg", "scene", "Yes"
    )  # fmt: skip
    assert len(list(found.images.rglob("*.png"))) == 1  # two questions, one picture
    asked += asked
    said = refused(r"mme cannot be fetched \(lmms-lab/MME: ConnectionError: no network here;", "mme")
    assert "hf download --repo-type dataset lmms-lab/MME" in said


def vsr(folder: Path, count: int = 4) -> Path:
    (folder / "images" / "train2017").mkdir(parents=True)
    lines = []
    for number in range(count):
        name = f"{number:012d}.jpg"
        place = folder / "images" / ("train2017" if number % 2 else "")
        Image.new("RGB", (20, 20), (number, 0, 0)).save(place / name)
        link = f"http://images.cocodataset.org/train2017/{name}"
        lines.append(
            {"image": name, "image_link": link, "caption": "The cat is left of the dog.", "label": number % 2}
        )
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_vsr_reads_coco_s_pictures_where_they_are(tmp_path: Path) -> None:
    refused(r"pictures have to be fetched by hand; make a folder with COCO 2017's .*images/", "vsr")
    folder = vsr(tmp_path / "vsr")
    found = opened("vsr", folder)
    assert found.images == folder / "images"
    records = [json.loads(line) for line in found.records.read_text().splitlines()]
    assert [record["image"] for record in records[:2]] == ["000000000000.jpg", "train2017/000000000001.jpg"]
    assert [record["conversations"][1]["value"] for record in records] == ["no", "yes", "no", "yes"]
    (folder / "images" / "000000000002.jpg").unlink()
    refused(r"is partial: pictures of 1 of 4 rows are missing .*train2017/000000000002\.jpg", "vsr", folder)
    found = opened("vsr", folder, on_error="skip")
    assert (found.rows, found.left_out) == (4, 1)
    shutil.rmtree(folder / "images")
    (folder / "images").mkdir()
    refused(r"is another folder: none of the 4 pictures is in", "vsr", folder, on_error="skip")


def test_snli_ve_leaves_out_what_annotators_did_not_agree_on(tmp_path: Path, config: EvalConfig) -> None:
    folder = tmp_path / "snli"
    (folder / "images" / "flickr30k-images").mkdir(parents=True)
    refused(r"has no snli_ve_test\.jsonl; expected a folder with snli_ve_test\.jsonl", "snli_ve", folder)
    lines = []
    for number, label in enumerate(("entailment", "-", "neutral", "contradiction")):
        Image.new("RGB", (20, 20)).save(folder / "images" / "flickr30k-images" / f"{number}.jpg")
        lines.append({"Flickr30K_ID": str(number), "sentence2": "A man sleeps.", "gold_label": label})
    (folder / "snli_ve_test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    results = evaluate(from_source(config, "snli_ve", folder))
    assert [(each.column, each.n) for each in results.scores] == [("SNLI-VE", 3)]
    assert results.about["sources"]["snli_ve"] | {"source": ""} == {
        "source": "", "rows": 4, "left_out": 1, "split_rows": 17_901
    }  # fmt: skip


def test_prompts_of_the_other_benchmarks() -> None:
    pope = ask.ask_pope(
        {"question_id": 1, "question": "Is there a dog?", "answer": "No", "category": "popular"}
    )
    assert pope.prompt() == "Is there a dog?\nAnswer the question using a single word or phrase."
    assert (pope.answer, pope.category) == ("no", "popular")
    row = {
        "question_id": 3,
        "question": "what brand?",
        "answers": ["nokia"] * 4 + ["lg"] * 6,
        "ocr_tokens": ["LG", "5"],
    }
    vqa = ask.ask_textvqa(row)
    assert (vqa.answer, len(vqa.answers)) == ("lg", 10)
    assert vqa.prompt() == "what brand?\nAnswer the question using a single word or phrase."
    assert vqa.prompt(with_hint=True).splitlines()[1] == "Reference OCR token: LG, 5"
    assert ask.ask_snli_ve({"gold_label": "-", "sentence2": "", "Flickr30K_ID": "1"}) is None
    assert ask.snli_ve_photos({"Flickr30K_ID": "7.jpg"})[0] == "7.jpg"


def own(folder: Path, **changes: Any) -> Path:
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for number, answer in enumerate(("Robin", "crow", "robin", "owl")):
        Image.new("RGB", (20, 20), (number, 9, 9)).save(folder / "pictures" / f"{number}.png")
        lines.append(
            {
                "image": f"{number}.png",
                "question": "Which bird?",
                "answer": answer,
                "category": "ab"[number % 2],
            }
        )
    (folder / "birds.jsonl").write_text("\n".join(map(json.dumps, lines)))
    values = {
        "records": "birds.jsonl",
        "images": "pictures",
        "scorer": "labels",
        "column": "Birds",
        **changes,
    }
    text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())
    (folder / "birds.yaml").write_text(text)
    return folder / "birds.yaml"


def test_one_yaml_file_adds_a_benchmark(config: EvalConfig, tmp_path: Path) -> None:
    path = own(tmp_path / "birds", labels=["robin", "crow", "owl"], prompt="{question} Answer with one word.")
    results = evaluate(from_source(config, "birds", path))
    assert [(each.name, each.column, each.n) for each in results.scores] == [("birds", "Birds", 4)]
    assert set(results.scores[0].parts) == {"a", "b"}
    assert results.about["benchmarks"] == {"birds": {"column": "Birds", "scorer": "labels"}}
    answered = read_predictions(Path(config.output_dir) / "predictions.jsonl").predictions
    assert {p.question for p in answered} == {"Which bird? Answer with one word."}
    assert answered[0].labels == ("robin", "crow", "owl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": "bleu"}, r"birds\.yaml: scorer=bleu: must be one of labels, exact, vqa, mme, pope"),
        ({"prompt": "Which?"}, r"birds\.yaml: prompt=Which\?: must contain \{question\}"),
        ({"image": "x"}, r"birds\.yaml: image=x: unknown key"),
        (
            {"records": "none.jsonl"},
            r"records=none\.jsonl: no such file; expected JSON lines beside birds\.yaml",
        ),
        ({"images": "none"}, r"images=none: no such folder"),
    ],
)
def test_mistakes_in_a_yaml_file_are_one_line(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    refused(message, "birds", own(tmp_path / "birds", **changes))


def test_sources_are_for_known_benchmarks_or_yaml_files() -> None:
    with pytest.raises(UserError, match=r"eval\.sources\.birds=x: expected a YAML file .* mme, textvqa"):
        sourced(None, {"birds": "x"})
    with pytest.raises(UserError, match=r"mnist is built in; give your own another name"):
        sourced(None, {"mnist": "m.yaml"})
    assert sourced(None, {"pope": "x", "mme": "y"}) == ["mme", "pope"]
    assert sourced(["mini_vsr", "mnist", "birds"], {"birds": "b.yaml"}) == ["mnist", "birds"]


def test_json_lines_say_where_they_break(tmp_path: Path) -> None:
    origin = BENCHMARKS["vsr"].origin
    assert origin is not None
    path = tmp_path / "test.jsonl"
    good = json.dumps({"image": "a", "caption": "b", "label": 1})
    for text, message in (("{", "line 2 is not JSON"), ("{}", "line 2 is no row of vsr: it lacks image")):
        path.write_text(f"{good}\n{text}\n")
        with pytest.raises(UserError, match=message):
            list(from_lines(path, origin, "vsr").rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_id": "a"},
            r"birds: 2 of 2 pictures have not two questions; the first is 'a' of subtask 's' with 3",
        ),
        (
            {"category": "t"},
            r"birds: 2 of 3 pictures have not two questions; the first is 'b' of subtask 's' with 1",
        ),
    ],
)
def test_mme_s_pairs_are_checked_before_a_model_is_built(
    changes: dict[str, str],
    message: str,
    config: EvalConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = own(tmp_path / "birds", scorer="mme")
    records = tmp_path / "birds" / "birds.jsonl"
    lines = [
        {**json.loads(line), "category": "s", "image_id": "ab"[number // 2]}
        for number, line in enumerate(records.read_text().splitlines())
    ]
    sources = from_source(config, "birds", path)
    records.write_text("\n".join(map(json.dumps, lines)))
    assert [part.counts for part in choose_instances(sources)] == [{"birds": 4}]
    lines[3] |= changes
    records.write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr("mixlora_cli.evaluation.local.build_base", None)
    with pytest.raises(UserError, match=message):
        evaluate(sources)


def with_row(folder: Path, row: dict[str, Any], **changes: Any) -> Path:
    """The benchmark of birds, its second row changed, with a blank line before it."""
    path = own(folder, **changes)
    lines = [json.loads(line) for line in (folder / "birds.jsonl").read_text().splitlines()]
    lines[1] |= row
    (folder / "birds.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize(
    ("row", "answer", "answers", "labels"),
    [
        ({}, "crow", None, None),
        ({"answers": None, "labels": None, "category": None, "id": None}, "crow", None, None),
        ({"answers": "cat"}, "crow", ["cat"], None),
        ({"answers": {"answer": "cat", "answer_id": 1}}, "crow", ["cat"], None),
        ({"answers": [{"answer": "cat"}, "a cat", {"answer": "dog"}]}, "crow", ["cat", "a cat", "dog"], None),
        ({"answer": {"answer": "cat", "answer_confidence": "yes"}}, "cat", None, None),
        ({"labels": ["crow", "owl"]}, "crow", None, ["crow", "owl"]),
    ],
)
def test_answers_are_taken_apart(
    row: dict[str, Any],
    answer: str,
    answers: list[str] | None,
    labels: list[str] | None,
    tmp_path: Path,
) -> None:
    path = with_row(tmp_path / "birds", row, scorer="vqa")
    found = json.loads(opened("birds", path).records.read_text().splitlines()[1])
    assert found["conversations"][1]["value"] == answer
    assert (found.get("answers"), found.get("labels")) == (answers, labels)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": None}, 'answer is null, expected a text or {"answer": text}'),
        ({"answer": True}, 'answer is true, expected a text or {"answer": text}'),
        ({"answer": 3}, 'answer is 3, expected a text or {"answer": text}; put it in quotation marks'),
        ({"answer": ["red", "dark red"]}, "answer is ['red', 'dark red'], expected a text or "),
        ({"answer": {"text": "red"}}, """answer is {'text': 'red'}, expected a text or {"answer": text}"""),
        ({"answer": {"answer": None}}, 'answer is null, expected a text or {"answer": text}'),
        ({"answers": False}, 'answers is false, expected a text, {"answer": text} or a list of them'),
        ({"answers": ["red", None]}, 'answers is null, expected a text, {"answer": text} or a list of them'),
        ({"answers": [["red"]]}, "answers is ['red'], expected a text, "),
        (
            {"answers": []},
            "answers is empty, expected one reference answer or more; without answers it is answer",
        ),
        ({"question": None}, "question is null, expected a text"),
        ({"image": ["1.png"]}, "image is ['1.png'], expected a text"),
        ({"labels": "yes, no"}, "labels is 'yes, no', expected a list of texts"),
        ({"labels": ["yes", 2]}, "labels is 2, expected a list of texts; put it in quotation marks"),
        ({"category": True}, "category is true, expected a text"),
        ({"answer": ["x" * 300]}, f"answer is ['{'x' * 75}..., expected a text or "),
    ],
)
def test_rows_that_cannot_be_scored_are_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = with_row(tmp_path / "birds", row, scorer="vqa")
    said = refused("line 3: ", "birds", path)
    assert said.startswith(f"{tmp_path / 'birds' / 'birds.jsonl'}, line 3: {message}")


@pytest.mark.parametrize(
    ("scorer", "row", "message"),
    [
        ("pope", {"answer": "crow"}, "answer is 'Robin', expected yes or no: POPE's rule reads nothing else"),
        ("labels", {"labels": ["robin", "owl"]}, "answer is 'crow', expected one of labels: robin, owl"),
        ("exact", {"labels": ["robin", "owl"]}, None),
        ("labels", {"labels": ["The Crow.", "owl"]}, None),
    ],
)
def test_targets_that_no_answer_can_be_are_refused_before_a_model_is_built(
    scorer: str,
    row: dict[str, Any],
    message: str | None,
    config: EvalConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = with_row(tmp_path / "birds", row, scorer=scorer)
    sources = from_source(config, "birds", path)
    if message is None:
        assert evaluate(sources).scores[0].n == 4
        return
    monkeypatch.setattr("mixlora_cli.evaluation.local.build_base", None)
    with pytest.raises(UserError) as caught:
        evaluate(sources)
    line = 1 if "Robin" in message else 3
    assert str(caught.value) == f"{tmp_path / 'birds' / 'birds.jsonl'}, line {line}: {message}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": True}, "answers is true, expected a text"),
        ({"labels": "yes, no"}, "labels is 'yes, no', expected a list of texts"),
        ({"benchmark": "mini_pope", "labels": None}, "answer is 'robin', expected yes or no: POPE's"),
        ({"labels": ["owl", "crow"]}, "answer is 'robin', expected one of labels: owl, crow"),
        ({"benchmark": "mini_textvqa", "answers": []}, "answers is empty, expected one reference answer"),
    ],
)
def test_records_of_the_data_follow_the_same_rule(
    changes: dict[str, Any], message: str, config: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "robin"}]
    record = {"task_name": "birds", "conversations": turns, **changes}
    (tmp_path / "unseen.json").write_text(json.dumps([record]))
    data = replace(config.data, unseen=str(tmp_path / "unseen.json"))
    monkeypatch.setattr("mixlora_cli.evaluation.local.build_base", None)
    with pytest.raises(UserError) as caught:
        evaluate(replace(config, data=data, eval=replace(config.eval, benchmarks=None, seen=False)))
    assert str(caught.value).startswith(f"{tmp_path / 'unseen.json'}, record 0: {message}")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_references_that_all_match_score_100(
    count: int, config: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mixlora_cli.models.generate.Generator.__call__", lambda _, batch: ["crow"] * len(batch)
    )
    path = with_row(tmp_path / "birds", {"answers": ["crow"] * count}, scorer="vqa")
    results = evaluate(from_source(config, "birds", path))
    assert results.scores[0].value == 25.0  # one of four rows
    assert "with fewer than four references the share that matches" in results.scores[0].rule


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-8-sig", None),
        ("latin-1", r"not UTF-8 text at byte \d+; expected {kind}, save it as UTF-8$"),
        ("utf-16", "not UTF-8 text at byte 0; expected {kind}, save it as UTF-8$"),
    ],
)
@pytest.mark.parametrize(
    ("name", "kind"),
    [("birds.jsonl", "JSON lines"), ("birds.yaml", "a YAML file that describes a benchmark")],
)
def test_encodings_of_a_benchmark_s_files(
    name: str, kind: str, encoding: str, message: str | None, tmp_path: Path
) -> None:
    path = own(tmp_path / "birds", column="Bird")
    text = (
        (tmp_path / "birds" / name).read_text().replace("Which", "Wh\u00efch").replace('Bird"', 'B\u00efrd"')
    )
    (tmp_path / "birds" / name).write_bytes(text.encode(encoding))
    if message is None:
        assert opened("birds", path).rows == 4
        return
    refused(rf"{name}: {message.format(kind=kind)}", "birds", path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "birds.jsonl",
            '{"image": ' + "9" * 5000,
            "line 1: malformed JSON: a number with thousands of digits",
        ),
        ("birds.jsonl", "[" * 100_000, r"line 1: malformed JSON: nested too deeply"),
        ("birds.yaml", "records: " + "[" * 5000, r"birds\.yaml: nested too deeply"),
        ("birds.yaml", 'records: "\\ud83d"', r"birds\.yaml: text that is no Unicode: lone surrogate U\+D83D"),
        (
            "birds.yaml",
            f"scorer: {'x' * 5000}\nrecords: a\nimages: b",
            rf"scorer={'x' * 77}\.\.\.: must be one of",
        ),
    ],
)
def test_files_beyond_all_measure_are_one_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = own(tmp_path / "birds")
    (tmp_path / "birds" / name).write_text(text)
    refused(message, "birds", path)


@pytest.mark.parametrize("key", ["question", "answer", "image", "category"])
def test_rows_with_half_a_character_are_counted(key: str, config: EvalConfig, tmp_path: Path) -> None:
    path = with_row(tmp_path / "birds", {key: "\ud83d"})
    sources = from_source(config, "birds", path)
    with pytest.raises(
        UserError, match=r"1 bad record in .*1 text that is no Unicode \(record 1, lone surrogate"
    ):
        choose_instances(sources)
    (part,) = choose_instances(replace(sources, data=replace(config.data, on_error="skip")))
    assert (len(part.records), part.about["left_out"]) == (3, 1)


@pytest.mark.parametrize(
    ("ask_row", "row", "message"),
    [
        (ask.ask_vsr, {"caption": None, "label": 1}, "caption is null, expected a text"),
        (ask.ask_vsr, {"caption": "a", "label": "yes"}, "label is 'yes', expected 0 or 1"),
        (
            ask.ask_snli_ve,
            {"gold_label": None, "sentence2": "a"},
            "gold_label is None, expected entailment, ",
        ),
        (ask.ask_snli_ve, {"gold_label": "neutral", "sentence2": 3}, "sentence2 is 3, expected a text"),
    ],
)
def test_rows_of_built_in_benchmarks_follow_the_rule(ask_row: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Origin((), "test", 1, (), ask_row).question(row, "test.jsonl, row 4")
    assert str(caught.value).startswith(f"test.jsonl, row 4: {message}")
