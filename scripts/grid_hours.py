#!/usr/bin/env python3
"""Hours that the parts of the cells in a folder took, by cell.json, divided by the number that ran side by side.

Usage: scripts/grid_hours.py JOBS FOLDER [EXPERIMENT ...]
"""

import sys
from pathlib import Path

from mixlora_cli.reproduce.jobs import RECORD, read_record

if len(sys.argv) < 3:
    raise SystemExit(__doc__)
jobs, folder, wanted = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
total = 0.0
for path in sorted(folder.glob(f"*/{RECORD}")):
    record = read_record(path.parent)
    if wanted and record["experiment"] not in wanted:
        continue
    parts = {name: part["seconds"] for name, part in record["parts"].items() if part["seconds"]}
    total += sum(parts.values())
    print(
        f"{path.parent.name}: {', '.join(f'{name} {seconds / 60:.1f} min' for name, seconds in parts.items())}"
    )
print(f"all: {total / 3600:.2f} hours one after the other, {total / 3600 / jobs:.2f} hours with {jobs} jobs")
