"""What serves an export without this package: exact adapters of tasks, the manifest, vLLM's command, PEFT's example."""

from __future__ import annotations

import json
import runpy
import shlex
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from families import make_family
from mixlora_cli.analysis.export.folder import folder_names, own_template
from mixlora_cli.analysis.export.run import export
from mixlora_cli.config import DataConfig, ModelConfig
from mixlora_cli.data.collate import PixelLoader, generation_collator
from mixlora_cli.data.encode import Item, encode_prompts
from mixlora_cli.data.loading import load_records
from mixlora_cli.data.records import parse_record
from mixlora_cli.errors import UserError
from mixlora_cli.models.load import build_base
from mixlora_cli.models.session import Session, find_run
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.training.run_folder import RunFolder
from tiny_runs import RANK, TINY

from .conftest import TASKS, MakeConfig, MakeRun

NOWHERE = DataConfig(name="json", source="json", unseen="not read")
NEW_TOKENS = 8


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content


def remember_definitions(run: RunFolder, data: DataConfig) -> None:
    """As the training leaves them that made its tasks' definitions itself."""
    assert data.metadata is not None
    known = json.loads(Path(data.metadata).read_text())
    run.definitions.write_text(json.dumps({task: known[task]["definition"] for task in TASKS}))


def prompts(data: DataConfig) -> list[Item]:
    return list(encode_prompts(load_records(data, "train"), build_tiny().chat).items)


class Answers:
    """Logits at the last token of each prompt, and the greedy answers behind it."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], **more: Any) -> None:
        with torch.inference_mode():
            whole = model(**batch, **more).logits
            self.logits: Tensor = whole[batch["attention_mask"].bool()]
            self.tokens: Tensor = model.generate(  # type: ignore[operator]
                **batch, **more, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_adapter_by_task_is_a_plain_lora_of_each_task(
    dtype: torch.dtype, make_run: MakeRun, make_config: MakeConfig, no_model_passes: None
) -> None:
    """Its rows are the pools' own; answers are equal token by token, logits to rounding: in fp64 a billion times less.

    No data is there to be read, and no instance goes through the model.
    """
    run, data = make_run(routing="task"), make_config(Path()).data
    remember_definitions(run, data)
    folder = export(make_config(run.root, per_task=True, evaluate=False, data=NOWHERE))
    manifest = manifest_of(folder)
    names = {each["tasks"][0]: each["folder"] for each in manifest["adapters"]}
    assert list(names) == [*TASKS] and all(each["exact"] for each in manifest["adapters"])

    items = prompts(data)
    if dtype == torch.float64:  # whose masks overflow: no padding
        lengths = Counter({(item.length, item.task): item.length for item in items}.values())
        items = [item for item in items if item.length == lengths.most_common(1)[0][0]]
    assert {item.task for item in items} == {*TASKS}
    base = build_tiny(dtype=dtype)
    routing = find_run(str(run.root), TINY).task_routing(data, TASKS)
    assert routing is not None
    session = Session(base, dtype, cache_features=False, adapter=run.adapter, routing=routing)
    session.model.to(dtype)
    collate = generation_collator(base.chat, PixelLoader(base.chat), session.embeddings)
    batch = {name: t.to(dtype) if t.is_floating_point() else t for name, t in collate(items).items()}
    mixlora = Answers(session.model, batch)
    assert session.tuner is not None
    selections = session.tuner.selections()
    pools = load_file(run.adapter / "adapter_model.safetensors")
    for task, name in names.items():
        row = next(place for place, item in enumerate(items) if item.task == task)
        written = load_file(folder / name / "adapter_model.safetensors")
        assert len(written) == 2 * len(selections)
        for layer, chosen in selections.items():
            prefix = f"base_model.model.{layer}"
            rows_a = pools[f"{prefix}.mixlora_factors_a.weight"][chosen.index_a[row]]
            rows_b = pools[f"{prefix}.mixlora_factors_b.weight"][chosen.index_b[row]]
            assert torch.equal(written[f"{prefix}.lora_A.weight"], rows_a)
            assert torch.equal(written[f"{prefix}.lora_B.weight"], rows_b.T)
        settings = PeftConfig.from_pretrained(str(folder / name))
        assert isinstance(settings, LoraConfig)
        assert settings.r == RANK and settings.lora_alpha / settings.r == session_scaling(session)
    session.take_off()
    without = Answers(base.model, plain(batch))
    assert (without.logits - mixlora.logits).abs().max() > 0.1
    assert not torch.equal(without.tokens, mixlora.tokens)

    model = PeftModel.from_pretrained(base.model, str(folder / names[TASKS[0]]), names[TASKS[0]])
    model.load_adapter(str(folder / names[TASKS[1]]), names[TASKS[1]])
    model.to(dtype).eval()
    atol = 1e-4 if dtype == torch.float32 else 1e-11
    mixed = Answers(model, plain(batch), adapter_names=[names[item.task] for item in items])
    torch.testing.assert_close(mixed.logits, mixlora.logits, rtol=0, atol=atol)
    assert torch.equal(mixed.tokens, mixlora.tokens)
    for task, name in names.items():
        model.set_adapter(name)
        rows = torch.tensor([item.task == task for item in items])
        alone = Answers(model, plain(batch))
        assert torch.equal(alone.tokens[rows], mixlora.tokens[rows])
        assert not torch.equal(alone.tokens[~rows], mixlora.tokens[~rows])


def session_scaling(session: Session) -> float:
    assert session.tuner is not None
    scaling: float = session.tuner.peft_config["default"].scaling
    return scaling


def plain(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "task_embeddings"}


@pytest.fixture
def no_model_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No instance is read during an export."""

    def read(*_: object) -> None:
        raise AssertionError("instances were read")

    monkeypatch.setattr("mixlora_cli.analysis.export.run._collect", read)
    monkeypatch.setattr("mixlora_cli.analysis.export.centroids.read_selections", read)
    monkeypatch.setattr("mixlora_cli.analysis.export.run.load_records", read)


def test_tasks_come_from_the_training_from_their_file_or_by_name(
    make_run: MakeRun, make_config: MakeConfig
) -> None:
    run = make_run(routing="task")
    data = make_config(run.root).data
    with_file = replace(NOWHERE, metadata=data.metadata)

    def tasks(of: Path, **values: Any) -> list[str]:
        output = str(run.root / "export")
        config = make_config(of, per_task=True, evaluate=False, overwrite=True, output_dir=output, **values)
        each = manifest_of(export(config))["adapters"]
        assert [one["definition"] for one in each] == [f"Do {one['tasks'][0]}." for one in each]
        return [one["tasks"][0] for one in each]

    # The training's data names them; without it, the file that is given, and which records there are.
    assert tasks(run.root, data=NOWHERE) == [*TASKS]
    assert tasks(run.adapter, data=data) == [*TASKS]
    assert tasks(run.adapter, data=with_file) == [*TASKS, "trained alone"]
    assert tasks(run.root, data=with_file, tasks=["trained alone", TASKS[0]]) == ["trained alone", TASKS[0]]
    with pytest.raises(UserError, match=r"1 of 1 tasks have none \(elsewhere\)"):
        tasks(run.root, data=with_file, tasks=["elsewhere", TASKS[0]])
    with pytest.raises(UserError, match="the training's tasks are not known here"):
        tasks(run.adapter, data=NOWHERE)


@pytest.mark.parametrize("name", ["llava", "gemma3", "phi3"])
def test_any_family_is_served(
    name: str,
    tmp_path: Path,
    make_run: MakeRun,
    make_config: MakeConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command names what the files hold, and the example answers with every adapter as MixLoRA does."""
    checkpoint = make_family(name, tmp_path / name)
    family = ModelConfig(
        name, "hub", str(checkpoint), attn_implementation="sdpa", chat_template={"llava": "v1"}.get(name)
    )
    run = make_run(routing="task", model=family)
    data = make_config(run.root).data
    folder = export(make_config(run.root, per_task=True, evaluate=False, data=data))
    manifest = manifest_of(folder)
    folders = [each["folder"] for each in manifest["adapters"]]
    script = (folder / "serve_vllm.sh").read_text()
    words = shlex.split(script.splitlines()[-1])
    assert words[:4] == ["exec", "vllm", "serve", str(checkpoint.resolve())] and words[-1] == "$@"
    assert words[-4:-1] == ["--lora-modules", *(f"{each}={each}" for each in folders)]
    flags = dict(pairwise(words))
    assert flags["--max-lora-rank"] == "8" and flags["--max-cpu-loras"] == "2"
    assert flags["--chat-template"] == "chat_template.jinja"
    assert flags["--chat-template-content-format"] == ("string" if name == "phi3" else "openai")
    assert "--enable-tower-connector-lora" not in words
    assert " ".join(words[1:-1]) in capsys.readouterr().err.replace("'", "")

    found = runpy.run_path(str(folder / "peft_example.py"))
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["__base__", *folders]
    base = build_base(family)
    routing = find_run(str(run.root), family).task_routing(data, TASKS)
    session = Session(base, torch.float32, cache_features=False, adapter=run.adapter, routing=routing)
    turns = [{"from": "human", "value": "Say yes or no."}, {"from": "gpt", "value": "yes"}]
    for place, task in enumerate(TASKS):
        (item,) = encode_prompts([parse_record(0, {"conversations": turns}, None, task)], base.chat).items
        assert found["inputs"]["attention_mask"][place + 1].all()
        assert found["inputs"]["input_ids"][place + 1].tolist() == list(item.input_ids)
        batch = generation_collator(base.chat, PixelLoader(base.chat), session.embeddings)([item])
        with torch.inference_mode():
            tokens = session.model.generate(**batch, do_sample=False, max_new_tokens=32)  # type: ignore[operator]
        answer = base.tokenizer.decode(tokens[0, item.length :], skip_special_tokens=True)
        assert found["answers"][place + 1] == answer
    assert len(set(found["answers"])) == 3


def test_vllm_is_offered_nothing_that_it_refuses(
    tmp_path: Path, make_run: MakeRun, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(routing="task")
    export(make_config(run.root, per_task=True, evaluate=False))
    assert "no command for vLLM: model=tiny is built into" in capsys.readouterr().err
    assert not (run.root / "export" / "serve_vllm.sh").exists()
    family = ModelConfig("llava", "hub", str(make_family("llava", tmp_path / "llava")), chat_template="v1")
    run = make_run(routing="task", model=family, train_also=["multi_modal_projector"])
    export(make_config(run.root, per_task=True, evaluate=False, overwrite=True))
    assert "multi_modal_projector: trained whole, and vLLM" in capsys.readouterr().err
    assert not (run.root / "export" / "serve_vllm.sh").exists()
    assert (run.root / "export" / "peft_example.py").exists()


@pytest.mark.parametrize("template", ["v1", "smollm", "onevision"])
def test_the_written_template_needs_none_of_our_options(template: str) -> None:
    chat = build_tiny(template).chat
    chat = replace(chat, template=replace(chat.template, options={"polite": True, "words": ["a", "'b'"]}))
    shown = replace(chat.template, source=chat.template.source + "{{ polite }} {{ words[1] }}")
    chat = replace(chat, template=shown)
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    ]
    options = {"tokenize": False, "add_generation_prompt": True}
    tokenizer = chat.tokenizer
    ours = tokenizer.apply_chat_template(
        messages,
        chat_template=shown.source,
        image_token=chat.image_token,
        **{**options, **shown.options},
    )
    begin = "".join(tokenizer.convert_ids_to_tokens(chat.begin))
    assert bool(begin) == (template == "v1")
    written = tokenizer.apply_chat_template(messages, chat_template=own_template(chat), **options)
    assert written.removeprefix(begin).removeprefix(" ") == ours and written.startswith(begin)


def test_prompts_that_servers_read_otherwise_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = build_tiny().chat
    own_template(chat)
    assert not capsys.readouterr().err
    other = Item([1, 2, 3], [], (), "", 0)
    monkeypatch.setattr("mixlora_cli.analysis.export.folder.encode_prompt", lambda *_: other)
    assert chat.template.source in own_template(chat)
    assert "prompts have other tokens at the borders of turns" in capsys.readouterr().err


def test_names_of_adapters_are_safe_and_distinct() -> None:
    names = folder_names(["a/b", "a b", "A_b", "..", "visual+question", "é", "items", "training", "o", "-x"])
    assert names == {
        "a/b": "a_b",
        "a b": "a_b-2",
        "A_b": "A_b-3",
        "..": "task",
        "visual+question": "visual+question",
        "é": "é",
        "items": "items-2",
        "training": "training-2",
        "o": "o-2",
        "-x": "x",
    }
