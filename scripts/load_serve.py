"""Ask a running `mixlora serve` many questions about held-out pictures of data=mini: is it right, fast and leak-free?

    mixlora serve run=FOLDER 8000 &
    python scripts/load_serve.py http://127.0.0.1:8000 MODEL

Each round asks the same questions one at a time and then all at once, through the package `openai`. Prints
how many answers differ between the two, the throughput of both and their ratio; then, with --more N, N further
requests at the same concurrency, and the server's resident memory along the way. Times are comparable within one run on
an idle machine alone.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from openai import OpenAI

from mixlora_cli.config import DataConfig
from mixlora_cli.data.loading import load_records
from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.evaluation.server import data_url


def main() -> None:
    """Ask, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", help="of the server, without /v1")
    parser.add_argument("model", help="one that it lists")
    parser.add_argument("--requests", type=int, default=64, help="questions of a round, all at once (64)")
    parser.add_argument("--rounds", type=int, default=3, help="one at a time, then at once (3)")
    parser.add_argument("--more", type=int, default=0, help="further requests, for the memory (0)")
    parser.add_argument("--max-tokens", type=int, default=24, help="longest answer (24)")
    settings = parser.parse_args()

    client = OpenAI(base_url=f"{settings.url}/v1", api_key="none", max_retries=0, timeout=600)
    records = load_records(DataConfig("mini", "mini"), "heldout")
    random.Random(0).shuffle(records)
    known = next(model.to_dict() for model in client.models.list() if model.id == settings.model)
    tasks = set(known["mixlora"]["tasks"])  # type: ignore[index]

    def ask(number: int) -> str:
        record = records[number % len(records)]
        pictures: list[Any] = [
            {"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in record.images
        ]
        text = record.conversation[-2].text.replace(IMAGE_MARKER, "").strip()
        reply = client.chat.completions.create(
            model=settings.model,
            messages=[{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}],
            max_tokens=settings.max_tokens,
            temperature=0,
            extra_body={"task": record.task} if record.task in tasks else {},
        )
        return str(reply.choices[0].message.content)

    def at_once(numbers: range) -> tuple[list[str], float]:
        start = time.monotonic()
        with ThreadPoolExecutor(settings.requests) as pool:
            answers = list(pool.map(ask, numbers))
        return answers, len(numbers) / (time.monotonic() - start)

    def memory() -> str:
        lines = httpx.get(f"{settings.url}/metrics").text.splitlines()
        value = next(line.split()[1] for line in lines if line.startswith("process_resident_memory_bytes "))
        return f"{float(value) / 1e6:.0f} MB"

    ratios, first = [], range(settings.requests)
    for number in range(settings.rounds):
        start = time.monotonic()
        alone = [ask(each) for each in first]
        slow = len(first) / (time.monotonic() - start)
        together, fast = at_once(first)
        ratios.append(fast / slow)
        differ = sum(one != other for one, other in zip(alone, together, strict=True))
        print(
            f"round {number + 1}: {len(together)} of {len(first)} answered at once, {differ} otherwise than alone; "
            f"{slow:.2f} answers/s one at a time, {fast:.2f} at once: {fast / slow:.2f} times; memory {memory()}",
            flush=True,
        )
    print(f"median: {statistics.median(ratios):.2f} times as many answers a second at once")
    part = max(settings.requests, settings.more // 8)
    for start_at in range(0, settings.more, part):
        numbers = range(start_at, min(start_at + part, settings.more))
        answers, speed = at_once(numbers)
        print(
            f"{numbers.stop} more: {len(answers)} answered, {speed:.2f} a second, memory {memory()}",
            flush=True,
        )


if __name__ == "__main__":
    main()
