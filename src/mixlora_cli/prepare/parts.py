"""The parts that something is prepared from: local folders, or snapshots of hub repositories.

The hub's own client downloads: into its cache, resuming what was interrupted, with its own progress bars.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import DryRunFileInfo, constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
)

from mixlora_cli.errors import UserError

_SAFETENSORS, _PICKLED = "*.safetensors*", "*.bin*"
_HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, IncompleteSnapshotError, OSError)


@dataclass(frozen=True)
class Part:
    """One part where it lies on this machine."""

    key: str
    """Configuration key that names it, for messages."""
    source: str
    """What the key was set to."""
    path: Path
    """Folder, or a file for a part that is one file."""

    def refuse(self, reason: str) -> UserError:
        """The error to raise when the part cannot be used."""
        return UserError(f"{self.key}={self.source}: {reason}")


def find_part(
    key: str, source: str, patterns: Sequence[str], revision: str | None = None, kind: str = "model"
) -> Part:
    """Where the part is on this machine, after downloading it if `source` is a hub id.

    Args:
        key: of the configuration.
        source: a path or a hub id.
        patterns: names of the files that are needed, with wildcards. Weights in `*.bin` are left out where the
            repository has the same in safetensors, and so is what lies in subfolders.
        revision: commit or tag; None is the newest.
        kind: "model" or "dataset", of the hub's repository.

    Raises:
        UserError: there is no such folder or repository, it cannot be reached, or the disk is too small.
    """
    path = Path(source).expanduser()
    if path.exists():
        return Part(key, source, path)
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(
            f"{key}={source}: no such file or folder; give one with {', '.join(patterns)}, "
            "or a hub id like owner/name"
        )
    needed = list(patterns)
    try:
        listed = snapshot_download(
            source, repo_type=kind, revision=revision, allow_patterns=needed, dry_run=True
        )
    except _HUB_ERRORS as error:
        return Part(key, source, _downloaded_before(key, source, needed, revision, kind, error))
    files = _without_doubles(listed)
    missing = sum(file.file_size or 0 for file in files if file.will_download)
    require_space(Path(constants.HF_HUB_CACHE), missing, f"downloading {source}")
    # Of the commit that was listed, so that nothing can change in between.
    commit = files[0].commit_hash if files else revision
    names = [file.filename for file in files]
    try:
        path = Path(snapshot_download(source, repo_type=kind, revision=commit, allow_patterns=names))
    except _HUB_ERRORS as error:
        raise UserError(
            f"{key}={source}: the download stopped: {_first_line(error)}; the same command goes on with it"
        ) from error
    return Part(key, source, path)


def _without_doubles(files: Sequence[DryRunFileInfo]) -> list[DryRunFileInfo]:
    top = [file for file in files if "/" not in file.filename]
    if any(fnmatch(file.filename, _SAFETENSORS) for file in top):
        return [file for file in top if not fnmatch(file.filename, _PICKLED)]
    return top


def _downloaded_before(
    key: str, repository: str, patterns: list[str], revision: str | None, kind: str, reason: Exception
) -> Path:
    """A snapshot in the hub's cache; without network that is all there is."""
    for unwanted in (_PICKLED, _SAFETENSORS):
        try:
            return Path(
                snapshot_download(
                    repository,
                    repo_type=kind,
                    revision=revision,
                    allow_patterns=patterns,
                    ignore_patterns=[unwanted],
                    local_files_only=True,
                )
            )
        except _HUB_ERRORS:
            continue
    raise UserError(
        f"{key}={repository}: cannot be downloaded: {_first_line(reason.__cause__ or reason)}; "
        f"check the name and the network, or give a local copy: {key}=<folder>"
    ) from reason


def _first_line(error: BaseException) -> str:
    lines = (line.strip().rstrip(".") for line in str(error).splitlines() if line.strip())
    return next(lines, type(error).__name__)


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Do nothing where `needed` bytes fit on the disk of `folder`, which need not exist yet.

    Args:
        folder: what is to be written.
        needed: its bytes.
        purpose: what the space is for, the start of the message: "unpacking the pictures".

    Raises:
        UserError: they do not fit; says how much is needed and how much is free.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{purpose} needs {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free: free some space, "
            "or use another disk (prepare.output=<folder> for the result, HF_HOME for downloads)"
        )
