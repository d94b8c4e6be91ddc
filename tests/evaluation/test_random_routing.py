"""Evaluating an adapter with routing=random: an instance's draw is its own, whatever else is answered, and when."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixlora_cli.config import AdapterConfig, EvalConfig, RoutingConfig
from mixlora_cli.data.collate import draw_seed
from mixlora_cli.data.encode import Item
from mixlora_cli.evaluation.evaluate import evaluate
from mixlora_cli.evaluation.predictions import Header, read_predictions
from mixlora_cli.models.adapters import attach_adapter, save_adapter
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.store import changed_parts


def tuned(config: EvalConfig, folder: Path, routing: RoutingConfig) -> EvalConfig:
    """An adapter whose factors matter so much that which ones are drawn decides the answers."""
    settings = AdapterConfig(name="mixlora", dropout=0.0)
    model = attach_adapter(build_tiny().model, settings, routing, rank=2, factors=8)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "mixlora" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    save_adapter(model, folder)
    few = replace(config.eval, benchmarks=["mini_mnist", "mini_vsr", "mini_pope"])
    return replace(config, run=str(folder), adapter=settings, eval=few)


def answers(config: EvalConfig, **changes: object) -> tuple[Header, dict[tuple[str, str, int], str]]:
    torch.manual_seed(len(changes))  # torch's own generator must not matter
    evaluate(config)
    contents = read_predictions(Path(config.output_dir) / "predictions.jsonl")
    assert contents.header is not None
    return contents.header, {p.key: p.prediction for p in contents.predictions}


@pytest.mark.parametrize("decode", ["prefill", "step"])
def test_answers_follow_the_seed_and_the_instance_alone(
    decode: str, config: EvalConfig, tmp_path: Path
) -> None:
    whole = tuned(config, tmp_path / "adapter", RoutingConfig("random", decode=decode))  # type: ignore[arg-type]
    header, together = answers(whole)
    assert len(together) == 17
    assert header.fingerprint["draws"] == "by instance, seed 0"
    alone = replace(whole, output_dir=str(tmp_path / "alone"), eval=replace(whole.eval, batch_size=1))
    by_one, one_by_one = answers(alone, batch_size=1)
    assert (changed_parts(by_one.fingerprint, header.fingerprint), one_by_one) == ([], together)
    other, by_other_seed = answers(replace(whole, output_dir=str(tmp_path / "other"), seed=1))
    assert changed_parts(other.fingerprint, header.fingerprint) == ["draws"]
    assert sum(by_other_seed[key] != together[key] for key in together) > 8
    # What a killed evaluation left is continued to the same answers.
    path = Path(whole.output_dir) / "predictions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    assert answers(whole, resumed=True)[1] == together


def test_other_routings_have_no_draws_in_their_fingerprint(config: EvalConfig, tmp_path: Path) -> None:
    header, _ = answers(tuned(config, tmp_path / "adapter", RoutingConfig("instance")))
    assert "draws" not in header.fingerprint


def test_a_draw_s_seed_is_a_digest_of_seed_tokens_and_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "b.png").write_bytes(b"one")
    (tmp_path / "c.png").write_bytes(b"two")
    item = Item([1, 2], [-100, -100], tmp_path / "a.png", "task", 5)
    tokens = (1).to_bytes(8, "little") + (2).to_bytes(8, "little")
    expected = hashlib.sha256(b"7 2 " + tokens + b"one").digest()
    assert draw_seed(7, item) == int.from_bytes(expected[:8], "big") >> 1
    assert draw_seed(7, replace(item, image=tmp_path / "b.png", index=6, task="x")) == draw_seed(7, item)
    others = [
        replace(item, image=tmp_path / "c.png"),
        replace(item, input_ids=[1, 3]),
        replace(item, image=None),
    ]
    assert len({draw_seed(7, item), draw_seed(8, item), *(draw_seed(7, each) for each in others)}) == 5
