"""A resumed run is the run that began: what of its configuration may differ, and what may not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mixlora_cli.errors import UserError

# Keys that may differ when a run is resumed, because they do not change what it computes; prefixes end with a dot.
HARMLESS_KEYS = (
    "output_dir",
    "resume",
    "overwrite",
    "wandb.",
    "launch.",  # the number of processes is compared itself, whoever started them
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.workers",
    "routing.health_every",
)


def refuse_changes(before: Any, now: Any, harmless: tuple[str, ...] = HARMLESS_KEYS) -> None:
    """Compare the nested configuration that a run began with to the one that it is resumed with.

    Args:
        before: the former.
        now: the latter.
        harmless: keys that may differ; prefixes end with a dot.

    Raises:
        UserError: they differ in what changes the run; names each key with both values.
    """
    old, new = _flat(before), _flat(now)
    changed = [
        f"{key} (was {old.get(key)}, now {new.get(key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _harmless(key, harmless)
    ]
    if changed:
        raise UserError(
            f"resume: the configuration is not the one that the run began with: {', '.join(changed)}; "
            "give the same values, or another output_dir="
        )


def essentials(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys and values of a training's configuration that decide what it computes."""
    return {key: value for key, value in _flat(config).items() if not _harmless(key)}


def _harmless(key: str, harmless: tuple[str, ...] = HARMLESS_KEYS) -> bool:
    return any(key.startswith(allowed) if allowed.endswith(".") else key == allowed for allowed in harmless)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> one mapping with dotted keys."""

    def walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, Mapping) and node:
            for key, child in node.items():
                yield from walk(child, f"{path}.{key}" if path else str(key))
        else:
            yield path, list(node) if isinstance(node, tuple) else node

    return dict(walk(value, prefix))
