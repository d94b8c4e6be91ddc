"""MME's official text files, so that anyone can run the benchmark's own `calculation.py` over the answers.

One file a subtask, `<subtask>.txt`; a line is image, question, ground truth, prediction, separated by tabs; the two
lines of an image stand together.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from mixlora_cli.evaluation.benchmarks import benchmark_named
from mixlora_cli.evaluation.metrics import MME
from mixlora_cli.evaluation.predictions import Prediction

_BREAKS = str.maketrans({mark: " " for mark in "\t\n\r"})
_NAME_LENGTH = 60
"""Characters; file systems take 255 bytes, and a character may have four."""


def safe_names(names: Iterable[str]) -> dict[str, str]:
    """A file name (without ending) for each subtask or benchmark: MME's own names stay as they are.

    What is no letter, digit, dot, hyphen or underscore becomes a hyphen; no name begins with a dot, is empty, or
    differs from another in case alone.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        stem = re.sub(r"[^\w.-]+", "-", name)[:_NAME_LENGTH].lstrip(".") or "unnamed"
        free, number = stem, 1
        while free.casefold() in taken:
            number += 1
            free = f"{stem}-{number}"
        taken.add(free.casefold())
        found[name] = free
    return found


class MmeFiles:
    """Takes one benchmark's predictions one at a time, in any order; their lines wait in a temporary file.

    In memory is only where each line begins.
    """

    def __init__(self) -> None:
        self._lines = TemporaryFile()  # noqa: SIM115 - open until `close`
        self._end = 0
        self._starts: dict[str, array[int]] = {}
        """By subtask."""

    def add(self, prediction: Prediction) -> None:
        """One more line. Tabs and line breaks inside a field become spaces, one for one: the tool reads the first
        four characters.
        """
        target = prediction.target.strip().capitalize()
        fields = (prediction.image_id, prediction.question, target, prediction.prediction)
        line = "\t".join([str(prediction.index), *(field.translate(_BREAKS) for field in fields)]) + "\n"
        self._starts.setdefault(prediction.category, array("q")).append(self._end)
        self._end += self._lines.write(line.encode(errors="replace"))

    def lines(self, subtask: str) -> list[str]:
        """The lines of a subtask's file: images in the order of the data, the lines of one together."""
        images: dict[str, list[str]] = {}
        numbered = [self._line(start).split("\t", 1) for start in self._starts[subtask]]
        for _, line in sorted(numbered, key=lambda each: int(each[0])):
            images.setdefault(line.split("\t", 1)[0], []).append(line)
        return [line for lines in images.values() for line in lines]

    def _line(self, start: int) -> str:
        self._lines.seek(start)
        return self._lines.readline().decode().removesuffix("\n")

    def subtasks(self) -> list[str]:
        """Names of the subtasks, sorted."""
        return sorted(self._starts)

    def write(self, folder: Path) -> None:
        """Write the files into `folder`, which the official tool takes as `--results_dir`.

        Other text files in it, of an earlier evaluation, are removed: the tool would count them in.
        """
        folder.mkdir(parents=True, exist_ok=True)
        names = safe_names(self.subtasks())
        for old in folder.glob("*.txt"):
            if old.stem not in names.values():
                old.unlink()
        for subtask, name in names.items():
            text = "".join(f"{line}\n" for line in self.lines(subtask))
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")

    def close(self) -> None:
        """Let go of the temporary file."""
        self._lines.close()

    def __enter__(self) -> MmeFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OfficialFiles:
    """The official files of every benchmark that MME's rule scores, taken down while predictions pass by."""

    def __init__(self, declared: Mapping[str, Any] | None = None) -> None:
        """`declared` describes the benchmarks of the user's own, see `benchmark_named`."""
        self._declared = declared
        self._files: dict[str, MmeFiles | None] = {}
        """By benchmark; None where another rule scores it."""

    def passing(self, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        """The same predictions; those that MME's rule scores are noted down on the way."""
        for prediction in predictions:
            if prediction.split == "unseen" and (files := self._of(prediction.benchmark)):
                files.add(prediction)
            yield prediction

    def _of(self, benchmark: str) -> MmeFiles | None:
        if benchmark not in self._files:
            mme = benchmark_named(benchmark, self._declared).metric is MME
            self._files[benchmark] = MmeFiles() if mme else None
        return self._files[benchmark]

    def write(self, folder: Path) -> None:
        """Write a subfolder for each benchmark, see `MmeFiles.write`."""
        noted = {name: files for name, files in self._files.items() if files}
        for name, subfolder in safe_names(sorted(noted)).items():
            noted[name].write(folder / subfolder)

    def __enter__(self) -> OfficialFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for files in self._files.values():
            if files:
                files.close()
