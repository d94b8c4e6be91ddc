"""Predictions of several processes: each but the leader writes its own file, which the leader takes in.

Files that a killed evaluation left behind are taken in when the next one starts, whatever their number.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from mixlora_cli.evaluation.predictions import (
    Header,
    PredictionReader,
    PredictionWriter,
    move_aside,
    open_predictions,
    read_header,
    resume_predictions,
)
from mixlora_cli.launch import Team

_TAKEN_IN_AT_ONCE = 256


def shard_path(path: Path, rank: int) -> Path:
    """`predictions.rank3.jsonl` beside `predictions.jsonl`."""
    return path.with_suffix(f".rank{rank}.jsonl")


def take_in_shards(path: Path) -> None:
    """Append what the shards beside `path` hold to it, then delete them.

    A shard of other settings than the file's is moved aside. Raises UserError when a file cannot be read.
    """
    pattern = re.compile(rf"{re.escape(path.stem)}\.rank\d+\.jsonl")
    shards = sorted(
        each for each in path.parent.glob(f"{path.stem}.rank*.jsonl") if pattern.fullmatch(each.name)
    )
    if not shards:
        return
    header = read_header(path) if path.exists() else None
    for shard in shards:
        theirs = read_header(shard)
        if theirs is None:
            shard.unlink()
        elif header is None or theirs.differences(header):
            move_aside(shard)
        else:
            _take_in(shard, path)


def _take_in(shard: Path, path: Path) -> None:
    with resume_predictions(path) as writer:
        waiting = []
        for prediction in PredictionReader(shard):
            if prediction.key not in writer.done:
                waiting.append(prediction)
            if len(waiting) == _TAKEN_IN_AT_ONCE:
                writer.append(waiting)
                waiting = []
        writer.append(waiting)
    shard.unlink()


def open_team_predictions(
    path: Path, header: Header, team: Team, announce: Callable[[str], None]
) -> PredictionWriter:
    """This process's writer; its `done` are the instances that were answered before, the same in all processes.

    Every process of the team must call it.
    """
    if team.leads:
        take_in_shards(path)
        writer = open_predictions(path, header, announce)
    team.wait()
    if not team.leads:
        before = PredictionReader(path)
        for _ in before:
            pass
        writer = open_predictions(shard_path(path, team.rank), header)
        writer.done = before.done
    team.wait()  # the leader appends to the file that the others have just read
    return writer
