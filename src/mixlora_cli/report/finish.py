"""What `mixlora eval` does once every answer is there: ask the judge, and write the report."""

from __future__ import annotations

from mixlora_cli.config import JudgeConfig, PageConfig
from mixlora_cli.evaluation.results import Results
from mixlora_cli.evaluation.scoring import Evaluation, score_evaluation
from mixlora_cli.judging.judge import judge_answers, print_judged
from mixlora_cli.report.evaluated import evaluated
from mixlora_cli.report.run import write_report


def finish(evaluation: Evaluation, results: Results, judge: JudgeConfig, seed: int) -> Results:
    """Have the answers of a scored evaluation judged and write its report; the results with what the judge said.

    Raises UserError when the judge cannot go on; the report is written all the same, and the same command continues.
    """
    try:
        if judge.name != "none":
            judge_answers(evaluation.folder, judge)
    finally:
        if judge.name != "none":
            results = score_evaluation(evaluation)
        print_judged(results)
        write_report([evaluated(evaluation, results)], evaluation.folder, PageConfig(seed=seed))
    return results
