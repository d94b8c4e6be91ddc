"""The configuration tree is found in a checkout, and travels inside the wheel."""

import re
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml

import mixlora_cli.paths
from mixlora_cli import __version__
from mixlora_cli.paths import conf_dir

ROOT = Path(__file__).parents[2]


def test_checkout_uses_the_tree_at_its_top() -> None:
    assert conf_dir() == ROOT / "conf"


def test_an_installed_package_uses_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lib" / "mixlora_cli"
    shutil.copytree(ROOT / "conf", package / "conf")
    monkeypatch.setattr(mixlora_cli.paths, "__file__", str(package / "paths.py"))
    assert conf_dir() == package / "conf"


def test_a_broken_installation_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixlora_cli.paths, "__file__", str(tmp_path / "a" / "b" / "paths.py"))
    with pytest.raises(FileNotFoundError, match="reinstall mixlora-cli"):
        conf_dir()


def test_wheel_ships_configuration_weights_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(ROOT)
    wheel = zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path)))
    names = set(wheel.namelist())
    for folder, prefix in ((ROOT / "conf", "mixlora_cli/conf"), (ROOT / "src/mixlora_cli", "mixlora_cli")):
        for path in folder.rglob("*"):
            if path.suffix in {".yaml", ".py", ".safetensors"}:
                assert f"{prefix}/{path.relative_to(folder).as_posix()}" in names
    scripts = next(name for name in names if name.endswith("entry_points.txt"))
    assert "mixlora = mixlora_cli.cli:main" in wheel.read(scripts).decode()


def test_the_documents_are_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    headings = re.findall(
        r"^## \[(.+?)\](?: - (.+))?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert headings[:2] == [("Unreleased", ""), (__version__, str(citation["date-released"]))]
    assert citation["version"] == __version__
