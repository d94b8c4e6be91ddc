"""Training on records that are read as they come."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from mixlora_cli.config import DataConfig, TrainConfig
from mixlora_cli.data.encode import StreamedDataset
from mixlora_cli.errors import UserError
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.training.callbacks import Interrupted
from mixlora_cli.training.run_folder import RunFolder, read_metrics
from mixlora_cli.training.train import train

from .conftest import NUM_RECORDS, MakeConfig, adapter_weights, assert_same_bits, each_step

MakeStream = Callable[..., TrainConfig]


@pytest.fixture
def make_stream(make_config: MakeConfig, tmp_path: Path) -> MakeStream:
    """Configurations that stream the little data set from JSON lines."""
    written = make_config("any").data
    assert isinstance(written.train, str)
    lines = tmp_path / "train.jsonl"
    lines.write_text(
        "".join(json.dumps(record) + "\n" for record in json.loads(Path(written.train).read_text()))
    )

    def make(folder: str, data: dict[str, Any] | None = None, **values: Any) -> TrainConfig:
        config = make_config(folder, **values)
        streamed = replace(config.data, train=str(lines), streaming=True, **(data or {}))
        return replace(config, data=streamed)

    return make


def indices(data: DataConfig, number: int, **settings: Any) -> list[int]:
    dataset = StreamedDataset(data, build_tiny().chat, seed=0, **settings)
    return [item.index for item in islice(dataset, number)]


def test_passes_follow_each_other_in_orders_of_their_own(make_stream: MakeStream) -> None:
    data = make_stream("run").data
    seen = indices(data, 2 * NUM_RECORDS)
    first, second = seen[:NUM_RECORDS], seen[NUM_RECORDS:]
    assert sorted(first) == sorted(second) == list(range(NUM_RECORDS))
    assert first != second
    assert seen == indices(data, 2 * NUM_RECORDS)


def test_processes_share_the_records(make_stream: MakeStream) -> None:
    data = make_stream("run").data
    halves = [indices(data, NUM_RECORDS // 2, rank=rank, world_size=2) for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == list(range(NUM_RECORDS))


def test_resuming_gives_the_uninterrupted_adapter(
    make_stream: MakeStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop lies in the second pass."""
    numbers = {"steps": 5, "batch_size": 4}
    whole = train(make_stream("whole", **numbers))
    with monkeypatch.context() as patch:
        each_step(patch, lambda step: signal.raise_signal(signal.SIGTERM) if step == 4 else None)
        with pytest.raises(Interrupted):
            train(make_stream("cut", **numbers))
    cut = train(replace(make_stream("cut", **numbers), resume="auto"))
    assert_same_bits(adapter_weights(whole), adapter_weights(cut))
    losses = [[row["loss"] for row in read_metrics(RunFolder(root).metrics)] for root in (whole, cut)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": None}, "data.streaming=true has no end; give the number of steps"),
        ({"steps": 2, "workers": 1}, "data.streaming=true reads by itself; only 0"),
    ],
)
def test_what_streaming_cannot_do_is_refused(
    make_stream: MakeStream, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_stream("run", **values)


def test_a_task_without_a_definition_stops(make_stream: MakeStream) -> None:
    data = make_stream("run").data
    with pytest.raises(UserError, match=r"task task1 of record .* has none; add it to data\.metadata"):
        indices(data, NUM_RECORDS, tasks={"task0"})


def test_a_record_that_cannot_be_encoded_stops_or_is_left_out(make_stream: MakeStream) -> None:
    with pytest.raises(UserError, match=r"record \d+: .* \(the prompt alone fills the 16 tokens"):
        indices(replace(make_stream("run").data, max_length=16), 1)
    with pytest.raises(UserError, match="no record can be encoded"):
        indices(replace(make_stream("run").data, max_length=16, on_error="skip"), 1)
