"""How many processes a command runs in (key `launch`)."""

from __future__ import annotations

from dataclasses import dataclass


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key}={'null' if value is None else value}: {allowed}")


@dataclass(frozen=True)
class LaunchConfig:
    """Processes and nodes; where torchrun, deepspeed or SLURM has started the processes, they decide instead."""

    nproc: int | None = None
    """Processes on each node; null = one for each visible GPU, one without a GPU."""
    nnodes: int = 1
    """Nodes; the same command is started on each."""
    rdzv_endpoint: str | None = None
    """host:port where the nodes meet; the host is one of them."""

    def __post_init__(self) -> None:
        _require(self.nproc is None or self.nproc > 0, "launch.nproc", self.nproc, "must be > 0 or null")
        _require(self.nnodes > 0, "launch.nnodes", self.nnodes, "must be > 0")
        _require(
            self.rdzv_endpoint is None or _is_host_and_port(self.rdzv_endpoint),
            "launch.rdzv_endpoint",
            self.rdzv_endpoint,
            "must be host:port, such as node01:29500",
        )
        _require(
            self.nnodes == 1 or self.rdzv_endpoint is not None,
            "launch.rdzv_endpoint",
            self.rdzv_endpoint,
            f"launch.nnodes={self.nnodes} needs a host:port where the nodes meet, the same on each of them",
        )


def _is_host_and_port(endpoint: str) -> bool:
    host, _, port = endpoint.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 2**16
