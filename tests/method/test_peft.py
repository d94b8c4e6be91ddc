"""The method behaves as any other PEFT method: attach, train, save, load, name, switch, disable."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from method_models import adapt, adapted_layers, batch, build_llava, logits, strengthen
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from mixlora_cli import MixLoraConfig
from mixlora_cli.method.layer import CANNOT_MERGE, MixLoraLinear

SOURCE = Path(__file__).parents[2] / "src"


def in_a_fresh_process(code: str, *arguments: str) -> str:
    """Standard output of `code`, run where nothing is imported yet."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_untrained_adapter_changes_nothing(prompts) -> None:
    base, inputs = build_llava(), batch(prompts)
    expected = logits(base, inputs)
    model = get_peft_model(base, MixLoraConfig(r=2, factors=8))
    assert torch.equal(logits(model, inputs), expected)


def test_initial_values() -> None:
    base = nn.Sequential(nn.Linear(400, 30))
    model = get_peft_model(base, MixLoraConfig(r=3, factors=50, target_modules=["0"]))
    own = {name.split("mixlora_")[1]: p for name, p in model.named_parameters() if "mixlora_" in name}
    bound = 400**-0.5  # Kaiming uniform with a = sqrt 5, and the default of nn.Linear
    for name in ("factors_a", "router_a", "router_b", "router_ab"):
        values = own[f"{name}.default.weight"]
        assert 0.99 * bound < values.abs().max() <= bound, name
        assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
    assert own["factors_b.default.weight"].abs().max() == 0
    assert {name: tuple(p.shape) for name, p in own.items()} == {
        "factors_a.default.weight": (50, 400),
        "factors_b.default.weight": (50, 30),
        "router_a.default.weight": (50, 400),
        "router_b.default.weight": (50, 400),
        "router_ab.default.weight": (3, 400, 50),
    }


def test_the_scale_is_alpha_over_r() -> None:
    assert MixLoraConfig(r=4, factors=16).scaling == 8
    assert MixLoraConfig(r=4, factors=16, alpha=2).scaling == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 8, "factors": 4}, "r=8: must be <= factors=4"),
        ({"r": 0}, "r=0: must be >= 1"),
        ({"factors": 0}, "factors=0: must be >= 1"),
        ({"alpha": 0.0}, "alpha=0.0: must be > 0"),
        ({"dropout": 1.0}, r"dropout=1.0: must be in \[0, 1\)"),
        ({"cfs": "papre"}, "cfs=papre: must be one of paper, released, none"),
        ({"router_grad": "ste"}, "router_grad=ste: must be one of none, straight_through"),
        ({"routing": "token"}, "routing=token: must be one of instance, task, random"),
        ({"pool": "image"}, "pool=image: must be one of all, prompt, text"),
        ({"pairing": "loose"}, "pairing=loose: must be one of separate, tied"),
        ({"per": "model"}, "per=model: must be one of layer, block"),
        ({"router_init": "clusters"}, "router_init=clusters: needs normalize=True"),
        (
            {"routing": "task", "normalize": True},
            "normalize=True: goes with routing=instance; routing=task has False",
        ),
        ({"routing": "random", "per": "block"}, "per=block: goes with routing=instance"),
        (
            {"routing": "random", "pairing": "tied"},
            "pairing=tied: needs routers, which routing=random has not",
        ),
        ({"decode": "never"}, "decode=never: must be one of prefill, step"),
        ({"task_embedding_dim": 0}, "task_embedding_dim=0: must be >= 1"),
    ],
)
def test_a_bad_field_is_named(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        MixLoraConfig(**fields)


def test_only_the_language_model_is_adapted() -> None:
    model = get_peft_model(build_llava(), MixLoraConfig(r=2, factors=8))
    adapted = adapted_layers(model)
    assert len(adapted) == 14
    assert all(".language_model.layers." in name for name in adapted)
    with pytest.raises(ValueError, match=r"only torch\.nn\.Linear can be adapted"):
        get_peft_model(build_llava(), MixLoraConfig(target_modules=["embed_tokens"]))


def test_trainable_parameters(capsys) -> None:
    """Routers count where they learn; the base never does."""
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)] * 2
    factors = sum(8 * (d_in + d_out) for d_in, d_out in shapes)
    routers = sum(2 * 8 * d_in + 2 * d_in * 8 for d_in, _ in shapes)
    fixed = get_peft_model(build_llava(), MixLoraConfig(r=2, factors=8))
    assert fixed.get_nb_trainable_parameters()[0] == factors
    fixed.print_trainable_parameters()
    assert f"trainable params: {factors:,}" in capsys.readouterr().out
    learning = get_peft_model(build_llava(), MixLoraConfig(r=2, factors=8, router_grad="straight_through"))
    assert learning.get_nb_trainable_parameters()[0] == factors + routers


@pytest.mark.parametrize("router_grad", ["none", "straight_through"])
def test_a_training_step_moves_the_adapter_alone(prompts, router_grad) -> None:
    model = adapt(build_llava(), router_grad=router_grad).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    inputs = batch(prompts, side="right")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is None for name, p in model.named_parameters() if "mixlora_" not in name)
    optimizer.step()
    for name, p in model.named_parameters():
        learns = "factors" in name or ("router" in name and router_grad == "straight_through")
        assert torch.equal(p, before[name]) != learns, name


def test_named_adapters_switch_disable_and_delete(prompts) -> None:
    inputs = batch(prompts)
    base = build_llava()
    plain = logits(base, inputs)
    model = adapt(base)
    first = logits(model, inputs)
    model.add_adapter("other", MixLoraConfig(r=3, factors=5, cfs="none", decode="step"))
    assert torch.equal(logits(model, inputs), first)
    model.set_adapter("other")
    assert torch.equal(logits(model, inputs), plain)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"other"}
    strengthen(model, seed=5)
    second = logits(model, inputs)
    model.set_adapter("default")
    changed = logits(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), plain)
    assert torch.equal(logits(model, inputs), changed)
    assert (second - changed).abs().max() > 0.1
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if "factors" in n and ".default." in n}
    model.delete_adapter("other")
    assert not any("other" in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model, inputs), changed)


def test_merging_is_refused_with_the_reason(make_model) -> None:
    model = make_model()
    for refused in (model.merge_adapter, model.unmerge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="depends on the input"):
            refused()
    assert "Keep the adapter beside the base" in CANNOT_MERGE


def test_unload_gives_the_base_back(prompts) -> None:
    base, inputs = build_llava(), batch(prompts)
    plain = logits(base, inputs)
    bare = adapt(base).unload()
    assert bare is base and torch.equal(logits(bare, inputs), plain)
    assert not any(isinstance(m, MixLoraLinear) or m._forward_pre_hooks for m in bare.modules())
    assert "generate" not in vars(bare)


def test_two_models_and_a_copy_do_not_meet(make_model, prompts) -> None:
    inputs, shorter = batch(prompts), batch(prompts[:1])
    one, other = make_model(), make_model(seed=1)
    alone = logits(one, inputs), logits(other, shorter)
    twin = copy.deepcopy(one)
    assert twin.base_model.context is not one.base_model.context
    for layer in twin.modules():
        if isinstance(layer, MixLoraLinear):
            assert layer.context is twin.base_model.context
    assert torch.equal(logits(one, inputs), alone[0])
    assert torch.equal(logits(other, shorter), alone[1])
    assert torch.equal(logits(twin, inputs), alone[0])
    # A pass of one model in the middle of another's.
    layer = one.get_base_model().model.language_model.layers[0].mlp

    def interrupt(*_: object) -> None:
        logits(other, shorter)

    handle = layer.register_forward_hook(interrupt)
    assert torch.equal(logits(one, inputs), alone[0])
    handle.remove()
    strengthen(twin, seed=9)
    first = twin.generate(**shorter, max_new_tokens=3)
    assert twin.base_model.context.root is twin.get_base_model()
    assert torch.equal(logits(one, inputs), alone[0])
    assert not torch.equal(logits(twin, inputs), alone[0]) and first.shape[0] == 1


# peft is imported first here; the two other orders are tested below.
RELOAD = """
import json, sys
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration
import mixlora_cli

folder = sys.argv[1]
base = LlavaForConditionalGeneration.from_pretrained(folder + "/base", attn_implementation="eager").eval()
model = PeftModel.from_pretrained(base, folder + "/adapter").eval()
inputs = load_file(folder + "/inputs.safetensors")
with torch.no_grad():
    logits = model(**inputs).logits
selection = model.base_model.selections()["model.language_model.layers.1.mlp.down_proj"]
print(json.dumps([(logits - load_file(folder + "/expected.safetensors")["logits"]).abs().max().item(),
                  selection.index_a.tolist(), selection.index_b.tolist(), mixlora_cli.MixLoraConfig.__name__]))
"""


@pytest.fixture
def saved(tmp_path, prompts) -> tuple[Path, PeftModel, dict[str, Tensor]]:
    """Base, adapter, inputs and expected logits on disk."""
    from safetensors.torch import save_file

    base, inputs = build_llava(), batch(prompts)
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
    model = adapt(base, router_grad="straight_through", target_modules=r".*language_model.*_proj")
    save_file(inputs, tmp_path / "inputs.safetensors")
    save_file({"logits": logits(model, inputs)}, tmp_path / "expected.safetensors")
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path, model, inputs


def test_saved_files(saved) -> None:
    folder, model, _ = saved
    fields = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    expected = {
        "peft_type": "MIXLORA",
        "r": 2,
        "factors": 8,
        "alpha": None,
        "cfs": "paper",
        "router_grad": "straight_through",
        "routing": "instance",
        "pool": "all",
        "decode": "prefill",
    }
    assert fields.items() >= expected.items()
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    own = {n.replace(".default", ""): p for n, p in model.named_parameters() if "mixlora_" in n}
    assert weights.keys() == own.keys() and len(weights) == 14 * 5
    assert all(torch.equal(weights[name], own[name]) for name in own)


def test_a_fresh_process_reloads_to_the_same_outputs(saved) -> None:
    folder, model, _ = saved
    difference, index_a, index_b, name = json.loads(in_a_fresh_process(RELOAD, str(folder)))
    chosen = model.base_model.selections()["model.language_model.layers.1.mlp.down_proj"]
    assert difference == 0
    assert (index_a, index_b) == (chosen.index_a.tolist(), chosen.index_b.tolist())
    assert name == "MixLoraConfig"


def test_the_other_ways_to_load(saved) -> None:
    folder, model, inputs = saved
    expected = logits(model, inputs)
    adapter = str(folder / "adapter")
    assert PeftConfig.from_pretrained(adapter) == MixLoraConfig.from_pretrained(adapter)
    auto = AutoPeftModel.from_pretrained(adapter)
    auto.get_base_model().config._attn_implementation = "eager"
    torch.testing.assert_close(logits(auto.eval(), inputs), expected)
    beside = get_peft_model(build_llava(), MixLoraConfig(r=3, factors=4)).eval()
    result = beside.load_adapter(adapter, "loaded", low_cpu_mem_usage=True)
    assert not result.missing_keys and not result.unexpected_keys
    beside.set_adapter("loaded")
    assert torch.equal(logits(beside, inputs), expected)
    # The weights of another shape are not taken in silence.
    with pytest.raises(RuntimeError, match="size mismatch"):
        other = get_peft_model(build_llava(), MixLoraConfig(r=2, factors=4))
        other.load_state_dict(model.state_dict())


ORDERS = {
    "mixlora_first": """
import importlib.util, sys
import mixlora_cli
assert not {"torch", "peft", "transformers"} & set(sys.modules), "importing mixlora_cli is slow"
importlib.util.find_spec("peft")  # to ask whether it is installed must not use the hook up
import peft
""",
    "config_first": "from mixlora_cli.method.config import MixLoraConfig; import peft",
}


@pytest.mark.parametrize("order", ORDERS)
def test_importing_is_enough_to_register(order) -> None:
    check = """
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
print(PEFT_TYPE_TO_CONFIG_MAPPING["MIXLORA"].__name__, PEFT_TYPE_TO_TUNER_MAPPING["MIXLORA"].__name__,
      PEFT_TYPE_TO_PREFIX_MAPPING["MIXLORA"], type(peft.__spec__.loader).__name__,
      sum("Peft" in type(finder).__name__ for finder in __import__("sys").meta_path))
"""
    printed = in_a_fresh_process(ORDERS[order] + check).split()
    assert printed == ["MixLoraConfig", "MixLoraModel", "mixlora_", "SourceFileLoader", "0"]


def test_unknown_attribute_of_the_package() -> None:
    import mixlora_cli

    with pytest.raises(AttributeError, match="has no attribute 'MixLoraConfg'"):
        _ = mixlora_cli.MixLoraConfg
