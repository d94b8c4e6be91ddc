"""Pictures that are in the records: read from bytes and base64, written once, never taken for a path."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import pytest
from PIL import Image

from mixlora_cli.data.embedded import picture_from
from mixlora_cli.data.images import (
    Picture,
    as_shown,
    open_fully,
    open_picture,
    picture_name,
    read_picture,
    stamp,
)
from mixlora_cli.data.problems import BadRecord, Kind
from mixlora_cli.errors import UserError


def encoded(form: str, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, form)
    return buffer.getvalue()


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


FORMS = ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_picture_inside_a_record_is_its_bytes(form, tmp_path) -> None:
    content = encoded(form)
    uri = f"data:image/{form.lower()};base64,{text(content)}"
    values = [
        content, text(content), uri, f"data:;base64,{text(content)}", base64.encodebytes(content).decode(),
        {"bytes": content, "path": "gone.png"}, {"bytes": content, "path": None}, {"base64": text(content)},
        {"bytes": text(content)}, {"data": uri}, {"image": uri}, {"url": uri},
        {"type": "image_url", "image_url": {"url": uri}},
    ]  # fmt: skip
    assert [picture_from(value, None, None) for value in values] == [content] * len(values)
    paths = {picture_from(value, None, tmp_path / "store") for value in values}
    (path,) = paths
    assert isinstance(path, Path) and path.read_bytes() == content
    assert path.parent.parent == tmp_path / "store" and path.suffix == f".{form.lower()}"
    assert [file for file in (tmp_path / "store").rglob("*") if file.is_file()] == [path]


def test_pictures_are_told_apart_by_their_bytes_and_a_cut_file_is_written_again(tmp_path) -> None:
    red, blue = encoded("PNG"), encoded("PNG", "blue")
    first, second = picture_from(red, None, tmp_path), picture_from(blue, None, tmp_path)
    assert isinstance(first, Path) and isinstance(second, Path) and first != second
    written = first.stat().st_mtime_ns
    assert picture_from(red, None, tmp_path) == first and first.stat().st_mtime_ns == written
    first.write_bytes(red[:40])
    assert picture_from(red, None, tmp_path) == first and first.read_bytes() == red


def test_a_path_stays_a_path(images, tmp_path) -> None:
    for name in ("red.png", "iVBORw0KGgo", "9j", "R0lGOD"):
        (images / name).write_bytes(encoded("PNG"))
        assert picture_from(name, images, tmp_path / "store") == images / name
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "value", [b"", b"x" * 100, encoded("PNG")[:20], text(b"\x89PNG\r\n\x1a\n" + b"\0" * 200)]
)
def test_bytes_that_are_no_picture_are_not_kept(value, tmp_path) -> None:
    with pytest.raises(BadRecord, match="bytes in the record that are no picture") as caught:
        picture_from(value, None, tmp_path / "store")
    assert caught.value.kind is Kind.CORRUPT_IMAGE
    assert not (tmp_path / "store").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_store_without_permission(tmp_path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot be written: Permission denied; .*data\.streaming=true"):
        picture_from(encoded("PNG"), None, tmp_path / "store")


def test_a_store_that_is_a_file(tmp_path) -> None:
    (tmp_path / "store").write_text("x")
    with pytest.raises(UserError, match=r"the cache in .*store cannot be written: .*data\.streaming=true"):
        picture_from(encoded("PNG"), None, tmp_path / "store")


def test_bytes_are_opened_as_files_are(images) -> None:
    file = images / "red.png"
    content: Picture = file.read_bytes()
    assert read_picture(content) == content
    assert (stamp(content) or (0,))[0] == file.stat().st_size
    with open_picture(content) as opened, open_picture(file) as other:
        assert as_shown(opened, content).tobytes() == as_shown(other, file).tobytes()
    open_fully(content)
    with pytest.raises(BadRecord, match=f"{picture_name(content)}: ") as caught:
        open_fully(content[:60])
    assert caught.value.kind is Kind.CORRUPT_IMAGE
