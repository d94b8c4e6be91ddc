"""N static adapters in the place of one: instances that select alike share one, and a request's text says which.

The squared Frobenius distance between the updates of two instances, summed over layers, is what a shared static update
loses. k-means in that distance therefore makes the groups whose means lose least. The updates themselves are too large
to compare; each is known by its projections g_k^T Delta h_k onto random directions, whose squared distances have the
same expectation (Johnson and Lindenstrauss, 1984), and g_k^T R_B and R_A^T h_k (fit.py) are computed once for a layer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mixlora_cli.analysis.export.comparison import (
    NEAREST,
    ROUTED,
    ByTask,
    Examples,
    answer_with,
    asked_text,
    put_together,
)
from mixlora_cli.analysis.export.fit import Pools, StaticLora, fitted, observed
from mixlora_cli.analysis.export.folder import Exported
from mixlora_cli.config import FitConfig
from mixlora_cli.data.encode import Item
from mixlora_cli.data.records import Record
from mixlora_cli.errors import UserError
from mixlora_cli.method.selection import Selection
from mixlora_cli.models.generate import batches
from mixlora_cli.models.session import Session
from mixlora_cli.progress import with_bar
from mixlora_cli.stats import wilson
from mixlora_cli.store import write_text

_DIRECTIONS = 4096  # K: squared distances err by about sqrt(2 / K)
_FORMAT = "mixlora-router/1"
_WORDS = "[\u3040-\u30ff\u3400-\u9fff]|[^\\W\u3040-\u30ff\u3400-\u9fff]+"
"""A word, or a single character of a script that writes no spaces."""
_MOST_WORDS = 4000


def update_sketches(
    pools: Mapping[str, Pools], selections: Mapping[str, Selection], seed: int
) -> npt.NDArray[np.float32]:
    """Rows (n, K) fp32 whose squared distances estimate those of the instances' updates, summed over layers.

    Args:
        pools: of every layer.
        selections: (n, r) by layer.
        seed: of the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = len(next(iter(selections.values())).index_a)
    total = torch.zeros(rows, _DIRECTIONS)
    for layer, pool in pools.items():
        factors = pool.r_b.T.float(), pool.r_a.T.float()
        seen_b, seen_a = (f @ torch.randn(f.shape[1], _DIRECTIONS, generator=generator) for f in factors)
        chosen = selections[layer]
        # One pair after the other: all at once would be (n, r, K).
        for b, a in zip(chosen.index_b.T.cpu(), chosen.index_a.T.cpu(), strict=True):
            total += pool.scaling * seen_b[b] * seen_a[a]
    sketches: npt.NDArray[np.float32] = (total / _DIRECTIONS**0.5).numpy()
    return sketches


@dataclass(frozen=True)
class Clusters:
    """Groups of instances that select alike."""

    directions_seed: int
    means: KMeans

    def of(self, pools: Mapping[str, Pools], selections: Mapping[str, Selection]) -> list[int]:
        """The group whose mean update is nearest to each instance's own."""
        found = self.means.predict(update_sketches(pools, selections, self.directions_seed))
        return [int(number) for number in found]


def find_clusters(
    pools: Mapping[str, Pools], selections: Mapping[str, Selection], count: int, seed: int
) -> tuple[Clusters, list[int]]:
    """k-means of the instances' updates; the groups, and each instance's own, the largest group first.

    Raises:
        UserError: fewer than `count` instances select differently.
    """
    sketches = update_sketches(pools, selections, seed)
    different = len(np.unique(sketches, axis=0))
    if different < count:
        raise UserError(
            f"export.centroids={count}: only {different} of the {len(sketches)} instances select differently; give at "
            f"most {different}"
        )
    means = KMeans(count, n_init=10, random_state=seed).fit(sketches)
    sizes = np.bincount(means.labels_, minlength=count)
    means.cluster_centers_ = means.cluster_centers_[np.argsort(-sizes, kind="stable")]
    return Clusters(seed, means), [int(number) for number in means.predict(sketches)]


def _word_features(text: str) -> list[str]:
    """Words and pairs of words, each once, in lower case; numbers are all alike."""
    words = re.findall(_WORDS, re.sub(r"\d+", "0", text.lower()))
    return sorted({*words, *map(" ".join, pairwise(words))})


@dataclass(frozen=True)
class TextRouter:
    """Names an adapter by a request's text: a linear model of its words and pairs of words."""

    adapters: tuple[str, ...]
    bias: tuple[float, ...]
    weights: Mapping[str, Sequence[float]]
    """By word or pair: what it adds to the score of each adapter."""

    def route(self, text: str) -> str:
        """The adapter for a request; `text` is its system turn and its questions, joined by line breaks."""
        rows = [self.weights[feature] for feature in _word_features(text) if feature in self.weights]
        scores = [sum(column) for column in zip(self.bias, *rows, strict=True)]
        return self.adapters[scores.index(max(scores))]

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        content = {
            "format": _FORMAT,
            "reads": "system turn and questions joined by line breaks, in lower case, numbers as 0: the words of this "
            "pattern, and pairs of neighbours, each once",
            "pattern": _WORDS,
            "adapters": self.adapters,
            "bias": self.bias,
            "weights": self.weights,
        }
        write_text(path, json.dumps(content, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: Path | str) -> TextRouter:
        """What `save` wrote.

        Raises:
            UserError: it is no such file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != _FORMAT or content["pattern"] != _WORDS:
                raise ValueError(content["format"])
            return cls(tuple(content["adapters"]), tuple(content["bias"]), content["weights"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is no router of this version's export ({error})") from None

    @classmethod
    def fit(cls, texts: Sequence[str], groups: Sequence[int], adapters: Sequence[str]) -> TextRouter:
        """Logistic regression from texts to the number of each one's adapter."""
        if len(adapters) == 1:
            return cls(tuple(adapters), (0.0,), {})
        words = CountVectorizer(analyzer=_word_features, min_df=2, max_features=_MOST_WORDS, binary=True)
        try:
            features = words.fit_transform(texts)
        except ValueError:  # no word occurs twice: the larger group it is
            share = np.bincount(groups, minlength=len(adapters)) / len(groups)
            return cls(tuple(adapters), tuple(share.round(4).tolist()), {})
        model = LogisticRegression(max_iter=2000).fit(features, groups)
        # Of two classes scikit-learn keeps the second one's score alone.
        both = len(adapters) == 2
        bias = np.concatenate([-model.intercept_, model.intercept_]) if both else model.intercept_
        weights = np.concatenate([-model.coef_, model.coef_]) if both else model.coef_
        names = words.get_feature_names_out()
        columns = {str(name): column.round(4).tolist() for name, column in zip(names, weights.T, strict=True)}
        return cls(tuple(adapters), tuple(bias.round(4).tolist()), columns)


def rows_of(selections: Mapping[str, Selection], rows: Sequence[int] | Tensor) -> dict[str, Selection]:
    """The selections of some of the instances."""
    index = torch.as_tensor(rows)
    return {layer: selection.of(index) for layer, selection in selections.items()}


@dataclass(frozen=True)
class Grouping:
    """Adapters of inputs that select alike, and which one is for which request."""

    exports: list[Exported]
    all_inputs: StaticLora | None
    """One for all together, to compare with; None where there is one group alone."""
    router: TextRouter
    nearest: Mapping[int, str]
    """By index of a held-out prompt: the adapter nearest to its own selection."""


def make_centroids(
    session: Session,
    pools: Mapping[str, Pools],
    prompts: Mapping[str, Sequence[Item]],
    sample: Mapping[str, Sequence[Record]],
    examples: Examples,
    settings: FitConfig,
    seed: int,
) -> Grouping:
    """Static adapters of clustered selections."""
    assert settings.centroids is not None
    items = [item for of_task in prompts.values() for item in of_task]
    selections = read_selections(session, items, settings.batch_size)
    clusters, groups = find_clusters(pools, selections, settings.centroids, seed)
    names = [f"centroid-{number + 1}" for number in range(settings.centroids)]

    def mean(rows: Sequence[int]) -> StaticLora:
        chosen = rows_of(selections, rows)
        moments = {n: observed(chosen[n], pool.gram_a, pool.gram_b) for n, pool in pools.items()}
        return fitted(pools, moments, settings.rank)

    exports = []
    for number, name in enumerate(names):
        rows = [row for row, group in enumerate(groups) if group == number]
        exports.append(Exported(name, [], dict(Counter(items[row].task for row in rows)), mean(rows)))
    texts = {record.index: asked_text(record) for records in sample.values() for record in records}
    router = TextRouter.fit([texts[item.index] for item in items], groups, names)
    asked = [example.prompt for of_task in examples.values() for example in of_task]
    nearest = clusters.of(pools, read_selections(session, asked, settings.batch_size)) if asked else []
    return Grouping(
        exports,
        mean(range(len(items))) if len(names) > 1 else None,
        router,
        {item.index: names[number] for item, number in zip(asked, nearest, strict=True)},
    )


def read_selections(session: Session, items: Sequence[Item], batch_size: int) -> dict[str, Selection]:
    """By layer: the factors (n, r) of n prompts, in their order."""
    read: list[int] = []
    parts: dict[str, list[Selection]] = {}
    places = {id(item): place for place, item in enumerate(items)}
    for batch in with_bar(batches(items, batch_size), "reading prompts"):
        read += (places[id(item)] for item in batch)
        for name, selection in session.selections(batch).items():
            parts.setdefault(name, []).append(selection)
    order = torch.tensor(read).argsort()
    return {name: Selection.joined(of_layer).of(order) for name, of_layer in parts.items()}


def answers_of_centroids(
    folder: Path, grouping: Grouping, examples: Examples, session: Session, settings: FitConfig
) -> dict[str, ByTask]:
    """Answers of the nearest centroids, and of those that the router names."""
    nearest = grouping.nearest
    routed = {
        each.prompt.index: grouping.router.route(each.text)
        for of_task in examples.values()
        for each in of_task
    }
    answered = {}
    for name in (export.folder for export in grouping.exports):
        own = {
            task: [e for e in asked if name in (nearest[e.prompt.index], routed[e.prompt.index])]
            for task, asked in examples.items()
        }
        own = {task: asked for task, asked in own.items() if asked}
        answered[name] = (own, answer_with(folder / name, own, session, settings))
    return {
        NEAREST: put_together(examples, nearest, answered),
        ROUTED: put_together(examples, routed, answered),
    }


def agreement_of(grouping: Grouping, examples: Examples) -> dict[str, Any] | None:
    """How often the router names the nearest centroid of held-out instances, and how often the most frequent is it."""
    asked = [example for of_task in examples.values() for example in of_task]
    if not asked:
        return None
    nearest = grouping.nearest
    right = sum(grouping.router.route(example.text) == nearest[example.prompt.index] for example in asked)
    return {
        "instances": len(asked),
        "names the nearest": {**asdict(wilson(right, len(asked))), "value": right / len(asked)},
        "always the most frequent": Counter(nearest.values()).most_common(1)[0][1] / len(asked),
    }
