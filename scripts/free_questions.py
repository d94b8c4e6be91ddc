"""How well a free question's task is found, and what that is worth: the table in docs/serving.md.

    python scripts/free_questions.py RUN [INSTANCES]

RUN is a training with data=mini. So many held-out instances (8) of each seen task are asked as the training asks and in
other words; the factors are selected by the task's own definition, by what `ServedModel` makes of the question, by the
question's text as a definition, and by the definition whose embedding is nearest. An adapter without tasks: one row.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from mixlora_cli.benchmarks.metrics import exact_match
from mixlora_cli.config import DataConfig, ModelConfig
from mixlora_cli.data.loading import load_records, locate_files
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import IMAGE_MARKER, Turn
from mixlora_cli.evaluation.instances import limited
from mixlora_cli.models.definitions import choose_encoder, embed_text
from mixlora_cli.models.generate import Decoding
from mixlora_cli.serving.models import Question, ServedModel, open_models

DATA = DataConfig("mini", "mini")
IN_OTHER_WORDS = {
    "object_naming": ["What can you see in this photo?", "What's this?"],
    "object_category": ["To what group of things does this belong?"],
    "object_presence": ["Is there {a} in this picture?", "Do you spot {a}?"],
    "statement_truth": ["There is {a} in the image, true or false?"],
    "count_digit": ["How many things do you count? Just the digit please."],
    "count_words": ["Please tell me the number of things, written out in words."],
    "count_kinds": ["How many sorts of things are in the picture?"],
    "odd_one_out": ["Which of these things does not belong with the others?"],
    "same_or_different": ["Do both things look the same, or are they different?"],
    "choice_letter": ["What do you see: A, {first}, or B, {second}? Just the letter."],
    "left_or_right": ["On which side of the {other} do you see the {name}, left or right?"],
    "above_or_below": ["Do you find the {name} above the {other}, or below it?"],
    "neighbour_naming": ["What sits next to the {name}, on its {side} side?"],
    "picture_position": ["Tell me where in the image I can find the {name}."],
    "size_comparison": ["Tell me which one is {size}: the {name} or the {other}."],
    "shape_colour": ["What's the colour of this shape?"],
    "shape_naming": ["Can you tell me which geometric shape this is?"],
    "background_colour": ["What is the background's colour?"],
    "flag_naming": ["This is the flag of which country?"],
    "word_reading": ["What does it say?", "Tell me the word in the picture."],
    "first_letter": ["What letter does this word start with?"],
    "number_reading": ["Which number do you see?", "Tell me the number in the picture."],
    "arithmetic": ["How much is that?", "What does this sum come to?"],
    "number_comparison": ["Which of these two numbers is the {size} one?"],
    "captioning": ["What's in this picture? One short sentence.", "Tell me what you see."],
    "caption_matching": ['Is "{caption}" a good description of the picture?'],
}


def main(run: str, instances: int = 8) -> None:
    """Print the table."""
    plain, served = open_models([run], ModelConfig("mini", "mini"))
    records = limited(load_records(DATA, "heldout"), instances, 0)
    metadata = json.loads(Path(str(locate_files(DATA, "heldout").metadata)).read_text())
    asked = [record.conversation[0].text.replace(IMAGE_MARKER, "").strip() for record in records]
    reworded = [
        IN_OTHER_WORDS[record.task][number % len(IN_OTHER_WORDS[record.task])].format(
            **_slots(text, metadata[record.task]["templates"])
        )
        for number, (record, text) in enumerate(zip(records, asked, strict=True))
    ]
    for kind, texts in (("as the training asks", asked), ("in other words", reworded)):
        ways: dict[str, list[dict[str, str]]] = {"the question": [{} for _ in records]}
        if served.definitions:
            ways |= {
                "its own definition": [{"task": record.task} for record in records],
                "its text as a definition": [{"definition": text} for text in texts],
                "the nearest definition": [{"task": task} for task in _nearest(plain, served, texts)],
            }
        for way, named in ways.items():
            questions = [
                served.prepare([Turn("human", f"{IMAGE_MARKER}\n{text}")], record.images, **fields)
                for record, text, fields in zip(records, texts, named, strict=True)
            ]
            right = _right(served, records, questions)
            tasks = [question.task for question in questions]
            found = sum(task == record.task for task, record in zip(tasks, records, strict=True))
            told = f"task named {len(tasks) - tasks.count(None)} times, right {found} times"
            print(f"{kind}, by {way}: {right} of {len(records)} answers right; {told}", flush=True)


def _slots(text: str, templates: list[str]) -> dict[str, str]:
    """What a question has in the places of its template."""
    for template in templates:
        parts = re.split(r"(\{\w+\})", template)
        pattern = "".join(f"(?P<{p[1:-1]}>.+?)" if p.startswith("{") else re.escape(p) for p in parts)
        if found := re.fullmatch(pattern, text):
            slots = found.groupdict()
            return slots | {"a": slots["A"][0].lower() + slots["A"][1:]} if "A" in slots else slots
    raise ValueError(f"{text}: none of {templates}")


def _nearest(plain: ServedModel, served: ServedModel, texts: list[str]) -> list[str]:
    """The task whose definition's embedding has the largest cosine with each question's."""
    known: Any = served.session.embeddings
    definitions = torch.stack(list(known.values()))
    encoder = choose_encoder(None, plain.session.base).open()
    similar = [torch.cosine_similarity(embed_text(text, *encoder)[None], definitions) for text in texts]
    return [list(known)[int(each.argmax())] for each in similar]


def _right(served: ServedModel, records: list[Record], questions: list[Question]) -> int:
    """Answers that match exactly, in batches of 16 prompts of similar length."""
    order = sorted(range(len(questions)), key=lambda number: questions[number].item.length)
    right = 0
    for start in range(0, len(order), 16):
        batch = order[start : start + 16]
        answers = served.write([questions[number] for number in batch], [Decoding(24)] * len(batch))
        for number, answer in zip(batch, answers, strict=True):
            right += bool(exact_match(answer.text, records[number].conversation[-1].text.strip()))
    return right


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
