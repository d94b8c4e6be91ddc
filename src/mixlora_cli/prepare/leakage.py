"""What the training records share with an evaluation set: pictures, near-duplicates of pictures, texts.

Near-duplicates are found by a difference hash that survives scaling and compression (Krawetz, "Kind of Like That",
2013): the picture in 17 x 16 grey cells, one bit for each pair of neighbours that says which is brighter; 256 bits.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from mixlora_cli.benchmarks.registry import FROM_THE_PAPER, PAPER, expand
from mixlora_cli.benchmarks.sources import sourced
from mixlora_cli.config import AdapterConfig, CheckConfig, EvalConfig, GenerationConfig, RoutingConfig
from mixlora_cli.data.images import MAX_PIXELS, PIXELS, Memory, as_shown, read_picture, stamp
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.errors import UserError, cut
from mixlora_cli.evaluation.instances import Chosen, choose_instances
from mixlora_cli.progress import with_bar

SIDE = 16
MIN_BITS = 16
"""A hash with fewer bits of either value is that of a plain picture, which looks like any other plain one."""
_BLOCK = 128  # pictures compared at once with all others
_LAYOUT = f"1 {PIXELS}"  # raise when the hashes below change


class Print(NamedTuple):
    """Fingerprint of one picture file."""

    bytes_digest: str
    """Hex digest of the file's bytes."""
    perceptual: str
    """Hex of the 256 bits."""

    @property
    def is_plain(self) -> bool:
        """Whether the perceptual hash says too little to be compared."""
        return not MIN_BITS <= int(self.perceptual, 16).bit_count() <= SIDE * SIDE - MIN_BITS


def print_of(path: Path) -> Print | None:
    """Fingerprint of a picture; None where it cannot be opened."""
    try:
        content = read_picture(path)
        with Image.open(BytesIO(content)) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            image.draft("L", (8 * SIDE, 8 * SIDE))  # JPEG: decode no more than is needed
            bits = difference_bits(as_shown(image, path))
    except Exception:  # decoders raise OSError, SyntaxError, ValueError, ...; the picture check says what
        return None
    return Print(hashlib.blake2b(content, digest_size=16).hexdigest(), np.packbits(bits).tobytes().hex())


def difference_bits(image: Image.Image) -> npt.NDArray[np.bool_]:
    """(16, 16) bits: whether each grey cell is brighter than its left neighbour."""
    cells = np.asarray(image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX), dtype=np.int16)
    return cells[:, 1:] > cells[:, :-1]


def prints_of(paths: Iterable[Path], folder: Path, cache: Path, workers: int) -> dict[Path, Print]:
    """Fingerprints of all pictures that can be opened; those of an earlier call are remembered in `cache`."""
    memory = Memory(cache / "picture-prints", f"{folder} {_LAYOUT}")
    names = {path: os.path.relpath(path, folder) for path in dict.fromkeys(paths)}
    marks = {path: stamp(path) for path in names}
    prints: dict[Path, Print] = {}
    for path, name in names.items():
        mark, known = marks[path], memory.known.get(name)
        if mark is not None and known is not None and known[0] == [*mark]:
            prints[path] = Print(*known[1])
    lacking = [path for path in names if path not in prints]
    with ThreadPoolExecutor(workers) as pool:  # decoding and hashing let other threads run
        results = zip(lacking, pool.map(print_of, lacking), strict=True)
        for path, found in with_bar(results, "comparing pictures", total=len(lacking)):
            if found is not None:
                prints[path] = found
                memory.known[names[path]] = [marks[path], found]
    if lacking:
        memory.save()
    return prints


def nearest(wanted: Sequence[str], others: Sequence[str]) -> list[tuple[int, int]]:
    """For each hash of `wanted` the position of the nearest one of `others` and the number of bits that differ.

    Every pair is compared; empty without `others`.
    """
    results: list[tuple[int, int]] = []
    words = _words(others)
    for start in range(0, len(wanted) if others else 0, _BLOCK):
        block = _words(wanted[start : start + _BLOCK])
        distances = np.zeros((len(block), len(words)), dtype=np.uint16)
        for word in range(words.shape[1]):
            distances += np.bitwise_count(block[:, word, None] ^ words[None, :, word])
        best = distances.argmin(axis=1)
        results += zip(best.tolist(), distances[np.arange(len(block)), best].tolist(), strict=True)
    return results


def _words(hashes: Sequence[str]) -> npt.NDArray[np.uint64]:
    """(n, 4) words of n hex hashes."""
    return np.frombuffer(bytes.fromhex("".join(hashes)), dtype=np.uint64).reshape(len(hashes), 4)


@dataclass
class Found:
    """How often one sort of thing was found, and the first examples."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str, num_examples: int) -> None:
        """Count one more; at most `num_examples` are kept."""
        self.count += 1
        if len(self.examples) < num_examples:
            self.examples.append(" ".join(example.split()))


@dataclass
class Leak:
    """One evaluation set against the training records."""

    benchmark: str
    records: int
    pictures: int
    """Different picture files."""
    source: str = ""
    """Where a benchmark that does not come with the data is from."""
    same_picture: Found = field(default_factory=Found)
    """Pictures whose bytes a training picture has."""
    near_picture: Found = field(default_factory=Found)
    """Other pictures whose perceptual hash is near that of a training picture."""
    plain_pictures: int = 0
    """Pictures too plain for that comparison."""
    training_tasks: dict[str, int] = field(default_factory=dict)
    """Same and near pictures by the tasks whose pictures they are like; most first."""
    same_text: Found = field(default_factory=Found)
    """Records whose question and answer are those of a training record."""
    same_picture_and_question: Found = field(default_factory=Found)
    """Records that ask a training question about a training picture (equal bytes)."""

    @property
    def parts(self) -> tuple[Found, Found, Found, Found]:
        """Everything that was found, by sort."""
        return self.same_picture, self.near_picture, self.same_text, self.same_picture_and_question

    @property
    def total(self) -> int:
        return sum(found.count for found in self.parts)


class TrainingSide:
    """The training records, indexed for comparison; pictures that have no print are not compared."""

    def __init__(self, records: Sequence[Record], prints: Mapping[Path, Print]) -> None:
        self.texts = {digest(record, "human", "gpt"): record.index for record in records}
        self.pictures: dict[str, Path] = {}
        self.asked: dict[tuple[str, bytes], int] = {}
        self.tasks: dict[str, dict[str, None]] = {}
        """Tasks, in order, by digest and by perceptual hash of their pictures."""
        for record in records:
            for path in (path for path in record.files if path in prints):
                known = prints[path]
                self.pictures.setdefault(known.bytes_digest, path)
                self.asked.setdefault((known.bytes_digest, digest(record, "human")), record.index)
                for key in known:
                    self.tasks.setdefault(key, {})[record.task] = None
        looks = {known.perceptual: path for path, known in prints.items() if not known.is_plain}
        self.hashes, self.hash_paths = list(looks), list(looks.values())


def digest(record: Record, *roles: str) -> bytes:
    """Of what these roles say, in this order, without marker, case and differences in white space."""
    texts = [
        [turn.text.replace(IMAGE_MARKER, " ").casefold() for turn in record.conversation if turn.role == role]
        for role in roles
    ]
    lines = "\0\0".join("\0".join(" ".join(text.split()) for text in said) for said in texts)
    return hashlib.blake2b(lines.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def compare(
    benchmark: str,
    records: Sequence[Record],
    prints: Mapping[Path, Print],
    training: TrainingSide,
    near: int,
    num_examples: int,
    source: str = "",
) -> Leak:
    """Count what `records` share with the training side; `near` is the largest number of differing bits."""
    paths = list(dict.fromkeys(path for record in records for path in record.files))
    leak = Leak(benchmark, len(records), len(paths), source)
    tasks: Counter[str] = Counter()
    others: list[Path] = []
    for path in paths:
        known = prints.get(path)
        if known is None:
            continue
        if twin := training.pictures.get(known.bytes_digest):
            leak.same_picture.add(f"{cut(path.name)} = {cut(twin.name)}", num_examples)
            tasks.update(training.tasks[known.bytes_digest].keys())
        elif known.is_plain:
            leak.plain_pictures += 1
        else:
            others.append(path)
    found = nearest([prints[path].perceptual for path in others], training.hashes)
    for path, (position, distance) in zip(others, found, strict=bool(found)):
        if distance <= near:
            told = f"{cut(path.name)} ~ {cut(training.hash_paths[position].name)}"
            leak.near_picture.add(f"{told} ({distance} of 256 bits differ)", num_examples)
            tasks.update(training.tasks.get(training.hashes[position], {}).keys())
    leak.training_tasks = dict(tasks.most_common())
    for record in records:
        text = training.texts.get(digest(record, "human", "gpt"))
        if text is not None:
            leak.same_text.add(f"record {record.index} = training record {text}", num_examples)
        question = digest(record, "human")
        keys = [(prints[path].bytes_digest, question) for path in record.files if path in prints]
        asked = next((training.asked[key] for key in keys if key in training.asked), None)
        if asked is not None:
            told = f"record {record.index} = training record {asked}"
            leak.same_picture_and_question.add(told, num_examples)
    return leak


def open_benchmarks(config: CheckConfig) -> list[Chosen]:
    """What `check.benchmarks` and `check.sources` name, opened as `mixlora eval` opens it.

    Raises:
        UserError: a name is neither built in nor among the sources, a source is missing, wrong or partial, or there is
            nothing to compare with.
    """
    options, data = config.check, config.data
    if not options.benchmarks and not options.sources:
        return []
    key = "check.benchmarks" if options.benchmarks else "check.sources"
    if not options.leakage:
        raise UserError(
            f"{key} asks for a comparison with the training pictures, check.leakage=false for none"
        )
    if data.source == "json" and data.train is None:
        raise UserError(
            f"{key}: no training pictures to compare with, data.train=null; expected data.train=<annotation.json>"
        )
    try:
        wanted = None if options.benchmarks is None else expand(options.benchmarks)
        names = sourced(wanted, options.sources or {})
        if unknown := [name for name in wanted or [] if name not in names]:
            near = difflib.get_close_matches(unknown[0], [*FROM_THE_PAPER, PAPER], n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(
                f"check.benchmarks: unknown {', '.join(unknown)}.{hint} Expected {', '.join(FROM_THE_PAPER)}, {PAPER} "
                "(all of them) or a name in check.sources; the benchmarks of the data are compared without being named"
            )
        # one by one: `mixlora eval` refuses two benchmarks of one column, which does not matter here
        return [chosen for name in names for chosen in choose_instances(_evaluation(config, name))]
    except UserError as error:
        # the keys as the user of `mixlora check` knows them
        message = str(error).replace("eval.benchmarks", "check.benchmarks")
        raise UserError(message.replace("eval.sources", "check.sources")) from error


def _evaluation(config: CheckConfig, name: str) -> EvalConfig:
    """The evaluation that would answer this benchmark alone."""
    sources = {key: path for key, path in (config.check.sources or {}).items() if key == name}
    return EvalConfig(
        model=config.model,
        adapter=AdapterConfig(name="none"),
        routing=RoutingConfig(name="instance"),
        data=config.data,
        eval=GenerationConfig(benchmarks=[name], sources=sources),
        output_dir=config.output_dir,
    )
