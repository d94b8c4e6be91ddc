"""First half of stage one: the projector alone learns to say words.

A picture's cell that shows a cat should enter the language model as something close to the embedding of " cat". That
needs no pass through the language model at all, and gives the caption training after it a base that can be read.
Each cell's target is a distribution over the words that describe what covers it, by area; the loss is the cross
entropy against the embeddings of all words in use, plus the squared distance to the expected embedding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from mixlora_cli.config import AlignConfig
from mixlora_cli.data.collate import Features
from mixlora_cli.data.mini.canvas import SIZE, Item, Scene, text_width
from mixlora_cli.data.mini.captions import Captioned
from mixlora_cli.models.load import LoadedModel
from mixlora_cli.progress import counting, say

Weights = dict[int, float]
"""Token id -> weight, relative to the others of its cell."""

_EMPTY_SHARE = 0.15  # weight of the background's colour where a cell is not fully covered


def _described_boxes(item: Item) -> Iterator[tuple[str, tuple[float, float, float, float]]]:
    """The words that describe an item, with the box (pixels) that each describes."""
    if item.kind == "shape":
        yield item.colour, item.box
        yield item.name, item.box
    elif item.kind == "text" and not item.name.isalpha():
        left, top, _, bottom = item.box
        for position, character in enumerate(item.name):
            if character != " ":
                start = left + text_width(item.name[:position], item.size)
                yield character, (start, top, start + text_width(character, item.size), bottom)
    else:
        yield item.name, item.box


def _cell_overlap(box: tuple[float, float, float, float], cells: int) -> npt.NDArray[np.float64]:
    """Share of each of the cells x cells cells that the box covers, (cells * cells,)."""
    edges = np.arange(cells + 1) * (SIZE / cells)
    left, top, right, bottom = box
    columns = np.clip(np.minimum(edges[1:], right) - np.maximum(edges[:-1], left), 0, None)
    rows = np.clip(np.minimum(edges[1:], bottom) - np.maximum(edges[:-1], top), 0, None)
    return (np.outer(rows, columns) / (SIZE / cells) ** 2).reshape(-1)


def cell_targets(scene: Scene, cells: int, tokens_of: dict[str, list[int]]) -> list[Weights]:
    """For each cell, the weight of every token id that describes it; weights are relative."""
    targets: list[Weights] = [defaultdict(float) for _ in range(cells * cells)]
    covered = np.zeros(cells * cells)
    for item in scene.items:
        for word, box in _described_boxes(item):
            overlap = _cell_overlap(box, cells)
            ids = tokens_of[word]
            for cell in np.flatnonzero(overlap > 0.05).tolist():
                for token in ids:
                    targets[cell][token] += float(overlap[cell]) / len(ids)
            covered = np.maximum(covered, overlap)
    for cell, share in enumerate(covered.tolist()):
        for token in tokens_of[scene.background]:
            targets[cell][token] += _EMPTY_SHARE * (1 - share) + 1e-3
    return targets


class Tokens(dict[str, list[int]]):
    """Word -> ids; a word is tokenised as it stands inside a sentence, with the space before it; digits without."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> list[int]:
        text = word if len(word) == 1 and not word.isalpha() else f" {word}"
        self[word] = self._tokenizer.encode(text, add_special_tokens=False)
        return self[word]


def pretrain_projector(
    base: LoadedModel,
    features: Features,
    pictures: Sequence[Captioned],
    paths: Sequence[Path],
    config: AlignConfig,
) -> float:
    """Train the base's projector in place, on the pictures at `paths`; the mean loss of the last tenth of the steps."""
    projector: nn.Module = base.model.model.multi_modal_projector
    embeddings = base.model.get_input_embeddings().get_parameter("weight").detach()
    cells = round(len(base.chat.picture_tokens) ** 0.5)
    tokens_of = Tokens(base.tokenizer)
    targets = [cell_targets(picture.scene, cells, tokens_of) for picture in pictures]
    vocabulary = sorted({token for picture in targets for cell in picture for token in cell})
    column = {token: position for position, token in enumerate(vocabulary)}
    words = embeddings[vocabulary].float()
    scale = words.norm(dim=-1).mean()
    directions = F.normalize(words, dim=-1)

    generator = np.random.default_rng(config.seed)
    projector.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(projector.parameters(), lr=config.lexical_learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(
        optimizer, int(config.warmup_ratio * config.lexical_steps), config.lexical_steps
    )
    losses: list[float] = []
    console = Console(stderr=True)
    with counting("projector to words", config.lexical_steps, console=console) as advance:
        for step in range(config.lexical_steps):
            chosen = np.sort(generator.choice(len(pictures), config.lexical_batch_size, replace=False))
            wanted = _dense([targets[i] for i in chosen], column)
            projected = projector(features([(paths[i],) for i in chosen])["pixel_values"].float()).flatten(
                0, 1
            )
            logits = 20 * F.normalize(projected, dim=-1) @ directions.T
            loss = F.cross_entropy(logits, wanted) + F.mse_loss(projected, wanted @ words) / (
                scale**2 / words.shape[1]
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            advance(1, f"projector to words, loss {losses[-1]:.3f}")
            if step % config.log_every == 0 and not console.is_terminal:
                say(f"projector to words: step {step}, loss {losses[-1]:.3f}", console)
    projector.requires_grad_(False).eval()
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def _dense(batch: Sequence[Sequence[Weights]], column: dict[int, int]) -> Tensor:
    """Distributions (pictures * cells, words) out of weights."""
    rows = [cell for picture in batch for cell in picture]
    wanted = torch.zeros(len(rows), len(column))
    for number, cell in enumerate(rows):
        for token, weight in cell.items():
            wanted[number, column[token]] = weight
    return wanted / wanted.sum(dim=-1, keepdim=True)
