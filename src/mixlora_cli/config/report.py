"""Configuration of `mixlora report`."""

from __future__ import annotations

from dataclasses import dataclass


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key}={'null' if value is None else value}: {allowed}")


@dataclass(frozen=True)
class PageConfig:
    """What report.html shows (key `report`)."""

    sample: int = 6
    """At most so many right, wrong and (of several runs) differently answered instances of each benchmark."""
    seed: int = 0
    """Of the sample."""
    images: str | None = None
    """Folder that picture paths are relative to; null = where the evaluation found them."""
    picture_megabytes: float = 6.0
    """Most that all pictures together may take in the page."""

    def __post_init__(self) -> None:
        _require(self.sample >= 0, "report.sample", self.sample, "must be >= 0")
        _require(
            self.picture_megabytes >= 0, "report.picture_megabytes", self.picture_megabytes, "must be >= 0"
        )


@dataclass(frozen=True)
class ReportConfig:
    """Everything that `mixlora report` reads."""

    report: PageConfig
    run: str | None = None
    """Folder of a finished evaluation, or of the run that it belongs to."""
    runs: list[str] | None = None
    """Several, side by side."""
    output_dir: str | None = None
    """null = the folder of the evaluation."""

    def __post_init__(self) -> None:
        given = [key for key in ("run", "runs") if getattr(self, key)]
        _require(
            len(given) == 1,
            "run" if len(given) < 2 else "runs",
            getattr(self, given[-1]) if given else None,
            "give run=<folder of a finished `mixlora eval`>, or runs=[one,another] and output_dir=<new folder>",
        )
        _require(
            self.run is not None or self.output_dir is not None,
            "output_dir",
            self.output_dir,
            "name a folder for the report of several runs",
        )

    @property
    def evaluations(self) -> list[str]:
        """The folders to report on."""
        return [self.run] if self.run else list(self.runs or [])
