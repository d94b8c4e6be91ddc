"""The settings of an imported adapter: what tensors, files and options agree on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mixlora_cli.config import ImportConfig
from mixlora_cli.errors import UserError
from mixlora_cli.method.config import MixLoraConfig
from mixlora_cli.prepare.weight_files import load_data, read_object
from mixlora_cli.routers import ROUTERS

ARGUMENTS = "cmoa_args.bin"
PUBLISHED_DROPOUT = 0.05
"""The published training code's default; it acts in training only."""

LANGUAGE_MODEL_LINEARS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
"""Every linear layer of LLaVA's language model except `lm_head`; never the vision tower."""

_NAMES = {
    "n_selected": "rank",
    "r": "rank",
    "n_experts": "factors",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
}
_WITH_CFS = "input_lora_a_param"
_ROUTINGS: dict[str, Any] = {
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
_WHY_CFS = {
    "none": "none (the checkpoint has no CFS router)",
    "released": "released (the checkpoint's published outputs come from the published code's contraction)",
    "paper": "paper (as asked: Eq. 7, not what the checkpoint was trained and scored with)",
}


@dataclass(frozen=True)
class Sizes:
    """What the tensors tell of the adapter as a whole."""

    num_layers: int
    linears: tuple[str, ...]
    """Adapted linear layers of each decoder layer, sorted."""
    hidden_size: int | None
    """d_in of the attention's projections, if they are adapted."""
    factors: int
    """The number of factors E."""
    rank: int | None
    """The rank r, which only the CFS router's shape tells."""
    cond_type: str | None
    """The published name of what the routers read; None without routers."""
    task_width: int | None
    """Width of the routers' input where it cannot be the layer's own input; None where it can."""


class _Facts:
    """Values with their sources; two sources that differ are an error."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, str]] = {}
        self.confirmed: set[str] = set()
        """Keys that several sources tell alike."""

    def add(self, source: str, **values: Any) -> None:
        for key, value in values.items():
            if value is None:
                continue
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
    options: ImportConfig, sizes: Sizes, has_projector: bool, base_layers: int | None
) -> tuple[MixLoraConfig, dict[str, str]]:
    """Put together what the tensors, `cmoa_args.bin`, `adapter_config.json`, `config.json` and the options tell.

    Args:
        options: of the command.
        sizes: of the adapter's tensors.
        has_projector: whether a projector comes with them.
        base_layers: decoder layers of the base, where its tensors are there.

    Returns:
        The adapter's configuration, and for people where each setting comes from.

    Raises:
        UserError: two of them contradict each other, a value is missing, or the checkpoint needs a form of the method
            that mixlora does not have.
    """
    facts = _Facts()
    facts.add("the tensors", factors=sizes.factors, rank=sizes.rank)
    facts.add("the tensors", num_hidden_layers=sizes.num_layers, hidden_size=sizes.hidden_size)
    facts.add("the frozen base's tensors", num_hidden_layers=base_layers)
    for key in ("factors", "rank", "alpha", "cond_type"):
        facts.add("--" + key.replace("_", "-"), **{key: getattr(options, key)})
    problem = _add_files(facts, options.folder)
    cond_type, why = _what_selects(facts, sizes.cond_type)
    routing = _ROUTINGS[cond_type]
    if cond_type != _WITH_CFS and options.cfs is not None:
        raise UserError(f"--cfs={options.cfs}: this checkpoint has no CFS router; leave the option out")
    cfs: Any = (options.cfs or "released") if cond_type == _WITH_CFS else "none"
    for key in ("rank", "alpha"):
        if facts.get(key) is None:
            hint = f"; the published script takes 2 * factors = {2 * sizes.factors}" if key == "alpha" else ""
            raise UserError(f"{key}: not known, {problem or 'no file tells it'}; give --{key}{hint}")
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
            task_embedding_dim=sizes.task_width if ROUTERS[routing].source == "task" else None,
            inference_mode=True,
        )
    except ValueError as error:
        raise UserError(f"{options.folder}: {error}") from error
    reasons = {
        "rank": facts.told("rank"),
        "factors": facts.told("factors"),
        "alpha": f"{facts.told('alpha')}, updates are scaled by alpha / rank = {config.scaling:g}",
        "routing": f"{routing} ({why})",
        "cfs": _WHY_CFS[cfs],
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
    return config, reasons


def _targets(sizes: Sizes) -> str:
    """Regular expression of the adapted layers' names."""
    projections = sorted({linear.rpartition(".")[2] for linear in sizes.linears})
    if len(projections) == 7:
        return LANGUAGE_MODEL_LINEARS
    return rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(projections)})"


def _add_files(facts: _Facts, folder: Path) -> str | None:
    """Add what the files beside the weights tell; returns why `cmoa_args.bin` tells nothing, if so."""
    problem = None
    arguments: Any = None
    if not (folder / ARGUMENTS).is_file():
        problem = f"{ARGUMENTS} is missing"
    else:
        try:
            # The published code pickles a `types.SimpleNamespace` of numbers, truth values and words.
            arguments = load_data(folder / ARGUMENTS, allowed=(SimpleNamespace,))
        except UserError as error:
            problem = str(error)
    if isinstance(arguments, SimpleNamespace):
        arguments = vars(arguments)
    if isinstance(arguments, Mapping):
        _add(facts, arguments, ARGUMENTS)
    elif problem is None:
        problem = f"{ARGUMENTS} holds no settings by name"
    adapter, model = folder / "adapter_config.json", folder / "config.json"
    if adapter.is_file():
        content = read_object(adapter)
        if "n_experts" in content:  # else some other adapter's
            _add(facts, content, adapter.name)
    if model.is_file():
        content = read_object(model)
        _add(facts, {key: content.get(key) for key in ("cond_type", "mix_mm_projector")}, model.name)
        sizes = {key: content.get(key) for key in ("num_hidden_layers", "hidden_size")}
        facts.add(model.name, **sizes)
    return problem


def _add(facts: _Facts, content: Mapping[str, Any], source: str) -> None:
    for key, needed in _REQUIRED.items():
        value = content.get(key)
        if value is not None and value != needed:
            raise UserError(
                f"{key}={value} in {source}: mixlora has only {key}={needed}, so this cannot be imported"
            )
    for key, name in _NAMES.items():
        value = content.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{key}={value!r} in {source}: must be a number")
        facts.add(source, **{name: value})
    cond_type = content.get("cond_type")
    if cond_type is not None and not isinstance(cond_type, str):
        raise UserError(f"cond_type={cond_type!r} in {source}: must be a word")
    facts.add(source, cond_type=cond_type)


def _what_selects(facts: _Facts, shown: str | None) -> tuple[str, str]:
    """The published name of what selects the factors, which the tensors show in part, and how it is known."""
    told = facts.get("cond_type")
    if told is not None and told not in _ROUTINGS:
        raise UserError(
            f"cond_type={facts.told('cond_type')}: can be imported: {', '.join(_ROUTINGS)}; mixlora has no routing by "
            "something else"
        )
    if shown is None and told != "random":
        raise UserError(
            "no selectors among the tensors: adapter_model.bin lacks them, import the pytorch_model.bin of the same "
            "training; if its factors were drawn at random, say --cond-type random"
        )
    if told is None:
        return str(shown), f"the selectors' tensors; assumed: cond_type={shown}"
    if shown not in (None, told):
        raise UserError(
            f"cond_type={facts.told('cond_type')}, but the selectors' tensors are those of {shown}"
        )
    return told, f"cond_type={facts.told('cond_type')}"
