"""MME's official text files, so that anyone can run the benchmark's own `calculation.py` over the answers.

One file a subtask, `<subtask>.txt`; a line is image, question, ground truth, prediction, separated by tabs; the two
lines of an image stand together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from mixlora_cli.evaluation.predictions import Prediction

_BREAKS = str.maketrans({mark: " " for mark in "\t\n\r"})


def mme_lines(predictions: Iterable[Prediction]) -> dict[str, list[str]]:
    """Lines of each subtask's file, in the order of the data.

    Tabs and line breaks inside a field become spaces, one for one: the tool reads the first four characters.
    """
    images: dict[str, dict[str, list[Prediction]]] = defaultdict(lambda: defaultdict(list))
    for prediction in sorted(predictions, key=lambda p: p.key):
        images[prediction.category][prediction.image_id].append(prediction)
    return {
        subtask: [_line(each) for pair in pairs.values() for each in pair]
        for subtask, pairs in images.items()
    }


def _line(prediction: Prediction) -> str:
    target = prediction.target.strip().capitalize()
    fields = (prediction.image_id, prediction.question, target, prediction.prediction)
    return "\t".join(field.translate(_BREAKS) for field in fields)


def write_mme_files(folder: Path, predictions: Iterable[Prediction]) -> None:
    """Write the files into `folder`, which the official tool takes as `--results_dir`."""
    folder.mkdir(parents=True, exist_ok=True)
    for subtask, lines in mme_lines(predictions).items():
        (folder / f"{subtask}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
