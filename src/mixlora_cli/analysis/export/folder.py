"""The folder of an export: static LoRA adapters in PEFT's format, and what serves them without this package.

- <name>/: an adapter, for stock PEFT and for vLLM
- manifest.json: base model, adapters, which task each is for
- chat_template.jinja: the prompt's text as the adapter was trained on it, begin-of-sequence token and options included
- serve_vllm.sh: base and all adapters behind vLLM's API; not for a built-in base, nor where vLLM would refuse them
- peft_example.py: a batch whose rows have different adapters, with transformers and PEFT alone; not for a built-in base
- router.json: names an adapter by a request's text (export.centroids)
- export.json: what the export loses, and the comparison
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mixlora_cli.analysis.export.fit import Energies, StaticLora
from mixlora_cli.config import ModelConfig
from mixlora_cli.data.chat import Chat
from mixlora_cli.data.encode import encode_prompt
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import Turn
from mixlora_cli.errors import UserError
from mixlora_cli.method.config import MixLoraConfig
from mixlora_cli.method.model import MixLoraModel
from mixlora_cli.models.adapters import ADAPTER_WEIGHTS
from mixlora_cli.models.definitions import TaskRouting
from mixlora_cli.models.session import refuse_adapter_folder
from mixlora_cli.output import LOCK
from mixlora_cli.progress import say
from mixlora_cli.store import readable_as_usual, write_json, write_text

FILE_NAME = "export.json"
FORMAT = "mixlora-export/1"
MANIFEST, TEMPLATE, VLLM, EXAMPLE = "manifest.json", "chat_template.jinja", "serve_vllm.sh", "peft_example.py"
ROUTER = "router.json"
ALL_INPUTS = "adapter"
"""Folder of the adapter that is fitted to all inputs together."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be (vLLM 0.33)."""
_AT_ONCE = 8  # adapters that may share a batch of vLLM, which reserves memory for each


@dataclass(frozen=True)
class Exported:
    """One static adapter, and what it is for."""

    folder: str
    tasks: list[str]
    """Empty: any input."""
    instances: dict[str, int]
    """How many of each task it was fitted to; empty where it was fitted to none."""
    lora: StaticLora

    @property
    def energy(self) -> Energies:
        """All layers together."""
        return reduce(Energies.__add__, self.lora.energies.values())


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise UserError unless an export may be written into `folder`."""
    refuse_adapter_folder(folder)
    if not folder.is_dir() or {path.name for path in folder.iterdir()} <= {LOCK}:
        return
    if not (folder / FILE_NAME).is_file():
        raise UserError(f"output_dir={folder} holds files that no export wrote; give a folder of its own")
    if not overwrite:
        raise UserError(
            f"output_dir={folder} holds an export; choose another output_dir=, or overwrite=true to replace it"
        )
    _adapters_in(folder / FILE_NAME)


def begin_output(folder: Path, adapters: Sequence[str]) -> None:
    """Remove an earlier export and note the names of the adapters to come; other files stay."""
    file = folder / FILE_NAME
    if file.is_file():
        for name in _adapters_in(file):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (MANIFEST, TEMPLATE, VLLM, EXAMPLE, ROUTER):
            (folder / name).unlink(missing_ok=True)
    write_json(file, {"format": FORMAT, "finished": False, "adapters": [{"folder": n} for n in adapters]})


def _adapters_in(file: Path) -> list[str]:
    """Names of the adapter folders that an export wrote beside `file`; UserError where it is another's file."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(content["format"])
        names = [str(entry["folder"]) for entry in content["adapters"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is no file of this version's export: move it away, or give another output_dir="
        ) from error
    return [name for name in names if name == Path(name).name and name not in ("", ".", "..")]


def folder_names(tasks: Iterable[str]) -> dict[str, str]:
    """A folder name for each task, which is the adapter's name for servers, too; no two are alike.

    Characters that file systems and command lines dislike become "_". PEFT keeps adapters as modules by their names:
    those that a `ModuleDict` has for itself, or that are part of "lora_", would not load.
    """
    names: dict[str, str] = {}
    for task in tasks:
        plain = name = re.sub(r"[^\w+-]+", "_", task).strip("_-") or "task"
        taken = {other.lower() for other in names.values()}
        number = 2
        while name.lower() in taken or hasattr(nn.ModuleDict(), name) or name in "lora_":
            name, number = f"{plain}-{number}", number + 1
        names[task] = name
    return names


def write_lora(folder: Path, adapter: MixLoraConfig, lora: StaticLora, source: Path) -> None:
    """Write a static LoRA for the layers that `adapter`, in `source`, has.

    What is not the method's own in `source` goes along: a projector that was trained with it.
    """
    targets = adapter.target_modules or lora.factors  # else PEFT knew them by its table of architectures
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else sorted(targets),
        exclude_modules=adapter.exclude_modules,
        layers_to_transform=adapter.layers_to_transform,
        layers_pattern=adapter.layers_pattern,
        modules_to_save=adapter.modules_to_save,
        base_model_name_or_path=adapter.base_model_name_or_path,
        revision=adapter.revision,
        inference_mode=True,
    )
    config.auto_mapping = adapter.auto_mapping
    with safe_open(source / ADAPTER_WEIGHTS, framework="pt") as trained:
        others = [name for name in trained.keys() if f".{MixLoraModel.prefix}" not in name]  # noqa: SIM118
        weights = {name: trained.get_tensor(name) for name in others}
    for layer, (lora_a, lora_b) in lora.factors.items():
        weights[f"base_model.model.{layer}.lora_A.weight"] = lora_a
        weights[f"base_model.model.{layer}.lora_B.weight"] = lora_b
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    readable_as_usual(folder / ADAPTER_WEIGHTS)


def write_serving(
    folder: Path,
    model: ModelConfig,
    checkpoint: str,
    chat: Chat,
    exports: Sequence[Exported],
    routing: TaskRouting | None,
    adapter: MixLoraConfig,
    beside_decoder: bool,
    router: str | None,
) -> str:
    """Write `manifest.json` and what serves the adapters; returns the command for vLLM, or why there is none.

    Args:
        folder: of the export.
        model: the base's configuration.
        checkpoint: hub id or folder of the base.
        chat: of the base.
        exports: the adapters.
        routing: definitions of their tasks, where the adapter routes by them.
        adapter: what was exported.
        beside_decoder: whether layers outside of the language model are adapted.
        router: name of the router's file.
    """
    # A folder on this machine is found from wherever the script is called.
    checkpoint = str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else checkpoint
    targets = adapter.target_modules
    manifest = {
        "format": "mixlora-manifest/1",
        "base": checkpoint,
        "revision": model.revision,
        "target_modules": targets if targets is None or isinstance(targets, str) else sorted(targets),
        "modules_to_save": adapter.modules_to_save,
        "chat_template": TEMPLATE,
        "router": router,
        "adapters": [entry_of(each, routing) for each in exports],
    }
    write_json(folder / MANIFEST, manifest)
    write_text(folder / TEMPLATE, own_template(chat))
    if model.source in ("mini", "tiny"):
        return f"no command for vLLM: model={model.name} is built into this package, and no checkpoint that it reads"
    write_text(folder / EXAMPLE, _example(chat.processor is not None))
    rank = max(each.lora.rank for each in exports)
    if reason := _refused_by_vllm(rank, adapter):
        return f"no command for vLLM: {reason}"
    command = _vllm(model, checkpoint, chat, [each.folder for each in exports], rank, beside_decoder)
    head = "#!/bin/sh\n# Flags as of vLLM 0.33. A request's `model` is an adapter's name. Further flags go behind.\n"
    write_text(folder / VLLM, f'{head}cd "$(dirname "$0")" || exit 1\nexec {command} "$@"\n')
    return command


def entry_of(export: Exported, routing: TaskRouting | None) -> dict[str, Any]:
    """What a manifest says of an adapter, with its task's definition if there is one."""
    entry: dict[str, Any] = {
        "folder": export.folder,
        "tasks": export.tasks,
        "rank": export.lora.rank,
        "alpha": export.lora.alpha,
        "exact": export.lora.exact,
    }
    if routing is not None and len(export.tasks) == 1:
        entry["definition"] = routing.definitions[export.tasks[0]]
    return entry


def own_template(chat: Chat) -> str:
    """The chat's template as servers take it, who know neither our options nor what goes before the text.

    They tokenise a prompt as one text. Where that gives other tokens than training read, it is said.
    """
    values = {"image_token": chat.image_token} if chat.image_token else {}
    # Jinja reads texts, numbers, lists and dictionaries as Python writes them.
    known = "".join(
        f"{{% set {key} = {value!r} %}}" for key, value in {**values, **chat.template.options}.items()
    )
    begin = "".join(chat.tokenizer.convert_ids_to_tokens(chat.begin))
    # The line break behind a comment is taken away, so the template itself begins a line as before.
    rest = f"{known}{{# The prompts of training. #}}\n{chat.template.source}"
    # Some tokenizers begin a text with a space, but not what follows on a control token.
    starts = (begin, f"{begin} ") if begin else ()
    candidates = [f"{{{{ {start!r} }}}}{rest}" for start in starts] or [rest]
    record = Record(0, "", "", (), (Turn("human", "Say yes or no."), Turn("gpt", "yes")))
    wanted = list(encode_prompt(record, chat).input_ids)
    for template in candidates:
        if _tokens(record, template, chat) == wanted:
            return template
    say(
        f"note: {TEMPLATE}: as one text, prompts have other tokens at the borders of turns than training read them with"
    )
    return candidates[0]


def _tokens(record: Record, template: str, chat: Chat) -> list[int]:
    """What a server reads of a record's first question."""
    text = record.conversation[0].text
    content: Any = [{"type": "text", "text": text}] if chat.processor else text
    prompt = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
    )
    tokens: list[int] = chat.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return tokens


def _refused_by_vllm(rank: int, adapter: MixLoraConfig) -> str | None:
    if adapter.modules_to_save:
        return f"{', '.join(adapter.modules_to_save)}: trained whole, and vLLM takes low-rank weights alone"
    if rank > VLLM_RANKS[-1]:
        return f"rank {rank} is more than {VLLM_RANKS[-1]}, the most that it takes; give export.rank"
    return None


def _vllm(
    model: ModelConfig, checkpoint: str, chat: Chat, names: Sequence[str], rank: int, beside_decoder: bool
) -> str:
    flags: dict[str, Any] = {
        "--revision": model.revision,
        "--max-lora-rank": min(each for each in VLLM_RANKS if each >= rank),
        "--max-loras": min(len(names), _AT_ONCE),
        "--max-cpu-loras": len(names),
        "--chat-template": TEMPLATE,
        "--chat-template-content-format": "openai" if chat.processor else "string",
        "--mm-processor-kwargs": json.dumps(model.picture_options) if model.picture_options else None,
    }
    words = ["vllm", "serve", checkpoint, "--enable-lora"]
    words += ["--enable-tower-connector-lora"] if beside_decoder else []
    words += [str(word) for flag, value in flags.items() if value is not None for word in (flag, value)]
    return shlex.join([*words, "--lora-modules", *(f"{name}={name}" for name in names)])


def _example(reads_pictures: bool) -> str:
    auto, reader = (
        ("AutoModelForImageTextToText", "AutoProcessor")
        if reads_pictures
        else ("AutoModelForCausalLM", "AutoTokenizer")
    )
    inner = "processor.tokenizer" if reads_pictures else "processor"
    turn = '[{"type": "text", "text": question}]' if reads_pictures else "question"
    pictures = (
        '# With pictures: {"type": "image"} before the text of a turn, and images=[[picture, ...], ...] below, a list '
        "for each row.\n"
        if reads_pictures
        else ""
    )
    return f'''"""A batch whose rows have different adapters, with transformers and PEFT: python peft_example.py"""

import json
from pathlib import Path

from peft import PeftModel
from transformers import {auto}, {reader}

folder = Path(__file__).resolve().parent
manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
source = {{"pretrained_model_name_or_path": manifest["base"], "revision": manifest["revision"] or "main"}}
processor = {reader}.from_pretrained(**source)
tokenizer = {inner}
tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
model = {auto}.from_pretrained(**source, dtype="auto")

names = [adapter["folder"] for adapter in manifest["adapters"]]
model = PeftModel.from_pretrained(model, folder / names[0], adapter_name=names[0])
for name in names[1:]:
    model.load_adapter(folder / name, adapter_name=name)
model.eval()

# The adapter of each row, and what it is asked; "__base__" is none.
rows = [(name, "Say yes or no.") for name in ["__base__", *names[:3]]]
{pictures}turns = [[{{"role": "user", "content": {turn}}}] for _, question in rows]
template = (folder / manifest["chat_template"]).read_text(encoding="utf-8")
texts = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True)
inputs = processor(text=texts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
answers = model.generate(
    **inputs, adapter_names=[name for name, _ in rows], do_sample=False, max_new_tokens=32
)
answers = tokenizer.batch_decode(answers[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
for (name, question), answer in zip(rows, answers, strict=True):
    print(f"{{name}}: {{answer.strip()}}")
'''
