"""Groups of instances that select alike, one static adapter for each, and a router of texts to name it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mixlora_cli.analysis.export.centroids import (
    TextRouter,
    find_clusters,
    rows_of,
    update_sketches,
)
from mixlora_cli.analysis.export.comparison import asked_text
from mixlora_cli.analysis.export.fit import Pools
from mixlora_cli.analysis.export.run import export
from mixlora_cli.config import FitConfig
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import Turn
from mixlora_cli.errors import UserError
from mixlora_cli.method.selection import Selection

from .conftest import TASKS, MakeConfig, MakeRun

E, R, N = 6, 2, 30
NAMES = ("centroid-1", "centroid-2", "centroid-3")
QUESTIONS = (
    ["How many dogs are there?", "How many red balls do you see?", "How many cats are 3 dogs?", "How many?"],
    ["What colour is the ball?", "Name the colour of the dog.", "Which colour has it?", "The colour, please"],
    ["图里有几只狗?", "有几只猫?", "有几个红色的球?", "有几棵树?"],
)


@pytest.fixture
def pools() -> dict[str, Pools]:
    """Of many small layers, whose errors average out."""
    torch.manual_seed(0)
    return {f"layer{n}": Pools(torch.randn(E, 12), torch.randn(E, 9), 1.5) for n in range(60)}


def selections_of(groups: list[int], share: float) -> dict[str, Selection]:
    """Each group has its own factors in every layer, of which an instance keeps this share, and chance has the rest."""
    generator = torch.Generator().manual_seed(1)

    def index() -> torch.Tensor:
        own = torch.rand(max(groups) + 1, E, generator=generator)[groups]
        return (share * own + (1 - share) * torch.rand(len(groups), E, generator=generator)).topk(R).indices

    return {f"layer{n}": Selection(index(), index()) for n in range(60)}


def test_distances_are_those_of_the_updates(pools: dict[str, Pools]) -> None:
    selections = selections_of([0] * 4 + [1] * 4, share=0.7)
    sketches = torch.from_numpy(update_sketches(pools, selections, seed=0))

    def update(row: int, layer: str) -> torch.Tensor:
        pool, chosen = pools[layer], selections[layer]
        pairs = zip(chosen.index_a[row].tolist(), chosen.index_b[row].tolist(), strict=True)
        parts = [pool.scaling * torch.outer(pool.factors_b[b], pool.factors_a[a]) for a, b in pairs]
        return torch.stack(parts).sum(dim=0)

    for first in range(8):
        for second in range(first):
            exact = sum(float((update(first, n) - update(second, n)).square().sum()) for n in pools)
            assert float((sketches[first] - sketches[second]).square().sum()) == pytest.approx(
                exact, rel=0.08
            )


def test_groups_that_select_alike_are_found_the_largest_first(pools: dict[str, Pools]) -> None:
    groups = [0] * 5 + [1] * 16 + [2] * 9
    selections = selections_of(groups, share=0.8)
    clusters, found = find_clusters(pools, selections, 3, seed=0)
    assert found == [2] * 5 + [0] * 16 + [1] * 9
    assert clusters.of(pools, rows_of(selections, [29, 0, 7])) == [1, 2, 0]
    assert find_clusters(pools, selections, 1, seed=0)[1] == [0] * N


def test_as_many_groups_as_instances_that_differ(pools: dict[str, Pools]) -> None:
    alike = selections_of([0, 0, 0, 1, 1, 2], share=1.0)
    assert find_clusters(pools, alike, 3, seed=0)[1] == [0, 0, 0, 1, 1, 2]
    with pytest.raises(UserError, match=r"export.centroids=4: only 3 of the 6 instances select differently"):
        find_clusters(pools, alike, 4, seed=0)


@pytest.fixture
def router() -> TextRouter:
    texts = [text for of_group in QUESTIONS for text in of_group]
    return TextRouter.fit(texts, [0] * 4 + [1] * 4 + [2] * 4, NAMES)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("How many HORSES?", "centroid-1"),
        ("what colour\nis the horse", "centroid-2"),
        ("有几匹马?", "centroid-3"),
    ],
)
def test_a_text_names_its_group(text: str, name: str, router: TextRouter) -> None:
    assert router.route(text) == name


def test_a_router_is_a_small_plain_file(router: TextRouter, tmp_path: Path) -> None:
    """What it names is the same from the file, and by the lines of the documentation, which need no package."""
    router.save(tmp_path / "router.json")
    again = TextRouter.read(tmp_path / "router.json")
    page = Path("docs/export.md").read_text(encoding="utf-8")
    (lines,) = (
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def route" in block
    )
    known: dict[str, Any] = {}
    exec(lines.replace("FOLDER/export", str(tmp_path)), known)
    texts = [
        *(text for of_group in QUESTIONS for text in of_group),
        "",
        "nothing known",
        "a 12 b 7 colour how",
    ]
    named = [router.route(text) for text in texts]
    assert set(named) == set(NAMES)
    assert [again.route(text) for text in texts] == named == [known["route"](text) for text in texts]
    (tmp_path / "other.json").write_text("{}")
    for file in ("other.json", "nowhere.json"):
        with pytest.raises(UserError, match="is no router"):
            TextRouter.read(tmp_path / file)


def test_one_adapter_or_no_common_word_still_has_an_answer() -> None:
    assert TextRouter.fit(["a", "b"], [0, 0], ["only"]).route("anything") == "only"
    assert TextRouter.fit(["a", "b", "c"], [0, 1, 1], ["one", "two"]).route("a") == "two"
    two = TextRouter.fit(["yes it is", "yes it was", "no", "no way"], [0, 0, 1, 1], ["one", "two"])
    assert (two.route("yes it"), two.route("no")) == ("one", "two")


def test_a_router_reads_what_a_gateway_has() -> None:
    turns = (
        Turn("system", "Be brief."),
        Turn("human", "<image>\nWhat is it?"),
        Turn("gpt", "A dog."),
        Turn("human", "Which one?"),
        Turn("gpt", "A poodle."),
    )
    record = Record(0, "", "", (Path("dog.png"),), turns)
    assert asked_text(record).split() == ["Be", "brief.", "What", "is", "it?", "Which", "one?"]


def test_centroids_lose_less_and_are_compared(
    make_run: MakeRun, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()

    def content(count: int, **values: Any) -> dict[str, Any]:
        folder = export(make_config(run.root, centroids=count, overwrite=True, **values))
        found: dict[str, Any] = json.loads((folder / "export.json").read_text())
        manifest = json.loads((folder / "manifest.json").read_text())
        names = [f"centroid-{number + 1}" for number in range(count)]
        assert [each["folder"] for each in found["adapters"]] == names
        assert [each["folder"] for each in manifest["adapters"]] == names
        assert manifest["router"] == "router.json"
        assert set(TextRouter.read(folder / "router.json").adapters) == set(names)
        assert all((folder / name / "adapter_model.safetensors").is_file() for name in names)
        counts = [each["instances"] for each in found["adapters"]]
        assert {task: sum(c.get(task, 0) for c in counts) for task in TASKS} == dict.fromkeys(TASKS, 10)
        return found

    def lost(found: dict[str, Any]) -> float:
        parts = [
            (sum(a["instances"].values()) * a["energy"]["selected"], a["energy"]) for a in found["adapters"]
        ]
        return sum(w * energy["lost_by_averaging"] for w, energy in parts) / sum(w for w, _ in parts)

    one, three = content(1), content(3)
    assert lost(content(8, evaluate=False)) < lost(three) < lost(one)
    assert not (run.root / "export" / "centroid-9").exists()
    shown = capsys.readouterr()
    assert f"{100 * lost(three):.1f} %" in shown.out and "together" in shown.out
    assert "the router names the nearest centroid for" in shown.err
    assert [set(measure["adapter kind"]) for measure in one["comparison"]] == [
        {"base", "mixlora", "static"}
    ] * 2
    match, loss = three["comparison"]
    kinds = ["base", "mixlora", "static", "nearest centroid", "routed centroid"]
    assert list(match["adapter kind"]) == list(loss["adapter kind"]) == kinds
    values = {kind: loss["adapter kind"][kind]["mean"]["value"] for kind in kinds}
    for kind in kinds[2:]:
        difference = loss[f"{kind} - mixlora, paired"]["mean"]["value"]
        assert difference == pytest.approx(values[kind] - values["mixlora"])
    # The one static adapter is the one centroid of one.
    assert values["static"] == pytest.approx(one["comparison"][1]["adapter kind"]["static"]["mean"]["value"])
    router = three["router"]
    assert router["instances"] == 12 and 1 / 3 <= router["always the most frequent"] <= 1
    assert router["names the nearest"]["low"] <= router["names the nearest"]["value"]


def test_each_instance_alone_is_the_adapter_itself(make_run: MakeRun, make_config: MakeConfig) -> None:
    """As many centroids as instances, compared on those very instances: the nearest one loses nothing."""
    run = make_run()
    data = make_config(run.root).data
    data = replace(data, heldout=data.train)
    config = make_config(run.root, tasks=[TASKS[0]], data=data, limit=3)
    found = json.loads(
        (
            export(replace(config, export=replace(config.export, centroids=10, instances=10))) / "export.json"
        ).read_text()
    )
    _, loss = found["comparison"]
    assert loss["nearest centroid - mixlora, paired"]["mean"]["value"] == pytest.approx(0, abs=1e-4)
    assert abs(loss["static - mixlora, paired"]["mean"]["value"]) > 1e-3
    assert all(
        each["energy"]["lost_by_averaging"] == pytest.approx(0, abs=1e-9) for each in found["adapters"]
    )


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("run", "values", "message"),
    [
        (
            ["mixlora", "task"],
            {"centroids": 2},
            "give export.per_task=true in its place, which loses nothing",
        ),
        (["mixlora", "random"], {"centroids": 2}, "with routing=random no input selects"),
        ([], {"centroids": 21}, "export.centroids=21: must be <= 20, the instances to fit to"),
        ([], {"centroids": 5, "instances": 2}, "export.centroids=5: must be <= 4"),
    ],
)
def test_refused_in_one_line_before_a_model_is_built(
    run: list[str], values: dict[str, Any], message: str, make_run: MakeRun, make_config: MakeConfig
) -> None:
    with pytest.raises(UserError) as caught:
        export(make_config(make_run(*run).root, **values))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_tasks_and_centroids_are_two_ways_to_group() -> None:
    with pytest.raises(ValueError, match=r"export.centroids=2: with export.per_task=true the tasks are"):
        FitConfig(per_task=True, centroids=2)
