"""The configuration tree is found in a checkout and travels inside the wheel, which works without the repository."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.metadata import Metadata

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


def _built(kind: str, source: Path, folder: Path) -> Path:
    """The wheel or the sdist of a source tree."""
    backend = pytest.importorskip("hatchling.build")
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(source)
        return folder / getattr(backend, f"build_{kind}")(str(folder))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _built("wheel", ROOT, tmp_path_factory.mktemp("built") / "wheel")


def _files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def test_wheel_ships_configuration_weights_and_code_alone(wheel: Path) -> None:
    files = _files(wheel)
    information = f"mixlora_cli-{__version__}.dist-info"
    assert {name.split("/")[0] for name in files} == {"mixlora_cli", information}
    expected = set()
    for folder, prefix in ((ROOT / "conf", "mixlora_cli/conf"), (ROOT / "src/mixlora_cli", "mixlora_cli")):
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(f"{prefix}/{path.relative_to(folder).as_posix()}")
    assert {name for name in files if name.startswith("mixlora_cli/")} == expected
    assert "mixlora = mixlora_cli.cli:main" in files[f"{information}/entry_points.txt"].decode()
    metadata = Metadata.from_email(files[f"{information}/METADATA"], validate=True)
    assert str(metadata.version) == __version__
    assert metadata.description and metadata.description_content_type == "text/markdown"


def test_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(_built("sdist", ROOT, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / f"mixlora_cli-{__version__}"
    assert (source / "tests/config/test_package.py").is_file() and (source / "scripts/setup.sh").is_file()
    assert not (source / "results").exists()
    assert _files(_built("wheel", source, tmp_path / "wheel")) == _files(wheel)


@pytest.mark.slow
def test_the_wheel_works_from_an_empty_folder(wheel: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/check_wheel.py"), "--no-deps", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("==> The wheel works\n")


def test_the_documents_are_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    headings = re.findall(
        r"^## \[(.+?)\](?: - (.+))?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert headings[:2] == [("Unreleased", ""), (__version__, str(citation["date-released"]))]
    assert citation["version"] == __version__
