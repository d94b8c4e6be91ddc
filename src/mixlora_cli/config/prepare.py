"""Typed configuration of `mixlora prepare`; see `config/schema.py` for the groups that it shares."""

from __future__ import annotations

from dataclasses import dataclass, field

from mixlora_cli.config.schema import DataConfig, ModelConfig


@dataclass(frozen=True)
class PrepareOptions:
    """What preparation reads and where it writes (key `prepare`)."""

    output: str | None = None
    """Folder that the prepared model or data goes to; null = where `mixlora train` looks for it, in the cache."""
    language_model: str = "lmsys/vicuna-7b-v1.3"
    """Hub id or local folder of the language model that LLaVA-v1 is made of."""
    vision_tower: str = "openai/clip-vit-large-patch14"
    """Hub id or local folder of its CLIP."""
    projector: str = "liuhaotian/llava-pretrain-vicuna-7b-v1.3"
    """Hub id, local folder or file of its linear projector, mm_projector.bin."""
    vision_flan: str = "Vision-Flan/vision-flan_191-task_1k"
    """Hub id or local folder of Vision-Flan's annotation, metadata and picture archive."""
    revision: str | None = None
    """Commit or tag of that hub data set; null = the newest."""
    unpack: bool = False
    """Unpack Vision-Flan's pictures; otherwise they are read from the archive."""
    overwrite: bool = False
    """Replace what was prepared before."""


@dataclass(frozen=True)
class PrepareConfig:
    """Everything that `mixlora prepare` reads."""

    model: ModelConfig | None = None
    data: DataConfig | None = None
    prepare: PrepareOptions = field(default_factory=PrepareOptions)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model is None and self.data is None:
            raise ValueError(
                "model=null data=null: say what to prepare, e.g. model=llava_v1_7b or data=vision_flan"
            )
        if self.model is not None and self.data is not None and self.prepare.output is not None:
            raise ValueError(
                f"prepare.output={self.prepare.output}: is one folder; prepare model and data in two commands, "
                "or leave it out"
            )

    @property
    def output_dir(self) -> str:
        """What tells two jobs of a sweep apart: the folder, or what is prepared."""
        names = [group.name for group in (self.model, self.data) if group is not None]
        return self.prepare.output or " ".join(names)
