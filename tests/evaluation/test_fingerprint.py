"""Digests of records: what kept answers are keyed by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mixlora_cli.data.records import Record, parse_record
from mixlora_cli.data.template import Turn
from mixlora_cli.evaluation.fingerprint import records_digest, relative_image


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """One with a picture of five bytes, one without."""
    (tmp_path / "a.bin").write_bytes(b"12345")
    turns = (Turn("human", "<image>\nq"), Turn("gpt", "a"))
    pictured = Record(0, "1", "unnamed", (tmp_path / "a.bin",), turns, {"benchmark": "x"})
    return [pictured, Record(1, "1", "unnamed", (), (Turn("human", "q"), Turn("gpt", "a")))]


def test_records_with_one_picture_or_none_keep_the_digest_of_answers_kept_earlier(records, tmp_path) -> None:
    assert records_digest(records, tmp_path) == "7bcccdc3aac6eccb"
    assert records_digest(records[:1], None) == "d5cbf51e5351fccf"
    assert records_digest(records[1:], tmp_path) == "f2c8a7b610b3839b"


def test_a_marker_that_reading_added_is_not_in_the_digest(records, tmp_path) -> None:
    asked = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    read = parse_record(0, {"image": "a.bin", **asked}, tmp_path)
    assert read.conversation[0].text == "<image>\nq"
    as_before = replace(records[0], extra={}, conversation=(Turn("human", "q"), Turn("gpt", "a")))
    assert records_digest([read], tmp_path) == records_digest([as_before], tmp_path)
    marked = replace(as_before, conversation=(Turn("human", "<image>\nq"), Turn("gpt", "a")))
    assert records_digest([read], tmp_path) != records_digest([marked], tmp_path)


def test_a_digest_tells_several_pictures_their_order_and_a_system_turn_apart(records, tmp_path) -> None:
    (tmp_path / "b.bin").write_bytes(b"1234567")
    one, two = tmp_path / "a.bin", tmp_path / "b.bin"
    told = Turn("system", "Answer in one word.")
    versions = [replace(records[0], images=images) for images in ((one,), (one, two), (two, one), (one, one))]
    versions.append(replace(records[0], conversation=(told, *records[0].conversation)))
    assert len({records_digest([each], tmp_path) for each in versions}) == len(versions)
    assert relative_image(versions[2], tmp_path) == "b.bin"
