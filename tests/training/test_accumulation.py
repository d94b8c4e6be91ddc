"""An effective batch is split exactly, or refused with what would work."""

from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

from mixlora_cli.config import OptimConfig
from mixlora_cli.errors import UserError
from mixlora_cli.training import arguments
from mixlora_cli.training.arguments import accumulation, accumulation_for


@pytest.mark.parametrize(("processes", "passes"), [(1, 16), (2, 8), (4, 4), (8, 2), (16, 1)])
def test_128_on_any_number_of_gpus_that_divides_it(processes: int, passes: int) -> None:
    assert accumulation_for(128, 8, processes) == passes


def refused(effective_batch: int, batch_size: int, processes: int) -> str:
    with pytest.raises(UserError) as error:
        accumulation_for(effective_batch, batch_size, processes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_three_gpus_cannot_share_128() -> None:
    message = refused(128, 8, 3)
    assert "train.effective_batch=128: cannot be split over 3 processes with train.batch_size=8" in message
    assert message.endswith(
        "the nearest possible ones: 2 or 4 processes, or train.effective_batch=120 or 144"
    )


def test_a_batch_size_that_does_not_divide_is_told_its_neighbours() -> None:
    assert "train.batch_size=8 or 16, or train.effective_batch=120 or 160" in refused(128, 10, 4)


def test_more_gpus_than_instances() -> None:
    assert "128 processes, or train.effective_batch=400" in refused(128, 1, 400)


@pytest.mark.parametrize(
    ("effective_batch", "batch_size", "processes"), [(128, 8, 3), (128, 10, 4), (90, 7, 4)]
)
def test_what_is_proposed_works(effective_batch: int, batch_size: int, processes: int) -> None:
    together = batch_size * processes
    for part in refused(effective_batch, batch_size, processes).rpartition(": ")[2].split(", or "):
        for number in (int(word) for word in part.replace("=", " ").split() if word.isdigit()):
            if part.startswith("train.batch_size"):
                assert accumulation_for(effective_batch, number, processes) >= 1
            elif part.startswith("train.effective_batch"):
                assert accumulation_for(number, batch_size, processes) * together == number
            else:
                assert accumulation_for(effective_batch, batch_size, number) >= 1


def test_the_launcher_says_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert accumulation(OptimConfig(batch_size=8, effective_batch=128)) == 2
    assert accumulation(OptimConfig(batch_size=8, effective_batch=128), world_size=4) == 4
    monkeypatch.delenv("WORLD_SIZE")
    assert accumulation(OptimConfig(batch_size=8, effective_batch=128)) == 16


def test_without_effective_batch_accumulation_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert accumulation(OptimConfig(accumulation=5)) == 5


def test_both_keys_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train.accumulation=2: follows from train.effective_batch"):
        OptimConfig(accumulation=2, effective_batch=128)


def test_checkpointing_goes_by_the_name_that_transformers_has_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = arguments._checkpointing(True)
    assert list(now.values()) == [True, {"use_reentrant": False}]
    assert set(now) <= set(TrainingArguments.__dataclass_fields__)
    older = SimpleNamespace(__dataclass_fields__={"gradient_checkpointing": None})
    monkeypatch.setattr(arguments, "TrainingArguments", older)
    assert arguments._checkpointing(False) == {
        "gradient_checkpointing": False,
        "gradient_checkpointing_kwargs": None,
    }
