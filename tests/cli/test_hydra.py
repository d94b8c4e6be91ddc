"""Hydra's own features work through the subcommands, and leave nothing behind."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixlora_cli import __version__
from mixlora_cli.cli import with_key
from mixlora_cli.commands import COMMANDS, HEADINGS, Command
from mixlora_cli.config import AlignConfig, EvalConfig, TrainConfig
from mixlora_cli.errors import UserError
from mixlora_cli.paths import conf_dir
from mixlora_cli.routers import ROUTERS


def test_commands_get_the_typed_configuration(mixlora: Any, commands: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    result = mixlora("train", "adapter=lora", "rank=8", "train.learning_rate=1e-3", "seed=3")
    assert (result.code, result.out, result.err) == (0, "", "")
    assert mixlora("eval", "run=run", "eval.benchmarks=[mini_pope]").code == 0
    assert mixlora("align", "steps=3").code == 0
    train, evaluation, alignment = commands.called
    assert (type(train), type(evaluation), type(alignment)) == (TrainConfig, EvalConfig, AlignConfig)
    assert (train.adapter.name, train.rank, train.train.learning_rate, train.seed) == ("lora", 8, 1e-3, 3)
    assert train.output_dir == "runs/mini-mini/lora-r8-seed3"
    assert (evaluation.run, evaluation.output_dir) == ("run", "run/eval")
    assert (evaluation.eval.benchmarks, alignment.steps) == (["mini_pope"], 3)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_printed_instead_of_run(mixlora: Any, commands: Any) -> None:
    printed = yaml.safe_load(mixlora("train", "--cfg", "job", "--resolve", "rank=2").out)
    assert (printed["rank"], printed["model"]["name"]) == (2, "mini")
    assert printed["output_dir"] == "runs/mini-mini/mixlora-task-e16-r2-seed0"
    assert yaml.safe_load(mixlora("table", "table2", "--cfg", "job").out)["what"] == "table2"
    hydra = yaml.safe_load(mixlora("train", "--cfg", "hydra").out)["hydra"]
    assert (hydra["output_subdir"], hydra["job_logging"]["root"]) == (None, None)
    result = mixlora("train", "--info", "defaults")
    assert result.code == 0 and "adapter/mixlora" in result.out
    assert mixlora("--version").out == f"mixlora {__version__}\n"
    assert commands.called == []


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_help_lists_groups_options_keys_and_examples(command: Command, mixlora: Any) -> None:
    result = mixlora(command.name, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"mixlora {command.name}: ")
    for group in filter(None, command.groups.split(",")):
        files = {path.stem for path in (conf_dir() / group).glob("*.yaml")}
        options = sorted(files | set(ROUTERS) if group == "routing" else files)
        assert f"  {group + ':':<12}{', '.join(options)}\n" in result.out
    for key in yaml.safe_load((conf_dir() / f"{command.name}.yaml").read_text()):
        assert f"\n{key}:" in result.out or key == "defaults"
    assert result.out.count(f"  mixlora {command.name} ") >= 2
    assert (
        "--multirun" in result.out
        and "--cfg" in result.out
        and f"instead of {command.name}.yaml" in result.out
    )
    sentence = result.out.splitlines()[0].partition(": ")[2]
    assert f"  {command.name:<14}{sentence[0].upper()}{sentence[1:]}.\n" in mixlora("--help").out


@pytest.mark.parametrize("name", ["demo", "compare", "import", "doctor"])
def test_commands_without_hydra_say_what_they_do_with_examples(name: str, mixlora: Any) -> None:
    result = mixlora(name, "--help")
    usage, _, sentence, _, heading, *lines = result.out.splitlines()
    assert (result.code, usage.startswith(f"Usage: mixlora {name} "), heading) == (0, True, "  examples:")
    assert sum(line.startswith("    ") and f"mixlora {name}" in line for line in lines) >= 2
    assert f"  {name:<14}{sentence.strip()}\n" in mixlora("--help").out


def test_help_lists_every_command_under_one_heading(mixlora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = mixlora("--help").out
    assert re.findall(r"^(\w.*):$", text, re.MULTILINE) == ["Options", *HEADINGS]
    listed = re.findall(r"^  ([a-z]+) +([A-Z].*)$", text, re.MULTILINE)
    assert [name for name, _ in listed] == [name for names in HEADINGS.values() for name in names]
    assert sorted(name for name, _ in listed) == sorted([*COMMANDS, "demo", "compare", "import", "doctor"])
    assert all(sentence.endswith(".") and "..." not in sentence for _, sentence in listed)
    assert max(map(len, text.splitlines())) <= 80


def test_the_shell_completes_commands(mixlora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {
        "_MIXLORA_COMPLETE": "complete_bash",
        "COMP_WORDS": "mixlora re",
        "COMP_CWORD": "1",
    }.items():
        monkeypatch.setenv(key, value)
    assert mixlora().out.split() == ["report", "reproduce"]


def test_help_shows_the_chosen_values_and_the_users_options(mixlora: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.yaml").write_text("name: lora\ndropout: 0.5\n")
    printed = mixlora("train", "-cd", str(tmp_path), "adapter=mine", "rank=3", "-h").out
    assert "  adapter:    full, lora, mine, mixlora, mixlora_plus, none\n" in printed
    assert "\nrank: 3\n" in printed and "  dropout: 0.5\n" in printed


def test_users_own_configuration_folder(mixlora: Any, commands: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "wide.yaml").write_text("name: mixlora\nalpha: 7\n")
    (folder / "my.yaml").write_text(
        "defaults: [train, override adapter: wide, _self_]\nrank: 2\nfactors: 32\n"
    )
    assert mixlora("train", "-cd", "mine", "-cn", "my", "seed=1").code == 0
    (config,) = commands.called
    assert (config.adapter.alpha, config.rank, config.factors, config.seed) == (7.0, 2, 32, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_sweep_runs_every_combination(mixlora: Any, commands: Any, tmp_path: Path) -> None:
    result = mixlora("train", "factors=8,16", "-m", "rank=2,4")
    assert [(config.factors, config.rank) for config in commands.called] == [(8, 2), (8, 4), (16, 2), (16, 4)]
    assert len({config.output_dir for config in commands.called}) == 4
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[0] == "Launching 4 jobs locally"
    assert result.out.splitlines()[1].strip() == "#0 : factors=8 rank=2"
    (record,) = (tmp_path / "runs" / ".multirun").iterdir()
    assert [path.name for path in record.glob("*.yaml")] == ["multirun.yaml"]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("flags", [["-m"], ["--multirun"], ["hydra.mode=MULTIRUN"]])
def test_no_job_of_a_sweep_starts_when_one_is_wrong(
    flags: list[str], mixlora: Any, commands: Any, tmp_path: Path
) -> None:
    result = mixlora("train", *flags, "rank=2,4,20")
    assert (result.code, result.out, commands.called) == (2, "", [])
    assert result.err == (
        "error: job 2 (rank=20): rank=20: must be <= factors=16, because rank factors are selected out of the pool\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_jobs_of_a_sweep_may_not_share_a_folder(mixlora: Any, commands: Any) -> None:
    result = mixlora("train", "-m", "train.learning_rate=1e-3,1e-4")
    assert (result.code, commands.called) == (2, [])
    assert result.err == (
        "error: job 1 (train.learning_rate=0.0001): "
        "output_dir=runs/mini-mini/mixlora-task-e16-r4-seed0: "
        "job 0 (train.learning_rate=0.001) writes there too; "
        "name what differs in it, e.g. 'output_dir=runs/lr-${train.learning_rate}'\n"
    )
    named = mixlora("train", "-m", "train.learning_rate=1e-3,1e-4", "output_dir=runs/${train.learning_rate}")
    assert named.code == 0
    assert [config.output_dir for config in commands.called] == ["runs/0.001", "runs/0.0001"]


def test_one_failing_job_does_not_stop_the_others(mixlora: Any, commands: Any) -> None:
    def fail_once(config: TrainConfig) -> None:
        if config.rank == 2:
            raise UserError("no room on the disk")

    commands.does = fail_once
    result = mixlora("train", "-m", "rank=2,4")
    assert [config.rank for config in commands.called] == [2, 4]
    assert (result.code, result.err) == (2, "error: job 0 (rank=2): no room on the disk\n")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("the loss is not finite"), 2, "error: job 0 (rank=2): rank 1: the loss is not finite"),
        (RuntimeError("out of memory"), 1, "RuntimeError: out of memory"),
    ],
)
def test_one_of_several_processes_does_not_run_ahead_of_the_others(
    mixlora: Any, commands: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, said: str
) -> None:
    """They may still be in the job that failed here."""
    started = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    for key, value in started.items():
        monkeypatch.setenv(key, value)

    def fail(config: TrainConfig) -> None:
        raise error

    commands.does = fail
    result = mixlora("train", "-m", "rank=2,4")
    assert [config.rank for config in commands.called] == [2]
    assert (result.code, result.err.splitlines()[-1]) == (code, said)


def test_wrong_key_in_a_sweep(mixlora: Any, commands: Any) -> None:
    result = mixlora("train", "-m", "rnk=2,4")
    assert (result.code, commands.called) == (2, [])
    assert result.err.startswith("error: rnk=2") and result.err.endswith("did you mean rank?\n")


@pytest.mark.parametrize(
    ("train", "name"),
    [
        ("my data/a.json", "a"),
        ("owner/name/config:test", "config-test"),
        ("{ocr: a.json, vqa: {file: b.json, weight: 0.5}}", "ocr-vqa"),
        ("{a b: a.json, c/d: a.json}", "a_b-c_d"),
        ("{1: a.json, 2: a.json, 3: a.json, 4: a.json, 5: a.json}", "1-2-3-and-2"),
        ("null", "json"),
    ],
)
def test_a_run_is_named_after_its_files_or_their_tasks(train: str, name: str, mixlora: Any) -> None:
    quoted = f'"{train}"' if " " in train and "{" not in train else train
    printed = mixlora("train", "data=json", f"data.train={quoted}", "--cfg", "job", "--resolve").out
    assert yaml.safe_load(printed)["data"]["name"] == name


ODD_TEXTS = (
    *("What is this?", 'Isn\'t it "x" \\ ${a} = b?', "ends with \\", "\\'", "a,b [c] {d: e}", "zwei\nZeilen"),
    *("8", "null"),
)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_bare_text_reaches_its_key_as_it_is(mixlora: Any, commands: Any, text: str) -> None:
    assert mixlora("ask", "adapter=none", text).code == 0
    assert commands.called[0].question == text


def test_only_the_first_bare_word_gets_the_key_and_flags_keep_their_values() -> None:
    assert with_key("port", ["--cfg", "job", "run=a", "9000"]) == ["--cfg", "job", "run=a", "port=9000"]
    assert with_key("", ["word"]) == ["word"]
    assert with_key("what", ["-m", "seed=1,2", "~key"]) == ["-m", "seed=1,2", "~key"]


def test_sentences_are_taken_as_they_are() -> None:
    given = ["run=a", "system=Say it, in one word: it's 'x'.", "task=null", "task='a, b'", "Why, then?"]
    assert with_key("question", given, ("system", "task")) == [
        "run=a",
        "system='Say it, in one word: it\\'s \\'x\\'.'",
        "task=null",
        "task='a, b'",
        "question='Why, then?'",
    ]
    assert with_key("", ["-m", "system=a,b"], ("system",)) == ["-m", "system=a,b"]
