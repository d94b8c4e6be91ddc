"""`mixlora judge`: have stored answers judged, without the model that gave them; continues where it stopped."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mixlora_cli.config import JudgeCommandConfig, JudgeConfig
from mixlora_cli.evaluation.folder import check_finished, find_evaluation, open_evaluation
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.evaluation.progress import answer_progress
from mixlora_cli.evaluation.results import Results
from mixlora_cli.evaluation.scoring import score
from mixlora_cli.judging.build import build_judge
from mixlora_cli.judging.replies import open_replies
from mixlora_cli.judging.table import print_judged
from mixlora_cli.output import alone_in


def judge(config: JudgeCommandConfig) -> Results:
    """Judge the answers of a finished evaluation, score it anew and print what the judges say.

    Raises UserError when there is no finished evaluation or the judge cannot go on; every reply until then is kept.
    """
    folder = find_evaluation(str(config.run))
    with alone_in(folder, "judge", key="run"):
        judge_answers(folder, config.judge)
        results = score(folder)
    print_judged([(results.label, results)])
    return results


def judge_answers(folder: Path, settings: JudgeConfig) -> None:
    """Ask the judge about every answer in an evaluation folder that it has not judged yet.

    Raises UserError like `judge`.
    """
    console = Console(stderr=True)
    header, reader = open_evaluation(folder)
    judged_by = build_judge(settings)
    writer, known = open_replies(folder, judged_by.identity)
    with writer:
        missing: dict[str, Prediction] = {}
        done: set[str] = set()
        for prediction in reader:  # only what is to be asked stays in memory
            key = judged_by.identity.key(prediction)
            if key in known:
                done.add(key)
            else:
                missing.setdefault(key, prediction)
        check_finished(folder, header, reader)
        count = len(done) + len(missing)
        if done and missing:
            console.print(f"continuing: {len(done)} of {count} questions are judged already", markup=False)
        with answer_progress(console, len(done), count, ("judging", "judged")) as advance:
            for replies in judged_by.replies(missing):
                writer.append(replies)
                advance(len(replies))
