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
    Files,
    Flag,
    Folder,
    Folders,
    Integer,
    NotNegative,
    NotNegativeNumber,
    Number,
    OutputFolder,
    Positive,
    PositiveNumber,
    Resume,
    Seed,
    Settings,
    Share,
    Text,
    rule,
)
from mixlora_cli.routers import ROUTERS


class OptimConfig(Settings, at="train"):
    """The training loop's numbers (key `train`); defaults follow the paper, App. B, where it gives them."""

    epochs: PositiveNumber = 1.0
    steps: Positive | None = None
    batch_size: Positive = 16
    accumulation: Positive = 1
    effective_batch: Positive | None = None
    learning_rate: PositiveNumber = 4e-5
    scheduler: Text = "cosine"
    warmup_ratio: Share = 0.03
    weight_decay: NotNegativeNumber = 0.0
    max_grad_norm: PositiveNumber = 1.0
    precision: AnyPrecision = "auto"
    gradient_checkpointing: Flag = False
    group_by_length: Flag = True
    packing: Flag = False
    cache_features: Flag = True
    fsdp: Flag = False
    log_every: Positive = 10
    save_every: Positive = 100
    keep_checkpoints: Positive = 2
    workers: NotNegative = 0
    compile: Flag = False

    def __post_init__(self) -> None:
        self.require(
            self.effective_batch is None or self.accumulation == 1,
            "accumulation",
            "follows from train.effective_batch; give one of the two",
        )


def _require_mixlora(config: TrainConfig | BenchConfig) -> None:
    """Raise ValueError for sizes and choices of MixLoRA that do not go together."""
    adapter, routing = config.adapter, config.routing
    config.require(
        config.rank <= config.factors,
        "rank",
        f"must be <= factors={config.factors}, because rank factors are selected out of the pool",
    )
    routing.require_heeded()
    config.require(
        routing.router_init == "random" or routing.normalize,
        "routing.router_init",
        "starts from what routing.normalize=true reads; add it",
    )
    config.require(
        ROUTERS[routing.name].reads is not None or adapter.pairing == "separate",
        "adapter.pairing",
        f"needs routers, which routing={routing.name} has not; only separate",
    )
    config.require(
        routing.balance_loss == 0 or adapter.router_grad != "none",
        "routing.balance_loss",
        "the routers get no gradient with adapter.router_grad=none; "
        "give adapter.router_grad=straight_through, or routing.balance_loss=0",
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
    output_dir: OutputFolder
    seed: Seed = 0
    resume: Resume | None = None
    overwrite: Flag = False
    wandb: WandbConfig = field(default_factory=WandbConfig)
    deepspeed: DeepspeedConfig = field(default_factory=DeepspeedConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        if self.adapter.name == "mixlora":
            _require_mixlora(self)
        if self.data.streaming:
            self.require(
                self.train.steps, "train.steps", "data.streaming=true has no end; give the number of steps"
            )
            self.require(
                self.train.workers == 0, "train.workers", "data.streaming=true reads by itself; only 0"
            )
        quantised = self.model.quantization != "none"
        self.require(
            not quantised or self.adapter.name in ("lora", "mixlora"),
            "adapter",
            f"trains weights of the base, which model.quantization={self.model.quantization} freezes; "
            "choose lora or mixlora, or model.quantization=none",
        )
        self.require(
            not (self.train.fsdp and quantised),
            "train.fsdp",
            f"spreads weights, which those of model.quantization={self.model.quantization} do not survive; "
            "choose train.fsdp=false (each process has its own copy), or model.quantization=none",
        )
        others = (
            self.train.fsdp,
            self.train.packing,
            self.train.gradient_checkpointing,
            self.deepspeed.config,
        )
        self.require(
            not (self.train.compile and any(others)),
            "train.compile",
            "not tried with DeepSpeed, train.fsdp, train.packing or train.gradient_checkpointing; give compile=false, "
            "or leave those out",
        )
        self.require(
            not (self.train.fsdp and self.deepspeed.config),
            "train.fsdp",
            f"deepspeed={self.deepspeed.name} spreads the weights already; choose one of the two",
        )
        self.require(
            not (quantised and self.deepspeed.stage == 3),
            "deepspeed",
            f"{self.deepspeed.name} spreads the base's weights, which quantised ones do not survive; "
            "choose zero1, zero2 or none, or model.quantization=none",
        )
        self.require(
            self.adapter.name != "none" or self.model.train_also,
            "adapter",
            "trains nothing; choose lora, mixlora or full (the untuned base: `mixlora eval adapter=none`)",
        )


GpuName = Literal["a100-40gb", "a100-80gb", "h100", "h200", "l40s", "rtx4090"]


class MachineConfig(Settings, at="plan"):
    """The GPUs that a training would run on, and what is assumed of its data (key `plan`)."""

    gpu: GpuName = "a100-80gb"
    gpus: Positive = 4
    mfu: Annotated[Number, rule("must be in (0, 1]", lambda share: 0 < share <= 1)] = 0.3
    instances: Positive | None = None
    tokens: Annotated[Number, Field(ge=1)] | None = None
    label_tokens: PositiveNumber = 20.0
    padding: Share | None = None


class PlanConfig(TrainConfig):
    """Everything that `mixlora plan` reads: a training's configuration, so that any of its commands can be planned."""

    plan: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            not self.train.fsdp, "train.fsdp", "not counted; deepspeed=zero3 spreads as much, plan with that"
        )


class RequestsConfig(Settings, at="eval.requests"):
    """How a server is asked (key `eval.requests`)."""

    concurrency: Positive = 16
    timeout: PositiveNumber = 300.0
    retries: NotNegative = 5
    first_wait: NotNegativeNumber = 1.0
    on_refusal: Literal["stop", "empty"] = "stop"
    extra: dict[Text, Any] = field(default_factory=dict)


class GenerationConfig(Settings, at="eval"):
    """How `mixlora eval` answers (key `eval`)."""

    batch_size: Positive = 16
    max_new_tokens: Positive = 24
    limit: Positive | None = None
    seen: Flag = False
    benchmarks: list[Text] | None = None
    sources: dict[Text, Text] | None = None
    ocr_tokens: Flag = False
    cache_features: Flag = True
    server: Text | None = None
    server_model: Text | None = None
    requests: RequestsConfig = field(default_factory=RequestsConfig)

    def __post_init__(self) -> None:
        self.require(
            self.server or not self.server_model,
            "server_model",
            "is a model of the server in eval.server; give that too",
        )


class EvalConfig(Settings):
    """Everything that `mixlora eval` reads."""

    model: ModelConfig
    adapter: AdapterConfig
    routing: RoutingConfig
    data: DataConfig
    eval: GenerationConfig
    output_dir: OutputFolder
    run: Folder | None = None
    seed: Seed = 0
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        self.require(
            self.run is not None or self.adapter.name == "none" or self.eval.server,
            "run",
            "give run=<folder of a finished `mixlora train`>, or adapter=none to score the untuned base",
        )
        processes = (self.launch.nproc or 1) * self.launch.nnodes
        self.require(
            not self.eval.server or processes == 1,
            "launch.nproc" if self.launch.nnodes == 1 else "launch.nnodes",
            "a server is asked by one process, eval.requests.concurrency requests at once",
        )


class JudgeCommandConfig(Settings):
    """Everything that `mixlora judge` reads."""

    judge: JudgeConfig
    run: Folder | None = None

    def __post_init__(self) -> None:
        self.require(self.run is not None, "run", "give run=<folder of a finished `mixlora eval`>")
        self.require(self.judge.name != "none", "judge", "must be one of exact, hf, openai")

    @property
    def output_dir(self) -> str:
        """What two jobs of a sweep must not share: one judge's replies about one evaluation."""
        return f"{self.run}/judgements/{self.judge.name} {self.judge.model or ''}".rstrip()


class PageConfig(Settings, at="report"):
    """What report.html shows (key `report`)."""

    sample: NotNegative = 6
    seed: Integer = 0
    images: Text | None = None
    picture_megabytes: NotNegativeNumber = 6.0


class ReportConfig(Settings):
    """Everything that `mixlora report` reads."""

    report: PageConfig
    run: Folder | None = None
    runs: list[Text] | None = None
    base: Folder | None = None
    output_dir: OutputFolder | None = None

    def __post_init__(self) -> None:
        both = self.run and self.runs
        self.require(
            (self.run or self.runs) and not both,
            "runs" if both else "run",
            "give run=<folder of a `mixlora train` or a finished `mixlora eval`>, "
            "or runs=[one,another] and output_dir=<new folder>",
        )
        self.require(
            self.run is not None or self.output_dir is not None,
            "output_dir",
            "name a folder for the report of several runs",
        )

    @property
    def folders(self) -> list[str]:
        """The folders to report on."""
        return [self.run] if self.run else list(self.runs or [])


class AlignConfig(Settings):
    """Everything that `mixlora align` reads: stage one of the small model, picture -> caption."""

    output_dir: OutputFolder
    seed: Seed = 0
    start: Text | None = None
    pictures: Positive = 8_000
    questions: NotNegative = 0
    lexical_steps: NotNegative = 500
    lexical_batch_size: Positive = 128
    lexical_learning_rate: PositiveNumber = 2e-3
    steps: Positive = 500
    batch_size: Positive = 16
    learning_rate: PositiveNumber = 1e-3
    rank: Positive = 8
    warmup_ratio: Share = 0.03
    log_every: Positive = 10
    save_every: Positive = 50
    check_pictures: Integer = 200


Precision = Literal["fp32", "bf16"]
RunPrecision = Literal["run", "auto", "fp32", "bf16"]
Part = Literal["layer", "operations", "memory", "step", "peers", "generation", "evaluation", "scoring"]
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
    dtypes: Annotated[list[Precision], rule("choose of fp32, bf16", bool)] = field(
        default_factory=lambda: ["fp32", "bf16"]
    )
    batches: Annotated[list[Positive], _one_or_null] | None = None
    pools: Annotated[list[Positive], _one_or_null] | None = None
    tokens: Positive | None = None
    rounds: Positive | None = None
    warmup: NotNegative | None = None
    min_seconds: NotNegativeNumber | None = None
    precision: AnyPrecision = "auto"
    step_batch_size: Positive | None = None
    answer_batch_size: Positive | None = None
    max_new_tokens: Positive | None = None
    instances: Positive | None = None
    evaluation_rounds: Positive | None = None
    predictions: Positive | None = None
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
    output_dir: OutputFolder
    adapter: AdapterConfig = field(default_factory=lambda: AdapterConfig("mixlora"))
    routing: RoutingConfig = field(default_factory=lambda: RoutingConfig("instance"))
    rank: Annotated[Integer, Field(ge=1)] = 4
    factors: Integer = 16
    seed: Seed = 0
    overwrite: Flag = False

    def __post_init__(self) -> None:
        for factors in (self.factors, *(self.bench.pools or ())):
            words = f"must be <= {factors}, the smallest pool, because rank factors are selected out of it"
            self.require(self.rank <= factors, "rank", words)
        self.require(self.adapter.name == "mixlora", "adapter", "MixLoRA is what is measured beside LoRA")
        self.require(
            self.routing.name != "task", "routing", "the instances have no task; only instance or random"
        )
        _require_mixlora(self)


class PrepareOptions(Settings, at="prepare"):
    """What preparation reads and where it writes (key `prepare`); sources are hub ids or local copies."""

    output: Text | None = None
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
        self.require(
            self.model is None or self.data is None or self.prepare.output is None,
            "prepare.output",
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
    sources: dict[Text, Text] | None = None
    near: Annotated[Integer, rule("must be from 0 to 64", lambda bits: 0 <= bits <= 64)] = 10
    strict: Flag = False
    examples: Positive = 3
    workers: Positive | None = None


class CheckConfig(Settings):
    """Everything that `mixlora check` reads."""

    model: ModelConfig
    data: DataConfig
    output_dir: OutputFolder
    check: CheckOptions = field(default_factory=CheckOptions)


class FitConfig(Settings, at="export"):
    """Which inputs the static adapter is fitted to, how large it is, and how it is compared (key `export`)."""

    tasks: Annotated[list[Text], rule("must name at least one task, or null for all", bool)] | None = None
    per_task: Flag = False
    centroids: Positive | None = None
    split: Literal["train", "heldout", "unseen"] = "train"
    instances: Positive = 64
    rank: Positive | None = None
    evaluate: Flag = True
    limit: Positive | None = None
    batch_size: Positive = 16
    max_new_tokens: Positive = 24
    cache_features: Flag = True

    def __post_init__(self) -> None:
        self.require(
            not (self.per_task and self.centroids is not None),
            "centroids",
            "with export.per_task=true the tasks are the groups; give one of the two",
        )


_GIVE_RUN = "give run=<folder of a finished `mixlora train adapter=mixlora`>"


class ExportConfig(Settings):
    """Everything that `mixlora export` reads."""

    model: ModelConfig
    data: DataConfig
    export: FitConfig
    output_dir: OutputFolder
    run: Folder | None = None
    seed: Seed = 0
    overwrite: Flag = False

    def __post_init__(self) -> None:
        self.require(self.run is not None, "run", _GIVE_RUN)


class AnswerConfig(Settings, at="answer"):
    """How `mixlora ask` has its answers written (key `answer`)."""

    max_new_tokens: Positive = 256
    temperature: NotNegativeNumber = 0.0
    top_p: Annotated[Number, rule("must be in (0, 1]", lambda share: 0 < share <= 1)] = 1.0
    seed: Seed | None = None


class AskConfig(Settings):
    """Everything that `mixlora ask` reads."""

    model: ModelConfig
    answer: AnswerConfig = field(default_factory=AnswerConfig)
    run: Folders = None
    adapter: AdapterConfig | None = None
    question: Text | None = None
    image: Files = None
    system: Text | None = None
    task: Text | None = None
    definition: Text | None = None
    show: Literal["factors"] | None = None
    precision: RunPrecision = "run"

    def __post_init__(self) -> None:
        self.require(
            self.run or self.adapter,
            "run",
            "give run=<folder of a finished `mixlora train`>, several as run=[a,b], or adapter=none (the untuned base)",
        )
        self.require(
            self.adapter is None or self.adapter.name == "none",
            "adapter",
            "a run brings its own; only none, for the untuned base",
        )
        self.require(
            self.task is None or self.definition is None,
            "definition",
            "stands for a task's; give one of the two",
        )

    @property
    def output_dir(self) -> str:
        """What tells two jobs of a sweep apart."""
        return f"{self.run} {self.question} {self.image} {self.answer}"


class LimitsConfig(Settings, at="serve"):
    """How much the server does at once, and what it refuses (key `serve`)."""

    batch_size: Positive = 16
    exact: Flag = True
    queue: Positive = 256
    gather: NotNegativeNumber = 0.005
    max_new_tokens: Positive = 1024
    default_new_tokens: Positive = 256
    max_prompt_tokens: Positive = 4096
    body_mb: PositiveNumber = 32.0
    total_mb: PositiveNumber = 1024.0
    pictures: NotNegative = 8
    pixels: Positive = 25_000_000
    timeout: PositiveNumber = 300.0
    grace: NotNegativeNumber = 60.0
    images: Folder | None = None
    hosts: list[Text] | None = None
    factors: Flag = True


class ServeConfig(Settings):
    """Everything that `mixlora serve` reads."""

    model: ModelConfig
    serve: LimitsConfig = field(default_factory=LimitsConfig)
    run: Folders = None
    host: Text = "127.0.0.1"
    port: Annotated[Integer, rule("must be from 0 to 65535", lambda port: 0 <= port < 65536)] = 8000
    key: Text | None = None
    precision: RunPrecision = "run"

    @property
    def output_dir(self) -> str:
        """What two jobs of a sweep must not share."""
        return f"{self.host}:{self.port}"


class GradientConfig(Settings, at="interference"):
    """Which gradients are taken (key `interference`)."""

    split: Literal["train", "heldout"] = "train"
    batches: Annotated[Integer, Field(ge=2)] = 16
    batch_size: Positive = 8
    precision: RunPrecision = "run"
    near_zero: Annotated[Number, rule("must be in (0, 1)", lambda cosine: 0 < cosine < 1)] = 0.01
    cache_features: Flag = True


Variant = Literal["mean", "median", "ratio_of_means", "cosine"]
_Layer = Annotated[Integer, rule("must be >= 0; the first layer is 0", lambda layer: layer >= 0)]


class DrawConfig(Settings, at="draw"):
    """What the figures show (key `draw`); changing it needs no model."""

    layers: Annotated[list[_Layer], rule("must name at least one layer, or be null", bool)] | None = None
    score: Variant = "mean"


class MeasureConfig(Settings, at="measure"):
    """Real steps beside their estimate (key `measure`)."""

    lambdas: (
        Annotated[list[PositiveNumber], rule("must name at least one length, or be null", bool)] | None
    ) = None
    batches: Positive = 1


class InterferenceConfig(Settings):
    """Everything that `mixlora interference` reads."""

    model: ModelConfig
    data: DataConfig
    output_dir: OutputFolder
    interference: GradientConfig = field(default_factory=GradientConfig)
    draw: DrawConfig = field(default_factory=DrawConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    run: Folder | None = None
    tasks: list[Text] | None = None
    default_tasks: dict[Text, Any] = field(default_factory=dict)
    compare: Text | None = None
    draw_only: Flag = False
    seed: Seed = 0
    overwrite: Flag = False
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        self.require(
            self.run is not None,
            "run",
            "give run=<folder of a finished `mixlora train adapter=lora` or adapter=mixlora>; the untuned base has no "
            "adapter whose gradients could be compared",
        )
        self.require(
            self.tasks is None or len(set(self.tasks)) >= 2,
            "tasks",
            "must name at least two tasks: a task cannot disturb itself",
        )


Side = Literal["a", "b"]


class MapConfig(Settings, at="tsne"):
    """Which selections are drawn, and how (key `tsne`)."""

    instances: Annotated[Integer, Field(ge=2)] = 300
    sides: Annotated[list[Side], rule("must name a, b or both", bool)] = field(
        default_factory=lambda: ["a", "b"]
    )
    linear: Text = "gate_proj"
    layers: Annotated[list[Integer], rule("must name a layer, or be null", bool)] | None = None
    perplexity: Annotated[Number, Field(ge=1)] = 30.0
    neighbours: Positive = 10
    permutations: Annotated[Integer, Field(ge=20)] = 200
    routing_seed: Seed | None = None
    batch_size: Positive = 16
    cache_features: Flag = True
    page_mb: Annotated[Number, rule("must be >= 0; 0 = no pictures", lambda megabytes: megabytes >= 0)] = 12.0


class TsneConfig(Settings):
    """Everything that `mixlora tsne` reads."""

    model: ModelConfig
    data: DataConfig
    tsne: MapConfig
    output_dir: OutputFolder
    run: Folder | None = None
    tasks: list[Text] | None = None
    pairs: list[list[Text]] | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        self.require(self.run is not None, "run", _GIVE_RUN)
        tasks, pairs = self.tasks, self.pairs
        both = tasks is not None and pairs is not None
        self.require(not both, "pairs", "names the tasks itself; give tasks or pairs, not both")
        self.require(
            tasks is None or len(set(tasks)) > 1,
            "tasks",
            "must name two different tasks or more: a map of one task compares it with nothing",
        )
        self.require(
            pairs is None or (pairs and all(len(pair) == len(set(pair)) == 2 for pair in pairs)),
            "pairs",
            "must be [[seen,unseen],...], two different tasks in each pair",
        )


TableName = Literal[
    "table1", "table2", "table3", "figure4", "beyond", "seen", "control", "study", "study_unseen"
]
MINI_ALONE = ("beyond", "seen", "control", "study", "study_unseen")
"""Tables that the paper does not have."""
What = Literal[TableName, "figures"]
Scale = Literal["mini", "paper"]
_ONLY_MINI = "exists at scale=mini alone"


def _names(tables: Any) -> str:
    """`mixlora ... X` of the first, then the others, for messages that a table is missing in."""
    first, *others = get_args(tables)
    return f"{first}`, {', '.join(others)}"


class TableConfig(Settings):
    """Everything that `mixlora table` reads."""

    runs: Text
    output_dir: OutputFolder
    what: TableName | None = None
    scale: Scale = "mini"
    judge_title: Text | None = None

    def __post_init__(self) -> None:
        self.require(self.what is not None, "what", f"say which: `mixlora table {_names(TableName)}")
        self.require(
            self.what not in MINI_ALONE or self.scale == "mini", "scale", f"`{self.what}` {_ONLY_MINI}"
        )


MOST_JOBS = 4
"""Each takes some 2 to 4 GB of memory."""


class SpeedConfig(Settings, at="speed"):
    """What the whole machine is known to do, in instances a second, for the estimate before anything has run."""

    train: PositiveNumber
    answer: PositiveNumber


class ReproduceConfig(Settings):
    """Everything that `mixlora reproduce` reads."""

    output_dir: OutputFolder
    speed: SpeedConfig
    what: What | None = None
    scale: Scale = "mini"
    seeds: Annotated[list[Integer], rule("must name at least one seed", bool)] | None = None
    replicated: list[Text] | None = None
    only: list[Text] | None = None
    budget: Positive | None = None
    train: list[Text] = field(default_factory=list)
    evaluation: list[Text] = field(default_factory=list)
    drawing: list[Text] = field(default_factory=list)
    jobs: Positive | None = None
    keep_checkpoints: Flag = False
    dry_run: Flag = False

    def __post_init__(self) -> None:
        self.require(self.what is not None, "what", f"say what: `mixlora reproduce {_names(What)}")
        self.require(
            self.what not in MINI_ALONE or self.scale == "mini", "scale", f"`{self.what}` {_ONLY_MINI}"
        )
        seeds = self.seeds or []
        self.require(len(set(seeds)) == len(seeds), "seeds", "must differ from one another")


@dataclass(frozen=True)
class ImportConfig:
    """A published checkpoint, where its adapter goes, and what its files may fail to tell (`mixlora import`).

    Raises:
        ValueError: A value is out of range; names it and what is allowed.
    """

    folder: Path
    output: Path | None = None
    cfs: Literal["released", "paper"] | None = None
    rank: int | None = None
    factors: int | None = None
    alpha: float | None = None
    cond_type: str | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "factors", "alpha"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name}={value}: must be > 0")
        if self.cfs not in (None, "released", "paper"):
            raise ValueError(f"--cfs={self.cfs}: must be one of released, paper")
        if not self.folder.is_dir():
            what = "is a file; give the folder that it lies in" if self.folder.exists() else "no such folder"
            raise ValueError(
                f"{self.folder}: {what}; expected the output folder of the published training code "
                "(pytorch_model.bin, cmoa_args.bin)"
            )
        place = self.destination
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise ValueError(f"--output={place}: already exists; name another folder or delete it first")

    @property
    def destination(self) -> Path:
        """Where the adapter folder goes."""
        return self.output or Path("runs/imported") / self.folder.resolve().name
