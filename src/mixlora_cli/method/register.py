"""Makes the method known to `peft`."""

from __future__ import annotations

from typing import Any, cast

from peft import mapping

from mixlora_cli.method.config import PEFT_TYPE, MixLoraConfig
from mixlora_cli.method.model import MixLoraModel


def register() -> None:
    """Put configuration, tuner and prefix into PEFT's tables; calling it again changes nothing.

    Every look-up in PEFT goes through these tables, and none through `PeftType` itself, which is closed.
    """
    tables: tuple[tuple[Any, object], ...] = (
        (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, MixLoraConfig),
        (mapping.PEFT_TYPE_TO_TUNER_MAPPING, MixLoraModel),
        (mapping.PEFT_TYPE_TO_PREFIX_MAPPING, MixLoraModel.prefix),
    )
    for table, entry in tables:
        cast("dict[str, object]", table)[PEFT_TYPE] = entry
