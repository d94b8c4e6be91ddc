"""From the configuration to a judge."""

from __future__ import annotations

from mixlora_cli.config import JudgeConfig
from mixlora_cli.judging.judge import ExactJudge, Judge


def build_judge(settings: JudgeConfig) -> Judge:
    """The judge that `settings.name` says; a server is not asked and weights are not read yet.

    Raises UserError when a local model cannot be found.
    """
    if settings.name == "openai":
        from mixlora_cli.judging.server import ServerJudge

        return ServerJudge(settings)
    if settings.name == "hf":
        from mixlora_cli.judging.local import LocalJudge

        return LocalJudge(settings)
    return ExactJudge()
