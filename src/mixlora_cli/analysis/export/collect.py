"""What an adapter selects while it reads prompts: as at inference with decode=prefill, without gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft import PeftModel
from rich.console import Console

from mixlora_cli.analysis.export.fit import Pools
from mixlora_cli.analysis.export.moments import Moments, expected_at_random, observed, total
from mixlora_cli.analysis.selections.at_prompt import ADAPTER, selections_at_prompt, tuner_of
from mixlora_cli.data.collate import Collator
from mixlora_cli.data.encode import Item
from mixlora_cli.evaluation.generate import batches
from mixlora_cli.method.config import MixLoraConfig
from mixlora_cli.method.layer import MixLoraLinear
from mixlora_cli.progress import with_bar

ByLayer = dict[str, Moments]


def read_pools(model: PeftModel) -> dict[str, Pools]:
    """The pools of every adapted layer, by the layer's name in the base model."""
    tuner = tuner_of(model)
    config = tuner.peft_config[ADAPTER]
    assert isinstance(config, MixLoraConfig)
    return {
        name: Pools(
            layer.mixlora_factors_a[ADAPTER].weight,  # type: ignore[arg-type]  # a FactorPool's Parameter
            layer.mixlora_factors_b[ADAPTER].weight,  # type: ignore[arg-type]
            config.scaling,
        )
        for name, layer in tuner.model.named_modules()
        if isinstance(layer, MixLoraLinear)
    }


def random_moments(pools: Mapping[str, Pools], rank: int) -> ByLayer:
    """Moments of routing=random, which no input changes."""
    return {name: expected_at_random(layer.gram_a, layer.gram_b, rank) for name, layer in pools.items()}


def collect(
    model: PeftModel,
    prompts: Mapping[str, Sequence[Item]],
    pools: Mapping[str, Pools],
    collate: Collator,
    batch_size: int,
) -> dict[str, ByLayer]:
    """Moments of every layer over the prompts of each task.

    Args:
        model: a base with its MixLoRA adapter, in eval mode.
        prompts: by task; with routing=task the first instance speaks for all of its task's.
        collate: makes generation batches.
    """
    console = Console(stderr=True)
    config = tuner_of(model).peft_config[ADAPTER]
    alike = isinstance(config, MixLoraConfig) and config.routing == "task"
    found = {}
    for task, items in with_bar(prompts.items(), "reading prompts", console):
        read = items[:1] if alike else items
        parts = [_moments(model, batch, pools, collate) for batch in batches(read, batch_size)]
        moments = {name: total(part[name] for part in parts) for name in pools}
        found[task] = {name: m.times(len(items) // len(read)) for name, m in moments.items()}
    return found


def _moments(
    model: PeftModel, items: Sequence[Item], pools: Mapping[str, Pools], collate: Collator
) -> ByLayer:
    selections = selections_at_prompt(model, items, collate)
    return {name: observed(selections[name], pool.gram_a, pool.gram_b) for name, pool in pools.items()}
