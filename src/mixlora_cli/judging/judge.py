"""`mixlora judge`: have stored answers judged, without the model that gave them; continues where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from rich.console import Console

from mixlora_cli.benchmarks.scorers import label_match
from mixlora_cli.config import JudgeCommandConfig, JudgeConfig
from mixlora_cli.evaluation.predictions import Prediction, find_evaluation, read_finished
from mixlora_cli.evaluation.results import Results
from mixlora_cli.evaluation.scoring import score
from mixlora_cli.judging.replies import EXACT, Identity, open_replies
from mixlora_cli.judging.verdicts import judged_table
from mixlora_cli.output import alone_in
from mixlora_cli.progress import counting, say
from mixlora_cli.tables import show

Questions = Mapping[str, Prediction]
"""By `Identity.key`: what two predictions ask alike is asked once."""


def judge(config: JudgeCommandConfig) -> Results:
    """Judge the answers of a finished evaluation, score it anew and print what the judges say.

    Raises UserError when there is no finished evaluation or the judge cannot go on; every reply until then is kept.
    """
    folder = find_evaluation(str(config.run))
    with alone_in(folder, "judge", key="run"):
        judge_answers(folder, config.judge)
        results = score(folder)
    print_judged(results)
    return results


def print_judged(results: Results) -> None:
    """Print what the judges say, a column for each: it fits every terminal."""
    if table := judged_table([(results.label, results)]):
        show(table.turned())


def judge_answers(folder: Path, settings: JudgeConfig) -> None:
    """Ask the judge about every answer in an evaluation folder that it has not judged yet.

    Raises UserError like `judge`.
    """
    console = Console(stderr=True)
    _, predictions = read_finished(folder)
    judged_by = build_judge(settings)
    questions = {judged_by.identity.key(p): p for p in predictions}
    with open_replies(folder, judged_by.identity) as log:
        missing = {key: questions[key] for key in questions if key not in log.replies}
        done, count = len(questions) - len(missing), len(questions)
        if done and missing:
            say(f"continuing: {done} of {count} questions are judged already", console)
        with counting("judging", count, done, console, 10, "instances", "judged") as advance:
            for replies in judged_by.replies(missing):
                log.append(replies)
                advance(len(replies))


class Judge(Protocol):
    """Anything that replies to the question whether a prediction is correct."""

    @property
    def identity(self) -> Identity:
        """Who judges."""

    def replies(self, questions: Questions) -> Iterator[dict[str, str]]:
        """Texts by key, a few at a time as they come; whoever asks stores each portion before the next.

        Raises UserError when it cannot go on; what it gave until then stays good.
        """


def build_judge(settings: JudgeConfig) -> Judge:
    """The judge that `settings.name` says; a server is not asked and weights are not read yet.

    Raises UserError when a local model cannot be found.
    """
    if settings.name == "openai":
        from mixlora_cli.judging.server import ServerJudge

        return ServerJudge(settings)
    if settings.name == "hf":
        from mixlora_cli.judging.local import LocalJudge

        return LocalJudge(settings)
    return ExactJudge()


class ExactJudge:
    """The rule of label match: the same answer after normalisation, or the only label that it names."""

    identity = Identity(EXACT)

    def replies(self, questions: Questions) -> Iterator[dict[str, str]]:
        """All at once: it is a function of the texts."""
        yield {
            key: "Yes" if label_match(p.prediction, p.target, p.labels) else "No"
            for key, p in questions.items()
        }
