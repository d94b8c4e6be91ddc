"""The whole command on the tiny model: selections are the layer's own, drawing again needs no model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from mixlora_cli.analysis.selections import reading
from mixlora_cli.analysis.selections.reading import choose_instances, find_layers
from mixlora_cli.analysis.selections.run import tsne
from mixlora_cli.commands import COMMANDS
from mixlora_cli.config import DataConfig, ModelConfig
from mixlora_cli.data.encode import encode_prompts
from mixlora_cli.hydra_app import run_command
from mixlora_cli.models.load import build_base
from mixlora_cli.models.session import Session
from mixlora_cli.models.tiny import build_tiny
from tiny_data import as_arguments
from tiny_runs import NUM_FACTORS, RANK

from .conftest import ATTACK, SEEN, UNSEEN, MakeConfig, MakeRun

LAYER = "model.language_model.layers.1.mlp.gate_proj"
COMMAND = COMMANDS["tsne"]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of the batches that were put to a model."""
    sizes: list[int] = []
    original = Session.selections

    def counted(self: Session, items: Any) -> Any:
        sizes.append(len(items))
        return original(self, items)

    monkeypatch.setattr(Session, "selections", counted)
    yield sizes


def stored(folder: Path) -> dict[tuple[str, int, str, str], list[int]]:
    """By (task, record, layer, side): the factors in order."""
    rows = [
        row for path in sorted((folder / "selections").iterdir()) for row in pq.read_table(path).to_pylist()
    ]
    return {(row["task"], row["index"], row["layer"], row["side"]): row["factors"] for row in rows}


def report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "tsne.json").read_text())
    return content


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.usefixtures("no_pictures")
def test_stored_are_the_selections_of_each_prompt(
    make_run: MakeRun, make_config: MakeConfig, batch_size: int
) -> None:
    """Whatever is in a batch with it; that these are the layers' own is for the session's tests."""
    run = make_run()
    config = make_config(run.root, tasks=[UNSEEN[0], SEEN[1]], batch_size=batch_size)
    found = stored(tsne(config))
    session = Session(build_tiny(), torch.float32, cache_features=False, adapter=run.adapter)
    compared = 0
    for instances in choose_instances(config):
        for item in encode_prompts(instances.records, session.base.chat).items:
            for name, selection in session.selections([item]).items():
                if "gate_proj" in name:
                    for side, index in (("a", selection.index_a), ("b", selection.index_b)):
                        assert found[instances.task, item.index, name, side] == index[0].tolist()
                        compared += 1
    assert compared == len(found) == 16 * 2 * 2
    assert len({tuple(factors) for key, factors in found.items() if key[2:] == (LAYER, "a")}) > 1


@pytest.mark.parametrize(
    ("family", "decoder"),
    [("smolvlm", "model.text_model"), ("qwen2_5_vl", "model.language_model")],
    indirect=["family"],
)
@pytest.mark.usefixtures("no_pictures")
def test_the_decoder_is_found_whatever_it_is_called(
    family: ModelConfig, decoder: str, make_run: MakeRun, make_config: MakeConfig
) -> None:
    run = make_run(model=family)
    found = stored(tsne(make_config(run.root, tasks=[*SEEN], cache_features=True)))
    assert {layer for _, _, layer, _ in found} == {f"{decoder}.layers.{n}.mlp.gate_proj" for n in (0, 1)}
    session = Session(build_base(family), torch.float32, cache_features=False, adapter=run.adapter)
    for instances in choose_instances(make_config(run.root, tasks=[*SEEN])):
        for item in encode_prompts(instances.records, session.base.chat).items:
            chosen = session.selections([item])
            for (task, index, layer, side), factors in found.items():
                if (task, index) == (instances.task, item.index):
                    own = chosen[layer].index_a if side == "a" else chosen[layer].index_b
                    assert own[0].tolist() == factors


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_an_adapted_tower_is_left_out(
    family: ModelConfig, make_run: MakeRun, make_config: MakeConfig
) -> None:
    """Its blocks have numbers, too, and linear layers of the same names."""
    run = make_run(model=family)
    file = run.adapter / "adapter_model.safetensors"
    weights = load_file(file)
    tower = {
        key.replace("model.language_model.layers", "model.visual.blocks"): tensor.clone()
        for key, tensor in weights.items()
    }
    save_file(weights | tower, file)
    layers = find_layers(make_config(run.root))[2]
    assert [(one.block, one.name.partition(".layers.")[0]) for one in layers] == [
        (0, "model.language_model"),
        (1, "model.language_model"),
    ]


def test_everything_is_written(
    make_run: MakeRun, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tsne(make_config(make_run().root, layers=None, sides=["a", "b"]))
    drawn = {f"{name}.{kind}" for name in ("map", "use", "overlap") for kind in ("png", "svg")}
    assert {path.name for path in folder.iterdir()} == drawn | {
        "tsne.html",
        "tsne.json",
        "points.parquet",
        "selections",
    }
    found = report(folder)
    assert [(one["task"], one["instances"]) for one in found["tasks"]] == [(task, 8) for task in UNSEEN]
    assert [(one["side"], one["block"]) for one in found["maps"]] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert (found["neighbours"], found["perplexity"]) == (7, 5)
    selections = stored(folder)
    for one in found["maps"]:
        for task in UNSEEN:
            mine = [
                s
                for key, s in selections.items()
                if key[0] == task and key[2:] == (one["layer"], one["side"])
            ]
            counts = np.bincount(np.concatenate(mine), minlength=NUM_FACTORS) / len(mine)
            np.testing.assert_allclose(one["factor use"][task], counts, atol=1e-6)
            assert sum(one["factor use"][task]) == pytest.approx(RANK, abs=1e-4)
        assert one["overlap"][UNSEEN[0]][UNSEEN[1]] == one["overlap"][UNSEEN[1]][UNSEEN[0]] <= 1
        for name in ("silhouette", "neighbour purity", "normalised mutual information"):
            number = one[name]
            assert number["chance"]["low"] <= number["chance"]["high"] and 1 / 21 <= number["p"] <= 1
        purity = one["neighbour purity"]
        assert np.mean(list(purity["tasks"].values())) == pytest.approx(purity["value"])
    points = pq.read_table(folder / "points.parquet").to_pylist()
    assert len(points) == 4 * 16 and all(0 <= point[axis] <= 1 for point in points for axis in "xy")
    shown = capsys.readouterr()
    assert "neighbour purity" in shown.out
    assert "perplexity 5 in the place of 30" in shown.err and "fewer than 300 instances" in shown.err


def test_drawing_again_needs_no_model(
    make_run: MakeRun,
    make_config: MakeConfig,
    forwards: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run()
    folder = tsne(make_config(run.root, tasks=list(UNSEEN)))
    assert sum(forwards) == 16
    first, page = report(folder)["maps"], (folder / "map.svg").read_bytes()
    forwards.clear()
    with monkeypatch.context() as patch:
        patch.setattr(reading, "build_base", None)
        tsne(make_config(run.root, tasks=list(UNSEEN)))
        assert report(folder)["maps"] == first and (folder / "map.svg").read_bytes() == page
        tsne(make_config(run.root, tasks=list(UNSEEN), layers=[0], sides=["b"], perplexity=2.0))
    assert forwards == [] and "drawn without the model" in capsys.readouterr().err
    (only,) = report(folder)["maps"]
    assert (only["block"], only["side"]) == (0, "b")
    # One more task is read alone; another sample is read anew.
    tsne(make_config(run.root, tasks=[*UNSEEN, SEEN[0]]))
    assert sum(forwards) == 8 and "2 of 3 tasks were read before" in capsys.readouterr().err
    tsne(make_config(run.root, tasks=list(UNSEEN), instances=4))
    assert sum(forwards) == 8 + 8


@pytest.mark.usefixtures("no_pictures")
def test_a_stopped_reading_goes_on_with_the_next_task(
    make_run: MakeRun, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, forwards: list[int]
) -> None:
    config = make_config(make_run().root, tasks=[*UNSEEN, SEEN[0]])
    counted = Session.selections

    def stopped(*arguments: Any) -> Any:
        if len(forwards) == 3:
            raise KeyboardInterrupt
        return counted(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "selections", stopped)
        with pytest.raises(KeyboardInterrupt):
            tsne(config)
    forwards.clear()
    interrupted = stored(tsne(config))
    assert sum(forwards) == 16
    whole = stored(
        tsne(make_config(make_run().root, tasks=[*UNSEEN, SEEN[0]], output_dir=config.output_dir + "-2"))
    )
    assert interrupted == whole


@pytest.mark.usefixtures("no_pictures")
def test_another_adapter_is_read_anew(
    make_run: MakeRun, make_config: MakeConfig, forwards: list[int]
) -> None:
    run = make_run()
    folder = tsne(make_config(run.root))
    before = stored(folder)
    path = run.adapter / "adapter_model.safetensors"
    weights = load_file(path)
    router = f"base_model.model.{LAYER}.mixlora_router_b.weight"
    weights[router] = weights[router].flip(0).contiguous()
    save_file(weights, path)
    forwards.clear()
    after = stored(tsne(make_config(run.root)))
    assert sum(forwards) == 16
    # Nothing but the B of that layer: the layers before it, and its own A, see what they saw.
    changed = {key[2:] for key, factors in before.items() if after[key] != factors}
    assert changed == {(LAYER, "b")}


@pytest.mark.usefixtures("no_pictures")
def test_task_routing_gives_each_task_one_selection(make_run: MakeRun, make_config: MakeConfig) -> None:
    folder = tsne(make_config(make_run(routing="task").root, tasks=[*UNSEEN, *SEEN]))
    found = report(folder)
    assert any("routing=task" in note for note in found["notes"])
    by_task = {key[0]: factors for key, factors in stored(folder).items() if key[2:] == (LAYER, "a")}
    assert all(
        factors == by_task[key[0]] for key, factors in stored(folder).items() if key[2:] == (LAYER, "a")
    )
    distinct = len({frozenset(factors) for factors in by_task.values()})
    assert distinct > 1
    one = next(one for one in found["maps"] if (one["layer"], one["side"]) == (LAYER, "a"))
    assert one["distinct selections"] == distinct
    if distinct == 4:
        assert one["normalised mutual information"]["value"] == pytest.approx(1)


@pytest.mark.usefixtures("no_pictures")
def test_random_routing_draws_with_its_seed(make_run: MakeRun, make_config: MakeConfig) -> None:
    run = make_run(routing="random").root

    def drawn(seed: int, tasks: tuple[str, ...] = UNSEEN) -> dict[Any, list[int]]:
        place = f"{run}/{seed}-{len(tasks)}"
        found = stored(tsne(make_config(run, tasks=list(tasks), routing_seed=seed, output_dir=place)))
        return {key: factors for key, factors in found.items() if key[0] in UNSEEN}

    torch.manual_seed(1)
    first = drawn(0)
    torch.manual_seed(2)
    # Other tasks that are read before change nothing.
    assert first == drawn(0, (SEEN[0], *UNSEEN)) and first != drawn(1)
    assert any("chance selects" in note for note in report(run / "0-2")["notes"])


def test_pairs(make_run: MakeRun, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [[SEEN[0], UNSEEN[0]], [SEEN[1], UNSEEN[1]]]
    found = report(tsne(make_config(make_run().root, pairs=pairs)))
    for one in found["maps"]:
        match, shared = one["pairs"], one["overlap"]
        partners = np.mean([shared[unseen][seen] for seen, unseen in pairs])
        others = np.mean([shared[UNSEEN[0]][SEEN[1]], shared[UNSEEN[1]][SEEN[0]]])
        assert (match["partner"], match["others"]) == (
            pytest.approx(partners, abs=1e-5),
            pytest.approx(others, abs=1e-5),
        )
        assert match["p"] in (0.5, 1.0)
    assert "overlap with the seen partner" in capsys.readouterr().out


@pytest.mark.slow
def test_command_line(make_run: MakeRun, data: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    given = [f"run={run.root}", *as_arguments(data)]
    arguments = [*given, "tasks=[mini_vsr,counting]", "tsne.permutations=20", "tsne.layers=[1]"]
    assert run_command(COMMAND, arguments) == 0, capsys.readouterr().err
    assert (run.root / "tsne" / "tsne.html").is_file()
    assert run_command(COMMAND, [*arguments[:-3], "tasks=[mini_vsr]"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: tasks=[mini_vsr]: must name two different tasks")
    assert run_command(COMMAND, [*given, "pairs=[[counting,mini_pope]]", "tsne.sides=[a]"]) == 0


class _Page(HTMLParser):
    """Elements, their addresses, and what stands in script elements."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")
        ]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.tags[-1] == "script":
            self.scripts[-1] += data


@pytest.mark.usefixtures("no_pictures")
def test_page_holds_everything_and_nothing_foreign(
    make_run: MakeRun, make_config: MakeConfig, data: DataConfig
) -> None:
    folder = tsne(make_config(make_run().root, tasks=[*UNSEEN, *SEEN], sides=["b", "a"]))
    text = (folder / "tsne.html").read_text()
    assert not re.search(r"https?:|//[a-z]", text) and "import(" not in text and "fetch(" not in text
    page = _Page()
    page.feed(text)
    assert page.tags.count("script") == 2 and page.addresses == []
    content = json.loads(page.scripts[0])
    assert len(content["instances"]) == 32
    assert all(
        len(panel[axis]) == 32 for panel in content["panels"] for axis in ("x", "y", "factors", "group")
    )
    points = pq.read_table(folder / "points.parquet").to_pylist()
    for panel, start in zip(content["panels"], range(0, len(points), 32), strict=True):
        mine = points[start : start + 32]
        np.testing.assert_allclose(panel["x"], [point["x"] * content["grid"] for point in mine], atol=0.5)
        np.testing.assert_allclose(panel["y"], [point["y"] * content["grid"] for point in mine], atol=0.5)
    # The attack of the data arrives as text.
    assert ATTACK not in text and sum(ATTACK in one["question"] for one in content["instances"]) == 2
    assert "innerHTML" not in page.scripts[1]
    records = [
        r for split in ("unseen", "heldout") for r in json.loads(Path(str(getattr(data, split))).read_text())
    ]
    with_picture = {r["id"] for r in records if "image" in r}
    assert {one["id"] for one in content["instances"] if one["picture"] is not None} == with_picture
    # 26 files with a picture; copies are embedded once.
    distinct = len(
        {(i, int(r["id"].split("-")[1]) // 2) for r in records if "image" in r for i in [r["id"][0]]}
    )
    assert len(content["pictures"]) == distinct == len(set(content["pictures"])) < len(with_picture)
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in content["pictures"])


@pytest.mark.usefixtures("no_pictures")
def test_pictures_keep_to_their_budget(make_run: MakeRun, make_config: MakeConfig) -> None:
    folder = tsne(make_config(make_run().root, page_mb=0.003))
    page = _Page()
    page.feed((folder / "tsne.html").read_text())
    content = json.loads(page.scripts[0])
    assert 0 < sum(map(len, content["pictures"])) <= 3000
    assert any("pictures had no room in this page" in note for note in content["notes"])
