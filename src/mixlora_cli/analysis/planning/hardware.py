"""GPUs: memory that a process can use and dense bf16 throughput, from the makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from mixlora_cli.config import GpuName

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One accelerator."""

    label: str
    memory_gib: float
    """What `nvidia-smi` reports, in GiB: less than the number on the box, which is in GB and partly reserved."""
    tflops: float
    """Dense bf16 products with fp32 sums, 10^12 operations a second."""

    @property
    def memory_bytes(self) -> float:
        """Memory in bytes."""
        return self.memory_gib * GIB


GPUS: dict[GpuName, Gpu] = {
    "a100-40gb": Gpu("A100 40 GB", 39.6, 312),
    "a100-80gb": Gpu("A100 80 GB", 79.3, 312),
    "h100": Gpu("H100 SXM 80 GB", 79.6, 989),
    "h200": Gpu("H200 141 GB", 140.4, 989),
    "l40s": Gpu("L40S 48 GB", 45.0, 362),
    "rtx4090": Gpu("RTX 4090 24 GB", 24.0, 165),
}
