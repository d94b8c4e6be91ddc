"""Nothing that an unseen benchmark shows or asks is shown or asked in training; read from the files on disk."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mixlora_cli.data.mini.objects import (
    calculations,
    objects,
    pictured,
    shapes,
    two_digit_numbers,
    written_words,
)
from mixlora_cli.data.mini.plan import Plan

Records = Mapping[str, list[dict[str, Any]]]
SEEN_SPLITS = ("train", "heldout")


def shown(records: list[dict[str, Any]]) -> set[str]:
    return {content for record in records for content in record["contents"]}


def question(record: dict[str, Any]) -> str:
    text = record["conversations"][0]["value"]
    assert isinstance(text, str)
    return text.removeprefix("<image>\n")


def pattern(template: str) -> re.Pattern[str]:
    """Matches every text that fills the template's blanks."""
    parts = re.split(r"\{\w+\}", template)
    return re.compile(".+".join(re.escape(part) for part in parts), re.IGNORECASE)


def test_contents_are_disjoint_in_the_full_data_set(full_plan: Plan) -> None:
    seen = shown([*full_plan.records["train"], *full_plan.records["heldout"]])
    unseen = shown(full_plan.records["unseen"])
    assert seen & unseen == set()
    numbers = {"seen": [], "unseen": []}  # type: dict[str, list[int]]
    for split, found in (("seen", seen), ("unseen", unseen)):
        for kind in ("object", "text", "shape", "flag"):
            numbers[split].append(sum(content.startswith(f"{kind}:") for content in found))
    assert (
        numbers["seen"][0] == len(objects("seen")) - 1 == 142
    )  # all but the ring, which is an unseen shape too
    assert numbers["unseen"][0] == len(objects("unseen")) == 67
    assert numbers["seen"][2:] == [5, 14]
    assert numbers["unseen"][2:] == [3, 0]


def test_names_are_disjoint(full_plan: Plan) -> None:
    """No text of training holds the name of an unseen object or shape, nor an unseen word."""
    foreign = {item.name for item in objects("unseen")} | set(shapes("unseen")) | set(written_words("unseen"))
    foreign -= {"green", "orange", "letter"}  # colours, and a word of the instructions
    for split in SEEN_SPLITS:
        for record in full_plan.records[split]:
            tokens = re.findall(r"\w+", " ".join(turn["value"] for turn in record["conversations"]).lower())
            assert foreign.isdisjoint(tokens), record["id"]


def test_vocabularies_are_disjoint() -> None:
    assert {item.name for item in pictured("seen")}.isdisjoint(item.name for item in pictured("unseen"))
    assert set(written_words("seen")).isdisjoint(written_words("unseen"))
    assert set(two_digit_numbers("seen")).isdisjoint(two_digit_numbers("unseen"))
    assert len(two_digit_numbers("seen")) + len(two_digit_numbers("unseen")) == 90
    assert set(calculations("seen")).isdisjoint(calculations("unseen"))
    assert len(calculations("seen")) + len(calculations("unseen")) == 81 + 45
    assert len(calculations("unseen")) >= 36


def test_templates_are_disjoint(built: Path, full_plan: Plan) -> None:
    """No unseen question could have been written by a training template, and no training one by an unseen."""
    metadata = json.loads((built / "metadata.json").read_text())
    templates: dict[str, list[re.Pattern[str]]] = {"seen": [], "unseen": []}
    for entry in metadata.values():
        templates[entry["split"]] += [pattern(template) for template in entry["templates"]]
    assert len(templates["seen"]) == 78
    assert len(templates["unseen"]) == 15

    def written_by(text: str, split: str) -> bool:
        return any(template.fullmatch(text) for template in templates[split])

    for record in full_plan.records["unseen"]:
        assert written_by(question(record), "unseen"), question(record)
        assert not written_by(question(record), "seen"), question(record)
    for record in full_plan.records["train"][::5]:
        assert written_by(question(record), "seen"), question(record)
        assert not written_by(question(record), "unseen"), question(record)


def test_pictures_are_disjoint_on_disk(built: Path, read_records: Records) -> None:
    files = {split: {record["image"] for record in read_records[split]} for split in read_records}
    assert sum(map(len, files.values())) == len(set().union(*files.values()))
    digests = {}
    for name in sorted(set().union(*files.values())):
        with Image.open(built / "images" / name) as picture:
            assert (picture.mode, picture.size, picture.format) == ("RGB", (160, 160), "PNG")
            digests[name] = hashlib.sha256(picture.tobytes()).hexdigest()
    assert len(set(digests.values())) == len(digests)
