"""The page as a browser shows it: headless Chromium, where there is one."""

import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from report_folder import prediction, write_folder

from browser import CHROMIUM
from mixlora_cli.benchmarks.registry import CIFAR10, DIGITS
from mixlora_cli.config import PageConfig, ReportConfig
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.report.run import report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome on the PATH"),
]

# Chooses wrong answers of CIFAR-10 as a person would, and writes what the page then says into its own text.
PROBE = """<pre id="probe"></pre><script>
const note = (key, value) => { document.getElementById("probe").append(`${key}=${value};`); };
note("title", document.title);
note("overflow", document.documentElement.scrollWidth - document.documentElement.clientWidth);
note("all", document.getElementById("count").value);
const choose = (id, value) => {
  const select = document.getElementById(id);
  select.value = value;
  select.dispatchEvent(new Event("change"));
};
choose("column", "CIFAR-10");
choose("outcome", "wrong");
note("chosen", document.getElementById("count").value);
const visible = [...document.querySelectorAll("article")].filter((card) => card.offsetParent !== null);
note("visible", visible.length);
note("kinds", [...new Set(visible.map((card) => card.dataset.column + "/" + card.dataset.outcome))].join());
note("broken", [...document.images].filter((image) => image.complete && !image.naturalWidth).length);
note("errors", window.errors);
</script>"""
FIRST = "<script>window.errors = 0; window.onerror = () => { window.errors += 1; };</script>"


def chromium(page: Path, *flags: str) -> str:
    profile = page.parent / "profile"
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--disable-background-networking",
        f"--user-data-dir={profile}",
        *flags,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


# How many matrices are open, and by how many pixels the one that fits worst is wider than its box.
MATRICES = """<pre id="probe"></pre><script>
const boxes = [...document.querySelectorAll(".matrix")].map((table) => table.parentElement);
const beyond = Math.max(...boxes.map((box) => box.scrollWidth - box.clientWidth));
const open = boxes.filter((box) => box.clientWidth > 0).length;
document.getElementById("probe").append(`open=${open};beyond=${beyond};`);
</script>"""


def noted(text: str, probe: str, folder: Path, width: int) -> dict[str, str]:
    """What a probe, a script that writes `key=value;` into #probe, finds in a page at a width in pixels."""
    probed = folder / "probed.html"
    probed.write_text(text.replace("<body>", f"<body>{FIRST}").replace("</body>", f"{probe}</body>"))
    dumped = chromium(probed, f"--window-size={width},900", "--dump-dom")
    (found,) = re.findall(r'<pre id="probe">(.*?)</pre>', dumped, re.DOTALL)
    return dict(pair.split("=", 1) for pair in found.rstrip(";").split(";"))


@pytest.mark.parametrize("width", [1280, 900, 500])
def test_matrices_of_ten_labels_are_seen_whole(tmp_path: Path, width: int) -> None:
    answers: list[Prediction] = []
    for benchmark, labels in (("cifar10", CIFAR10), ("mnist", DIGITS), ("vsr", ("true", "false"))):
        for number, label in enumerate(label for label in labels for _ in range(101)):
            answers.append(prediction(number, benchmark, label, label, labels=labels))
    page = report(ReportConfig(PageConfig(sample=1), run=str(write_folder(tmp_path / "e", answers, None))))
    assert noted(page.read_text(), MATRICES, tmp_path, width) == {"open": "3", "beyond": "0"}


@pytest.mark.parametrize("width", [1280, 500])
def test_filters_work_and_nothing_overflows(folder: Path, tmp_path: Path, width: int) -> None:
    text = report(ReportConfig(PageConfig(), run=str(folder))).read_text()
    said = noted(text, PROBE, tmp_path, width)
    cards = text.count("<article")
    wrong = text.count('data-column="CIFAR-10" data-outcome="wrong"')
    assert said == {
        "title": "Evaluation: LoRA r=4",
        "overflow": "0",
        "all": f"{cards} of {cards}",
        "chosen": f"{wrong} of {cards}",
        "visible": str(wrong),
        "kinds": "CIFAR-10/wrong",
        "broken": "0",
        "errors": "0",
    }
    assert 0 < wrong < cards


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_are_readable(folder: Path, tmp_path: Path, dark: bool) -> None:
    page = report(ReportConfig(PageConfig(), run=str(folder)))
    shot = tmp_path / "shot.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    chromium(page, "--window-size=1000,1200", f"--screenshot={shot}", *scheme)
    with Image.open(shot) as opened:
        grey = opened.convert("L")
    ground = grey.getpixel((5, 5))
    darkest, brightest = grey.getextrema()
    assert (ground < 60) == dark and (ground > 220) == (not dark)
    assert brightest - darkest > 150  # text stands out
    assert (
        sum(grey.histogram()[max(ground - 8, 0) : ground + 9]) < 0.97 * 1000 * 1200
    )  # and there is a lot of it
