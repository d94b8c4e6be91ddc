"""What `mixlora import` is told; no Hydra, because there is nothing to compose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CFS_FORMS = ("released", "paper")


@dataclass(frozen=True)
class ImportConfig:
    """A published checkpoint, where its adapter goes, and what its files may fail to tell.

    Raises:
        ValueError: a value is out of range; names it and what is allowed.
    """

    folder: Path
    """Folder with `pytorch_model.bin` and `cmoa_args.bin`."""
    output: Path | None = None
    """New adapter folder; None: `runs/imported/<name of the checkpoint's folder>`."""
    cfs: Literal["released", "paper"] | None = None
    """How the CFS router meets A; None: released, because the checkpoint's published outputs come from it."""
    rank: int | None = None
    factors: int | None = None
    alpha: float | None = None
    cond_type: str | None = None
    """The published code's name for what selects the factors."""

    def __post_init__(self) -> None:
        for name in ("rank", "factors", "alpha"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name}={value}: must be > 0")
        if self.cfs is not None and self.cfs not in CFS_FORMS:
            raise ValueError(f"--cfs={self.cfs}: must be one of {', '.join(CFS_FORMS)}")
        if not self.folder.is_dir():
            what = "is a file; give the folder that it lies in" if self.folder.exists() else "no such folder"
            raise ValueError(
                f"{self.folder}: {what}; expected the output folder of the published training code "
                "(pytorch_model.bin, cmoa_args.bin)"
            )
        if self.destination.exists() and (not self.destination.is_dir() or any(self.destination.iterdir())):
            raise ValueError(
                f"--output={self.destination}: already exists; name another folder or delete it first"
            )

    @property
    def destination(self) -> Path:
        """Where the adapter folder goes."""
        return self.output or Path("runs/imported") / self.folder.resolve().name
