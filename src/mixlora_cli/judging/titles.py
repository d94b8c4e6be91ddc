"""Titles that tell several judges apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from mixlora_cli.judging.identity import Identity

_SHOWN = 12
"""Characters of a commit or digest."""


def distinct_titles(identities: Sequence[Identity]) -> list[str]:
    """A title for each: `Identity.title`, and where several share one, the shortest setting that tells them apart.

    "judge (openai, api=chat)" and "judge (openai, api=completions)", for instance.
    """
    titles = [identity.title for identity in identities]
    for title in {title for title in titles if titles.count(title) > 1}:
        places = [place for place, each in enumerate(titles) if each == title]
        texts = _telling_apart([_settings(identities[place]) for place in places])
        for place, text in zip(places, texts, strict=True):
            titles[place] = f"{title[:-1]}, {text})" if title.endswith(")") else f"{title} ({text})"
    return titles


def _settings(identity: Identity) -> dict[str, str]:
    """Everything that may differ between two judges of one title, as short texts by name."""
    decoding = {name: f"{name}={value}" for name, value in identity.decoding.items()}
    named = {"revision": identity.revision, "prompt": identity.prompt}
    digests = {name: f"{name}={value[:_SHOWN] or 'unknown'}" for name, value in named.items()}
    return {"model": identity.model, **digests, **decoding}


def _telling_apart(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """For each the values of as few settings as it takes, the shortest of those; a number where none does."""
    names = [
        name
        for name in dict.fromkeys(name for each in settings for name in each)
        if len({each.get(name) for each in settings}) > 1
    ]
    for count in range(1, len(names) + 1):
        found = [_texts(settings, chosen) for chosen in combinations(names, count)]
        if apart := [texts for texts in found if len(set(texts)) == len(texts)]:
            return min(apart, key=lambda texts: len("".join(texts)))
    return [str(number) for number in range(1, len(settings) + 1)]


def _texts(settings: Sequence[Mapping[str, str]], names: Sequence[str]) -> list[str]:
    return [", ".join(each.get(name, f"no {name}") for name in names) for each in settings]
