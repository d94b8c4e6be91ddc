"""Every rule on literal answers, the awkward ones above all."""

import pytest

from mixlora_cli.benchmarks.scorers import (
    exact_match,
    label_match,
    named_labels,
    normalise_answer,
    normalise_vqa,
    pope_answer,
    vqa_accuracy,
    yes_no,
)

DIGITS = tuple("0123456789")
TREES = ("tree", "maple tree", "palm", "cat")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Maple Tree.", "maple tree"),
        ("  a cat ", "cat"),
        ("The cat", "cat"),
        ("Answer: 7", "7"),
        ("The answer is the cat.", "cat"),
        ("answer", "answer"),
        ("Answering machine", "answering machine"),
        ("\N{FULLWIDTH DIGIT FOUR}\N{FULLWIDTH DIGIT TWO}", "42"),
        ("Seven", "7"),
        ("seven cats", "seven cats"),
        ("1,000", "1000"),
        ("1,2", "1 2"),
        ("-3", "-3"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("x-ray", "x ray"),
        ("traffic_light", "traffic light"),
        ("don\N{RIGHT SINGLE QUOTATION MARK}t", "dont"),
        ("STRASSE", "strasse"),
        ("a", "a"),
        ("", ""),
        ("?!", ""),
    ],
)
def test_normalise_answer(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


def test_an_empty_answer_is_never_right() -> None:
    assert not exact_match("", "")
    assert not exact_match("   ", "cat")
    assert not exact_match("", "?")
    assert not label_match("", "cat", TREES)
    assert exact_match("?", "?")
    assert not exact_match("!", "?")


@pytest.mark.parametrize(
    ("prediction", "target", "labels", "right"),
    [
        ("cat", "cat", (), True),
        ("a big cat", "cat", (), False),
        ("It is a CAT!", "cat", TREES, True),
        ("It is a cat and a palm", "cat", TREES, False),
        ("cat, cat, cat", "cat", TREES, True),
        ("a maple tree", "maple tree", TREES, True),
        ("a maple tree", "tree", TREES, False),
        ("maple tree", "tree", TREES, False),
        ("a maple tree or another tree", "maple tree", TREES, False),
        ("category", "cat", TREES, False),
        ("Answer: 7", "7", DIGITS, True),
        ("The digit is seven.", "7", DIGITS, True),
        ("This one is a 7", "7", DIGITS, True),
        ("7 or 1", "7", DIGITS, False),
        ("seven or 1", "1", DIGITS, False),
        ("77", "7", DIGITS, False),
        ("7.5", "7", DIGITS, False),
        ("-7", "7", DIGITS, False),
        ("\N{FULLWIDTH DIGIT SEVEN}", "7", DIGITS, True),
        ("Yes, it is not", "yes", ("yes", "no"), True),
        ("no", "yes", ("yes", "no"), False),
        ("NO", "no", ("yes", "no"), True),
        ("know", "no", ("yes", "no"), False),
    ],
)
def test_label_match(prediction: str, target: str, labels: tuple[str, ...], right: bool) -> None:
    assert label_match(prediction, target, labels) is right


def test_overlapping_labels_are_both_named() -> None:
    labels = ("sweet pepper", "pepper plant", "pepper")
    assert named_labels("a sweet pepper plant", labels) == {"sweet pepper", "pepper plant"}


@pytest.mark.parametrize(
    ("prediction", "named"),
    [
        ("seven", {"7"}),
        ("seven or 1", {"7", "1"}),
        ("1 or seven", {"7", "1"}),
        ("Seven, or eight", {"7", "8"}),
        ("one or 7", {"1", "7"}),
        ("7 and one", {"1", "7"}),
        ("this one is a 7", {"7"}),
        ("This one is a seven.", {"7"}),
        ("this one", {"1"}),
        ("seventeen", set()),
        ("7, seven", {"7"}),
    ],
)
def test_number_words_name_digits(prediction: str, named: set[str]) -> None:
    assert named_labels(prediction, DIGITS) == named


def test_number_words_in_longer_labels() -> None:
    assert named_labels("two wheels", ("2", "two wheels")) == {"two wheels"}
    assert named_labels("two dogs", ("2 dogs", "3 dogs")) == {"2 dogs"}
    assert named_labels("one is two", ("one", "two")) == {"1", "2"}
    assert named_labels("two cats", TREES) == set()


@pytest.mark.parametrize(
    ("prediction", "read_as"),
    [
        ("yes", "yes"),
        ("Yes, it is not", "yes"),
        ("no", "no"),
        ("NO.", "no"),
        ("No, there is a yes", "no"),
        (" yes", "yes"),
        ("  yes", "other"),
        ("None", "no"),
        ("know", "no"),
        ("noyes", "no"),
        ("I do not", "other"),
        ("Answer: yes", "other"),
        ("", "other"),
    ],
)
def test_yes_no_follows_the_official_mme_rule(prediction: str, read_as: str) -> None:
    assert yes_no(prediction) == read_as


@pytest.mark.parametrize(
    ("prediction", "read_as"),
    [
        ("Yes", "yes"),
        ("Yes, it is not", "no"),
        ("no", "no"),
        ("No, there is none", "no"),
        ("There is not.", "no"),
        ("Yes. No.", "yes"),
        ("NO", "yes"),
        ("nothing", "yes"),
        ("don't", "yes"),
        ("", "yes"),
    ],
)
def test_pope_answer_follows_the_common_parser(prediction: str, read_as: str) -> None:
    assert pope_answer(prediction) == read_as


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat", "cat"),
        ("two an a the dogs", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("Don't!", "don't"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("Inc.", "inc"),
        ("coca-cola", "coca cola"),
        ("coca - cola", "coca cola"),
        ("pass - the pre-test", "pass pretest"),
        ("a/b", "b"),
        ("mcdonald's", "mcdonald 's"),
        ("oughtnt notve twas", "oughtn't not've 'twas"),
        ("couldnt've he'dve", "couldn't've he'd've"),
        ("yall'd've y'alld've y'all'dve", "y'all'd've y'all'd've y'all'd've"),
        ("hes there", "he's there"),
        ("im ive wed shell its well", "im ive wed shell its well"),
        ("stop\n", "stop"),
        ("", ""),
    ],
)
def test_normalise_vqa(text: str, expected: str) -> None:
    assert normalise_vqa(text) == expected


@pytest.mark.parametrize(
    ("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_vqa_accuracy_of_ten_answers(matches: int, accuracy: float) -> None:
    answers = ["The Cat."] * matches + ["dog"] * (10 - matches)
    assert vqa_accuracy("cat", answers) == pytest.approx(accuracy, abs=1e-12)


def test_vqa_accuracy_equals_the_rule_spelt_out() -> None:
    answers = ["2", "two", "3", "2 cats", "two", "none", "a 2", "3", "4", "5"]
    for prediction in ("2", "two", "3", "0", "nothing", ""):
        rounds = []
        for left_out in range(len(answers)):
            others = answers[:left_out] + answers[left_out + 1 :]
            same = sum(normalise_vqa(other) == normalise_vqa(prediction) for other in others)
            rounds.append(min(same / 3, 1))
        assert vqa_accuracy(prediction, answers) == pytest.approx(sum(rounds) / 10, abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "accuracy"),
    [
        (["cat"], 1.0),
        (["dog"], 0.0),
        (["cat", "The Cat."], 1.0),
        (["cat", "dog"], 1 / 2),
        (["cat", "cat", "a cat"], 1.0),
        (["cat", "dog", "cat"], 2 / 3),
        (["cat", "dog", "cow"], 1 / 3),
        (["cat", "cat", "cat", "cat"], 1.0),
        (["cat", "cat", "cat", "dog"], 3 / 4),  # by the rule itself
    ],
)
def test_vqa_accuracy_of_few_answers(answers: list[str], accuracy: float) -> None:
    assert vqa_accuracy("cat", answers) == pytest.approx(accuracy, abs=1e-12)


def test_vqa_accuracy_needs_answers() -> None:
    with pytest.raises(ValueError, match="at least one"):
        vqa_accuracy("cat", [])
