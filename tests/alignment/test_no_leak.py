"""No picture that stage one learns from is one that the small model is trained or evaluated on later."""

from mixlora_cli.data.mini.canvas import Scene
from mixlora_cli.data.mini.plan import Counts, make_plan
from mixlora_cli.prepare.align.run import draw

PICTURES = {"align/0": 24_000, "align/1": 4_000}
"""What the shipped stage one saw in its rounds; the first 8,000 also with an earlier mix of captions."""


def test_scenes_are_not_shared() -> None:
    shown = {captioned.scene for stream, count in PICTURES.items() for captioned in draw(count, stream)}
    asked = {picture for picture in make_plan(Counts()).pictures.values() if isinstance(picture, Scene)}
    assert len(shown) > 0.99 * sum(PICTURES.values()) and len(asked) > 10_000
    assert not shown & asked
