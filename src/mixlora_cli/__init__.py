"""Conditional mixture of LoRA for multimodal instruction tuning.

Importing this package makes the method known to `peft`. Nothing heavy is imported for that: where `peft` is not
imported yet, the registration waits until it is, so the command line answers `--help` at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixlora_cli.peft_import import when_peft_is_imported

if TYPE_CHECKING:
    from mixlora_cli.method.config import MixLoraConfig

__all__ = ["MixLoraConfig", "__version__"]

__version__ = "1.0.0"


def __getattr__(name: str) -> object:
    """Import the configuration class on first use (PEP 562): it needs `peft`, which takes seconds."""
    if name == "MixLoraConfig":
        from mixlora_cli.method.config import MixLoraConfig

        return MixLoraConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register() -> None:
    from mixlora_cli.method.register import register

    register()


when_peft_is_imported(_register)
