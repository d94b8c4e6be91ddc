"""The small file that stage one leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixlora_cli.errors import UserError
from mixlora_cli.models.mini import StageOne, load_stage_one, merge_update, stacked
from mixlora_cli.models.tiny import build_tiny


def _stage_one() -> StageOne:
    draw = torch.Generator().manual_seed(1)
    up, down = torch.randn(32, 2, generator=draw), torch.randn(2, 32, generator=draw)
    projector = {
        "linear_1.weight": torch.randn(8, 5, generator=draw),
        "linear_1.bias": torch.randn(8, generator=draw),
    }
    return StageOne(projector, {"layers.0.self_attn.q_proj": (up, down)}, {"config": "{}"})


def test_it_reads_back_to_within_the_quantisation_step(tmp_path: Path) -> None:
    written = _stage_one()
    written.save(tmp_path / "one.safetensors")
    read = load_stage_one(tmp_path / "one.safetensors")
    weight = written.projector["linear_1.weight"]
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((read.projector["linear_1.weight"] - weight).abs() <= 0.5 * step * 1.001).all()
    assert torch.equal(read.projector["linear_1.bias"], written.projector["linear_1.bias"])
    assert read.update.keys() == written.update.keys()
    assert read.metadata == {"config": "{}"}


def test_the_update_is_added_to_the_weight() -> None:
    base = build_tiny()
    weight = base.model.model.language_model.layers[0].self_attn.q_proj.weight
    before = weight.detach().clone()
    up, down = _stage_one().update["layers.0.self_attn.q_proj"]
    merge_update(base.model, {"layers.0.self_attn.q_proj": (up, down)})
    torch.testing.assert_close(weight - before, up @ down, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("content", [None, b"not a safetensors file"])
def test_a_missing_or_broken_file_says_what_to_do(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "one.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="mixlora align"):
        load_stage_one(path)


def test_stacked_updates_are_their_sum() -> None:
    first, then = (
        _stage_one().update,
        {name: (2 * up, -down) for name, (up, down) in _stage_one().update.items()},
    )
    both = stacked(first, then)
    assert both.keys() == first.keys()
    for name, (up, down) in both.items():
        assert up.shape[1] == 2 * first[name][0].shape[1]
        wanted = sum(one @ other for one, other in (first[name], then[name]))
        torch.testing.assert_close(up @ down, wanted)
