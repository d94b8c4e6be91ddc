#!/usr/bin/env python3
"""Ask a running `mixlora serve` through its playground, and draw the page: docs/figures/playground.png.

    set -- train.steps=150 train.batch_size=8 train.learning_rate=1e-3 train.precision=fp32
    mixlora train "$@" output_dir=runs/mixlora-task
    mixlora train "$@" output_dir=runs/lora adapter=lora
    mixlora serve run=[runs/lora,runs/mixlora-task]
    scripts/playground_picture.py http://127.0.0.1:8000 docs/figures/playground.png \\
        .cache/mini-*/images/above_or_below/heldout_0000.png \\
        "Seen from the popcorn, is the church above or below?" "What colour is the background?"

All questions are one conversation. Where there are several, the grid shows what the last one changed.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from browser import browser

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("url")
PARSER.add_argument("drawing", type=Path)
PARSER.add_argument("picture", type=Path)
PARSER.add_argument("questions", nargs="+")
PARSER.add_argument("--width", type=int, default=1400)
PARSER.add_argument("--height", type=int, default=900)
PARSER.add_argument("--dark", action="store_true")


def main() -> None:
    """Ask, and draw."""
    asked = PARSER.parse_args()
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as tab:
        tab.open(asked.url, asked.width, asked.height, asked.dark)
        tab.wait("!get('send').disabled")
        tab.give_files("#files", asked.picture.resolve())
        tab.wait("pictures.length")
        for number, question in enumerate(asked.questions, 1):
            tab.run("get('question').focus()")
            tab.type(question)
            tab.press("Enter")
            tab.wait(f"turns.length === {number} && !running", seconds=300)
        tab.run(f"get('other').value = {'previous' if len(asked.questions) > 1 else ''!r}; drawPanel()")
        tab.wait("[...uses.values()].every(known => known)")
        # The first cell that is selected, as if it were pointed at.
        tab.run(
            "tell([...cells].find(([, cell]) => cell.kept)[0]); document.activeElement.blur(); scrollTo(0, 0)"
        )
        tab.screenshot(asked.drawing)
        print(
            *(
                tab.run(
                    "turns.flatMap(turn => turn.replies.map(({ model, text }) => `${model.id}: ${text}`))"
                )
            ),
            sep="\n",
        )
    with Image.open(asked.drawing) as drawn:
        drawn.convert("RGB").save(asked.drawing, optimize=True)


if __name__ == "__main__":
    main()
