"""A training task as data: what it asks for, its instructions, and how one instance is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from mixlora_cli.data.mini.canvas import Scene


@dataclass(frozen=True)
class Draw:
    """A picture, the right answer, and the words that the instruction's blanks are filled with."""

    scene: Scene
    answer: str
    blanks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One training task."""

    name: str
    definition: str
    """What the task requires, in one or two sentences; task routing reads it."""
    templates: tuple[str, ...]
    """Paraphrased instructions; `{blank}` is filled from `Draw.blanks`."""
    draw: Callable[[Random], Draw]

    def instance(self, rng: Random) -> tuple[Scene, str, str]:
        """A random (scene, question, answer)."""
        drawn = self.draw(rng)
        return drawn.scene, rng.choice(self.templates).format(**drawn.blanks), drawn.answer
