"""No picture that stage one learns from is one that the small model is trained or evaluated on later."""

from mixlora_cli.alignment.pictures import draw
from mixlora_cli.config.schema import AlignConfig
from mixlora_cli.data.mini.canvas import Scene
from mixlora_cli.data.mini.plan import Counts, make_plan

PICTURES = 24_000
"""As many as the shipped stage one saw; the first 8,000 of them come from an earlier mix of captions."""


def test_scenes_are_not_shared() -> None:
    shown = {captioned.scene for captioned in draw(PICTURES, f"align/{AlignConfig(output_dir='').seed}")}
    asked = {picture for picture in make_plan(Counts()).pictures.values() if isinstance(picture, Scene)}
    assert len(shown) > 0.99 * PICTURES and len(asked) > 10_000
    assert not shown & asked
