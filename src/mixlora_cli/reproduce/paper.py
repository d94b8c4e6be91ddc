"""The numbers that the paper gives (Shen et al., ACL 2024, Tables 1-3), by experiment, in the order of its columns.

Figure 4's own numbers are only drawn there. Each is one training without an interval.
"""

from __future__ import annotations

from collections.abc import Mapping

from mixlora_cli.benchmarks.registry import COLUMNS, MEAN_TITLE, SEEN_TASKS

Numbers = Mapping[str, tuple[float, ...]]

TABLE_1: Numbers = {
    # MME, Text-VQA, VSR, SNLI-VE, CIFAR-10, CIFAR-100, MNIST, POPE, MMAvg
    "llava_align": (1110.82, 32.62, 50.16, 34.51, 80.00, 58.04, 52.79, 59.10, 52.46),
    "llava_ft": (1587.26, 37.26, 53.76, 43.35, 92.97, 63.73, 94.27, 80.82, 66.59),
    "lora_r2": (1291.20, 39.86, 51.88, 31.80, 85.51, 49.23, 79.22, 76.72, 59.17),
    "lora_r4": (1345.86, 39.44, 53.19, 33.08, 86.62, 47.36, 80.89, 76.89, 59.64),
    "lora_r8": (1312.87, 39.20, 53.27, 36.36, 88.92, 46.88, 82.95, 75.48, 60.44),
    "lora_r16": (1381.23, 39.22, 53.60, 36.11, 87.31, 45.60, 85.92, 75.16, 60.42),
    "lora_r32": (1393.67, 39.20, 52.95, 44.56, 90.10, 45.90, 83.42, 72.33, 61.21),
    "mixlora_e16_r2": (1417.83, 39.82, 52.13, 35.38, 90.14, 58.05, 85.98, 73.86, 62.19),
    "mixlora_e32_r2": (1459.15, 40.46, 52.62, 35.04, 91.02, 57.95, 85.26, 78.31, 62.95),
    "mixlora_e16_r4": (1443.82, 40.66, 52.70, 43.10, 91.59, 57.28, 85.25, 78.13, 64.10),
    "mixlora_e32_r4": (1509.61, 40.42, 49.18, 36.69, 91.40, 59.27, 87.68, 78.48, 63.30),
    "mixlora_e16_r8": (1485.26, 39.92, 52.70, 40.74, 92.85, 53.96, 82.95, 75.31, 62.63),
    "mixlora_e32_r8": (1485.48, 40.02, 51.15, 37.77, 91.12, 60.25, 86.64, 78.87, 63.69),
}

TABLE_2: Numbers = {
    # MME, MMAvg
    "routing_random": (1007.40, 49.12),
    "mixlora_e32_r4": (1509.61, 63.30),
    "routing_task": (1381.87, 61.75),
}

TABLE_3: Numbers = {
    # ScienceQA, COCO, FairFace, iNaturalist, ST-VQA, PACS, AVG
    "specialist_lora_r4": (64.33, 77.67, 54.67, 58.67, 44.67, 99.00, 66.50),
    "specialist_lora_r16": (67.33, 76.33, 59.00, 60.00, 46.33, 99.00, 68.00),
    "lora_r4": (57.67, 76.33, 59.67, 57.00, 42.33, 99.33, 65.39),
    "lora_r16": (59.67, 73.00, 59.33, 58.33, 43.67, 99.00, 65.50),
    "mixlora_e16_r4": (60.67, 78.67, 59.00, 61.00, 44.33, 99.33, 67.17),
}

_COLUMNS = {
    "table1": (*COLUMNS, MEAN_TITLE),
    "table2": ("MME", MEAN_TITLE),
    "table3": (*(task.title for task in SEEN_TASKS.values()), "AVG"),
}
_NUMBERS = {"table1": TABLE_1, "table2": TABLE_2, "table3": TABLE_3}


def published(table: str, experiment: str, column: str) -> float | None:
    """The paper's number; None where it gives none."""
    if table == "figure4":  # with CFS, these are rows of Table 1
        table = "table1"
    numbers = _NUMBERS.get(table, {}).get(experiment)
    return (
        None if numbers is None or column not in _COLUMNS[table] else numbers[_COLUMNS[table].index(column)]
    )
