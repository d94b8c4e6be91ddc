"""What each command reads: one class a command, and the group of keys that is its own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from mixlora_cli.config.groups import (
    AdapterConfig,
    DataConfig,
    DeepspeedConfig,
    JudgeConfig,
    LaunchConfig,
    ModelConfig,
    RoutingConfig,
    WandbConfig,
)
from mixlora_cli.config.settings import (
    AnyPrecision,
    Flag,
    Integer,
    NotNegative,
    NotNegativeNumber,
    Number,
    Positive,
    PositiveNumber,
    Seed,
    Settings,
    Share,
    Text,
    require,
    rule,
)


class OptimConfig(Settings, at="train"):
    """The training loop's numbers (key `train`); defaults follow the paper, App. B, where it gives them."""

    epochs: PositiveNumber = 1.0
    steps: Positive | None = None
    """Optimizer steps; overrides `epochs` when set."""
    batch_size: Positive = 16
    """Instances per device and forward pass."""
    accumulation: Positive = 1
    effective_batch: Positive | None = None
    """Instances per optimizer step over all devices; accumulation follows from it. null = `accumulation` as given."""
    learning_rate: PositiveNumber = 4e-5
    scheduler: Text = "cosine"
    warmup_ratio: Share = 0.03
    weight_decay: NotNegativeNumber = 0.0
    max_grad_norm: PositiveNumber = 1.0
    precision: AnyPrecision = "auto"
    """`auto` takes bf16 where the processor multiplies bf16 matrices in hardware, else fp32."""
    gradient_checkpointing: Flag = False
    group_by_length: Flag = True
    cache_features: Flag = True
    """Compute the frozen vision tower once per picture and keep the result on disk."""
    log_every: Positive = 10
    save_every: Positive = 100
    keep_checkpoints: Positive = 2
    workers: NotNegative = 0

    def __post_init__(self) -> None:
        require(
            self.effective_batch is None or self.accumulation == 1,
            "train.accumulation",
            self.accumulation,
            "follows from train.effective_batch; give one of the two",
        )


class TrainConfig(Settings):
    """Everything that `mixlora train` reads."""

    model: ModelConfig
    adapter: AdapterConfig
    routing: RoutingConfig
    data: DataConfig
    train: OptimConfig
    rank: Annotated[Integer, Field(ge=1)]
    factors: Annotated[Integer, Field(ge=1)]
    output_dir: Text
    seed: Seed = 0
    resume: Text | None = None
    """`auto` continues from the newest checkpoint in output_dir, a path from that checkpoint; null starts new."""
    overwrite: Flag = False
    wandb: WandbConfig = field(default_factory=WandbConfig)
    deepspeed: DeepspeedConfig = field(default_factory=DeepspeedConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        if self.adapter.name == "mixlora":
            require(
                self.rank <= self.factors,
                "rank",
                self.rank,
                f"must be <= factors={self.factors}, because rank factors are selected out of the pool",
            )
            self.routing.require_heeded()
            require(
                self.routing.balance_loss == 0 or self.adapter.router_grad != "none",
                "routing.balance_loss",
                self.routing.balance_loss,
                "the routers get no gradient with adapter.router_grad=none; "
                "give adapter.router_grad=straight_through, or routing.balance_loss=0",
            )
        require(
            self.adapter.name != "none" or self.model.train_projector,
            "adapter",
            self.adapter.name,
            "trains nothing; choose lora, mixlora or full (the untuned base: `mixlora eval adapter=none`)",
        )


GpuName = Literal["a100-40gb", "a100-80gb", "h100", "h200", "l40s", "rtx4090"]


class MachineConfig(Settings, at="plan"):
    """The GPUs that a training would run on, and what is assumed of its data (key `plan`)."""

    gpu: GpuName = "a100-80gb"
    gpus: Positive = 4
    """Of all nodes together."""
    mfu: Annotated[Number, rule("must be in (0, 1]", lambda share: 0 < share <= 1)] = 0.3
    """Operations really done per second, recomputation included, as a share of the GPU's bf16 peak."""
    instances: Positive | None = None
    tokens: Annotated[Number, Field(ge=1)] | None = None
    """Mean tokens of an instance, image tokens included; null = image tokens + an estimate of the text."""
    label_tokens: PositiveNumber = 20.0
    padding: Share | None = None
    """Share of a batch that is padding; null = 0.02 grouped by length, else 0.2."""


class PlanConfig(TrainConfig):
    """Everything that `mixlora plan` reads: a training's configuration, so that any of its commands can be planned."""

    plan: MachineConfig = field(default_factory=MachineConfig)


class GenerationConfig(Settings, at="eval"):
    """How `mixlora eval` answers (key `eval`)."""

    batch_size: Positive = 16
    max_new_tokens: Positive = 24
    limit: Positive | None = None
    """At most so many instances of each benchmark or task, a seeded sample; null = all."""
    seen: Flag = False
    benchmarks: list[Text] | None = None
    """Only these; null = those of `sources` where it is given, else all that the data has. "paper" = its eight."""
    sources: dict[Text, Text] | None = None
    """Local copies of benchmarks (folder, parquet file) and YAML files of your own, by name; the rest: from the hub."""
    ocr_tokens: Flag = False
    cache_features: Flag = True


class EvalConfig(Settings):
    """Everything that `mixlora eval` reads."""

    model: ModelConfig
    adapter: AdapterConfig
    routing: RoutingConfig
    data: DataConfig
    eval: GenerationConfig
    output_dir: Text
    run: Text | None = None
    """Run folder of `mixlora train`, whose base, adapter and template are evaluated; null: the untuned base."""
    seed: Seed = 0
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        require(
            self.run is not None or self.adapter.name == "none",
            "run",
            self.run,
            "give run=<folder of a finished `mixlora train`>, or adapter=none to score the untuned base",
        )


class JudgeCommandConfig(Settings):
    """Everything that `mixlora judge` reads."""

    judge: JudgeConfig
    run: Text | None = None

    def __post_init__(self) -> None:
        require(self.run is not None, "run", self.run, "give run=<folder of a finished `mixlora eval`>")
        require(self.judge.name != "none", "judge", self.judge.name, "must be one of exact, hf, openai")

    @property
    def output_dir(self) -> str:
        """What two jobs of a sweep must not share: one judge's replies about one evaluation."""
        return f"{self.run}/judgements/{self.judge.name} {self.judge.model or ''}".rstrip()


class PageConfig(Settings, at="report"):
    """What report.html shows (key `report`)."""

    sample: NotNegative = 6
    """At most so many right, wrong and (of several runs) differently answered instances of each benchmark."""
    seed: Integer = 0
    images: Text | None = None
    picture_megabytes: NotNegativeNumber = 6.0
    """Most that all pictures together may take in the page."""


class ReportConfig(Settings):
    """Everything that `mixlora report` reads."""

    report: PageConfig
    run: Text | None = None
    runs: list[Text] | None = None
    output_dir: Text | None = None

    def __post_init__(self) -> None:
        both = self.run and self.runs
        require(
            (self.run or self.runs) and not both,
            "runs" if both else "run",
            self.runs if both else None,
            "give run=<folder of a finished `mixlora eval`>, or runs=[one,another] and output_dir=<new folder>",
        )
        require(
            self.run is not None or self.output_dir is not None,
            "output_dir",
            self.output_dir,
            "name a folder for the report of several runs",
        )

    @property
    def evaluations(self) -> list[str]:
        """The folders to report on."""
        return [self.run] if self.run else list(self.runs or [])


class AlignConfig(Settings):
    """Everything that `mixlora align` reads: stage one of the small model, picture -> caption."""

    output_dir: Text
    seed: Seed = 0
    start: Text | None = None
    """Stage-one file to go on from; None = a random projector and the language model as its package has it."""
    pictures: Positive = 8_000
    questions: NotNegative = 0
    """Short questions asked about each picture, in turns of one conversation; 0 = captions alone."""
    lexical_steps: NotNegative = 500
    """Steps in which the projector alone maps picture cells to the embeddings of words that describe them; 0 = none."""
    lexical_batch_size: Positive = 128
    lexical_learning_rate: PositiveNumber = 2e-3
    steps: Positive = 500
    """Caption steps: projector and a low-rank update of the language model, through the whole model."""
    batch_size: Positive = 16
    learning_rate: PositiveNumber = 1e-3
    rank: Positive = 8
    """Rank of the language model's update, which is merged when the base is built."""
    warmup_ratio: Share = 0.03
    log_every: Positive = 10
    save_every: Positive = 50
    check_pictures: Integer = 200
    """Held-out pictures that the finished base captions, to count the names it gets right."""


Precision = Literal["fp32", "bf16"]
Part = Literal["layer", "operations", "memory", "step", "generation", "evaluation", "scoring"]
PARTS: tuple[Part, ...] = get_args(Part)
_SHAPE = re.compile(r"([1-9]\d*)(?:x([1-9]\d*))?")
_Shape = Annotated[Text, rule("a width, or two joined by x: [576,4096x11008]", _SHAPE.fullmatch)]
_one_or_null = rule("give at least one, or null", bool)


class BenchSettings(Settings, at="bench"):
    """Key `bench`; where a value is null, `quick` decides what it is."""

    parts: Annotated[list[Part], rule(f"choose of {', '.join(PARTS)}", bool)] = field(
        default_factory=lambda: list(PARTS)
    )
    quick: Flag = False
    shapes: Annotated[list[_Shape], _one_or_null] | None = None
    """Widths of the layers: "1024" is square, "4096x11008" maps 4096 features to 11008."""
    dtypes: Annotated[list[Precision], rule("choose of fp32, bf16", bool)] = field(
        default_factory=lambda: ["fp32", "bf16"]
    )
    batches: Annotated[list[Positive], _one_or_null] | None = None
    pools: Annotated[list[Positive], _one_or_null] | None = None
    """Sizes E of the factor pools."""
    tokens: Positive | None = None
    """Tokens of each instance in the layers; null: by width, so that wide layers do not take all the time."""
    rounds: Positive | None = None
    """Counted rounds of each case; in each, every variant runs once, in an order drawn anew."""
    warmup: NotNegative | None = None
    min_seconds: NotNegativeNumber | None = None
    """A case that is quicker goes on with more rounds."""
    precision: AnyPrecision = "auto"
    """Of the whole model."""
    step_batch_size: Positive | None = None
    answer_batch_size: Positive | None = None
    max_new_tokens: Positive | None = None
    instances: Positive | None = None
    """Prompts of the evaluation part, answered in one batch after another and then one by one."""
    evaluation_rounds: Positive | None = None
    predictions: Positive | None = None
    """Stored answers that the scoring part scores."""
    threads: Positive | None = None


def parse_shape(shape: str) -> tuple[int, int]:
    """(d_in, d_out) of "1024" or "4096x11008"."""
    found = _SHAPE.fullmatch(shape)
    assert found is not None  # checked when the configuration was read
    return int(found[1]), int(found[2] or found[1])


class BenchConfig(Settings):
    """Everything that `mixlora bench` reads."""

    model: ModelConfig
    data: DataConfig
    bench: BenchSettings
    output_dir: Text
    rank: Annotated[Integer, Field(ge=1)] = 4
    """Of LoRA and of MixLoRA, the same."""
    factors: Integer = 16
    """E of the MixLoRA that is compared with LoRA."""
    seed: Seed = 0
    overwrite: Flag = False

    def __post_init__(self) -> None:
        for factors in (self.factors, *(self.bench.pools or ())):
            words = f"must be <= {factors}, the smallest pool, because rank factors are selected out of it"
            require(self.rank <= factors, "rank", self.rank, words)


class PrepareOptions(Settings, at="prepare"):
    """What preparation reads and where it writes (key `prepare`); sources are hub ids or local copies."""

    output: Text | None = None
    """Folder that the prepared model or data goes to; null = where `mixlora train` looks for it, in the cache."""
    language_model: Text = "lmsys/vicuna-7b-v1.3"
    vision_tower: Text = "openai/clip-vit-large-patch14"
    projector: Text = "liuhaotian/llava-pretrain-vicuna-7b-v1.3"
    vision_flan: Text = "Vision-Flan/vision-flan_191-task_1k"
    revision: Text | None = None
    unpack: Flag = False
    overwrite: Flag = False


class PrepareConfig(Settings):
    """Everything that `mixlora prepare` reads."""

    model: ModelConfig | None = None
    data: DataConfig | None = None
    prepare: PrepareOptions = field(default_factory=PrepareOptions)
    seed: Integer = 0

    def __post_init__(self) -> None:
        if self.model is None and self.data is None:
            raise ValueError(
                "model=null data=null: say what to prepare, e.g. model=llava_v1_7b or data=vision_flan"
            )
        require(
            self.model is None or self.data is None or self.prepare.output is None,
            "prepare.output",
            self.prepare.output,
            "is one folder; prepare model and data in two commands, or leave it out",
        )

    @property
    def output_dir(self) -> str:
        """What tells two jobs of a sweep apart: the folder, or what is prepared."""
        names = [group.name for group in (self.model, self.data) if group is not None]
        return self.prepare.output or " ".join(names)


class CheckOptions(Settings, at="check"):
    """What is looked at (key `check`)."""

    lengths: Flag = True
    images: Flag = True
    leakage: Flag = True
    benchmarks: list[Text] | None = None
    """Benchmarks that do not come with the data, to compare as well; as `eval.benchmarks`, "paper" = all eight."""
    sources: dict[Text, Text] | None = None
    """As `eval.sources`."""
    near: Annotated[Integer, rule("must be from 0 to 64", lambda bits: 0 <= bits <= 64)] = 10
    """Pictures whose perceptual hashes differ in at most so many of 256 bits count as near-duplicates."""
    strict: Flag = False
    examples: Positive = 3
    workers: Positive | None = None


class CheckConfig(Settings):
    """Everything that `mixlora check` reads."""

    model: ModelConfig
    data: DataConfig
    output_dir: Text
    check: CheckOptions = field(default_factory=CheckOptions)


class FitConfig(Settings, at="export"):
    """Which inputs the static adapter is fitted to, how large it is, and how it is compared (key `export`)."""

    tasks: Annotated[list[Text], rule("must name at least one task, or null for all", bool)] | None = None
    per_task: Flag = False
    """One adapter for each task; else one for all inputs together."""
    split: Literal["train", "heldout", "unseen"] = "train"
    instances: Positive = 64
    """At most so many inputs of each task, a seeded sample."""
    rank: Positive | None = None
    """Rank of the static adapter, at most the factors in a pool; null = as large as the mean update's own."""
    evaluate: Flag = True
    limit: Positive | None = None
    """At most so many instances of each task are compared, a seeded sample; null = all."""
    batch_size: Positive = 16
    max_new_tokens: Positive = 24
    cache_features: Flag = True


class ExportConfig(Settings):
    """Everything that `mixlora export` reads."""

    model: ModelConfig
    """Base of a bare adapter folder; a run folder brings its own."""
    data: DataConfig
    export: FitConfig
    output_dir: Text
    run: Text | None = None
    seed: Seed = 0
    overwrite: Flag = False

    def __post_init__(self) -> None:
        _require_run(self.run)


def _require_run(run: str | None) -> None:
    require(run is not None, "run", run, "give run=<folder of a finished `mixlora train adapter=mixlora`>")


class GradientConfig(Settings, at="interference"):
    """Which gradients are taken (key `interference`)."""

    split: Literal["train", "heldout"] = "train"
    batches: Annotated[Integer, Field(ge=2)] = 16
    """Batches of each task, fewer where it has not enough instances."""
    batch_size: Positive = 8
    precision: Literal["run", "auto", "fp32", "bf16"] = "run"
    """Number format of the matrix products; `run` = that of the training."""
    near_zero: Annotated[Number, rule("must be in (0, 1)", lambda cosine: 0 < cosine < 1)] = 0.01
    """A denominator counts as near zero where the cosine of its two vectors is below this."""
    cache_features: Flag = True


Variant = Literal["mean", "median", "ratio_of_means", "cosine"]
_Layer = Annotated[Integer, rule("must be >= 0; the first layer is 0", lambda layer: layer >= 0)]


class DrawConfig(Settings, at="draw"):
    """What the figures show (key `draw`); changing it needs no model."""

    layers: Annotated[list[_Layer], rule("must name at least one layer, or be null", bool)] | None = None
    """Transformer layers of the figure by layer, counted from 0; null = the middle of each third."""
    score: Variant = "mean"
    """The paper's mean of ratios, or a variant that near-zero denominators move less."""


class MeasureConfig(Settings, at="measure"):
    """Real steps beside their estimate (key `measure`)."""

    lambdas: (
        Annotated[list[PositiveNumber], rule("must name at least one length, or be null", bool)] | None
    ) = None
    """Lengths of the steps; null = no step is made."""
    batches: Positive = 1
    """Pairs of batches for each pair of tasks."""


class InterferenceConfig(Settings):
    """Everything that `mixlora interference` reads."""

    model: ModelConfig
    """Base of a bare adapter folder; a run folder brings its own."""
    data: DataConfig
    output_dir: Text
    interference: GradientConfig = field(default_factory=GradientConfig)
    draw: DrawConfig = field(default_factory=DrawConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    run: Text | None = None
    """Run folder of `mixlora train`, or a folder with a LoRA or MixLoRA adapter."""
    tasks: list[Text] | None = None
    default_tasks: dict[Text, Any] = field(default_factory=dict)
    """By `data.source`: what the YAML file fills into `tasks`."""
    compare: Text | None = None
    """Another run, or its interference folder, measured before on the same instances."""
    draw_only: Flag = False
    seed: Seed = 0
    overwrite: Flag = False
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        require(
            self.run is not None,
            "run",
            self.run,
            "give run=<folder of a finished `mixlora train adapter=lora` or adapter=mixlora>; the untuned base has no "
            "adapter whose gradients could be compared",
        )
        require(
            self.tasks is None or len(set(self.tasks)) >= 2,
            "tasks",
            self.tasks,
            "must name at least two tasks: a task cannot disturb itself",
        )


Side = Literal["a", "b"]


class MapConfig(Settings, at="tsne"):
    """Which selections are drawn, and how (key `tsne`)."""

    instances: Annotated[Integer, Field(ge=2)] = 300
    """At most so many instances of each task, a seeded sample."""
    sides: Annotated[list[Side], rule("must name a, b or both", bool)] = field(
        default_factory=lambda: ["a", "b"]
    )
    """Factors of A, of B, or both."""
    linear: Text = "gate_proj"
    """The linear layer of each block whose selections are read."""
    layers: Annotated[list[Integer], rule("must name a layer, or be null", bool)] | None = None
    """Numbers of the blocks that are drawn, from 0; null = the first, the middle and the last."""
    perplexity: Annotated[Number, Field(ge=1)] = 30.0
    neighbours: Positive = 10
    """k of the nearest-neighbour purity; lower where a task has fewer instances."""
    permutations: Annotated[Integer, Field(ge=20)] = 200
    routing_seed: Seed | None = None
    """Seed of a random routing's draws; required there, and of no use elsewhere."""
    batch_size: Positive = 16
    cache_features: Flag = True
    page_mb: Annotated[Number, rule("must be >= 0; 0 = no pictures", lambda megabytes: megabytes >= 0)] = 12.0
    """Megabytes of pictures in the interactive page: they get smaller, and then fewer, until they fit."""


class TsneConfig(Settings):
    """Everything that `mixlora tsne` reads."""

    model: ModelConfig
    """Base of a bare adapter folder; a run folder brings its own."""
    data: DataConfig
    tsne: MapConfig
    output_dir: Text
    run: Text | None = None
    tasks: list[Text] | None = None
    """Unseen benchmarks, or seen tasks (their held-out instances); null = the data's unseen benchmarks but MME."""
    pairs: list[list[Text]] | None = None
    """[[seen, unseen], ...]: tasks that are drawn in matched colours (Fig. 6), in the place of `tasks`."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        _require_run(self.run)
        tasks, pairs = self.tasks, self.pairs
        both = tasks is not None and pairs is not None
        require(not both, "pairs", pairs, "names the tasks itself; give tasks or pairs, not both")
        require(
            tasks is None or len(set(tasks)) > 1,
            "tasks",
            tasks,
            "must name two different tasks or more: a map of one task compares it with nothing",
        )
        require(
            pairs is None or (pairs and all(len(pair) == len(set(pair)) == 2 for pair in pairs)),
            "pairs",
            pairs,
            "must be [[seen,unseen],...], two different tasks in each pair",
        )


TableName = Literal["table1", "table2", "table3", "figure4", "beyond", "seen", "control"]
MINI_ALONE = ("beyond", "seen", "control")
"""Tables that the paper does not have."""
What = Literal[TableName, "figures"]
Scale = Literal["mini", "paper"]


def _require_what(what: str | None, scale: str, command: str, known: Any) -> None:
    first, *others = get_args(known)
    require(what is not None, "what", what, f"say {command.replace('*', f'{first}`')}, {', '.join(others)}")
    require(what not in MINI_ALONE or scale == "mini", "scale", scale, f"`{what}` exists at scale=mini alone")


class TableConfig(Settings):
    """Everything that `mixlora table` reads."""

    runs: Text
    """Folder with the cells that `mixlora reproduce` made."""
    output_dir: Text
    what: TableName | None = None
    scale: Scale = "mini"
    """paper: the paper's own numbers stand beside ours."""
    judge: Text | None = None
    """Title of a judge whose scores are shown; null = each benchmark's own rule."""

    def __post_init__(self) -> None:
        _require_what(self.what, self.scale, "which: `mixlora table *", TableName)


MOST_JOBS = 4
"""Each takes some 2 to 4 GB of memory."""


class SpeedConfig(Settings, at="speed"):
    """What the whole machine is known to do, in instances a second, for the estimate before anything has run."""

    train: PositiveNumber
    answer: PositiveNumber


class ReproduceConfig(Settings):
    """Everything that `mixlora reproduce` reads."""

    output_dir: Text
    """Folder of the cells; tables that need the same cell share it."""
    speed: SpeedConfig
    what: What | None = None
    scale: Scale = "mini"
    seeds: Annotated[list[Integer], rule("must name at least one seed", bool)] | None = None
    """The first one for every row; the others for the rows in `replicated`."""
    replicated: list[Text] | None = None
    """Experiments that are run with every seed; null = all."""
    only: list[Text] | None = None
    """Experiments that are run; null = every row. What else is there is still shown."""
    budget: Positive | None = None
    """At most so many optimizer steps a training and instances a benchmark: a smoke run; null = no cut."""
    train: list[Text] = field(default_factory=list)
    """Further overrides of every training."""
    evaluation: list[Text] = field(default_factory=list)
    drawing: list[Text] = field(default_factory=list)
    """Further overrides of every `mixlora interference` and `mixlora tsne`."""
    jobs: Positive | None = None
    """Cells that run at the same time, each on its share of the processor's cores; null = one for each core, at most
    `MOST_JOBS`, at scale=mini without a GPU, else 1."""
    keep_checkpoints: Flag = False
    dry_run: Flag = False

    def __post_init__(self) -> None:
        _require_what(self.what, self.scale, "what: `mixlora reproduce *", What)
        seeds = self.seeds or []
        require(len(set(seeds)) == len(seeds), "seeds", seeds, "must differ from one another")


@dataclass(frozen=True)
class ImportConfig:
    """A published checkpoint, where its adapter goes, and what its files may fail to tell (`mixlora import`).

    Raises:
        ValueError: A value is out of range; names it and what is allowed.
    """

    folder: Path
    """Folder with `pytorch_model.bin` and `cmoa_args.bin`."""
    output: Path | None = None
    """New adapter folder; None: `runs/imported/<name of the checkpoint's folder>`."""
    cfs: Literal["released", "paper"] | None = None
    """How the CFS router meets A; None: released, because the checkpoint's published outputs come from it."""
    rank: int | None = None
    factors: int | None = None
    alpha: float | None = None
    cond_type: str | None = None
    """The published code's name for what selects the factors."""

    def __post_init__(self) -> None:
        for name in ("rank", "factors", "alpha"):
            value = getattr(self, name)
            require(value is None or value > 0, f"--{name}", value, "must be > 0")
        require(self.cfs in (None, "released", "paper"), "--cfs", self.cfs, "must be one of released, paper")
        if not self.folder.is_dir():
            what = "is a file; give the folder that it lies in" if self.folder.exists() else "no such folder"
            raise ValueError(
                f"{self.folder}: {what}; expected the output folder of the published training code "
                "(pytorch_model.bin, cmoa_args.bin)"
            )
        free = not self.destination.exists() or (
            self.destination.is_dir() and not any(self.destination.iterdir())
        )
        require(free, "--output", self.destination, "already exists; name another folder or delete it first")

    @property
    def destination(self) -> Path:
        """Where the adapter folder goes."""
        return self.output or Path("runs/imported") / self.folder.resolve().name
