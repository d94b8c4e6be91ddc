"""The adapter's settings, from tensors, files and options: what they agree on; what they contradict is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mixlora_cli.config.import_command import ImportConfig
from mixlora_cli.errors import UserError
from mixlora_cli.method.config import ConditionalSelection, MixLoraConfig
from mixlora_cli.prepare.published.files import read_json, read_pickle
from mixlora_cli.prepare.published.sizes import CONDITIONAL, Sizes

ARGUMENTS = "cmoa_args.bin"
PUBLISHED_DROPOUT = 0.05
"""The published training code's default; it acts in training only."""

LANGUAGE_MODEL_LINEARS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
"""Every linear layer of LLaVA's language model except `lm_head`; never the vision tower."""

_NAMES = {"n_selected": "rank", "r": "rank", "n_experts": "factors", "lora_alpha": "alpha"}
_WITH_CFS = "input_lora_a_param"
_KINDS: dict[str, str] = {
    "input": "instance",
    _WITH_CFS: "instance",
    "task_embed": "task",
    "random": "random",
}
_REQUIRED: dict[str, object] = {
    "used_scored_weight": False,
    "independent_rank": True,
    "mix_loraA": True,
    "mix_start_layer": 0,
    "mix_mm_projector": False,
    "ifs_weight": 1,
}
"""Settings of the published code that mixlora has in this one form only."""


@dataclass(frozen=True)
class Settings:
    """The configuration of the imported adapter, and for people why it is so."""

    config: MixLoraConfig
    reasons: dict[str, str]
    """By setting: its value and where it comes from."""


class _Facts:
    """Values with their sources; two sources that differ are an error."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, str]] = {}
        self.confirmed: set[str] = set()
        """Keys that several sources tell alike."""

    def add(self, key: str, value: Any, source: str) -> None:
        if value is None:
            return
        if key in self._known:
            self.confirmed.add(key)
        known, before = self._known.setdefault(key, (value, source))
        if known != value:
            raise UserError(
                f"{key}: {known} in {before}, but {value} in {source}; one of the two is not of this checkpoint"
            )

    def get(self, key: str) -> Any:
        return self._known.get(key, (None, ""))[0]

    def told(self, key: str) -> str:
        value, source = self._known[key]
        return f"{value} ({source})"


def choose_settings(
    options: ImportConfig, sizes: Sizes, has_projector: bool, base_layers: int | None = None
) -> Settings:
    """Put together what the tensors, `cmoa_args.bin`, `adapter_config.json`, `config.json` and the options tell.

    Args:
        options: of the command.
        sizes: of the adapter's tensors.
        has_projector: whether a projector comes with them.
        base_layers: decoder layers of the base, where its tensors are there.

    Raises:
        UserError: two of them contradict each other, a value is missing, or the checkpoint needs a form of the method
            that mixlora does not have.
    """
    facts = _Facts()
    facts.add("factors", sizes.factors, "the tensors")
    facts.add("rank", sizes.rank, "the tensors")
    facts.add("num_hidden_layers", sizes.num_layers, "the tensors")
    facts.add("num_hidden_layers", base_layers, "the frozen base's tensors")
    facts.add("hidden_size", sizes.hidden_size, "the tensors")
    for key in ("factors", "rank", "alpha", "cond_type"):
        facts.add(key, getattr(options, key), "--" + key.replace("_", "-"))
    problem = _add_files(facts, options.folder)
    routing, cfs, why = _choose_routing(facts, sizes, options)
    for key in ("rank", "alpha"):
        if facts.get(key) is None:
            raise UserError(_missing(key, sizes.factors, problem))
    dropout = facts.get("dropout")
    try:
        config = MixLoraConfig(
            r=facts.get("rank"),
            factors=sizes.factors,
            alpha=facts.get("alpha"),
            dropout=PUBLISHED_DROPOUT if dropout is None else dropout,
            target_modules=_targets(sizes),
            modules_to_save=["multi_modal_projector"] if has_projector else None,
            cfs=cfs,
            router_grad="none",
            routing=routing,
            pool="all",
            decode="step",
            task_embedding_dim=sizes.task_width if routing == "task" else None,
            inference_mode=True,
        )
    except ValueError as error:
        raise UserError(f"{options.folder}: {error}") from error
    reasons = {
        "rank": facts.told("rank"),
        "factors": facts.told("factors"),
        "alpha": f"{facts.told('alpha')}, updates are scaled by alpha / rank = {config.scaling:g}",
        "routing": f"{routing} ({why})",
        "cfs": _why_cfs(cfs),
        "pool, decode": "all, step (what the published code does when it answers)",
    }
    if "num_hidden_layers" not in facts.confirmed:
        reasons["not known"] = (
            "how many decoder layers the base has, without config.json and without its tensors: "
            f"if it has more than {sizes.num_layers}, the checkpoint lacks the last, "
            "and `mixlora eval` will refuse the adapter"
        )
    if problem is not None:
        reasons["not read"] = problem
    return Settings(config, reasons)


def _targets(sizes: Sizes) -> str:
    """Regular expression of the adapted layers' names."""
    projections = sorted({linear.rpartition(".")[2] for linear in sizes.linears})
    if len(projections) == 7:
        return LANGUAGE_MODEL_LINEARS
    return rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(projections)})"


def _add_files(facts: _Facts, folder: Path) -> str | None:
    """Add what the files beside the weights tell; returns why `cmoa_args.bin` tells nothing, if so."""
    problem = None
    try:
        _add(facts, _read_arguments(folder / ARGUMENTS), ARGUMENTS)
    except _Unread as reason:
        problem = str(reason)
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        content = read_json(adapter)
        if "n_experts" in content:  # else some other adapter's
            _add(facts, content, adapter.name)
    model = folder / "config.json"
    if model.is_file():
        content = read_json(model)
        _add(facts, {key: content.get(key) for key in ("cond_type", "mix_mm_projector")}, model.name)
        for key in ("num_hidden_layers", "hidden_size"):
            facts.add(key, content.get(key), model.name)
    return problem


class _Unread(Exception):
    """`cmoa_args.bin` tells nothing; the message says why."""


def _read_arguments(path: Path) -> Mapping[str, Any]:
    """The published code pickles a `types.SimpleNamespace` of numbers, truth values and words."""
    if not path.is_file():
        raise _Unread(f"{path.name} is missing")
    try:
        content = read_pickle(path, allowed=(SimpleNamespace,))
    except UserError as error:
        raise _Unread(str(error)) from error
    content = vars(content) if isinstance(content, SimpleNamespace) else content
    if not isinstance(content, Mapping):
        raise _Unread(f"{path.name} holds no settings by name")
    return content


def _add(facts: _Facts, content: Mapping[str, Any], source: str) -> None:
    for key, needed in _REQUIRED.items():
        value = content.get(key)
        if value is not None and value != needed:
            raise UserError(
                f"{key}={value} in {source}: mixlora has only {key}={needed}, so this cannot be imported"
            )
    for key in (*_NAMES, "lora_dropout", "cond_type"):
        value = content.get(key)
        if key == "cond_type":
            if value is not None and not isinstance(value, str):
                raise UserError(f"{key}={value!r} in {source}: must be a word")
        elif value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{key}={value!r} in {source}: must be a number")
        facts.add(_NAMES.get(key, key.removeprefix("lora_")), value, source)


def _choose_routing(
    facts: _Facts, sizes: Sizes, options: ImportConfig
) -> tuple[str, ConditionalSelection, str]:
    """What selects the factors, with or without CFS, and why."""
    told = facts.get("cond_type")
    shown = _shown(sizes)
    if told is not None and told not in _KINDS:
        raise UserError(
            f"cond_type={facts.told('cond_type')}: can be imported: {', '.join(_KINDS)}; mixlora has no routing by "
            "something else"
        )
    if shown is None and told != "random":
        raise UserError(
            "no selectors among the tensors: adapter_model.bin lacks them, import the pytorch_model.bin of the same "
            "training; if its factors were drawn at random, say --cond-type random"
        )
    if shown is not None and told not in (None, shown):
        raise UserError(
            f"cond_type={facts.told('cond_type')}, but the selectors' tensors are those of {shown}"
        )
    kind = told or shown
    assert kind is not None
    why = (
        f"cond_type={facts.told('cond_type')}"
        if told
        else f"the selectors' tensors; assumed: cond_type={kind}"
    )
    if kind != _WITH_CFS:
        if options.cfs is not None:
            raise UserError(f"--cfs={options.cfs}: this checkpoint has no CFS router; leave the option out")
        return _KINDS[kind], "none", why
    return "instance", options.cfs or "released", why


def _shown(sizes: Sizes) -> str | None:
    """The published name of what the tensors show; None without selectors."""
    if not sizes.routers:
        return None
    if sizes.routers == CONDITIONAL:
        return _WITH_CFS
    return "input" if sizes.task_width is None else "task_embed"


def _why_cfs(cfs: ConditionalSelection) -> str:
    if cfs == "none":
        return "none (the checkpoint has no CFS router)"
    if cfs == "released":
        return "released (the checkpoint's published outputs come from the published code's contraction)"
    return "paper (as asked: Eq. 7, not what the checkpoint was trained and scored with)"


def _missing(key: str, factors: int, problem: str | None) -> str:
    hint = f"; the published script takes 2 * factors = {2 * factors}" if key == "alpha" else ""
    return f"{key}: not known, {problem or 'no file tells it'}; give --{key}{hint}"
