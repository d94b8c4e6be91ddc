"""The small model as a `Base`: assembled once, kept on disk, loaded in a second after that."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from rich.console import Console
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mixlora_cli.data.template import SMOLLM
from mixlora_cli.models import mini, tower
from mixlora_cli.models.base import Base
from mixlora_cli.models.stage_one import ASSET, StageOne, load_stage_one
from mixlora_cli.paths import cache_root
from mixlora_cli.store import folder_beside, rename_unless_there

IMAGE_SIZE = 160
_LAYOUT = "1"  # raise when the assembly below changes


def unaligned_base(seed: int) -> Base:
    """The assembled model before stage one: its projector is random (from `seed`)."""
    tokenizer = mini.build_tokenizer()
    model = mini.build_unaligned(tokenizer, IMAGE_SIZE, seed)
    digest = hashlib.sha256(f"{_LAYOUT} {mini.sources()} unaligned".encode()).hexdigest()
    return _as_base(model, mini.build_processor(tokenizer, IMAGE_SIZE), "mini-unaligned", digest)


def with_stage_one(base: Base, stage_one: StageOne) -> Base:
    """The same base, changed in place: stage one's projector, its update merged into the language model."""
    base.model.model.multi_modal_projector.load_state_dict(stage_one.projector)
    mini.merge_update(base.model, stage_one.update)
    return base


def mini_base(dtype: torch.dtype) -> Base:
    """The small model after stage one.

    Raises:
        UserError: one of the packages that carry its weights is missing.
    """
    digest = hashlib.sha256(f"{_LAYOUT} {mini.sources()} ".encode() + ASSET.read_bytes()).hexdigest()
    folder = cache_root() / f"mini-base-{digest[:16]}"
    if not folder.is_dir():
        _assemble(folder)
    tower.register()
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return _as_base(
        model.requires_grad_(False).eval(), LlavaProcessor.from_pretrained(folder), "mini", digest
    )


def _assemble(folder: Path) -> None:
    """Build from the packages and write a checkpoint that `from_pretrained` reads; complete or not there at all."""
    Console(stderr=True).print("assembling the small model (once, about a minute)", markup=False)
    stage_one = load_stage_one()
    base = with_stage_one(unaligned_base(seed=0), stage_one)
    with folder_beside(folder) as draft:
        base.model.save_pretrained(draft)
        mini.build_processor(base.tokenizer, IMAGE_SIZE).save_pretrained(draft)
        rename_unless_there(draft, folder, Path.is_dir)


def _as_base(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, name: str, fingerprint: str
) -> Base:
    return Base(
        model=model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        num_image_tokens=(IMAGE_SIZE // tower.STRIDE) ** 2,
        image_token_id=model.config.image_token_id,
        template=SMOLLM,
        name=name,
        fingerprint=fingerprint,
    )
