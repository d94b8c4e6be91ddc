"""Trained runs that answer: in the terminal, behind OpenAI's interface, and in others' harnesses."""

from typing import Any


def lmms_eval_models() -> Any:
    """For lmms-eval's entry points: the name `mixlora` and its class, imported when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mixlora", chat_class_path="mixlora_cli.serving.lmms_eval.MixLora")
