"""The parts that a model is assembled from: local folders, or snapshots of hub repositories with the needed files only.

The hub's own client downloads: into its cache, resuming what was interrupted, with its own progress bars.
"""

from __future__ import annotations

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
from mixlora_cli.prepare.disk import require_space

SAFETENSORS = "*.safetensors"
PICKLED = "*.bin"
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


def find_part(key: str, source: str, patterns: Sequence[str], revision: str | None = None) -> Part:
    """Where the part is on this machine, after downloading it if `source` is a hub id.

    Args:
        patterns: names of the files that are needed, with wildcards. Weights in `*.bin` are left out where the
            repository has the same in safetensors.

    Raises:
        UserError: there is no such folder or repository, it cannot be reached, or the disk is too small.
    """
    path = Path(source).expanduser()
    if path.exists():
        return Part(key, source, path)
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(
            f"{key}={source}: no such file or folder; give one that exists, or a hub id like owner/name"
        )
    return Part(key, source, _download(key, source, patterns, revision))


def _download(key: str, repository: str, patterns: Sequence[str], revision: str | None) -> Path:
    try:
        listed = snapshot_download(repository, revision=revision, allow_patterns=list(patterns), dry_run=True)
    except _HUB_ERRORS as error:
        return _downloaded_before(key, repository, patterns, revision, error)
    files = wanted(listed)
    missing = sum(file.file_size or 0 for file in files if file.will_download)
    require_space(Path(constants.HF_HUB_CACHE), missing, f"downloading {repository}")
    try:
        # Of the commit that was listed, so that nothing can change in between.
        commit = files[0].commit_hash if files else revision
        return Path(
            snapshot_download(repository, revision=commit, allow_patterns=[file.filename for file in files])
        )
    except _HUB_ERRORS as error:
        raise UserError(
            f"{key}={repository}: the download stopped: {_first_line(error)}; the same command goes on with it"
        ) from error


def wanted(files: Sequence[DryRunFileInfo]) -> list[DryRunFileInfo]:
    """The files without pickled weights that are there as safetensors too, and without what lies in subfolders."""
    top = [file for file in files if "/" not in file.filename]
    if any(fnmatch(file.filename, SAFETENSORS) for file in top):
        return [file for file in top if not fnmatch(file.filename, f"{PICKLED}*")]
    return top


def _downloaded_before(
    key: str, repository: str, patterns: Sequence[str], revision: str | None, reason: Exception
) -> Path:
    """A snapshot in the hub's cache; without network that is all there is."""
    for unwanted in (f"{PICKLED}*", f"{SAFETENSORS}*"):
        try:
            return Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    allow_patterns=list(patterns),
                    ignore_patterns=[unwanted],
                    local_files_only=True,
                )
            )
        except _HUB_ERRORS:
            continue
    raise UserError(
        f"{key}={repository}: cannot be downloaded: {_first_line(reason)}; "
        f"check the name and the network, or give a local copy: {key}=<folder>"
    ) from reason


def _first_line(error: Exception) -> str:
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    ).rstrip(".")
