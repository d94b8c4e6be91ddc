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

from mixlora_cli.config.judge import JudgeConfig
from mixlora_cli.config.report import PageConfig, ReportConfig
from mixlora_cli.errors import UserError
from mixlora_cli.judging.run import judge_answers
from mixlora_cli.report.finish import finish
from mixlora_cli.report.run import report

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
    folder = write_folder(tmp_path / "evil", [evil, own], images, label=EVIL)
    page = Page(written(folder))
    assert len(page.all("script")) == 1 and not any("onerror" in a for _, a in page.tags)
    assert page.text.count("<script>document.title") >= 8 and "49" not in page.text
    assert all(str(a["src"]).startswith("data:") for a in page.all("img"))
    table = (folder / "results.md").read_text()
    assert "<script>" not in table


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


def test_an_evaluation_ends_with_judge_and_report(folder: Path) -> None:
    results = finish(folder, JudgeConfig("exact"), seed=0)
    assert [judged.title for judged in results.judged] == ["exact"]
    assert {"report.html", "results.md", "results.json"} <= {path.name for path in folder.iterdir()}
    assert Page(folder / "report.html").text.count("exact:") > 20
    down = JudgeConfig("openai", model="m", base_url="http://127.0.0.1:1/v1", retries=0, first_wait=0.0)
    (folder / "report.html").unlink()
    with pytest.raises(UserError, match="the same command asks only what is missing"):
        finish(folder, down, seed=0)
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
