"""Figures 2, 5, 6 and 7: which trainings they need and which command draws them."""

from __future__ import annotations

from pathlib import Path

from mixlora_cli.config import ReproduceConfig
from mixlora_cli.reproduce.cell import Part
from mixlora_cli.reproduce.layout import Row

LORA = "lora_r16"
COMPARED = "mixlora_e16_r4"
"""Its interference is shown beside that of `LORA`, which has to be measured before."""
_LARGE = "mixlora_e32_r8"
FIGURE_ROWS = (
    Row(LORA, ("LoRA", "-", "16"), "LoRA r=16"),
    Row(_LARGE, ("MixLoRA", "32", "8"), "MixLoRA E=32 r=8"),
    Row(COMPARED, ("MixLoRA", "16", "4"), "MixLoRA E=16 r=4"),  # last: it waits for the first
)
PAIRS = {
    "mini": (
        ("caption_matching", "mini_snli_ve"),
        ("word_reading", "mini_textvqa"),
        ("left_or_right", "mini_vsr"),
        ("object_presence", "mini_pope"),
        ("object_naming", "mini_cifar10"),
    ),
}
"""Figure 6: a seen task and the unseen benchmark that asks for the same ability. For scale=paper give `drawing=`: the
names depend on the held-out file that is used."""


def drawings_of(experiment: str, folder: Path, lora: Path, config: ReproduceConfig) -> list[Part]:
    """The drawings that come from this row's training; Figure 7 reads what Figure 2 measured in the cell `lora`."""
    given = [f"data={'mini' if config.scale == 'mini' else 'vision_flan'}", *config.drawing]
    if experiment == LORA:
        return [_part("interference", folder, [*given, *_few_batches(config)])]
    if experiment == COMPARED:
        compare = f"compare={lora / 'interference'}"
        return [_part("interference", folder, [*given, compare, *_few_batches(config)])]
    few = [] if config.budget is None else [f"tsne.instances={max(config.budget, 2)}"]
    drawings = [_part("tsne", folder, [*given, *few])]
    if pairs := PAIRS.get(config.scale):
        listed = ",".join(f"[{seen},{unseen}]" for seen, unseen in pairs)
        drawings.append(_part("tsne", folder, [*given, f"pairs=[{listed}]", *few], "tsne-pairs"))
    return drawings


def _few_batches(config: ReproduceConfig) -> list[str]:
    return [] if config.budget is None else [f"interference.batches={max(config.budget, 2)}"]


def _part(command: str, folder: Path, arguments: list[str], name: str | None = None) -> Part:
    name = name or command
    given = (command, f"run={folder}", *arguments, f"output_dir={folder / name}")
    return Part(name, given, folder / name / f"{command}.json", {"arguments": list(given)}, None)
