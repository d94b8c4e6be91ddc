"""The documents name files that are there, and the site's reference has everything."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixlora_cli import config
from mixlora_cli.commands import COMMANDS, HEADINGS

ROOT = Path(__file__).parents[1]
PLACES = (ROOT, ROOT / "src/mixlora_cli", ROOT / "docs")
DOCUMENTS = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|md|sh)|(?:src|tests|conf|scripts|docs)/[\w./-]*)`")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_are_there(document: Path) -> None:
    named = set(FILE.findall(document.read_text(encoding="utf-8")))
    assert [name for name in sorted(named) if not any((place / name).exists() for place in PLACES)] == []


def test_the_architecture_names_the_rooms() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = [
        place.name for place in (ROOT / "src/mixlora_cli").iterdir() if (place / "__init__.py").is_file()
    ]
    assert [room for room in rooms if f"{room}/" not in text] == []


def test_the_reference_has_every_key_of_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from docs_reference import GROUPS, leaf_keys, page

    sections = dict(re.findall(r"^### (.+)\n((?:(?!^###? ).*\n)+)", page(), re.MULTILINE))
    assert [name for names in HEADINGS.values() for name in names if f"mixlora {name}" not in sections] == []
    for command in COMMANDS.values():
        own = sections[f"mixlora {command.name}"]
        if "every key of [mixlora train]" in own:
            own += sections["mixlora train"]
        for key in leaf_keys(getattr(config, command.config)):
            group, dot, _ = key.partition(".")
            if dot and group in GROUPS:
                assert f"[`{group}`](#{group})" in own and f"| `{key}` |" in sections[group]
            else:
                assert f"| `{key}` |" in own
    for group in GROUPS:
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert f"| `{group}={path.stem}` |" in sections[group]
    assert (
        "| `train.warmup_ratio` | a number in [0, 1) | `0.03` | share of the steps in"
        in sections["mixlora train"]
    )
    assert "numerator of the scale alpha / rank; null: 2 * rank<br>mixlora: " in sections["adapter"]
    assert (
        "| Regular expression that must match the whole name" in sections["adapter"]
    )  # a comment above its key
    assert "| `judge_title` | " in sections["mixlora table"]


@pytest.fixture
def documents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What reads commands out of documents; the working folder is an empty one."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.chdir(tmp_path)
    import docs_commands

    return docs_commands


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if path.name != "CONTRIBUTING.md"], ids=lambda path: path.name
)
def test_commands_compose_and_are_accepted(document: Path, documents: Any, tmp_path: Path) -> None:
    assert document in documents.pages()
    refused = {}
    for number, shown in enumerate(documents.commands(document)):
        if shown.words[0] in ("mixlora", "make") and not shown.fails:
            with documents.in_folder(tmp_path / str(number)):
                refused[str(shown)] = documents.refusal(shown.words)
    assert {line: reason for line, reason in refused.items() if reason} == {}
    for block in documents.blocks(document):
        if block.kind == "python":
            compile(block.text, document.name, "exec")


@pytest.mark.parametrize(
    ("line", "reason"),
    {
        "mixlora train rank=8 data=json 'data.train={a: x.json}' data.images=/pictures": "",
        "mixlora train -m rank=2,4,20": "rank=20: must be <= factors=16",
        "mixlora train train.step=3": "train.step=3: unknown key",
        "mixlora ask run=FOLDER 'What is this?' image=a.png": "",
        "mixlora compare A B --output C": "",
        "mixlora compare A B --outputs C": "No such option",
        "mixlora trian": "no such command: trian",
        "make lint": "",
        "make linted": "No rule to make target",
    }.items(),
)
def test_what_is_refused(line: str, reason: str, documents: Any) -> None:
    page = ROOT / "docs" / "page.md"
    text = f"```console\n$ A=b {line} > out.txt  # why\nerror: no\n```\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_, **__: text)
        (shown,) = documents.commands(page)
    assert shown.fails and shown.line == 2
    assert shown.words == (*shlex.split(line),)
    refused = documents.refusal(shown.words)
    assert reason in refused and bool(reason) == bool(refused)


def test_commands_behind_one_another_are_each_checked(
    documents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "```sh\nA=b make lint > out.txt && B=c mixlora doctor | head  # why\n```\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    shown = documents.commands(ROOT / "docs" / "page.md")
    assert [each.words for each in shown] == [("make", "lint"), ("mixlora", "doctor")]


def test_the_site_builds_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("material")
    line = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(line, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    pages = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.html")}
    assert set(pages) >= {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")}
    for text in pages.values():
        assert re.findall(r"<(?:script|img)[^>]*src=\"?https?:|<link[^>]*stylesheet[^>]*https?:", text) == []
    shown = re.findall(r'src="(outside/[^"]+)"', pages["findings.html"])
    assert shown and all((tmp_path / name).is_file() for name in shown)
    assert "<code>train.learning_rate</code>" in pages["reference.html"]
