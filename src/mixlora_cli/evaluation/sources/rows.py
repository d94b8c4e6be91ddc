"""How a row of each benchmark becomes a question: pure functions, one for each form of row.

Prompts: MME's questions carry their own instruction. MNIST and CIFAR follow Zhai et al. (2023, EMT). Text-VQA and
POPE end with the line that LLaVA-1.5 evaluates both with. VSR and SNLI-VE have no agreed prompt; theirs are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath

from mixlora_cli.errors import cut
from mixlora_cli.evaluation.references import text_of
from mixlora_cli.evaluation.sources.origin import Question, Row

SHORT_ANSWER = "Answer the question using a single word or phrase."
YES_NO = ("yes", "no")
VERDICTS = ("entailment", "neutral", "contradiction")
DIGITS = tuple("0123456789")
CIFAR10 = tuple(["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"])
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
"""
CIFAR100 = tuple(name.replace("_", " ") for name in _CIFAR100.split())
"""Fine labels in the order of their numbers."""


def classify(thing: str, labels: tuple[str, ...], column: str) -> Callable[[Row], Question]:
    """A classification benchmark: `column` holds the number of one of `labels`."""
    question = (
        f"What is the {thing} in the image? Please only answer a single {thing} in {', '.join(labels)}."
    )

    def ask(row: Row) -> Question:
        return Question(question, labels[int(row[column])], labels=labels)

    return ask


def ask_mme(row: Row) -> Question:
    """MME: two questions about each picture, paired by `question_id`."""
    about = str(row["question_id"])
    return Question(
        text_of(row["question"], "question").strip(),
        str(row["answer"]),
        about,
        category=str(row["category"]),
        image_id=about,
    )


def ask_pope(row: Row) -> Question:
    """POPE: is there such an object?"""
    return Question(
        text_of(row["question"], "question").strip(),
        str(row["answer"]).lower(),
        str(row["question_id"]),
        instruction=SHORT_ANSWER,
        category=str(row["category"]),
        labels=YES_NO,
    )


def ask_textvqa(row: Row) -> Question:
    """Text-VQA: ten people's answers; the one most of them gave stands for all where one is needed."""
    answers = tuple(str(answer) for answer in row["answers"])
    tokens = ", ".join(str(token) for token in row.get("ocr_tokens") or ())
    return Question(
        text_of(row["question"], "question").strip(),
        max(answers, key=answers.count),
        str(row["question_id"]),
        instruction=SHORT_ANSWER,
        hint=f"Reference OCR token: {tokens}" if tokens else "",
        answers=answers,
    )


def ask_vsr(row: Row) -> Question:
    """VSR: a statement about where two things are, true (1) or false (0)."""
    caption, label = text_of(row["caption"], "caption").strip(), row["label"]
    if label not in (0, 1, "0", "1"):
        raise ValueError(f"label is {cut(repr(label))}, expected 0 or 1")
    text = f'Is this statement about the image true? "{caption}" Answer yes or no.'
    return Question(text, YES_NO[0] if int(label) else YES_NO[1], labels=YES_NO)


def vsr_photos(row: Row) -> tuple[str, ...]:
    """COCO 2017's folders and file names: that of the row's link first."""
    name = str(row["image"])
    link = PurePosixPath(str(row.get("image_link") or ""))
    return tuple(dict.fromkeys([f"{link.parent.name}/{name}", name, f"train2017/{name}", f"val2017/{name}"]))


def ask_snli_ve(row: Row) -> Question | None:
    """SNLI-VE: does the picture entail the hypothesis? Rows without an agreed label ("-") are left out."""
    label = row["gold_label"]
    if label == "-":
        return None
    if label not in VERDICTS:
        raise ValueError(f'gold_label is {cut(repr(label))}, expected {", ".join(VERDICTS)} or "-"')
    hypothesis = text_of(row["sentence2"], "sentence2").strip()
    text = (
        f'Hypothesis: "{hypothesis}" Does the image entail the hypothesis, contradict it, or neither? '
        "Answer with one word: entailment, neutral or contradiction."
    )
    return Question(text, label, str(row.get("pairID", "")), labels=VERDICTS)


def snli_ve_photos(row: Row) -> tuple[str, ...]:
    """Flickr30k's file names, flat or in the folder that its archive unpacks to."""
    name = str(row["Flickr30K_ID"]).removesuffix(".jpg") + ".jpg"
    return (name, f"flickr30k-images/{name}", f"flickr30k_images/{name}")
