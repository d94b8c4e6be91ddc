"""An evaluation folder, and a judge server on this machine that misbehaves as told."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixlora_cli.config import JudgeConfig
from mixlora_cli.evaluation.predictions import Header, Prediction, open_predictions
from openai_server import Action, Body, FakeServer, Handler


def prediction(index: int, given: str, target: str = "cat", **more: Any) -> Prediction:
    fields = {"split": "unseen", "benchmark": "mini_cifar10", **more}
    return Prediction(
        index=index,
        id=f"i{index}",
        question=f"What is in picture {index}?",
        target=target,
        prediction=given,
        **fields,
    )


def eval_folder(root: Path, predictions: list[Prediction], count: int | None = None) -> Path:
    header = Header(
        {"model": "m"}, len(predictions) if count is None else count, {"label": "LoRA r=4", "limit": None}
    )
    with open_predictions(root / "eval" / "predictions.jsonl", header) as writer:
        writer.append(predictions)
    return root / "eval"


def honest(handler: Handler, body: Body) -> None:
    """Yes where the prediction in the prompt is "cat"."""
    text = body["prompt"] if "prompt" in body else body["messages"][1]["content"]
    handler.say(" Yes" if "Prediction: cat" in text else " No")


@dataclass
class FakeJudge(FakeServer):
    then: Action = honest

    @property
    def config(self) -> JudgeConfig:
        """Settings under which a test is quick."""
        return JudgeConfig(
            "openai",
            model="some/judge",
            base_url=self.url,
            concurrency=1,
            timeout=5.0,
            retries=3,
            first_wait=0.01,
        )

    def configured(self, **changes: Any) -> JudgeConfig:
        return replace(self.config, **changes)
