"""Every configuration file composes into its dataclass, and says what the dataclass says."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from mixlora_cli import config
from mixlora_cli.commands import COMMANDS
from mixlora_cli.config import (
    AdapterConfig,
    AlignConfig,
    DataConfig,
    DeepspeedConfig,
    FitConfig,
    GenerationConfig,
    JudgeConfig,
    ModelConfig,
    OptimConfig,
    PageConfig,
    RoutingConfig,
    WandbConfig,
    load,
)
from mixlora_cli.errors import UserError
from mixlora_cli.hydra_conf import billions_in, register
from mixlora_cli.paths import conf_dir
from mixlora_cli.routers import ROUTERS, Router

CONF = conf_dir()
ROOTS: dict[str, Any] = {name: getattr(config, command.config) for name, command in COMMANDS.items()}
GROUPS = {
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "routing": RoutingConfig,
    "data": DataConfig,
    "deepspeed": DeepspeedConfig,
    "judge": JudgeConfig,
}
OPTIONS = [
    *((path.parent.name, path.stem) for path in sorted(CONF.glob("*/*.yaml"))),
    *(("routing", name) for name in ROUTERS),
]
# Keys that an option cannot do without, and keys that keep a combination sensible.
WITH = {
    ("model", "hf"): ["model.name_or_path=someone/some-llava"],
    ("data", "json"): ["data.train={folder}/my.json", "data.images={folder}"],
    ("adapter", "none"): ["model.train_also=[multi_modal_projector]"],
    **{("judge", option): ["adapter=none"] for option in ("none", "exact", "hf", "openai")},
}


def composed(root: str, *overrides: str) -> Any:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return load(ROOTS[root], compose(root, list(overrides)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my.json").write_text("[]")
    return tmp_path


def test_every_file_is_a_root_a_known_group_or_hydras() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(COMMANDS)
    assert {path.name for path in CONF.iterdir() if path.is_dir()} == {*GROUPS, "experiment", "hydra"}
    assert all(OmegaConf.is_dict(OmegaConf.load(path)) for path in CONF.rglob("*.yaml"))


@pytest.mark.parametrize("root", sorted(COMMANDS))
def test_no_key_has_the_name_of_a_group(root: str) -> None:
    """Hydra takes `name=value` as the choice of an option wherever there is a group of that name."""
    keys = OmegaConf.load(CONF / f"{root}.yaml").keys()
    assert {path.name for path in CONF.iterdir() if path.is_dir()} & set(keys) == set()


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group: str, option: str, folder: Path) -> None:
    extra = [text.format(folder=folder) for text in WITH.get((group, option), [])]
    root = "eval" if group == "judge" else "train"
    config = composed(root, f"{group}={option}", *extra)
    assert isinstance(config, ROOTS[root])
    if group in GROUPS:
        chosen = getattr(config, group)
        assert isinstance(chosen, GROUPS[group])
        if option.startswith("llava_1_5"):
            assert chosen.name_or_path == f"llava-hf/llava-1.5-{option[-3:].strip('_')}-hf"
        names = {("model", "hf"): "some-llava", ("data", "json"): "my", ("routing", "auto"): "task"}
        names["adapter", "mixlora_plus"] = "mixlora"
        assert chosen.name == names.get((group, option), option)


def test_train_defaults() -> None:
    config = composed("train")
    assert (config.model.name, config.data.name, config.adapter.name) == ("mini", "mini", "mixlora")
    assert (config.routing.name, config.deepspeed.name) == ("task", "none")
    assert (config.factors, config.rank, config.seed) == (16, 4, 0)
    assert (config.model.chat_template, config.model.attn_implementation) == ("smollm", "eager")
    assert config.train == replace(OptimConfig(), learning_rate=config.train.learning_rate)
    assert config.wandb == WandbConfig()
    assert config.data == DataConfig(name="mini", source="mini")


def test_yaml_repeats_the_defaults_of_the_dataclasses() -> None:
    assert composed("align") == AlignConfig(output_dir="runs/align")
    assert composed("eval", "adapter=none").eval == GenerationConfig()
    assert composed("eval", "adapter=none").judge == JudgeConfig()
    for option in ("hf", "openai"):
        assert composed("judge", f"run={CONF}", f"judge={option}").judge == JudgeConfig(
            option, model="lmsys/vicuna-13b-v1.5"
        )
    export = composed("export", f"run={CONF}")
    assert export.export == FitConfig()
    assert (export.output_dir, export.seed, export.overwrite) == (f"{CONF}/export", 0, False)
    assert composed("report", f"run={CONF}").report == PageConfig()
    for option in ("lora", "mixlora"):
        assert composed("train", f"adapter={option}").adapter == AdapterConfig(name=option)
    assert composed("train").routing == RoutingConfig(name="task")


def test_experiment_changes_only_what_it_names() -> None:
    plain, quick = composed("train"), composed("train", "experiment=mini_quick")
    assert (quick.data.max_per_task, quick.train.steps) == (40, 40)
    assert replace(quick, data=plain.data, train=plain.train) == plain


def test_mixlora_plus_is_mixlora_with_other_choices() -> None:
    """Also on top of a row of the paper, and with a choice of one's own."""
    for given in ([], ["experiment=paper/mixlora_e16_r4"], ["experiment=mini/mixlora_e16_r8"]):
        plain = composed("train", *given, "routing=instance")
        plus = composed("train", *given, "adapter=mixlora_plus")
        assert plus.adapter == replace(plain.adapter, pairing="tied")
        assert plus.routing == replace(plain.routing, pool="text", normalize=True, router_init="tasks")
        assert replace(plain, adapter=plus.adapter, routing=plus.routing, output_dir=plus.output_dir) == plus
    own = composed("train", "adapter=mixlora_plus", "routing.router_init=clusters", "adapter.cfs=none")
    assert (own.routing.router_init, own.adapter.cfs) == ("clusters", "none")


@pytest.mark.parametrize("option", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_stages_of_zero_are_plain_values(option: str) -> None:
    values = composed("train", f"deepspeed={option}").deepspeed.config
    assert values["zero_optimization"]["stage"] == int(option[4])
    assert type(values) is dict and type(values["zero_optimization"]) is dict


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [
        ([], "runs/mini-mini/mixlora-task-e16-r4-seed0"),
        (["rank=2", "factors=8", "seed=3"], "runs/mini-mini/mixlora-task-e8-r2-seed3"),
        (["routing=random"], "runs/mini-mini/mixlora-random-e16-r4-seed0"),
        (["adapter=mixlora_plus"], "runs/mini-mini/mixlora-instance-tasks-e16-r4-seed0"),
        (["adapter.pairing=tied"], "runs/mini-mini/mixlora-task-tied-e16-r4-seed0"),
        (["adapter=lora", "rank=8"], "runs/mini-mini/lora-r8-seed0"),
        (["adapter=full", "model=tiny"], "runs/tiny-mini/full-seed0"),
        (["model=hf", "model.name_or_path=org/net-1.5", "adapter=lora"], "runs/net-1.5-mini/lora-r4-seed0"),
    ],
)
def test_run_folders_tell_the_choices_apart(overrides: list[str], folder: str) -> None:
    assert composed("train", *overrides).output_dir == folder


def test_routing_is_by_task_where_the_data_brings_definitions(folder: Path) -> None:
    mine = ["data=json", f"data.train={folder}/my.json", f"data.images={folder}"]
    defined = f"data.metadata={folder}/my.json"
    assert composed("train", *mine).routing == RoutingConfig(name="instance")
    assert composed("train", *mine, defined).routing == RoutingConfig(name="task")
    assert composed("train", *mine, defined, "routing=instance").routing == RoutingConfig(name="instance")
    assert composed("train", "data=vision_flan").routing == RoutingConfig(name="instance")
    assert composed("train", "data.tasks=[flag_naming]").routing == RoutingConfig(name="instance")
    assert composed("train", "data.tasks=[flag_naming,count_digit]").routing == RoutingConfig(name="task")
    assert composed("train", *mine, "routing.pool=prompt").routing.pool == "prompt"


@pytest.mark.parametrize(
    "given",
    [
        "routing.pool=prompt",
        "routing.pool=text",
        "routing.normalize=true",
        "routing.per=block",
        "routing.decode=step",
    ],
)
def test_what_task_routing_does_not_heed_is_refused(given: str) -> None:
    refused = f"{given}: of no effect with routing=task; add routing=instance, or leave "
    with pytest.raises(UserError, match=refused):
        composed("train", given)
    assert composed("train", given, "adapter=lora").adapter.name == "lora"  # which selects nothing
    assert composed("train", given, "routing=instance").routing.name == "instance"


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        (
            ["routing=instance", "routing.router_init=clusters"],
            r"routing\.router_init=clusters: starts from what .* add it",
        ),
        (["routing=random", "adapter.pairing=tied"], "adapter.pairing=tied: needs routers"),
    ],
)
def test_ways_to_select_that_would_do_nothing_are_refused(given: list[str], refused: str) -> None:
    with pytest.raises(UserError, match=refused):
        composed("train", *given)


def test_evaluation_goes_into_its_run(folder: Path) -> None:
    assert composed("eval", f"run={folder}/").output_dir == f"{folder}/eval"
    assert composed("eval", "adapter=none").output_dir == "runs/mini-base/eval"
    server = "eval.server=http://me:secret@gpu-1:8000/v1/"
    assert composed("eval", f"run={folder}", server).output_dir == f"{folder}/eval-server"
    assert composed("eval", server).output_dir == "runs/gpu-1-8000/eval"
    assert composed("eval", server, "eval.server_model=Qwen/Q-3B").output_dir == "runs/Qwen-Q-3B/eval"


def test_every_key_is_explained() -> None:
    """A line that sets a key ends in a comment, or the line above it is one.

    Not so the keys that name an option or open a block, and files whose head explains a set of choices.
    """
    exempt = {
        "launch",
        "bench",
        "check",
        "prepare",
        "report",
        "name",
        "source",
        "train",
        "eval",
        "wandb",
        "plan",
    }
    files = [*CONF.glob("*.yaml"), *CONF.glob("*/*.yaml")]
    lacking = []
    for path in files:
        if path.parent.name == "experiment" or path.stem.startswith("zero"):
            continue
        before = ""
        for line in path.read_text().splitlines():
            key, colon, _ = line.strip().partition(":")
            if colon and key.isidentifier() and key not in {*exempt, "defaults"} and "#" not in line + before:
                lacking.append(f"{path.name}: {line}")
            before = line if line.strip().startswith("#") else ""
    assert lacking == []


def test_a_toy_router_is_an_option_of_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Router("toy", "By nothing in particular.", "chance", None, ("decode",))
    monkeypatch.setitem(ROUTERS, "toy", toy)
    # What is stored stays for the process, and lists of options are made of it.
    monkeypatch.setattr(ConfigStore.instance(), "repo", copy.deepcopy(ConfigStore.instance().repo))
    config = composed("train", "routing=toy", "routing.decode=step")
    assert (config.routing.name, config.routing.decode) == ("toy", "step")
    assert "mixlora-toy-e16-r4" in config.output_dir
    with pytest.raises(UserError, match=r"routing\.pool=prompt: of no effect with routing=toy"):
        composed("train", "routing=toy", "+routing.pool=prompt")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=mini"], (16, 1, 4e-4, False, True)),
        (["model=tiny", "train.batch_size=2"], (2, 1, 4e-4, False, True)),
        (["model=hf", "model.name_or_path=org/SmolLM2-135M-Instruct"], (16, 1, 4e-4, False, True)),
        (["model=hf", "model.name_or_path=org/Qwen2.5-VL-3B-Instruct"], (2, 8, 1e-4, True, False)),
        (["model=hf", "model.name_or_path=org/SmolVLM2-500M-Video"], (2, 8, 1e-4, True, False)),
        (["model=hf", "model.name_or_path=org/some-llava-4bit"], (2, 8, 1e-4, True, False)),
        (["model=hf", "model.name_or_path=org/some-llava", "model.billions=0.1"], (16, 1, 4e-4, False, True)),
        (["model=llava_1_5_7b"], (1, 16, 4e-5, True, False)),
        (["model=llava_1_5_7b", "train.batch_size=3"], (3, 5, 4e-5, True, False)),
        (["model=llava_1_5_7b", "train.batch_size=64"], (64, 1, 4e-5, True, False)),
        (["model=llava_1_5_7b", "train.effective_batch=128"], (1, 1, 4e-5, True, False)),
        (
            ["model=llava_1_5_7b", "train.accumulation=2", "train.learning_rate=1e-3"],
            (1, 2, 1e-3, True, False),
        ),
        (["model=llava_1_5_7b", "train.gradient_checkpointing=false"], (1, 16, 4e-5, False, False)),
        (["model=llava_1_5_7b", "train.cache_features=true"], (1, 16, 4e-5, True, True)),
    ],
)
def test_defaults_of_training_go_by_the_models_size(overrides: list[str], expected: tuple[Any, ...]) -> None:
    """What the command line says comes before what follows from the size."""
    train = composed("train", *overrides).train
    found = (train.batch_size, train.accumulation, train.learning_rate)
    assert (*found, train.gradient_checkpointing, train.cache_features) == expected
    assert composed("plan", *overrides).train == train


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", 7),
        ("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", 0.5),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 0.135),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", 30),
        ("/models/7b/mine", None),
        ("org/net-4bit", None),
        (None, None),
    ],
)
def test_a_size_is_read_from_a_models_name(name: str | None, billions: float | None) -> None:
    assert billions_in(name) == billions


def test_a_size_or_batch_of_no_use_is_named_itself() -> None:
    with pytest.raises(UserError, match=r"model\.billions=large: "):
        composed("train", "model=llava_1_5_7b", "model.billions=large")
    with pytest.raises(UserError, match=r"train\.batch_size=many: "):
        composed("train", "model=llava_1_5_7b", "train.batch_size=many")
