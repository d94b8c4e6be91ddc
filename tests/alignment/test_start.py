"""Going on from an earlier stage one."""

from pathlib import Path

import pytest

from mixlora_cli.config import AlignConfig
from mixlora_cli.errors import UserError
from mixlora_cli.prepare.align.run import align, remember


def test_a_start_that_is_not_there_is_said_before_anything_is_drawn(tmp_path: Path) -> None:
    missing, folder = tmp_path / "one.safetensors", tmp_path / "align"
    with pytest.raises(UserError, match=r"one\.safetensors: no stage-one weights"):
        align(AlignConfig(output_dir=str(folder), start=str(missing)))
    assert not folder.exists()


def test_the_folder_of_another_run_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    folder = tmp_path / "align"
    remember(AlignConfig(output_dir=str(folder), seed=0), folder)
    remember(AlignConfig(output_dir=str(folder), seed=0, save_every=7), folder)
    with pytest.raises(
        UserError, match=r"seed \(was 0, now 1\); give the same values, or another output_dir="
    ):
        align(AlignConfig(output_dir=str(folder), seed=1))
    assert [path.name for path in folder.iterdir()] == ["align.json"]


@pytest.mark.parametrize("key", ["questions", "lexical_steps"])
def test_a_number_that_may_be_zero_is_not_negative(key: str) -> None:
    none: dict[str, int] = {key: 0}
    assert getattr(AlignConfig(output_dir="", **none), key) == 0  # type: ignore[arg-type]
    negative: dict[str, int] = {key: -1}
    with pytest.raises(ValueError, match=f"{key}=-1: must be >= 0"):
        AlignConfig(output_dir="", **negative)  # type: ignore[arg-type]
