"""The judge `hf`: a language model that generates its verdicts in batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from judging_server import eval_folder, prediction
from transformers import LlamaConfig, LlamaForCausalLM

from mixlora_cli.config import JudgeConfig
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.scoring import score
from mixlora_cli.judging.judge import judge_answers
from mixlora_cli.judging.local import LocalJudge
from mixlora_cli.judging.replies import question_to
from mixlora_cli.models.tiny import build_tiny

REPLIES = ("Yes", "No, a dog", "Perhaps")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised LLaMA with the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = build_tiny().tokenizer
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(checkpoint: Path, **more: Any) -> JudgeConfig:
    return JudgeConfig("hf", model=str(checkpoint), batch_size=5, precision="fp32", **more)


def test_a_model_that_babbles_is_all_unparsed(checkpoint: Path, folder: Path) -> None:
    judge_answers(folder, settings(checkpoint))
    (judged,) = score(folder).judged
    (found,) = judged.scores
    assert (found.value, found.n, found.unparsed) == (0.0, 12, 12)
    assert judged.judge["model"] == str(checkpoint) and len(judged.judge["revision"]) == 16


def test_the_batch_size_changes_no_reply(checkpoint: Path) -> None:
    asked = {str(n): prediction(n, "cat " * (n + 1)) for n in range(5)}
    together, alone = ({}, {})
    for size, found in ((5, together), (1, alone)):
        judge = LocalJudge(JudgeConfig("hf", model=str(checkpoint), batch_size=size, precision="fp32"))
        for replies in judge.replies(asked):
            found.update(replies)
    assert together == alone and set(together) == set(asked)


def test_verdicts_are_read_from_what_the_model_writes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the network generates given texts; prompt, batching, decoding and counting are real."""
    folder = eval_folder(tmp_path, [prediction(n, str(n)) for n in range(6)])
    tokenizer = build_tiny().tokenizer
    prompts: list[str] = []

    def generate(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = []
        for row, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            text = tokenizer.decode(
                [t for t, m in zip(row, mask, strict=True) if m], skip_special_tokens=True
            )
            prompts.append(text)
            number = int(text.split("Prediction: ")[1].split()[0])
            rows.append(tokenizer(" " + REPLIES[number % 3] + "</s>", add_special_tokens=False)["input_ids"])
        longest = max(map(len, rows))
        end = [tokenizer.pad_token_id]
        return torch.cat([input_ids, torch.tensor([r + end * (longest - len(r)) for r in rows])], dim=1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    judge_answers(folder, settings(checkpoint))
    (judged,) = score(folder).judged
    (found,) = judged.scores
    assert (found.value, found.unparsed) == (pytest.approx(100 * 2 / 6), 2)
    assert sorted(prompts) == sorted(question_to(prediction(n, str(n))) for n in range(6))


def test_a_model_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"judge\.model=.* cannot be loaded"):
        judge_answers(folder, JudgeConfig("hf", model=str(tmp_path / "nothing")))
