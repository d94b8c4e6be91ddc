"""What every test takes for granted, on whatever machine it runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def no_bf16_in_hardware() -> Iterator[None]:
    """`precision=auto` is fp32 in this process, so that numbers are compared with the same rounding everywhere.

    Tests of bf16 ask for it. Processes that a test starts see the real processor.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            patch.setattr(torch.cpu, name, lambda: False)
        yield


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Hydra's logging writes to the standard output of the test that it was set up in.

    Of a fixture that ran a command for several tests it is still there when the next test begins.
    """
    loggers = [logging.getLogger(), logging.getLogger("hydra")]
    loggers[1].handlers.clear()
    loggers[1].setLevel(logging.NOTSET)
    before = [(logger.handlers[:], logger.level) for logger in loggers]
    yield
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)
