"""Vision-Flan's own files, from the hub or from a local copy; a partial copy is told apart from a missing one."""

from __future__ import annotations

import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mixlora_cli.errors import UserError
from mixlora_cli.prepare.disk import require_space

ANNOTATIONS = "annotation_191-task_1k.json"
METADATA = "metadata.json"
ARCHIVE = "image_191-task_1k.zip"
INNER_FOLDER = "images_191task_1k"
FILES = (ANNOTATIONS, METADATA, ARCHIVE)
_KEY = "prepare.vision_flan"
_ZIP_START, _POINTER_START = b"PK\x03\x04", b"version https://git-lfs"


@dataclass(frozen=True)
class SourceFiles:
    """What the preparation reads."""

    annotations: Path
    metadata: Path | None
    images: Path
    """The folder of the pictures, or the folder inside the archive that holds them."""

    @property
    def stamps(self) -> dict[str, list[int]]:
        """Size and time of change of each file, to notice that one was replaced."""
        archive = self.images if self.images.is_dir() else _archive_of(self.images)
        files = [self.annotations, archive] + ([] if self.metadata is None else [self.metadata])
        return {file.name: _stamp(file) for file in files}


def _archive_of(images: Path) -> Path:
    return next(place for place in (images, *images.parents) if place.is_file())


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [0 if file.is_dir() else status.st_size, 0 if file.is_dir() else status.st_mtime_ns]


def find_source(place: str, revision: str | None) -> SourceFiles:
    """The files of a local copy, or those of the hub data set `place` after a download that can be resumed.

    Raises UserError when a file is missing, cut short or not what its name says, or cannot be downloaded.
    """
    folder = Path(place).expanduser()
    if folder.is_dir():
        return local_source(folder)
    if place.startswith((".", "/", "~")) or place.count("/") != 1:
        raise UserError(
            f"{_KEY}={place}: no such folder; expected a folder with {', '.join(FILES)}, or a hub id such as "
            "Vision-Flan/vision-flan_191-task_1k"
        )
    return _check(_download(place, revision))


def local_source(folder: Path) -> SourceFiles:
    """The files of a local copy; the pictures may be unpacked in `images_191task_1k/`, the metadata may be missing.

    Raises UserError that tells a folder of something else, a partial copy and damaged files apart.
    """
    unpacked = (folder / INNER_FOLDER).is_dir()
    needed = (ANNOTATIONS, INNER_FOLDER if unpacked and not (folder / ARCHIVE).is_file() else ARCHIVE)
    missing = [name for name in needed if not (folder / name).exists()]
    if missing:
        found = [name for name in (*FILES, INNER_FOLDER) if (folder / name).exists()]
        parts = sorted(path.name for path in folder.rglob("*.incomplete"))
        if not found and not parts:
            raise UserError(
                f"{_KEY}={folder}: holds nothing of Vision-Flan; expected {', '.join(FILES)} in it"
            )
        state = f"has {', '.join(found) or 'no whole file'}, lacks {', '.join(missing)}"
        hint = f" ({len(parts)} unfinished downloads lie in it)" if parts else ""
        raise UserError(f"{_KEY}={folder}: a partial copy: {state}{hint}; finish the download and try again")
    return _check({name: folder / name for name in (*FILES, INNER_FOLDER) if (folder / name).exists()})


def _check(files: dict[str, Path]) -> SourceFiles:
    for name in (ANNOTATIONS, METADATA):
        if name in files:
            _refuse_pointer(files[name])
    archive = files.get(ARCHIVE)
    images = files[INNER_FOLDER].resolve() if archive is None else archive.absolute() / inner_folder(archive)
    return SourceFiles(files[ANNOTATIONS], files.get(METADATA), images)


def _refuse_pointer(file: Path) -> bytes:
    """First bytes of a file that is not a Git LFS pointer."""
    with file.open("rb") as stream:
        start = stream.read(len(_POINTER_START))
    if start == _POINTER_START:
        raise UserError(f"{file}: only a Git LFS pointer; fetch the file itself with `git lfs pull`")
    return start


def inner_folder(archive: Path) -> str:
    """Folder inside the archive that holds the pictures.

    Raises UserError when the archive is cut short, is no zip file, or holds no pictures.
    """
    start = _refuse_pointer(archive)
    try:
        with zipfile.ZipFile(archive) as opened:
            files = [name for name in opened.namelist() if not name.endswith("/")]
    except zipfile.BadZipFile as error:
        size = archive.stat().st_size
        if start.startswith(_ZIP_START):
            raise UserError(
                f"{archive}: begins like a zip archive but is cut short at {size:,} bytes ({error}); "
                "finish the download and try again"
            ) from None
        raise UserError(f"{archive}: not a zip archive ({size:,} bytes); download it again") from None
    folders = Counter(str(PurePosixPath(name).parent) for name in files if not name.startswith("__MACOSX"))
    if not folders:
        raise UserError(f"{archive}: holds no file; expected the pictures in {INNER_FOLDER}/")
    chosen = INNER_FOLDER if INNER_FOLDER in folders else folders.most_common(1)[0][0]
    return "" if chosen == "." else chosen


def _download(repository: str, revision: str | None) -> dict[str, Path]:
    """The hub's files in its own cache; what is there already is not fetched again, a cut download goes on."""
    from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        known = [
            try_to_load_from_cache(repository, name, revision=revision, repo_type="dataset") for name in FILES
        ]
        if not all(isinstance(path, str) for path in known):
            info = HfApi().dataset_info(repository, revision=revision, files_metadata=True)
            sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or []}
            fetched = dict(zip(FILES, known, strict=True))
            size = sum(sizes.get(name, 0) for name in FILES if not isinstance(fetched[name], str))
            require_space(Path(constants.HF_HUB_CACHE), size, f"downloading {repository}")
        return {
            name: Path(hf_hub_download(repository, name, revision=revision, repo_type="dataset"))
            for name in FILES
        }
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise UserError(
            f"{_KEY}={repository} cannot be downloaded: {reason}; the same command goes on where it stopped, or give "
            f"{_KEY}=<folder with {', '.join(FILES)}>"
        ) from error
