"""`mixlora align`: stage one of the small model, from pictures to the file that ships.

1. draw caption pictures; 2. the projector learns words (`projector_pretraining.py`); 3. projector and a low-rank update
of the language model learn captions, or short questions and captions, through the same training code as every adapter;
4. both go into one file; 5. held-out pictures are captioned and asked about, right names and answers counted. Each part
is kept in `output_dir`, and the same command continues an interrupted run.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import set_seed

from mixlora_cli.config import (
    AdapterConfig,
    AlignConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RoutingConfig,
    TrainConfig,
)
from mixlora_cli.data.collate import PixelLoader
from mixlora_cli.data.encode import encode_prompts
from mixlora_cli.data.loading import load_records
from mixlora_cli.data.mini.canvas import render
from mixlora_cli.data.mini.captions import PROMPTS, Captioned, captioned, plural
from mixlora_cli.models.adapters import load_adapter
from mixlora_cli.models.features import FeatureCache
from mixlora_cli.models.generate import Generator
from mixlora_cli.models.load import LoadedModel
from mixlora_cli.models.mini import StageOne, load_stage_one, stacked, unaligned_base, with_stage_one
from mixlora_cli.output import alone_in
from mixlora_cli.prepare.align.projector_pretraining import pretrain_projector
from mixlora_cli.prepare.align.questions import Asked, ask
from mixlora_cli.progress import say, with_bar
from mixlora_cli.store import write_json
from mixlora_cli.training.run_folder import refuse_changes
from mixlora_cli.training.train import train

RESULT, ANNOTATION, IMAGES = "stage_one.safetensors", "train.json", "images"
HARMLESS = ("output_dir", "log_every", "save_every", "check_pictures")
"""Keys that may differ when a run goes on."""
_BATCH = 20


def align(config: AlignConfig) -> Path:
    """Run stage one; returns the file with its result.

    Raises:
        UserError: a package of the small model is missing; the folder holds another configuration's run.
    """
    root = Path(config.output_dir)
    with alone_in(root, "alignment"):
        return _align(config, root)


def _align(config: AlignConfig, root: Path) -> Path:
    console = Console()
    start = None if config.start is None else load_stage_one(Path(config.start))
    remember(config, root)
    pictures = draw(config.pictures, f"align/{config.seed}")
    paths = write_pictures(root, pictures, config.questions)
    set_seed(config.seed)
    base = _base_before(config, start)

    projector_file = root / "projector.safetensors"
    if projector_file.exists():
        base.model.model.multi_modal_projector.load_state_dict(load_file(projector_file))
    elif config.lexical_steps > 0:
        loss = pretrain_projector(base, FeatureCache(base), pictures, paths, config)
        save_file(base.model.model.multi_modal_projector.state_dict(), projector_file)
        say(f"the projector says words: loss {loss:.3f}", console)

    run = root / "captions"
    if not (run / "result.json").exists():
        train(_caption_training(config, root, run), base)
    say("merging, and captioning held-out pictures", console)
    _extract(config, start, run).save(root / RESULT)

    # On the base as everybody will build it: from the quantised file.
    base = with_stage_one(unaligned_base(config.seed), load_stage_one(root / RESULT))
    held_out = draw(config.check_pictures, "align/heldout")
    captions = check_captions(base, held_out, root / "heldout")
    write_json(root / "check.json", captions)
    if config.questions > 0:
        questions = check_questions(base, held_out, root / "heldout-questions")
        write_json(root / "check_questions.json", questions)
        asked, right = questions["asked"], questions["right"]
        kinds = ", ".join(f"{kind} {right[kind]}/{count}" for kind, count in sorted(asked.items()))
        total = f"{sum(right.values())} of {sum(asked.values())}"
        say(f"answers right to short questions about held-out pictures: {total} ({kinds})", console)
    say(
        f"names right in captions of held-out pictures: {captions['names_right']} of {captions['names']} "
        f"({100 * captions['share']:.1f} %)\n"
        f"weights: {root / RESULT}",
        console,
    )
    return root / RESULT


def remember(config: AlignConfig, root: Path) -> None:
    """Note what this folder's run is, or see that it is this one.

    Raises:
        UserError: it is another one.
    """
    start = None if config.start is None else hashlib.sha256(Path(config.start).read_bytes()).hexdigest()
    asked = {**asdict(config), "start": start}
    record = root / "align.json"
    if record.is_file():
        refuse_changes(json.loads(record.read_text()), asked, HARMLESS)
    else:
        write_json(record, asked)


def draw(count: int, stream: str) -> list[Captioned]:
    """The first `count` captioned scenes of a named random stream."""
    return [captioned(random.Random(f"{stream}/{number}")) for number in range(count)]


def write_pictures(
    root: Path, pictures: list[Captioned], questions: int = 0, captioned_share: float = 1 / 3
) -> list[Path]:
    """Write the pictures as ordinary training data, LLaVA's JSON and a folder; what is already there is kept.

    With `questions`, each picture is asked about in as many turns; `captioned_share` of them are captioned last.

    Returns:
        The picture files, in order.
    """
    paths = [root / IMAGES / f"{number // 1000:03d}" / f"{number:06d}.png" for number in range(len(pictures))]
    for picture, path in with_bar(list(zip(pictures, paths, strict=True)), "drawing pictures"):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temp = path.with_suffix(".partial")
            render(picture.scene).save(temp, format="PNG", compress_level=1)
            temp.replace(path)
    records = [
        {
            "id": f"caption-{number}",
            "task_name": "caption",
            "image": str(path.relative_to(root / IMAGES)),
            "conversations": _conversation(number, picture, questions, captioned_share),
        }
        for number, (picture, path) in enumerate(zip(pictures, paths, strict=True))
    ]
    (root / ANNOTATION).write_text(json.dumps(records))
    return paths


def _conversation(
    number: int, picture: Captioned, questions: int, captioned_share: float
) -> list[dict[str, str]]:
    """Turns of LLaVA's format: the questions, and last, in a share of the pictures, the caption."""
    rng = _questioner(number, picture)
    turns = [(asked.text, asked.answer) for asked in ask(rng, picture.scene, questions)]
    if not turns or rng.random() < captioned_share:
        turns.append((PROMPTS[number % len(PROMPTS)], picture.caption))
    turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
    conversation = []
    for question, answer in turns:
        conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return conversation


def asked_first(number: int, picture: Captioned) -> Asked | None:
    """The question with which the conversation about a picture begins; none fits some pictures."""
    return next(iter(ask(_questioner(number, picture), picture.scene, 1)), None)


def _questioner(number: int, picture: Captioned) -> random.Random:
    return random.Random(f"questions/{number}/{picture.caption}")


def _base_before(config: AlignConfig, start: StageOne | None) -> LoadedModel:
    """The base that the training starts from: with an earlier stage one in it, or with none."""
    base = unaligned_base(config.seed)
    return base if start is None else with_stage_one(base, start)


def _caption_training(config: AlignConfig, root: Path, run: Path) -> TrainConfig:
    """Of projector and low-rank update."""
    return TrainConfig(
        model=ModelConfig(
            name="mini", source="mini", chat_template="smollm", train_also=["multi_modal_projector"]
        ),
        adapter=AdapterConfig(name="lora", dropout=0.0),
        routing=RoutingConfig(name="instance"),
        data=DataConfig(
            name="captions", source="json", train=str(root / ANNOTATION), images=str(root / IMAGES)
        ),
        train=OptimConfig(
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            warmup_ratio=config.warmup_ratio,
            log_every=config.log_every,
            save_every=config.save_every,
            keep_checkpoints=1,
        ),
        rank=config.rank,
        factors=config.rank,
        output_dir=str(run),
        seed=config.seed,
        resume="auto",
    )


def _extract(config: AlignConfig, start: StageOne | None, run: Path) -> StageOne:
    """Read projector and update out of the trained adapter; the update of the start comes with it."""
    fresh = _base_before(config, start)
    adapted = load_adapter(fresh.model, run / "adapter")
    assert isinstance(adapted, PeftModel)
    update = {}
    for name, module in fresh.model.model.language_model.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            scale = module.scaling["default"]
            update[name] = (scale * module.lora_B["default"].weight, module.lora_A["default"].weight)
    if start is not None:
        update = stacked(start.update, update)
    projector = fresh.model.model.multi_modal_projector.modules_to_save["default"].state_dict()
    versions = json.loads((run / "versions.json").read_text())
    made_by = {
        **({} if start is None else {"start": json.dumps(start.metadata)}),
        "config": json.dumps(asdict(config)),
        "git_commit": str(versions["git_commit"]),
        "packages": json.dumps(versions["packages"]),
    }
    return StageOne(projector, update, made_by)


def check_captions(base: LoadedModel, pictures: list[Captioned], folder: Path) -> dict[str, Any]:
    """Caption every picture greedily and count the names of its objects in the caption; `folder` keeps the pictures.

    Returns:
        `names`, `names_right`, their `share`, and `examples`: (written caption, generated caption) of the first ones.
    """
    write_pictures(folder, pictures)
    captions = _generated(base, folder, max_new_tokens=40)
    # Several of one kind ("three cats") count as one name.
    wanted = [tuple(dict.fromkeys(picture.names)) for picture in pictures]
    total = sum(len(names) for names in wanted)
    right = sum(count_names(names, caption) for names, caption in zip(wanted, captions, strict=True))
    examples = [(picture.caption, caption) for picture, caption in zip(pictures, captions, strict=True)]
    return {"names": total, "names_right": right, "share": right / max(total, 1), "examples": examples[:20]}


def count_names(names: tuple[str, ...], caption: str) -> int:
    """How many of the names occur in a caption as whole words, singular or plural; each occurrence is used once."""
    rest = caption.lower()
    found = 0
    for name in names:
        pattern = rf"\b(?:{re.escape(name)}|{re.escape(plural(name))})\b"
        rest, hits = re.subn(pattern, "", rest, count=1)
        found += hits
    return found


def check_questions(base: LoadedModel, pictures: list[Captioned], folder: Path) -> dict[str, Any]:
    """Ask one question about every picture, each in a conversation of its own; `folder` keeps the pictures.

    Returns:
        By kind how many were `asked` and how many answers are exactly `right`, and `examples`: (question, right answer,
        generated answer) of the first ones.
    """
    write_pictures(folder, pictures, questions=1, captioned_share=0)
    answers = _generated(base, folder, max_new_tokens=12)
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    examples = []
    for number, (picture, answer) in enumerate(zip(pictures, answers, strict=True)):
        if question := asked_first(number, picture):
            asked[question.kind] += 1
            right[question.kind] += answer.strip() == question.answer
            examples.append((question.text, question.answer, answer))
    return {"asked": dict(asked), "right": dict(right), "examples": examples[:40]}


def _generated(base: LoadedModel, folder: Path, max_new_tokens: int) -> list[str]:
    """What the base says, greedily, to the last question about each picture of a folder."""
    data = DataConfig(
        name="captions", source="json", heldout=str(folder / ANNOTATION), images=str(folder / IMAGES)
    )
    items = encode_prompts(load_records(data, "heldout"), base.chat).items
    answer = Generator(base.model, base, PixelLoader(base.chat), max_new_tokens=max_new_tokens)
    return [text for start in range(0, len(items), _BATCH) for text in answer(items[start : start + _BATCH])]
