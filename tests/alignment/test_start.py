"""Going on from an earlier stage one."""

from pathlib import Path

import pytest

from mixlora_cli.alignment.run import align
from mixlora_cli.config.schema import AlignConfig
from mixlora_cli.errors import UserError


def test_a_start_that_is_not_there_is_said_before_anything_is_drawn(tmp_path: Path) -> None:
    missing, folder = tmp_path / "one.safetensors", tmp_path / "align"
    with pytest.raises(UserError, match=r"one\.safetensors: no stage-one weights"):
        align(AlignConfig(output_dir=str(folder), start=str(missing)))
    assert not folder.exists()
