"""`mixlora ask`: one answer on stdout, refusals before the weights, conversations, lines of a pipe, Ctrl-C, factors."""

from __future__ import annotations

import io
import os
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from rich.console import Console

from mixlora_cli.cli import with_key
from mixlora_cli.commands import COMMANDS
from mixlora_cli.config import AnswerConfig, AskConfig, DataConfig, ModelConfig
from mixlora_cli.data.template import IMAGE_MARKER, Turn
from mixlora_cli.errors import UserError
from mixlora_cli.hydra_app import run_command
from mixlora_cli.models.generate import Answer, Decoding, Factors
from mixlora_cli.serving.ask import ask
from mixlora_cli.serving.conversation import Conversation, Stop
from mixlora_cli.serving.drawing import likeness, picture_of
from mixlora_cli.serving.factors import TaskFactors
from mixlora_cli.serving.models import ServedModel, open_models
from mixlora_cli.serving.terminal import Screen, Talk
from tiny_runs import TINY, finished_run


@dataclass(frozen=True)
class Runs:
    """Finished runs of the tiny model, by what they are."""

    root: Path

    def __getitem__(self, name: str) -> str:
        return str(self.root / name)


@pytest.fixture
def runs(data: DataConfig, tmp_path: Path) -> Runs:
    root = tmp_path / "runs"
    finished_run(root / "plain", data, "lora")
    finished_run(root / "instance", data, router_spread=50)
    finished_run(root / "task", data, routing="task", router_spread=50)
    return Runs(root)


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    path = tmp_path / "a cat, grey.png"
    Image.effect_noise((60, 40), 80).convert("RGB").save(path)
    return path


@pytest.fixture
def asked(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`asked("run=a", "What?")`: exit code and what was printed."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        given = ["model=tiny", "answer.max_new_tokens=6", *arguments]
        code = run_command(COMMANDS["ask"], with_key("question", given, COMMANDS["ask"].texts))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def answer_of(run: str, question: str, images: Sequence[Path] = (), **named: Any) -> str:
    """What the run's model says to it, asked without a terminal."""
    (model,) = open_models([run], TINY, base=False)
    turns = [Turn("human", f"{IMAGE_MARKER}\n" * len(images) + question)]
    (answer,) = model.write([model.prepare(turns, images, **named)], [Decoding(6)])
    return answer.text


def test_the_answer_alone_is_on_stdout(runs: Runs, cat: Path, asked: Any) -> None:
    for question, pictures in (
        ("What is 'it', really?", [cat]),
        ("${x} null, [a: b]", []),
        ("Both?", [cat, cat]),
    ):
        expected = answer_of(runs["instance"], question, pictures)
        assert expected
        names = ",".join(f"'{path}'" for path in pictures)
        code, out, err = asked(f"run={runs['instance']}", f"image=[{names}]", question)
        assert (code, out) == (0, f"{expected}\n")
        first, second, *rest = err.splitlines()
        assert (first, second[:16]) == ("loading ...", "loading: done in")
        assert rest == ["cut off after 6 tokens (answer.max_new_tokens)"]


def test_a_phones_picture_is_turned(runs: Runs, tmp_path: Path, asked: Any) -> None:
    upright = Image.effect_noise((90, 60), 90).convert("RGB")
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    answers = {
        name: asked(f"run={runs['instance']}", f"image={tmp_path / name}", "What?")[1]
        for name in ("upright.png", "phone.png")
    }
    assert answers["upright.png"] == answers["phone.png"] != "\n"


def test_task_and_definition(runs: Runs, asked: Any) -> None:
    run = f"run={runs['task']}"
    said = {
        "task": asked(run, "What?", "task=reading"),
        "definition": asked(run, "What?", "definition=Count, please."),
        "neither": asked(run, "What is it?"),
    }
    assert said["task"][1].strip() == answer_of(runs["task"], "What?", task="reading")
    assert said["definition"][1].strip() == answer_of(runs["task"], "What?", definition="Count, please.")
    assert all("task by the question" not in said[name][2] for name in ("task", "definition"))
    assert "task by the question: " in said["neither"][2]
    assert "task=NAME or definition=TEXT say which it is" in said["neither"][2]


def test_side_by_side(runs: Runs, asked: Any) -> None:
    both = f"run=[{runs['plain']},{runs['task']}]"
    code, out, err = asked(both, "adapter=none", "task=reading", "What is it?")
    assert code == 0
    (base,) = open_models([], TINY)
    (untuned,) = base.write([base.prepare([Turn("human", "What is it?")])], [Decoding(6)])
    texts = [
        untuned.text,
        answer_of(runs["plain"], "What is it?"),
        answer_of(runs["task"], "What is it?", task="reading"),
    ]
    assert (
        out
        == "\n\n".join(
            f"{name}:\n{text}" for name, text in zip(("base", "plain", "task"), texts, strict=True)
        )
        + "\n"
    )
    assert len({*texts}) == 3
    assert "task: cut off after 6 tokens" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run={instance}", "image=nowhere.png"], "image=nowhere.png: "),
        (["run={instance}", "image={folder}"], "image="),
        (["run={instance}", "image={text}"], "cannot identify image file"),
        (["run={instance}", "image={cut}"], "corrupt image"),
        (
            ["run={instance}", "image={heic}"],
            "a HEIC picture, which is not read here; save or export it as JPEG",
        ),
        (["run={instance}", "image={huge}"], "at most 64000000 allowed"),
        (["run={task}", "task=readin"], "task=readin: no such task; did you mean reading?"),
        (
            ["run={plain}", "task=reading"],
            "task=reading: no model here selects by the task (LoRA r=2); leave it out",
        ),
        (["run={instance}", "definition=Count."], "definition=Count.: no model here selects by the task"),
        (["run={task}", "task=reading", "definition=Read."], "give one of the two"),
        (["run=nowhere"], "run=nowhere"),
        ([], "give run=<folder of a finished `mixlora train`>"),
        (["run=[{task},{task}]"], "the same run twice"),
        (["run={instance}", "answer.temperature=-1"], "answer.temperature=-1"),
        (["run={instance}", "show=factor"], "show=factor"),
        (["adapter=lora"], "only none, for the untuned base"),
    ],
)
def test_refused_in_one_line_before_the_weights(
    arguments: list[str],
    message: str,
    runs: Runs,
    tmp_path: Path,
    asked: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build(*_: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("mixlora_cli.serving.models.build_base", build)
    files = {name: tmp_path / f"{name}.png" for name in ("text", "cut", "heic", "huge")}
    files["text"].write_text("no picture")
    Image.effect_noise((64, 64), 50).save(files["cut"])
    files["cut"].write_bytes(files["cut"].read_bytes()[:900])
    files["heic"].write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    Image.new("1", (70_000, 1000)).save(files["huge"])
    given = {name: runs[name] for name in ("plain", "instance", "task")} | files | {"folder": tmp_path}
    code, out, err = asked(*(each.format(**given) for each in arguments), "What is it?")
    assert code == 2 and out == ""
    *_, line = err.splitlines()
    assert line.startswith("error: ") and message in line
    assert "Traceback" not in err


def test_a_model_of_text_refuses_pictures(runs: Runs, cat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(_: ModelConfig) -> Any:
        return type("Chat", (), {"processor": None})

    monkeypatch.setattr("mixlora_cli.models.load.build_chat", blind)
    model = ModelConfig("text-only", "hub", "some/model")
    with pytest.raises(UserError, match="text-only reads text alone; leave it out"):
        ask(AskConfig(model, run=[str(Path(runs["plain"]) / "adapter")], image=[str(cat)], question="What?"))


def piped(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_each_line_of_a_pipe_is_a_question(
    runs: Runs, cat: Path, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, "What is it?\n\n</s> not this\nWhich colour?\n")
    code, out, err = asked(f"run={runs['instance']}", f"image='{cat}'")
    expected = [answer_of(runs["instance"], text, [cat]) for text in ("What is it?", "Which colour?")]
    assert out.split("\n") == [" ".join(expected[0].split()), "", " ".join(expected[1].split()), ""]
    assert code == 2
    assert "line 3: control token in the text" in err
    assert "line 4: cut off after 6 tokens" in err
    assert err.splitlines()[-1] == "error: 1 of 3 questions could not be asked; their lines are empty"

    piped(monkeypatch, "What is it?\n")
    code, out, _ = asked(f"run=[{runs['plain']},{runs['instance']}]")
    assert code == 0
    assert [line.split("\t")[0] for line in out.splitlines()] == ["plain", "instance"]


def test_a_line_whose_answer_was_stopped_is_not_printed(
    runs: Runs, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_both, number = Conversation.ask, iter(range(2))

    def stopped_at_the_second(self: Any, text: str, told: Any, stop: Stop, remember: bool = True) -> Any:
        stop.pressed = next(number) == 1
        return ask_both(self, text, told, stop, remember)

    monkeypatch.setattr(Conversation, "ask", stopped_at_the_second)
    piped(monkeypatch, "What is it?\nWhich colour?\nWhich letter?\n")
    code, out, err = asked(f"run={runs['instance']}")
    assert (code, out) == (130, f"{' '.join(answer_of(runs['instance'], 'What is it?', []).split())}\n")
    assert err.splitlines()[-1] == "line 2: stopped"


def opened(runs: Runs, *names: str, **values: Any) -> tuple[list[ServedModel], AskConfig]:
    given = [runs[name] for name in names]
    config = AskConfig(TINY, AnswerConfig(max_new_tokens=6), run=given, **values)
    return open_models(given, TINY, base=False), config


def talked(
    conversation: Conversation, lines: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str]:
    """What a conversation of these lines prints."""
    out, err = io.StringIO(), io.StringIO()
    screen = Screen(conversation, Console(file=out, width=100), Console(file=err, width=100))
    typed = iter(lines)

    def read(_: str = "") -> str:
        try:
            line = next(typed)
        except StopIteration:
            raise EOFError from None
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)
    Talk(screen, with_factors=False).run()
    assert next(typed, None) is None
    return out.getvalue(), err.getvalue()


def test_a_conversation_goes_on_from_its_own_answers(
    runs: Runs, cat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, config = opened(runs, "plain", "instance", system="Be brief.")
    conversation = Conversation(models, config, [cat])
    out, err = talked(conversation, ["What is it?", f"/image {cat}", "And this?"], monkeypatch)
    lines = []
    for model in models:
        turns, pictures = [Turn("system", "Be brief.")], [cat]
        for question in ("What is it?", "And this?"):
            turns.append(Turn("human", f"{IMAGE_MARKER}\n{question}"))
            (answer,) = model.write([model.prepare(turns, pictures)], [Decoding(6)])
            turns.append(Turn("gpt", answer.text))
            pictures = [cat, cat]
        lines.append([turn.text for turn in turns if turn.role == "gpt"])
    (one, two), (three, four) = lines
    assert out == f"plain:\n{one}\n\ninstance:\n{three}\nplain:\n{two}\n\ninstance:\n{four}\n"
    assert "a cat, grey.png, 60 x 40: goes with the next question" in err


def test_commands(runs: Runs, cat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, config = opened(runs, "task")
    conversation = Conversation(models, config)
    escaped = str(cat).replace(" ", "\\ ")
    lines = ["/factors", "/task readng", "/task reading", f"/image {escaped}", "/image", "/image nowhere.png"]
    out, err = talked(conversation, [*lines, "What is it?", "/factors", "/hlp", "/help"], monkeypatch)
    assert out.strip() == answer_of(runs["task"], "What is it?", [cat], task="reading")
    for told in (
        "factors: nothing has been asked yet",
        "error: /task readng: no such task; did you mean reading?",
        "task: reading",
        "pictures for the next question: a cat, grey.png; /image PATH adds one",
        "error: image=nowhere.png: no such file; expected a picture",
        "error: /hlp: no such command; did you mean /help?; /help lists them",
        "tasks of the training by the share of these factors that they select, too (unrelated: 0.33)",
        "  reading   1.00  ████████████████████",
        "  tasks: counting, reading, naming",
    ):
        assert told in err, told
    # What is forgotten is no part of the next prompt.
    out, err = talked(conversation, ["/definition Count.", "/reset", "What is it?", "/quit"], monkeypatch)
    assert out.strip() == answer_of(runs["task"], "What is it?", definition="Count.")
    assert "error" not in err
    _, err = talked(Conversation(*opened(runs, "plain")), ["/task reading", "^C", "^C"], monkeypatch)
    assert "/task: no model here selects by the task" in err and "Ctrl-C once more" in err
    out, _ = talked(
        Conversation(*opened(runs, "plain")), ["^C", "What is it?", "/factors", "^C", "^C"], monkeypatch
    )
    assert out.strip() == answer_of(runs["plain"], "What is it?")


@pytest.mark.parametrize("width", [60, 100])
def test_a_wide_terminal_has_columns(width: int, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    models, config = opened(runs, "plain", "instance")
    monkeypatch.setattr(models[1], "write", lambda *_: [_said(_[2], "dog\x1b[2J", " cat")])
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    screen = Screen(Conversation(models, config), console, Console(file=io.StringIO()))
    assert screen.answer("What is it?")
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).splitlines()]
    assert "\x1b[2J" not in out.getvalue()  # a model may not clear the screen
    if width == 100:
        assert [word for line in lines if "plain" in line for word in line.split()][-2:] == [
            "plain",
            "instance",
        ]
        assert lines[-1].endswith("dog[2J cat")
    else:
        assert lines[0] == "plain:" and lines[-2:] == ["instance:", "dog[2J cat"]


def _said(watch: Any, *pieces: str) -> Answer:
    """An answer of these pieces, each of which is told."""
    for piece in pieces:
        watch(0, piece, None)
    return Answer("".join(pieces), len(pieces), "stop")


def test_the_tab_key(runs: Runs, cat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, config = opened(runs, "task")
    screen = Screen(Conversation(models, config), Console(file=io.StringIO()), Console(file=io.StringIO()))
    monkeypatch.setenv("HOME", str(cat.parent))
    (cat.parent / "a cat [2]").mkdir()
    complete = Talk(screen, with_factors=False)._continuations
    assert complete("/") == ["/image ", "/task ", "/definition ", "/factors", "/reset", "/help", "/quit"]
    assert complete("/task re") == ["/task reading"]
    assert complete("/image ~/a cat") == [f"/image {cat.parent / 'a cat [2]'}/", f"/image {cat}"]
    assert complete("What is") == []


@pytest.mark.parametrize("places", [0, 1, 2])
def test_places_of_pictures(places: int, runs: Runs, cat: Path) -> None:
    models, config = opened(runs, "plain")
    conversation = Conversation(models, config, [cat])
    text = f"What is {IMAGE_MARKER * places}?"
    if places == 2:
        with pytest.raises(
            UserError, match=r"the question has 2 places for pictures \(<image>\) and goes with 1"
        ):
            conversation.ask(text, lambda *_: None, Stop())
        return
    (reply,) = conversation.ask(text, lambda *_: None, Stop())
    shown = f"What is {IMAGE_MARKER}?" if places else f"{IMAGE_MARKER}\nWhat is ?"
    (expected,) = models[0].write([models[0].prepare([Turn("human", shown)], [cat])], [Decoding(6)])
    assert reply.answer.text == expected.text
    assert conversation.pictures == []


def test_a_conversation_that_is_too_long(runs: Runs) -> None:
    models, config = opened(runs, "plain", "instance")
    conversation = Conversation(models, config)
    length = models[1].prepare([Turn("human", "What is it?")]).item.length
    vars(models[1])["context"] = length + 2
    first, second = conversation.ask("What is it?", lambda *_: None, Stop())
    assert (second.answer.num_tokens, second.answer.finish) == (2, "length")
    with pytest.raises(UserError, match=f"instance knows {length + 2} tokens, and what it is asked has"):
        conversation.ask("What is it?", lambda *_: None, Stop())
    assert first.answer.text and conversation.last == []


def test_ctrl_c_stops_the_answer_and_then_leaves(
    runs: Runs, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, config = opened(runs, "plain", "instance")
    conversation = Conversation(models, config)
    before = signal.getsignal(signal.SIGINT)
    pieces: list[str] = []

    def told(_: ServedModel, piece: str) -> None:
        pieces.append(piece)
        if len([piece for piece in pieces if piece]) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    (reply,) = conversation.ask("What is it?", told, stop := Stop())
    assert stop.pressed and reply.answer.finish == "cancelled" and reply.answer.num_tokens < 6
    assert reply.answer.text == "".join(pieces)
    assert signal.getsignal(signal.SIGINT) == before

    def impatient(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        conversation.ask("What is it?", impatient, Stop())
    assert signal.getsignal(signal.SIGINT) == before


def test_show_factors(runs: Runs, asked: Any) -> None:
    code, out, err = asked(f"run=[{runs['instance']},{runs['plain']}]", "show=factors", "What is it?")
    assert code == 0 and "block" not in out
    assert "instance (MixLoRA E=6 r=2)" in err and "plain (LoRA" not in err
    assert "factors 0 to 5 from left to right, two in a character: ⠛ of A, ⣤ of B" in err
    assert "unrelated: 0.33" in err
    assert (Path(runs["instance"]) / "task-factors.npz").is_file()


LAYERS = ["m.layers.0.self_attn.q_proj", "m.layers.0.mlp.up_proj", "m.layers.10.self_attn.q_proj", "m.head"]
FACTORS = Factors(LAYERS, a=[[0, 1], [4, 0], [2, 3], [0, 4]], b=[[1, 2], [4, 0], [0, 3], [3, 4]])


def test_the_picture_of_factors() -> None:
    # Of a character the left column is the even factor: dots 1 and 2 of A, 3 and 7 of B; the right one the odd factor.
    first, *wide = picture_of(FACTORS, 5, width=80).splitlines()
    assert first.startswith("factors 0 to 4 from left to right")
    assert wide == [
        "block q   up  head",
        "    0 ⢻⡄⠀ ⡇⠀⡇",
        "   10 ⡄⢻⠀",
        "              ⠃⢠⡇",
    ]
    narrow = picture_of(FACTORS, 5, width=12).splitlines()
    assert [line for line in narrow if line.startswith("block")] == ["block q", "block up", "block head"]
    assert all(len(line) <= 12 for line in narrow[1:])


def test_likeness_names_the_most_alike_tasks() -> None:
    counts = np.zeros((4, 5, 7), dtype=np.int64)
    for layer, (a, _) in enumerate(zip(FACTORS.a, FACTORS.b, strict=True)):
        counts[layer, a, 3] = 2
    known = TaskFactors(
        [f"task {n}" for n in range(7)], np.full(7, 2), LAYERS, 2, counts, np.zeros_like(counts)
    )
    lines = likeness(FACTORS, known, most=2).splitlines()
    assert lines[0].endswith("(unrelated: 0.40)")
    assert lines[1:] == ["  task 3  0.50  ██████████", "  task 0  0.00", "  and 5 more, down to 0.00"]
