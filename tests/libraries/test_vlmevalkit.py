"""VLMEvalKit's own classes ask our server: the answers are those of the model.

They come from ms-vlmeval, as which VLMEvalKit is on PyPI. The whole package imports every model and every data set;
here only the modules that send requests are imported.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from mixlora_cli.data.template import IMAGE_MARKER, Turn
from mixlora_cli.models.generate import Decoding
from serving import Served, png, serving
from tiny_data import tiny_data
from tiny_runs import finished_run

NEW = 6


def _bypassed(name: str, path: str | None = None) -> ModuleType:
    """In the place of a package whose own `__init__` would import too much."""
    module = ModuleType(name)
    if path is not None:
        module.__path__ = [path]
    sys.modules[name] = module
    return module


@pytest.fixture(scope="module")
def kit() -> Iterator[dict[str, Any]]:
    spec = find_spec("vlmeval")
    assert spec is not None and spec.submodule_search_locations is not None
    (folder,) = spec.submodule_search_locations
    _bypassed("vlmeval", folder)
    _bypassed("vlmeval.api", f"{folder}/api")
    _bypassed("vlmeval.api.adapters").build_adapter = None  # type: ignore[attr-defined]  # prompts of certain models
    from vlmeval.api.gpt import GPT4V
    from vlmeval.api.lmdeploy import LMDeployAPI
    from vlmeval.smp.vlm import encode_image_to_base64

    yield {"LMDeployAPI": LMDeployAPI, "GPT4V": GPT4V, "encode": encode_image_to_base64}
    for name in [name for name in sys.modules if name.split(".")[0] == "vlmeval"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    data = tiny_data(folder / "data", train=["counting", "reading"] * 4)
    runs = [
        finished_run(folder / "lora", data, adapter="lora"),
        finished_run(folder / "instance", data, router_spread=50),
        finished_run(folder / "task", data, routing="task", router_spread=50),
    ]
    with serving([run.root for run in runs]) as found:
        yield found


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Files of two pictures, the second smaller than the kit sends any."""
    sizes = ((150, 110), (32, 40))
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.png").write_bytes(png(number, size))
    return [str(tmp_path / f"{number}.png") for number in range(len(sizes))]


def messages(pictures: Sequence[str]) -> list[list[dict[str, str]]]:
    """As the kit's data sets build them."""
    first, second = ({"type": "image", "value": picture} for picture in pictures)
    options = "Options:\nA. a cat\nB. a dog\nAnswer with the letter."
    choices = {"type": "text", "value": f"Question: What is it?\n{options}"}
    text = {"type": "text", "value": "How many legs has a dog?"}
    return [[first, choices], [first, second, choices], [text]]


SYSTEM = "Be brief."
CASES = [
    *(
        (name, model, {})
        for name in ("LMDeployAPI", "GPT4V")
        for model in ("base", "lora", "instance", "task")
    ),
    ("LMDeployAPI", "task", {"task": "reading"}),
    ("LMDeployAPI", "task", {"definition": "Say what it is."}),
]


@pytest.mark.parametrize(("name", "model", "extra"), CASES)
def test_its_classes_get_the_model_s_answers(
    name: str,
    model: str,
    extra: dict[str, str],
    served: Served,
    kit: dict[str, Any],
    pictures: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`--base-url` takes the first class, with `--extra-body`; a configuration file the second."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    settings = {"max_tokens": NEW, "temperature": 0.0, "retry": 1, "verbose": False, "system_prompt": SYSTEM}
    url = f"{served.url}/v1/chat/completions"
    api = kit[name](model=model, api_base=url, key="sk-1", **settings, **extra)
    found, expected = [], []
    for message in messages(pictures):
        found.append(api.generate([dict(part) for part in message]))
        text, files = "", []
        for part in message:
            text += part["value"] if part["type"] == "text" else IMAGE_MARKER
            if part["type"] == "image":
                with Image.open(part["value"]) as image:  # as the kit sends it: larger, as JPEG
                    files.append(base64.b64decode(kit["encode"](image)))
        own = served.models[model]
        question = own.prepare([Turn("system", SYSTEM), Turn("human", text)], files, **extra)
        (answer,) = own.write([question], [Decoding(NEW)])
        expected.append(answer.text or api.fail_msg)  # the kit takes an answer without a word for none
    assert found == expected and len(set(found)) > 1
