"""`mixlora align`: stage one of the small model, from pictures to the file that ships.

1. draw caption pictures; 2. the projector learns words (`lexical.py`); 3. projector and a low-rank update of the
language model learn captions, or short questions and captions, through the same training code as every adapter; 4. both
go into one file; 5. held-out pictures are captioned and asked about, right names and answers counted. Each part is kept
in `output_dir`, and the same command continues an interrupted run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import set_seed

from mixlora_cli.alignment.check import CaptionCheck, QuestionCheck, check_captions, check_questions
from mixlora_cli.alignment.lexical import train_lexical
from mixlora_cli.alignment.pictures import ANNOTATION, IMAGES, draw, write_pictures
from mixlora_cli.config import (
    AdapterConfig,
    AlignConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RoutingConfig,
    TrainConfig,
)
from mixlora_cli.models.adapters import load_adapter
from mixlora_cli.models.features import FeatureCache
from mixlora_cli.models.load import Base
from mixlora_cli.models.mini import StageOne, load_stage_one, stacked, unaligned_base, with_stage_one
from mixlora_cli.output import alone_in
from mixlora_cli.store import write_text
from mixlora_cli.training.run_folder import refuse_changes
from mixlora_cli.training.train import train

RESULT = "stage_one.safetensors"
HARMLESS = ("output_dir", "log_every", "save_every", "check_pictures")
"""Keys that may differ when a run goes on."""


def align(config: AlignConfig) -> Path:
    """Run stage one; returns the file with its result.

    Raises:
        UserError: a package of the small model is missing; the folder holds another configuration's run.
    """
    root = Path(config.output_dir)
    with alone_in(root, "alignment"):
        return _align(config, root)


def _align(config: AlignConfig, root: Path) -> Path:
    console = Console(soft_wrap=True, markup=False, highlight=False)
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
        loss = train_lexical(base, FeatureCache(base), pictures, paths, config)
        save_file(base.model.model.multi_modal_projector.state_dict(), projector_file)
        console.print(f"the projector says words: loss {loss:.3f}")

    run = _train_captions(config, root, base)
    console.print("merging, and captioning held-out pictures")
    stage_one = _extract(config, start, run)
    stage_one.save(root / RESULT)
    check, questions = _check(config, root)
    (root / "check.json").write_text(json.dumps(asdict(check), indent=2) + "\n")
    if questions is not None:
        (root / "check_questions.json").write_text(json.dumps(asdict(questions), indent=2) + "\n")
        console.print(
            "answers right to short questions about held-out pictures: "
            f"{sum(questions.right.values())} of {sum(questions.asked.values())} ("
            + ", ".join(f"{kind} {questions.right[kind]}/{n}" for kind, n in sorted(questions.asked.items()))
            + ")"
        )
    console.print(
        f"names right in captions of held-out pictures: {check.names_right} of {check.names} "
        f"({100 * check.share:.1f} %)\n"
        f"weights: {root / RESULT}"
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
        return
    root.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(asked, indent=2) + "\n")


def _train_captions(config: AlignConfig, root: Path, base: Base) -> Path:
    """Train projector and low-rank update; a finished part is not run again."""
    run = root / "captions"
    if (run / "result.json").exists():
        return run
    return train(
        TrainConfig(
            model=ModelConfig(name="mini", source="mini", template="smollm", train_projector=True),
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
        ),
        base,
    )


def _base_before(config: AlignConfig, start: StageOne | None) -> Base:
    """The base that the training starts from: with an earlier stage one in it, or with none."""
    base = unaligned_base(config.seed)
    return base if start is None else with_stage_one(base, start)


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


def _check(config: AlignConfig, root: Path) -> tuple[CaptionCheck, QuestionCheck | None]:
    """Try held-out pictures on the base as everybody will build it: from the quantised file."""
    base = with_stage_one(unaligned_base(config.seed), load_stage_one(root / RESULT))
    pictures = draw(config.check_pictures, "align/heldout")
    captions = check_captions(base, pictures, root / "heldout")
    if config.questions == 0:
        return captions, None
    return captions, check_questions(base, pictures, root / "heldout-questions")
