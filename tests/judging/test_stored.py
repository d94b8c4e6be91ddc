"""Replies on the disk, the rule as a judge, and how scores and agreement come out of the files."""

from dataclasses import replace
from pathlib import Path

import pytest
from judging_server import eval_folder, prediction

from mixlora_cli.config import JudgeCommandConfig, JudgeConfig
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.results import read_results
from mixlora_cli.evaluation.scoring import score
from mixlora_cli.judging.judge import judge, judge_answers
from mixlora_cli.judging.replies import Identity, all_replies, distinct_titles, open_replies
from mixlora_cli.judging.verdicts import judged_table
from mixlora_cli.stats import wilson

LLM = Identity("hf", "org/judge", "abc")


def test_a_key_holds_everything_that_the_reply_depends_on() -> None:
    asked = prediction(0, "cat")
    others = [
        LLM.key(prediction(0, "dog")),
        LLM.key(prediction(0, "cat", "dog")),
        LLM.key(prediction(1, "cat")),
        Identity("hf", "org/judge", "abd").key(asked),
        Identity("openai", "org/judge", "abc").key(asked),
        Identity("hf", "org/judge", "abc", decoding={"max_new_tokens": 9}).key(asked),
        Identity("hf", "org/judge", "abc", prompt="x").key(asked),
    ]
    assert len({LLM.key(asked), *others}) == 8
    assert LLM.key(asked) == Identity("hf", "org/judge", "abc").key(prediction(0, "cat", category="c"))
    rule = Identity("exact")
    assert rule.key(prediction(0, "cat")) == rule.key(prediction(1, "cat"))
    assert rule.key(prediction(0, "cat")) != rule.key(prediction(0, "cat", labels=("cat", "dog")))


def test_a_file_killed_at_any_byte_keeps_its_complete_lines(tmp_path: Path) -> None:
    with open_replies(tmp_path, LLM) as log:
        log.append({"a": "Yes", "b": "No \N{SNOWMAN}\n\u2028"})
        log.append({"c": "Yes"})
    path = tmp_path / "judgements" / LLM.file_name
    whole = path.read_bytes()
    for cut in range(0, len(whole), 3):
        path.write_bytes(whole[:cut])
        expected = list("abc")[: max(whole[:cut].count(b"\n") - 1, 0)]
        with open_replies(tmp_path, LLM) as log:
            assert list(log.replies) == expected
            log.append({"d": "No", "a": "of a key that is there twice the first reply counts"})
        (found,) = all_replies(tmp_path)
        assert found.identity == LLM
        assert set(found.replies) == {*expected, "a", "d"}
        assert not expected or found.replies["a"] == "Yes"


@pytest.mark.parametrize(
    ("line", "message"), [("{nonsense", "line 3 cannot be read"), ("{}", "a line that is no reply")]
)
def test_a_damaged_line_in_the_middle_is_said(line: str, message: str, tmp_path: Path) -> None:
    with open_replies(tmp_path, LLM) as log:
        log.append({"a": "Yes"})
    path = tmp_path / "judgements" / LLM.file_name
    path.write_text(path.read_text() + line + '\n{"key": "b", "reply": "No"}\n')
    with pytest.raises(UserError, match=message):
        all_replies(tmp_path)


def test_the_rule_as_a_judge(tmp_path: Path) -> None:
    labels = ("cat", "dog", "maple tree", "tree")
    given = ["a cat", "It is a cat.", "cat or dog", "dog", "", "The CAT"]
    answers = [prediction(n, text, labels=labels) for n, text in enumerate(given)]
    found = judge(JudgeCommandConfig(JudgeConfig("exact"), run=str(eval_folder(tmp_path, answers).parent)))
    (judged,) = found.judged
    (only,) = judged.scores
    interval = wilson(3, 6).scaled(100)
    assert (only.value, only.low, only.high, only.unparsed) == (50.0, interval.low, interval.high, 0)
    assert judged.agreement == {} and judged.title == "exact"
    assert read_results(tmp_path / "eval") == found
    assert score(tmp_path / "eval") == found  # scoring again does not lose the judge


def test_only_benchmarks_that_are_judged_whole_have_a_score(tmp_path: Path) -> None:
    answers = [prediction(n, "cat", benchmark=("mini_cifar10", "mini_vsr")[n % 2]) for n in range(6)]
    answers += [prediction(n, "cat", split="heldout", benchmark="naming") for n in range(6, 8)]
    folder = eval_folder(tmp_path, answers)
    with open_replies(folder, LLM) as writer:
        writer.append({LLM.key(p): "Yes" for p in answers[:6] if p.index != 3})
    (judged,) = score(folder).judged
    assert [s.name for s in judged.scores] == ["mini_cifar10"] and judged.seen is None and judged.mean is None
    with open_replies(folder, LLM) as writer:
        writer.append({LLM.key(p): "hm" for p in (answers[3], *answers[6:])})
    (judged,) = score(folder).judged
    assert [(s.name, s.value, s.unparsed) for s in judged.scores] == [
        ("mini_vsr", pytest.approx(200 / 3), 1),
        ("mini_cifar10", 100.0, 0),
    ]
    assert judged.seen is not None and (judged.seen.value, judged.seen.unparsed) == (0.0, 2)
    assert judged.agreement["exact"].share == pytest.approx(100 * 5 / 8)


def test_judges_of_one_model_and_server_are_told_apart(tmp_path: Path) -> None:
    """The same model by chat and by completions: each has its own entry in the other's agreement."""
    answers = [prediction(n, "cat" if n < 3 else "dog") for n in range(4)]
    folder = eval_folder(tmp_path, answers)
    for api, yes in (("chat", 3), ("completions", 1)):
        judge = Identity("openai", "org/judge", decoding={"api": api, "max_tokens": 8})
        with open_replies(folder, judge) as writer:
            writer.append({judge.key(p): "Yes" if p.index < yes else "No" for p in answers})
    with open_replies(folder, LLM) as writer:
        writer.append({LLM.key(p): "No" for p in answers[:2]} | {LLM.key(answers[2]): "hm"})
    found = {judged.title: judged for judged in score(folder).judged}
    chat, completions = "judge (openai, api=chat)", "judge (openai, api=completions)"
    assert sorted(found) == [chat, completions]  # `LLM` has judged no benchmark whole
    shares = {title: (each.share, each.n) for title, each in found[chat].agreement.items()}
    assert shares == {completions: (50.0, 4), "judge (hf)": (0.0, 3), "exact": (100.0, 4)}
    shares = {title: (each.share, each.n) for title, each in found[completions].agreement.items()}
    assert shares == {chat: (50.0, 4), "judge (hf)": (pytest.approx(200 / 3), 3), "exact": (50.0, 4)}


@pytest.mark.parametrize(
    ("judges", "titles"),
    [
        ([LLM, Identity("exact")], ["judge (hf)", "exact"]),
        (
            [LLM, Identity("hf", "other/judge", "abc")],
            ["judge (hf, org/judge)", "judge (hf, other/judge)"],
        ),
        ([LLM, Identity("hf", "org/judge")], ["judge (hf, revision=abc)", "judge (hf, revision=unknown)"]),
        (
            [Identity("hf", "m", decoding=d) for d in ({"a": 1, "b": 1}, {"a": 1, "b": 2}, {"a": 2, "b": 2})],
            ["m (hf, a=1, b=1)", "m (hf, a=1, b=2)", "m (hf, a=2, b=2)"],
        ),
        ([Identity("hf", "m", "0" * 12 + end) for end in "ab"], ["m (hf, 1)", "m (hf, 2)"]),
    ],
)
def test_titles_say_what_differs(judges: list[Identity], titles: list[str]) -> None:
    assert distinct_titles(judges) == titles


def test_mean_of_the_papers_seven(tmp_path: Path) -> None:
    answers = []
    for n, name in enumerate(("textvqa", "vsr", "snli_ve", "cifar10", "cifar100", "mnist", "pope")):
        target = "yes" if name == "pope" else "cat"
        answers.append(prediction(n, "cat" if n < 4 else "dog", target, benchmark=f"mini_{name}"))
    folder = eval_folder(tmp_path, answers)
    judge_answers(folder, JudgeConfig("exact"))
    (judged,) = score(folder).judged
    assert judged.mean is not None
    assert (judged.mean.value, judged.mean.n, judged.mean.column) == (pytest.approx(400 / 7), 7, "MMAvg")


def test_tables_have_a_line_for_each_model_and_judge(folder: Path) -> None:
    judge_answers(folder, JudgeConfig("exact"))
    results = score(folder)
    table = judged_table([("LoRA r=4", results)])
    assert table is not None
    ((label, title, cell, unparsed, agrees),) = table.rows
    assert (label, title, unparsed, agrees) == ("LoRA r=4", "exact", "0 of 12", "-")
    assert str(cell).startswith("66.7 [")
    assert judged_table([]) is None


def test_an_evaluation_that_is_not_there_or_not_finished(tmp_path: Path) -> None:
    command = JudgeCommandConfig(JudgeConfig("exact"), run=str(tmp_path))
    with pytest.raises(UserError, match=r"there is no predictions\.jsonl"):
        judge(command)
    inner = [tmp_path / "run" / part for part in ("eval-seen", "eval-unseen")]
    for folder in inner:
        folder.mkdir(parents=True)
        (folder / "predictions.jsonl").touch()
    with pytest.raises(UserError, match=f"predictions.jsonl; it is in {inner[0]}, {inner[1]}$"):
        judge(replace(command, run=str(tmp_path / "run")))
    eval_folder(tmp_path, [prediction(0, "cat")], count=2)
    with pytest.raises(UserError, match=r"not finished \(1 of 2 answers\)"):
        judge(command)
