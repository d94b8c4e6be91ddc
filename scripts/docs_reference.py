"""The page `reference.md` of the site, made out of what `mixlora COMMAND --help` and the checks of values read.

Keys and types are those of the settings, defaults are what Hydra composes, explanations are the comments in conf/.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf
from typer.testing import CliRunner

from mixlora_cli import config
from mixlora_cli.cli import app
from mixlora_cli.commands import COMMANDS, HEADINGS, Command
from mixlora_cli.config.settings import all_keys, permitted, show
from mixlora_cli.hydra_conf import register
from mixlora_cli.paths import conf_dir
from mixlora_cli.routers import ROUTERS

GROUPS = {
    "model": config.ModelConfig,
    "adapter": config.AdapterConfig,
    "routing": config.RoutingConfig,
    "data": config.DataConfig,
    "deepspeed": config.DeepspeedConfig,
    "judge": config.JudgeConfig,
}
INTRODUCTION = """\
# Reference

Look up any command, key or option here: what values it takes, what it is when nobody gives it, and what it does.
The page is made out of the configuration itself when the site is built. `mixlora COMMAND --help` shows the same keys
with the values of a command line, and a wrong key or value is answered in one line that names what is allowed.

`key=value` changes a key, `group=option` chooses a group's option. A default `${...}` follows from other keys;
`mixlora COMMAND --cfg job --resolve` prints what it comes to. [Configuration](configuration.md) explains run folders,
sweeps and configurations of your own.
"""


def page() -> str:
    """The whole page as Markdown."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return "\n".join([INTRODUCTION, *_commands(), "## Groups\n", *map(_group, GROUPS), _experiments()])


def leaf_keys(config_class: Any, at: str = "") -> list[str]:
    """The dotted keys of a class of settings that have a value and no keys of their own."""
    keys = all_keys(config_class, at)
    return [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


def _commands() -> Iterator[str]:
    for heading, names in HEADINGS.items():
        yield f"## {heading}\n"
        for name in names:
            yield f"### mixlora {name}\n"
            if name in COMMANDS:
                yield _command(COMMANDS[name])
            else:
                yield f"```text\n{CliRunner().invoke(app, [name, '--help']).output.strip()}\n```\n"


def _command(command: Command) -> str:
    """What a command says of itself, and the keys that are its own; those of another command it builds on are there."""
    config_class = getattr(config, command.config)
    loader = GlobalHydra.instance().config_loader()
    parts = loader.compute_defaults_list(command.name, [], RunMode.RUN).defaults
    roots = [part.config_path for part in parts if part.config_path in COMMANDS]
    own = explanations(conf_dir() / f"{command.name}.yaml")
    borrowed = {key: root for root in roots for key in explanations(conf_dir() / f"{root}.yaml")}
    values = OmegaConf.to_container(compose(command.name, return_hydra_config=False), resolve=False)
    chosen = {path.partition("/")[0]: path.partition("/")[2] for path in (part.config_path for part in parts)}
    rows, others = [], set()
    for key in leaf_keys(config_class):
        group, dot, _ = key.partition(".")
        if dot and group in GROUPS:
            if not any(row[0] == f"[`{group}`](#{group})" for row in rows):
                rows.append(
                    (
                        f"[`{group}`](#{group})",
                        "an option of the group",
                        chosen.get(group, "null"),
                        f"below: `{group}.KEY=value`",
                    )
                )
        elif borrowed.get(key, command.name) != command.name and key not in own:
            others.add(borrowed[key])
        else:
            default = show(_at(values, key))
            rows.append((f"`{key}`", permitted(config_class, key), default, own.get(key, "")))
    if "experiment" in command.groups:
        rows.append(
            ("[`experiment`](#experiment)", "an option of the group, or null", "null", "several keys at once")
        )
    beside = "".join(
        f"Beside these it has every key of [mixlora {name}](#mixlora-{name}).\n" for name in sorted(others)
    )
    return f"```text\n{command.head()}\n```\n\n{_table(rows)}\n{beside}"


def _group(group: str) -> str:
    """A group's options with what they set, and its keys."""
    config_class = GROUPS[group]
    defaults = {
        key.partition(".")[2]: _default(config_class, key.partition(".")[2])
        for key in leaf_keys(config_class, group)
    }
    options, said = [], {key: {} for key in defaults}
    for option in GlobalHydra.instance().config_loader().get_group_options(group):
        path = conf_dir() / group / f"{option}.yaml"
        node = (
            OmegaConf.load(path)
            if path.is_file()
            else ConfigStore.instance().load(f"{group}/{option}.yaml").node
        )
        values = _flat(OmegaConf.to_container(node, resolve=False))
        sets = [
            f"`{key}={show(value)}`"
            for key, value in values
            if key not in ("name", "defaults") and defaults.get(key, ...) != value
        ]
        text = _head(path) if path.is_file() else ROUTERS[option].help
        options.append((f"`{group}={option}`", text, "<br>".join(sets)))
        for key, comment in explanations(path).items() if path.is_file() else ():
            if key in said:
                said[key].setdefault(comment, []).append(option)
    rows = []
    for key, comments in said.items():
        usual = max(comments, key=lambda comment: len(comments[comment]), default="")
        lines = [usual or "comes with the option"] + [
            f"{', '.join(names)}: {text}" for text, names in comments.items() if text != usual
        ]
        default = defaults[key]
        rows.append(
            (
                f"`{group}.{key}`",
                permitted(config_class, key),
                "" if default is ... else show(default),
                "\n".join(lines),
            )
        )
    doc = " ".join((config_class.__doc__ or "").split())
    return (
        f"### {group}\n\n{doc}\n\n{_table(options, ('option', 'what it is', 'what it sets'))}\n{_table(rows)}"
    )


def _experiments() -> str:
    loader = GlobalHydra.instance().config_loader()
    files = sorted((conf_dir() / "experiment").glob("*.yaml"))
    rows = [(f"`experiment={path.stem}`", _head(path)) for path in files]
    for scale in loader.list_groups("experiment"):
        names = ", ".join(f"`{name}`" for name in loader.get_group_options(f"experiment/{scale}"))
        rows.append(
            (
                f"`experiment={scale}/NAME`",
                f"A row of a table of `mixlora reproduce`. NAME is one of {names}.",
            )
        )
    return f"### experiment\n\nSeveral keys at once.\n\n{_table(rows, ('option', 'what it is'))}"


@cache
def explanations(path: Path) -> Mapping[str, str]:
    """The comment beside each dotted key of a YAML file, or above it where there is none beside it."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    head = len(list(takewhile(lambda line: line.startswith("#"), lines)))
    found: dict[str, str] = {}

    def walk(node: yaml.MappingNode, at: str) -> None:
        for key, value in node.value:
            name = f"{at}{key.value}"
            block = isinstance(value, yaml.CollectionNode) and not value.flow_style
            end = key.end_mark if block else value.end_mark
            beside = lines[end.line][end.column :].removeprefix(":").strip()
            above = list(
                takewhile(
                    lambda line: line.strip().startswith("#"), reversed(lines[head : key.start_mark.line])
                )
            )
            found[name] = beside.removeprefix("#").strip() or " ".join(
                line.strip(" #") for line in reversed(above)
            )
            if block and isinstance(value, yaml.MappingNode):
                walk(value, f"{name}.")

    walk(yaml.compose(text), "")
    return found


def _head(path: Path) -> str:
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return " ".join(line.strip("# ") for line in lines if "@package" not in line)


def _flat(values: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _default(config_class: Any, key: str) -> Any:
    """What the class says, `...` where it asks for a value."""
    found = config_class.__dataclass_fields__[key]
    if callable(found.default_factory):
        return found.default_factory()
    return found.default if getattr(config_class, key, ...) is not ... else ...


def _table(
    rows: Iterable[tuple[str, ...]], heads: tuple[str, ...] = ("key", "values", "default", "what it does")
) -> str:
    """A table; defaults, the third of four columns, stand as code."""
    lines = [heads, tuple("---" for _ in heads)]
    for row in rows:
        cells = [*row]
        if len(cells) == 4 and cells[2]:
            cells[2] = f"`{cells[2]}`"
        lines.append(tuple(_cell(cell) for cell in cells))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    """Text in a table: no line break, no bar, and outside of code no HTML."""
    parts = text.replace("|", "\\|").split("`")
    parts[::2] = [
        part.replace("<", "&lt;").replace("&lt;br>", "<br>").replace("\n", "<br>") for part in parts[::2]
    ]
    return "`".join(parts)
