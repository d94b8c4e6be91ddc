"""A stand-in for `mixlora`, as a real process: `standin.py PART FOLDER BEHAVIOUR CONFIG`.

It notes its calls in FOLDER/calls, and leaves what the real command would: config.yaml and result.json, or
results.json.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

part, folder, behaviour, config = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
folder.mkdir(parents=True, exist_ok=True)
with (folder / "calls").open("a") as calls:
    calls.write(f"{part}\n")
print(f"this is {part}")
(folder / f"{part}.threads").write_text(os.environ.get("OMP_NUM_THREADS", ""))
(folder / f"{part}.start").write_text(str(time.monotonic()))
checkpoint = folder / "checkpoints" / "checkpoint-1"

if behaviour == "fail" and not (folder / "mended").exists():
    print("error: no luck today")
    raise SystemExit(2)
if behaviour == "slow" and not checkpoint.exists():

    def stop(*_: object) -> None:
        checkpoint.mkdir(parents=True)
        raise SystemExit(130)

    signal.signal(signal.SIGINT, stop)
    (folder / "ready").touch()
    time.sleep(60)
if behaviour == "meet":  # fails unless another one is at work at the same time
    (folder / "here").touch()
    deadline = time.monotonic() + 30
    while len(list(folder.parent.glob("*/here"))) < 2:
        if time.monotonic() > deadline:
            raise SystemExit(3)
        time.sleep(0.02)
if part == "train":
    checkpoint.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text('{"step": 3, "loss": 1.5}\n')
    (folder / "config.yaml").write_text(config)  # JSON is YAML
    (folder / "result.json").write_text("{}")
elif behaviour != "empty":
    (folder / part).mkdir(exist_ok=True)
    (folder / part / "results.json").write_text(json.dumps({}))
(folder / f"{part}.end").write_text(str(time.monotonic()))
