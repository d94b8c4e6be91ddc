"""What `mixlora eval` does once every answer is there: ask the judge, and write the report."""

from __future__ import annotations

from pathlib import Path

from mixlora_cli.config import JudgeConfig, PageConfig
from mixlora_cli.evaluation.results import Results
from mixlora_cli.judging.run import judge_answers
from mixlora_cli.judging.table import print_judged
from mixlora_cli.report.evaluated import read_evaluated
from mixlora_cli.report.run import write_report


def finish(folder: Path, judge: JudgeConfig, seed: int) -> Results:
    """Have the answers in an evaluation folder judged and write its report; the results with what the judge said.

    Raises UserError when the judge cannot go on; the report is written all the same, and the same command continues.
    """
    try:
        if judge.name != "none":
            judge_answers(folder, judge)
    finally:
        evaluated = read_evaluated(folder)
        print_judged([(evaluated.label, evaluated.results)])
        write_report([evaluated], folder, PageConfig(seed=seed))
    return evaluated.results
