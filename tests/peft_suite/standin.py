"""MixLoRA under LoRA's name: `LoraConfig(r=8, lora_alpha=16, ...)` in PEFT's tests is a `MixLoraConfig`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from peft import LoraConfig

from mixlora_cli import MixLoraConfig
from mixlora_cli.method.layer import MixLoraLayer

RENAMED = {"lora_alpha": "alpha", "lora_dropout": "dropout", "init_lora_weights": "init_weights"}
SAME_AS_LEFT_OUT: dict[str, Any] = {"bias": "none", "use_rslora": False, "use_dora": False}
"""LoRA's options at these values ask for nothing that MixLoRA would have to do."""
OWN_FIELDS = {field.name for field in fields(MixLoraConfig)}

uses = 0
"""How often a test has met the method so far: configurations made, layers adapted."""


def met() -> None:
    """Count that the method took part."""
    global uses
    uses += 1


def lora_only(options: dict[str, Any]) -> list[str]:
    """The given options of LoRA that MixLoRA does not have, by name."""
    renamed = {RENAMED.get(name, name): value for name, value in options.items()}
    unknown = [name for name in renamed if name not in OWN_FIELDS and name not in SAME_AS_LEFT_OUT]
    unknown += [name for name, same in SAME_AS_LEFT_OUT.items() if options.get(name, same) != same]
    return unknown + ["init_lora_weights"] * (not isinstance(renamed.get("init_weights", True), bool))


class _AsLora(type):
    """Calls make a `MixLoraConfig`, or a real `LoraConfig` where an option is LoRA's alone."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        if args or lora_only(options):
            return LoraConfig(*args, **options)
        met()
        own = {
            RENAMED.get(name, name): value for name, value in options.items() if name not in SAME_AS_LEFT_OUT
        }
        own.setdefault("r", 8)
        own.setdefault("factors", max(64, 2 * own["r"]))
        own.setdefault("router_grad", "straight_through")  # the suite wants gradients of all that it trains
        return MixLoraConfig(**own)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, MixLoraConfig)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, MixLoraConfig) or type.__subclasscheck__(cls, subclass)


class MixLoraAsLora(MixLoraConfig, metaclass=_AsLora):
    """What `from peft import LoraConfig` gives to PEFT's tests."""


MixLoraAsLora.__name__ = "LoraConfig"  # some tests look for it in a message


def count_layers() -> None:
    """From now on adapted layers are counted."""
    update_layer = MixLoraLayer.update_layer

    def counted(layer: MixLoraLayer, *args: Any, **kwargs: Any) -> None:
        met()
        update_layer(layer, *args, **kwargs)

    MixLoraLayer.update_layer = counted  # type: ignore[method-assign]
