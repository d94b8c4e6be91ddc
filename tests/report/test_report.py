"""The files that `mixlora report` writes."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_folder import picture, prediction, write_folder

from mixlora_cli.benchmarks.metrics import COGNITION, PERCEPTION
from mixlora_cli.config import JudgeConfig, PageConfig, ReportConfig
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.scoring import read_evaluation, score_evaluation
from mixlora_cli.judging.judge import judge_answers
from mixlora_cli.report.run import finish, report

EVIL = "<script>document.title = 'stolen'</script><img src=x onerror=alert(1)>\"' {{ 7 * 7 }} & more"


class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._in: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = [tag]

    def handle_endtag(self, tag: str) -> None:
        self._in = []

    def handle_data(self, data: str) -> None:
        self.text += "" if self._in and self._in[0] in ("script", "style") else data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def written(folder: Path, **settings: Any) -> Path:
    return report(ReportConfig(PageConfig(**settings), run=str(folder)))


def test_a_page_with_table_bars_matrices_and_answers(folder: Path) -> None:
    path = written(folder.parent)  # the run folder will do
    assert path == folder / "report.html"
    page = Page(path)
    results = json.loads((folder / "results.json").read_text())
    for score in results["scores"]:
        digits = 0 if score["unit"] == "points" else 1
        assert (
            f"{score['value']:.{digits}f} [{score['low']:.{digits}f}, {score['high']:.{digits}f}]"
            in page.text
        )
        assert score["rule"] in page.text
    values = [a for a in page.all("rect") if a["class"] == "value"]
    assert len(values) == len(results["scores"]) + 1  # and the seen tasks
    assert float(str(values[0]["width"])) == pytest.approx(
        results["scores"][0]["value"] / 400 * 100, abs=1e-3
    )
    assert sum("matrix" in str(a.get("class")) for a in page.all("table")) == 3
    assert len(page.all("article")) == len([a for a in page.all("img")]) > 20


def test_nothing_is_fetched_and_nothing_but_its_own_script_runs(folder: Path) -> None:
    page = Page(written(folder))
    links = [a[key] for _, a in page.tags for key in ("src", "href", "srcset", "action", "data") if key in a]
    assert links and all(str(link).startswith("data:image/") for link in links)
    assert "http" not in re.sub(r'http-equiv="[^"]*"|data:[^"]*', "", (folder / "report.html").read_text())
    assert len(page.all("script")) == 1
    policy = next(a for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'; img-src data:;")


def test_texts_are_escaped(tmp_path: Path, images: Path) -> None:
    evil = prediction(0, "mini_cifar10", EVIL, EVIL, question=EVIL, category=EVIL, labels=(EVIL, "red"))
    evil = replace(evil, id=EVIL)
    own = prediction(1, "mine", "red", EVIL)
    folder = write_folder(tmp_path / "evil", [evil, own], images, label=f"{EVIL} | more")
    page = Page(written(folder))
    assert len(page.all("script")) == 1 and not any("onerror" in a for _, a in page.tags)
    assert page.text.count("<script>document.title") >= 8 and "49" not in page.text
    assert all(str(a["src"]).startswith("data:") for a in page.all("img"))
    table = (folder / "results.md").read_text()
    assert "<script>" not in table
    assert "more \\| more | " in table


def test_pictures_are_small_upright_and_bounded(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    tall = Image.new("RGB", (600, 300), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    tall.save(images / "turned.jpg", exif=exif)
    Image.new("RGBA", (10, 10), (255, 0, 0, 0)).save(images / "clear.png")
    Image.new("L", (20, 30), 7).save(images / "grey.png")
    (images / "broken.png").write_bytes(b"\x89PNG nothing")
    names = ["turned.jpg", "clear.png", "grey.png", "broken.png", "missing.png", "../outside.png"]
    picture(tmp_path / "outside.png", 0)
    answers = [prediction(n, "mini_vsr", "yes", "no", image=name) for n, name in enumerate(names)]
    folder = write_folder(tmp_path / "e", answers, images)
    page = Page(written(folder))
    uris = [str(a["src"]) for a in page.all("img")]
    found = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in uris]
    assert [image.size for image in found] == [(96, 192), (10, 10), (20, 30)]
    assert found[1].convert("RGB").getpixel((5, 5)) == (255, 255, 255)
    assert "3 pictures of the sample were not found or cannot be read" in page.text
    assert page.text.count("no picture") == 3
    limited = Page(written(folder, picture_megabytes=0.0))
    assert not limited.all("img") and "6 pictures are left out to keep this file small" in limited.text


def test_a_large_evaluation_makes_a_small_page(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number in range(4):
        picture(images / f"{number}.png", number, side=400)
    names = ["cifar10", "cifar100", "mnist", "vsr", "snli_ve", "textvqa"]
    answers = [
        prediction(n, f"mini_{names[n % 6]}", "a", "ab"[n // 6 % 2] * 3000, question="long " * 2000)
        for n in range(600)
    ]
    path = written(write_folder(tmp_path / "e", answers, images), sample=50, picture_megabytes=1)
    assert 1e6 < path.stat().st_size < 4e6
    pages = Page(path)
    assert 0 < len(pages.all("img")) < 300 == len(pages.all("article"))


def test_many_labels_are_drawn(tmp_path: Path, images: Path) -> None:
    labels = tuple(f"thing {n}" for n in range(100))
    answers = [prediction(n, "mini_cifar100", labels[n], labels[n // 2], labels=labels) for n in range(100)]
    page = Page(written(write_folder(tmp_path / "e", answers, images), sample=0))
    (heat,) = (a for a in page.all("img") if a.get("class") == "heat")
    drawn = Image.open(io.BytesIO(base64.b64decode(str(heat["src"]).partition(",")[2])))
    assert drawn.size == (505, 500)
    assert [drawn.getpixel((5 * (n // 2) + 2, 5 * n + 2))[3] for n in range(100)] == [255] * 100
    assert drawn.getpixel((502, 2))[3] == 0


def test_several_runs_side_by_side(folder: Path, other: Path, tmp_path: Path) -> None:
    page_config = ReportConfig(
        PageConfig(), runs=[str(folder), str(other)], output_dir=str(tmp_path / "both")
    )
    page = Page(report(page_config))
    outcomes = {a["data-outcome"] for a in page.all("article")}
    assert outcomes == {"right", "wrong", "differ"}
    assert page.text.count("MixLoRA E=16 r=4:") >= len(page.all("article"))
    same = ReportConfig(PageConfig(), runs=[str(folder), str(folder)], output_dir=str(tmp_path / "same"))
    assert "LoRA r=4 (one)" in Page(report(same)).text


def test_the_markdown_table_is_in_the_papers_order(folder: Path) -> None:
    judge_answers(folder, JudgeConfig("exact"))
    written(folder)
    text = (folder / "results.md").read_text()
    paper = "MME | Text-VQA | VSR | SNLI-VE | CIFAR-10 | CIFAR-100 | MNIST | POPE | MMAvg"
    assert f"|  | {paper} | Seen |" in text
    assert "| judge | MME | Text-VQA | CIFAR-10 | POPE | Seen | unparsed | agrees with |" in text
    assert text.count("| LoRA r=4 |") == 2


def test_incomplete_sources_are_said_in_the_page_and_in_markdown(tmp_path: Path, images: Path) -> None:
    labels = ("3", "7")
    answers = [prediction(n, "mnist", "7", labels[n % 2], labels=labels) for n in range(4)]
    short = {"mnist": {"source": "copies/m|<b>", "rows": 20, "left_out": 5, "split_rows": 10_000}}
    one = write_folder(tmp_path / "a", answers, images, label="A", limit=4, sources=short)
    whole = {"mnist": {"source": "hub", "rows": 10_000, "left_out": 0, "split_rows": 10_000}}
    other = write_folder(tmp_path / "b", answers, images, label="B", limit=4, sources=whole)
    page = Page(written(one))
    beginning = page.text[: page.text.index("Results")]
    assert "a sample of at most 4 instances of each benchmark" in beginning
    assert "mnist: copies/m|<b> has 20 rows, the whole split 10000." in beginning
    assert "mnist: 5 of 20 rows left out (no agreed label, or no usable picture)." in beginning
    text = (one / "results.md").read_text()
    assert "Samples of at most 4 instances of each benchmark." in text
    assert (
        "- mnist: copies/m\\|&lt;b> has 20 rows, the whole split 10000.\n- mnist: 5 of 20 rows left" in text
    )
    both = ReportConfig(PageConfig(), runs=[str(one), str(other)], output_dir=str(tmp_path / "both"))
    page = Page(report(both))
    assert "the whole split 10000: A." in page.text and "B." not in page.text[: page.text.index("Results")]
    whole_one = Page(written(other)).text
    assert "the whole split" not in whole_one and "left out" not in whole_one


@pytest.mark.parametrize(
    ("subtasks", "width", "said"),
    [(PERCEPTION + COGNITION, "2800 points", ""), (PERCEPTION[:9], "1800 points", "9 of 14 subtasks")],
)
def test_mme_over_some_of_its_subtasks_says_so(
    tmp_path: Path, images: Path, subtasks: list[str], width: str, said: str
) -> None:
    answers = [
        prediction(2 * n + k, "mme", ("yes", "no")[k], "yes", category=name, image_id=f"{name}{n % 3}")
        for n, name in enumerate(name for name in subtasks for _ in range(3))
        for k in range(2)
    ]
    folder = write_folder(tmp_path / "e", answers, images)
    page = Page(written(folder))
    points = 50 * len(subtasks)  # every "yes" of a pair right, no pair
    assert f"full width: {width}{said and ', '}{said}" in page.text
    (bar,) = (a for a in page.all("rect") if a["class"] == "value")
    assert float(str(bar["width"])) == pytest.approx(25.0)
    (line,) = (line for line in (folder / "results.md").read_text().splitlines() if line.startswith("| LoRA"))
    assert line.startswith(f"| LoRA r=4 | {points} [{points}, {points}]{said and ' '}{said} | - |")
    assert page.text.count("of 14 subtasks") == (
        3 if said else 0
    )  # two tables, one for narrow windows, and the bar


def test_seen_tasks_have_the_papers_names(tmp_path: Path, images: Path) -> None:
    names = ("scienceqa+question_answering", "PACS+elephant_image_category_classification", "naming")
    answers = [prediction(n, name, "a", "a", split="heldout") for n, name in enumerate(names)]
    folder = write_folder(tmp_path / "e", answers, images)
    page = Page(written(folder))
    assert "Seen: ScienceQA" in page.text and "Seen: naming" in page.text
    assert re.findall(r"^(.+)100\.0 \[20\.7, 100\.0\]$", page.text, re.MULTILINE) == [
        *("PACS", "naming", "ScienceQA"),
    ]
    assert set(json.loads((folder / "results.json").read_text())["seen"]["parts"]) == set(names)
    assert "loss per answer token" not in page.text


def test_seen_tasks_with_losses(tmp_path: Path, images: Path) -> None:
    given = [(nll, prediction(n, "naming", "a", "a", split="heldout")) for n, nll in enumerate((1.0, 3.0))]
    answers = [replace(each, nll=nll, tokens=2) for nll, each in given]
    page = Page(written(write_folder(tmp_path / "e", answers, images)))
    assert "LoRA r=4, loss" in page.text and "1.000 [0.500, 1.500]" in page.text
    assert "loss per answer token of held-out instances in nats, lower is better" in page.text
    assert (
        len([a for a in page.all("rect") if a["class"] == "value"]) == 1
    )  # a longer bar would be the worse one


def test_an_evaluation_ends_with_judge_and_report(folder: Path) -> None:
    evaluation = read_evaluation(folder)
    results = finish(evaluation, score_evaluation(evaluation), JudgeConfig("exact"), seed=0)
    assert [judged.title for judged in results.judged] == ["exact"]
    assert {"report.html", "results.md", "results.json"} <= {path.name for path in folder.iterdir()}
    assert Page(folder / "report.html").text.count("exact:") > 20
    down = JudgeConfig("openai", model="m", base_url="http://127.0.0.1:1/v1", retries=0, first_wait=0.0)
    (folder / "report.html").unlink()
    with pytest.raises(UserError, match="the same command asks only what is missing"):
        finish(evaluation, results, down, seed=0)
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "run=null: give run="),
        ({"run": "a", "runs": ["b"]}, "runs="),
        ({"runs": ["a", "b"]}, "output_dir=null: name a folder"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReportConfig(PageConfig(), **keys)
