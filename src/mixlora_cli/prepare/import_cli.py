"""The options of `mixlora import`; every mistake in them is one line, as with the commands that Hydra configures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mixlora_cli.errors import UserError

# Of typer's own copy of click or of click itself, as the release has it; there is no public name for both.
_UsageError: type[Any] = typer.BadParameter.__bases__[0]


class OneLineMistakes(TyperCommand):
    """Reports a misspelt option or a missing argument in one line instead of with the usage."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As click does; leaves with exit code 2 at a mistake."""
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            from mixlora_cli.errors import USER_MISTAKE, report

            report(
                UserError(
                    f"{error.format_message().rstrip('.')}; mixlora {ctx.info_name} --help lists all options"
                )
            )
            raise typer.Exit(USER_MISTAKE) from error


def import_command(
    folder: Annotated[
        Path, typer.Argument(help="Output folder of the published training code.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="New adapter folder; default: runs/imported/<FOLDER's name>."),
    ] = None,
    cfs: Annotated[
        str | None,
        typer.Option(help="released (default: as the checkpoint was trained and scored) or paper (Eq. 7)."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="r, if neither tensors nor files tell it.")] = None,
    factors: Annotated[int | None, typer.Option(help="E; compared with the tensors.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="alpha, if no file tells it; the published script takes 2 * factors.")
    ] = None,
    cond_type: Annotated[
        str | None,
        typer.Option(
            help="What selects, if no file tells it: input, input_lora_a_param, task_embed or random."
        ),
    ] = None,
) -> None:
    """Turn a checkpoint of the published code into an adapter.

    \b
    examples:
      mixlora import checkpoints/ft_E-16_r-4
      mixlora import checkpoints/ft_E-16_r-4 --output runs/imported/e16r4
      mixlora import checkpoints/ft_E-16_r-4 --cfs paper

    `mixlora eval run=runs/imported/e16r4 model=llava_v1_7b` then scores it.
    """
    from mixlora_cli.config import ImportConfig
    from mixlora_cli.errors import INTERRUPTED, USER_MISTAKE, report

    try:
        options = ImportConfig(folder, output, cfs, rank, factors, alpha, cond_type)  # type: ignore[arg-type]
    except ValueError as error:
        report(UserError(str(error)))
        raise typer.Exit(USER_MISTAKE) from error
    # Only now: it loads torch.
    from mixlora_cli.prepare.original_checkpoint import import_checkpoint

    try:
        import_checkpoint(options)
    except UserError as error:
        report(error)
        raise typer.Exit(USER_MISTAKE) from error
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
