"""The tiny model: complete, the same in every process, and reacting to its input."""

from __future__ import annotations

import os
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import mixlora_cli
from mixlora_cli.data.template import TEMPLATES
from mixlora_cli.models.tiny import build_tiny

FINGERPRINT_PROGRAM = "import mixlora_cli.models.tiny as t; print(t.build_tiny().fingerprint)"


def test_same_bits_whatever_was_drawn_before() -> None:
    torch.manual_seed(1)
    first = build_tiny()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build_tiny()
    assert torch.equal(state, torch.get_rng_state())
    assert first.fingerprint == second.fingerprint
    weights = second.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in first.model.state_dict().items())
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()


@pytest.mark.slow
def test_same_bits_in_another_process() -> None:
    source = str(Path(mixlora_cli.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", FINGERPRINT_PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": source},
    )
    assert done.stdout.strip() == build_tiny().fingerprint


def test_small_frozen_and_in_eval_mode() -> None:
    model = build_tiny().model
    assert sum(p.numel() for p in model.parameters()) < 100_000
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_any_text_survives_the_tokenizer_and_control_tokens_are_single(name: str) -> None:
    base = build_tiny(template=name)
    assert base.chat.template is TEMPLATES[name]
    text = string.printable + "naïve – 日本 🦊"
    assert base.tokenizer.decode(base.tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    for special in (base.chat.end, "<image>"):
        assert len(base.tokenizer(special, add_special_tokens=False)["input_ids"]) == 1
    assert base.tokenizer.convert_tokens_to_ids("<image>") == base.chat.image_token_ids[0]
    assert base.tokenizer.unk_token_id not in base.tokenizer(text)["input_ids"]


def test_logits_depend_on_picture_and_text() -> None:
    base = build_tiny()

    def last_logits(colour: str, text: str) -> torch.Tensor:
        pixels = base.chat.process([[Image.new("RGB", (30, 20), colour)]])[0]["pixel_values"]
        ids = [base.chat.image_token_ids[0]] * len(base.chat.picture_tokens) + base.tokenizer(text)[
            "input_ids"
        ]
        with torch.no_grad():
            return base.model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1]

    reference = last_logits("red", "which colour?")
    assert (reference - last_logits("blue", "which colour?")).abs().max() > 1e-3
    assert (reference - last_logits("red", "what colour?")).abs().max() > 1e-3
    assert reference.std() > 0.1
