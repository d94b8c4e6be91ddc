"""Another router is one more entry of `ROUTERS`: everything else, down to the saved adapter, takes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from method_models import adapt, build_llama
from peft import PeftModel
from torch import Tensor

from mixlora_cli import MixLoraConfig
from mixlora_cli.routers import ROUTERS, Router


def last_token(context, source: Tensor, hidden: Tensor, training: bool) -> Tensor:
    """The hidden state of each instance's last token that is not padding: (B, d_in)."""
    mask = context.info.tokens
    places = torch.arange(hidden.shape[1]).expand(hidden.shape[:2])
    last = (places * (1 if mask is None else mask)).argmax(dim=1)
    return hidden[torch.arange(len(hidden)), last].float()


@pytest.fixture
def toy(monkeypatch) -> None:
    monkeypatch.setitem(ROUTERS, "last", Router("last", "By the last token.", "tokens", lambda _: last_token))


def test_a_toy_router_selects_generates_and_is_saved(toy, tmp_path: Path) -> None:
    model = adapt(build_llama(), routing="last", target_modules=["q_proj"])
    ids = torch.randint(4, 64, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        embedded = model.base_model.model.model.layers[0].input_layernorm(
            model.get_input_embeddings()(ids[torch.arange(2), torch.tensor([5, 3])])
        )
    expected = (embedded @ layer.mixlora_router_a["default"].weight.T).topk(2).indices
    assert torch.equal(layer.last_selection["default"].index_a, expected)
    answer = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(layer.last_selection["default"].index_a, answer_selection(model, ids))
    assert answer.shape == (2, 9)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build_llama(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids, attention_mask=mask).logits, logits)


def answer_selection(model: PeftModel, ids: Tensor) -> Tensor:
    """What the prompt alone selects, which the answer keeps."""
    with torch.no_grad():
        model(input_ids=ids)
    chosen: Tensor = model.base_model.model.model.layers[0].self_attn.q_proj.last_selection["default"].index_a
    return chosen


def test_a_router_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"routing=last: must be one of instance, task, random"):
        MixLoraConfig(routing="last")
