"""The playground in headless Chromium, where there is one: the real server's models are asked through the page."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from browser import CHROMIUM, Tab, browser
from mixlora_cli.serving.server import PAGE
from tiny_data import tiny_data
from tiny_runs import NUM_FACTORS, RANK, finished_run

pytestmark = pytest.mark.slow
TASKS = ("counting", "reading", "naming")
MODELS = ("base", "lora", "by-task", "by-instance")
KEY = "a secret"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if CHROMIUM is None:
        pytest.skip("needs chromium or google-chrome on the PATH")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    data = tiny_data(folder / "data", train=TASKS * 5)
    by_task = finished_run(folder / "by-task", data, routing="task", router_spread=50)
    by_task.definitions.write_text(json.dumps({task: f"Do {task}." for task in TASKS}))
    by_instance = finished_run(folder / "by-instance", data, router_spread=50)
    return [str(run.root) for run in (finished_run(folder / "lora", data, "lora"), by_task, by_instance)]


@pytest.fixture(scope="module")
def url(runs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the base and three runs are served."""
    with served(tmp_path_factory.mktemp("cache"), f"run=[{','.join(runs)}]", "serve.pixels=40000") as found:
        yield found


@contextmanager
def served(cache: Path, *arguments: str, **variables: str) -> Iterator[str]:
    """A server of its own, on a free port. It has to end though nobody reads what it says then."""
    command = [sys.executable, "-m", "mixlora_cli.cli", "serve", "model=tiny", "port=0", *arguments]
    environment = {**os.environ, "MIXLORA_CACHE": str(cache), "OMP_NUM_THREADS": "1", **variables}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"(http://[\d.]+:\d+) in a browser", " ".join(said)):
                break
        else:
            raise AssertionError("".join(said))
        try:
            yield found[1]
        finally:
            process.terminate()


def post(url: str, **body: Any) -> Any:
    """What the server answers without the page."""
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()


def opened(tab: Tab, url: str, width: int = 1400, dark: bool = False) -> None:
    tab.open(url, width, dark=dark)
    tab.wait("get('send').disabled === false")


def ask(tab: Tab, question: str) -> None:
    """As a person does: into the field, Enter; and wait for the answers."""
    before = tab.run("turns.length")
    tab.run("get('question').focus()")
    tab.type(question)
    tab.press("Enter")
    tab.wait(f"turns.length === {before + 1} && !running")


def choose(tab: Tab, element: str, value: str) -> None:
    tab.run(
        f"{{ const one = {element}; one.value = {json.dumps(value)}; one.dispatchEvent(new Event('change')); }}"
    )


def texts(tab: Tab, selector: str) -> list[str]:
    """The text of the last turn's elements."""
    return list(
        tab.run(f"[...turns.at(-1).element.querySelectorAll('{selector}')].map(each => each.textContent)")
    )


def picture(folder: Path, size: tuple[int, int] = (16, 16)) -> tuple[Path, dict[str, Any]]:
    """A file, and the part of a message that holds it."""
    path = folder / "noise.png"
    Image.frombytes("RGB", size, random.Random(0).randbytes(size[0] * size[1] * 3)).save(path)
    shown = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return path, {"type": "image_url", "image_url": {"url": shown}}


def percent(share: float) -> str:
    return f"{int(100 * share + 0.5)}\xa0%"


def cells(factors: Any, linear: str) -> set[str]:
    """Names of the selected cells of one linear layer, as the page has them."""
    return {
        f"Block {layer.split('.layers.')[1].split('.')[0]}, {side.upper()}, factor {factor}"
        for side in ("a", "b")
        for layer, chosen in zip(factors["layers"], factors[side], strict=True)
        if layer.endswith(linear)
        for factor in chosen
    }


def drawn(tab: Tab, state: str) -> set[str]:
    return set(
        tab.run(f"[...cells.values()].filter(cell => cell.state === '{state}').map(cell => cell.name)")
    )


def test_models_answer_side_by_side_and_their_factors_are_drawn(tab: Tab, url: str, tmp_path: Path) -> None:
    opened(tab, url)
    assert tab.run("models.map(model => model.id)") == list(MODELS)
    file, part = picture(tmp_path)
    tab.give_files("#files", file)
    tab.wait("pictures.length === 1")
    tab.run("get('question').focus()")
    tab.type("What is it?")
    tab.press("Enter", modifiers=8)  # with Shift: a new line
    tab.type("A dog?")
    tab.press("Enter")
    tab.wait("turns.length === 1 && !running")
    content = [part, {"type": "text", "text": "What is it?\nA dog?"}]
    first = [
        post(url, model=model, messages=[{"role": "user", "content": content}], factors=True)
        for model in MODELS
    ]
    answers = [reply["choices"][0]["message"]["content"] for reply in first]
    assert texts(tab, ".said") == answers and len({*answers}) > 1
    assert texts(tab, ".asked p") == ["What is it?\nA dog?"]
    assert tab.run("turns[0].element.querySelector('.asked img').naturalWidth") == 16
    # The grid: those factors that the server names, of the first model that has some.
    factors = first[2]["mixlora"]["factors"]
    linear = tab.run("get('linear').value")
    assert drawn(tab, "selected") == cells(factors, linear) and len(cells(factors, linear)) == 2 * 2 * RANK
    # The next question: with what was said before, and with what has changed.
    ask(tab, "And this?")
    told: list[dict[str, Any]] = []
    for model, answer in zip(MODELS, answers, strict=True):
        past = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        told.append(
            post(url, model=model, messages=[*past, {"role": "user", "content": "And this?"}], factors=True)
        )
    assert texts(tab, ".said") == [reply["choices"][0]["message"]["content"] for reply in told]
    choose(tab, "get('shown')", "2/by-task")
    choose(tab, "get('other')", "previous")
    before, now = (cells(reply["mixlora"]["factors"], linear) for reply in (first[2], told[2]))
    assert before != now
    assert (drawn(tab, "kept"), drawn(tab, "new"), drawn(tab, "gone")) == (
        before & now,
        now - before,
        before - now,
    )
    legend = f"kept {len(before & now)} of {len(before)}"
    assert legend in tab.run("get('legend').textContent")
    # Nothing went wrong, and nobody else was asked.
    assert tab.complaints() == []
    assert {address.startswith(f"{url}/") for address in tab.requests()} == {True}


def test_a_cell_tells_which_tasks_use_its_factor(tab: Tab, url: str) -> None:
    opened(tab, url)
    ask(tab, "What is it?")
    tab.wait("uses.get('by-task')?.tasks")
    known = httpx.get(f"{url}/v1/models/by-task/factors").json()
    tab.run("document.querySelector('#grid td[tabindex=\"0\"]').focus()")
    tab.press("ArrowDown")
    tab.press("ArrowRight")
    layer = known["layers"].index(
        tab.run("shown.factors.layers[[...cells.values()][2 * 6 + 1].layers[0].index]")
    )
    users = ", ".join(f"{known['tasks'][task]} {percent(share)}" for task, share in known["a"][layer][1])
    assert tab.run("document.activeElement.ariaLabel").startswith("Block 1, A, factor 1: ")
    told = tab.run("get('told').innerText").split("\n")
    assert told[1:] == [known["layers"][layer], f"used by {users}" if users else "used by no training task"]
    # The tasks most alike, as the server counts them.
    reply = post(url, model="by-task", messages=[{"role": "user", "content": "What is it?"}], factors=True)
    alike = reply["mixlora"]["alike"]
    assert {task for task, _ in alike} == {*TASKS}
    rows = tab.run(
        "[...get('alike').tBodies[0].rows].map(row => [...row.cells].slice(0, 2).map(cell => cell.textContent))"
    )
    assert rows == [[task, percent(share)] for task, share in alike]
    # All linear layers of a block: the more of them select a factor, the stronger its cell.
    choose(tab, "get('linear')", "all")
    counted = tab.run("[...cells.values()].reduce((sum, cell) => sum + cell.kept, 0)")
    assert counted == 2 * RANK * len(known["layers"])
    assert tab.run("cells.size") == 2 * 2 * NUM_FACTORS


@pytest.mark.parametrize(
    ("choice", "definition", "named", "body"),
    [
        ("", "", "from the question", {}),
        ("task:reading", "", "factors of reading", {"task": "reading"}),
        ("definition", "Do counting.", "from your definition", {"definition": "Do counting."}),
    ],
)
def test_factors_by_a_task(
    tab: Tab, url: str, choice: str, definition: str, named: str, body: dict[str, str]
) -> None:
    opened(tab, url)
    for box in range(4):
        if box != 2:
            tab.run(f"document.querySelectorAll('#models input')[{box}].click()")
    choose(tab, "document.querySelector('#models select')", choice)
    if definition:
        tab.type(definition)  # the field has the focus
    ask(tab, "Is it red?")
    reply = post(
        url, model="by-task", messages=[{"role": "user", "content": "Is it red?"}], factors=True, **body
    )
    assert texts(tab, ".said") == [reply["choices"][0]["message"]["content"]]
    assert named in texts(tab, ".about")[0]
    assert (reply["mixlora"]["task"] or "") in texts(tab, ".about")[0]
    assert drawn(tab, "selected") == cells(reply["mixlora"]["factors"], tab.run("get('linear').value"))


def test_settings_are_sent(tab: Tab, url: str) -> None:
    opened(tab, url)
    for field, value in {"system": "Be short.", "temperature": "1.5", "max_tokens": "7", "seed": "3"}.items():
        tab.run(f"get('{field}').value = '{value}'")
    ask(tab, "What?")
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What?"}]
    sampled = [
        post(url, model=model, messages=messages, temperature=1.5, max_tokens=7, seed=3) for model in MODELS
    ]
    assert texts(tab, ".said") == [reply["choices"][0]["message"]["content"] for reply in sampled]


@pytest.mark.parametrize("width", [380, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_fits_its_window_in_light_and_dark(
    tab: Tab, url: str, tmp_path: Path, width: int, dark: bool
) -> None:
    opened(tab, url, width, dark)
    tab.give_files("#files", picture(tmp_path)[0])
    tab.run("get('settings').open = true")
    ask(tab, "averyveryverylongwordwithoutanyspaceatall" * 3)
    choose(tab, "get('other')", "previous")
    choose(tab, "document.querySelector('#models select')", "definition")
    assert tab.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    # Nothing that can be seen is wider than the box that it stands in, but for the grid, which scrolls.
    beyond = """[...document.querySelectorAll('#talk *, aside > *')].filter(each =>
        each.offsetParent && !each.closest('.hidden') && each.getBoundingClientRect().right > innerWidth).length"""
    assert tab.run(beyond) == 0
    shot = tmp_path / "shot.png"
    tab.screenshot(shot)
    with Image.open(shot) as picture_of_page:
        grey = picture_of_page.convert("L")
    ground = grey.getpixel((2, 2))
    darkest, brightest = grey.getextrema()
    assert (ground < 60) == dark and (ground > 220) == (not dark)
    assert brightest - darkest > 150


def test_pictures_by_drop_and_paste_are_scaled_where_the_server_would_refuse_them(
    tab: Tab, url: str, tmp_path: Path
) -> None:
    opened(tab, url)
    tab.wait("limits.pixels === 40000")
    for size, kind in (((16, 16), "paste"), ((400, 300), "drop")):
        data = picture(tmp_path, size)[1]["image_url"]["url"]
        tab.run(f"""{{
            const carried = new DataTransfer();
            const blob = Uint8Array.from(atob('{data.split(",")[1]}'), each => each.charCodeAt(0));
            carried.items.add(new File([blob], '{kind}.png', {{ type: 'image/png' }}));
            carried.items.add(new File(['text'], 'notes.txt', {{ type: 'text/plain' }}));
            const options = {{ bubbles: true, cancelable: true, clipboardData: carried, dataTransfer: carried }};
            const kinds = {{ drop: DragEvent, paste: ClipboardEvent }};
            get('question').dispatchEvent(new kinds['{kind}']('{kind}', options));
        }}""")
        tab.wait(f"pictures.some(picture => picture.name === '{kind}.png')")
        assert tab.run("get('refused').textContent") == "notes.txt is not a picture"
    assert tab.run("pictures.map(picture => picture.note)") == ["", "scaled to 230 × 173"]
    assert tab.run("pictures[0].url") == picture(tmp_path)[1]["image_url"]["url"]  # as it is
    tab.run("document.querySelector('#pictures button').click()")
    assert tab.run("pictures.map(picture => picture.name)") == ["drop.png"]
    ask(tab, "What is it?")
    assert texts(tab, ".wrong") == [""] * 4


# What the server is in place of the real one: its status, and what it streams.
STAND_IN = """window.real ??= window.fetch;
window.fetch = async (path, { signal } = {}) => {
  if (path !== '/v1/chat/completions') return window.real(path);
  const body = new ReadableStream({
    start(stream) {
      for (const each of %s) stream.enqueue(new TextEncoder().encode(each));
      signal.addEventListener('abort', () => stream.error(signal.reason));
      if (%s) stream.close();
    },
  });
  return new Response(body, { status: %d, headers: { 'Retry-After': '7' } });
};"""
EVIL = "<script>window.done = 1</script><img src=x onerror='window.done = 2'>&amp;<b>"


def streamed(*pieces: str, finish: str | None = None) -> list[str]:
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces
    ]
    if finish:
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    whole = "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks)
    return [whole[start : start + 37] for start in range(0, len(whole), 37)]  # cut anywhere


@pytest.mark.parametrize(
    ("status", "body", "said", "wrong", "about"),
    [
        (200, streamed("So: ", EVIL, " ü", finish="stop"), f"So: {EVIL} ü", "", ""),
        (200, streamed("cut", finish="length"), "cut", "", "cut at the most tokens"),
        (200, streamed("half"), "half", "the connection ended before the answer did", ""),
        (200, ['data: {"error": {"message": "the server failed"}}\n\n'], "", "the server failed", ""),
        (429, ['{"error": {"message": "<b>too many</b>"}}'], "", "<b>too many</b> (again in 7 s)", ""),
        (503, ['{"error": {"message": "it stops"}}'], "", "it stops (again in 7 s)", ""),
        (502, ["<html>"], "", "the server answered 502 (again in 7 s)", ""),
    ],
)
def test_what_a_server_says_is_shown_as_text(
    tab: Tab, url: str, status: int, body: list[str], said: str, wrong: str, about: str
) -> None:
    opened(tab, url)
    tab.run(STAND_IN % (json.dumps(body), "true", status))
    ask(tab, f"{EVIL} {said}")
    assert [*{*texts(tab, ".said")}] == [said] and [*{*texts(tab, ".wrong")}] == [wrong]
    assert texts(tab, ".asked p") == [f"{EVIL} {said}".strip()]
    assert all(about in one for one in texts(tab, ".about"))
    assert tab.run("window.done ?? 0") == 0
    assert tab.run("document.scripts.length") == 1


def test_stop_retry_and_clear(tab: Tab, url: str) -> None:
    opened(tab, url)
    tab.run(STAND_IN % (json.dumps(streamed("never", " ends")), "false", 200))
    tab.run("get('question').focus()")
    tab.type("What?")
    tab.press("Enter")
    tab.wait("turns[0]?.replies.every(reply => reply.text === 'never ends')")
    tab.run("get('stop').click()")
    tab.wait("!running")
    assert all(each.startswith("stopped") for each in texts(tab, ".about"))
    assert texts(tab, ".said") == ["never ends"] * 4 and texts(tab, ".wrong") == [""] * 4
    tab.run("window.fetch = window.real")
    tab.run("get('retry').click()")
    tab.wait("!running")
    replies = [post(url, model=model, messages=[{"role": "user", "content": "What?"}]) for model in MODELS]
    assert texts(tab, ".said") == [reply["choices"][0]["message"]["content"] for reply in replies]
    assert tab.run("turns.length") == 1
    tab.run("get('clear').click()")
    assert tab.run("[turns.length, document.querySelectorAll('.turn').length, get('panel').hidden]") == [
        0,
        0,
        True,
    ]
    for _ in MODELS:
        tab.run("document.querySelector('#models input:checked').click()")
    tab.run("get('question').focus()")
    tab.type("Nobody?")
    tab.press("Enter")
    assert tab.run("get('refused').textContent") == "choose a model that answers"
    assert tab.run("get('question').value") == "Nobody?"


def test_a_refusal_is_in_the_servers_words(tab: Tab, url: str) -> None:
    opened(tab, url)
    tab.run("get('max_tokens').value = '-3'")
    ask(tab, "What?")
    refused = post(url, model="base", messages=[{"role": "user", "content": "What?"}], max_tokens=-3)
    assert texts(tab, ".wrong") == [refused["error"]["message"]] * 4


def test_a_key_is_asked_for_and_an_absent_server_is_named(tab: Tab, tmp_path: Path) -> None:
    with served(tmp_path, MIXLORA_SERVE_KEY=KEY) as url:
        tab.open(url, 1400)
        for key in ("wrong", KEY):
            tab.wait("get('problem').textContent === 'the server wants its key: Authorization: Bearer KEY'")
            assert not tab.run("get('access').hidden || get('notice').hidden")
            tab.run("get('problem').textContent = ''")
            tab.run("get('key').select()")
            tab.type(key)
            tab.press("Enter")
        tab.wait("get('send').disabled === false")
        assert tab.run("get('access').hidden && get('notice').hidden")
        ask(tab, "What?")
        assert texts(tab, ".wrong") == [""] and texts(tab, ".said") != [""]
        assert tab.run("document.querySelector('aside').hidden")  # the base has no factors
    ask(tab, "Still there?")
    gone = f"no server answers at {url.removeprefix('http://')}: is mixlora serve still running there?"
    assert texts(tab, ".wrong") == [gone]


def test_only_the_pages_own_script_may_run() -> None:
    text = PAGE.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    allowed = f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    assert allowed in text, f"the script has changed: the page's policy must say {allowed}"
