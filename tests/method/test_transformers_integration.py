"""transformers' own ways with adapters: the same logits as through PEFT, before saving and after loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import method_models
import pytest
import torch
from method_models import NEW, adapt, build_llama, generate, strengthen
from peft import PeftModel, get_layer_status, get_model_status, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, pipeline
from word_tokenizer import word_tokenizer

from mixlora_cli import MixLoraConfig
from mixlora_cli.method.layer import MixLoraLinear

FIELDS: dict[str, Any] = {"r": 2, "factors": 8}
PROMPT = "w5 w9 w20 w31 w7"


def inputs() -> dict[str, Tensor]:
    """Two rows of different lengths, padded on the left."""
    ids = torch.tensor([[5, 9, 20, 31, 7], [0, 0, 8, 40, 22]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def logits(model: Any) -> Tensor:
    return method_models.logits(model, inputs())


@pytest.fixture
def added() -> LlamaForCausalLM:
    """A model with an adapter that transformers put in."""
    model = build_llama()
    torch.manual_seed(2)  # as in `adapt`
    model.add_adapter(MixLoraConfig(**FIELDS))
    strengthen(model)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`base` and `adapter` on disk, saved by PEFT, and the tokenizer in both."""
    base = build_llama()
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
    adapt(base).save_pretrained(str(tmp_path / "adapter"))
    for name in ("base", "adapter"):
        word_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def reference(folder: Path) -> PeftModel:
    """The same adapter through PEFT."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    return PeftModel.from_pretrained(base, str(folder / "adapter")).eval()


def test_add_adapter_is_get_peft_model(added: LlamaForCausalLM) -> None:
    expected = adapt(build_llama())
    assert torch.equal(logits(added), logits(expected))
    assert (logits(added) - logits(build_llama())).abs().max() > 0.1
    assert torch.equal(generate(added, inputs()), generate(expected, inputs()))


def test_disable_enable_and_delete(added: LlamaForCausalLM) -> None:
    plain, adapted = logits(build_llama()), logits(added)
    added.disable_adapters()
    assert torch.equal(logits(added), plain)
    added.enable_adapters()
    assert torch.equal(logits(added), adapted)
    added.add_adapter(MixLoraConfig(r=3, factors=5), "other")
    assert added.active_adapters() == ["other"]
    assert torch.equal(logits(added), plain)  # a new adapter changes nothing
    added.set_adapter("default")
    assert torch.equal(logits(added), adapted)
    added.delete_adapter("other")
    assert not any(".other." in name for name, _ in added.named_parameters())
    assert torch.equal(logits(added), adapted)
    added.delete_adapter("default")
    assert torch.equal(logits(added), plain)


def test_an_added_adapter_is_saved_and_loaded(added: LlamaForCausalLM, tmp_path: Path) -> None:
    expected = logits(added)
    added.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    fresh = build_llama()
    fresh.load_adapter(str(tmp_path))
    assert torch.equal(logits(fresh.eval()), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(build_llama(), str(tmp_path)).eval()), expected)


def test_load_adapter_of_a_folder_that_peft_saved(folder: Path) -> None:
    model = build_llama()
    model.load_adapter(str(folder / "adapter"))
    assert torch.equal(logits(model.eval()), logits(reference(folder)))
    model.load_adapter(str(folder / "adapter"), adapter_name="again")
    model.set_adapter("again")
    assert torch.equal(logits(model), logits(reference(folder)))


def test_a_folder_with_an_adapter_is_a_model(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "adapter").eval()
    assert any(isinstance(module, MixLoraLinear) for module in model.modules())
    assert torch.equal(logits(model), logits(reference(folder)))


def test_pipeline_of_a_folder_with_an_adapter(folder: Path) -> None:
    write = pipeline("text-generation", model=str(folder / "adapter"))
    answer = write(PROMPT, max_new_tokens=NEW, do_sample=False, return_tensors=True)
    ids = word_tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    expected = reference(folder).generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)
    assert answer[0]["generated_token_ids"] == expected[0].tolist()
    plain = build_llama().generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)
    assert not torch.equal(expected, plain)


def test_status_of_model_and_layers() -> None:
    model = adapt(build_llama())
    status = get_model_status(model)
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "MixLoraModel")
    assert status.peft_types == {"default": "MIXLORA"}
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.num_adapter_layers == 14
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    layers = get_layer_status(model)
    assert layers[0].name == "model.model.layers.0.self_attn.q_proj"
    assert {(layer.module_type, layer.enabled) for layer in layers} == {("mixlora.MixLoraLinear", True)}
    with model.disable_adapter():
        assert get_model_status(model).enabled is False


def test_what_peft_keeps_to_its_own_methods_is_refused(folder: Path) -> None:
    """Hot swapping and mixed models look the method up in a closed list; each names it in its refusal."""
    model = adapt(build_llama())
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but MIXLORA"):
        hotswap_adapter(model, str(folder / "adapter"), adapter_name="default")
    loaded = build_llama()
    loaded.load_adapter(str(folder / "adapter"))
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        loaded.load_adapter(str(folder / "adapter"), adapter_name="default", hotswap=True)
    with pytest.raises(ValueError, match="'MIXLORA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(build_llama(), MixLoraConfig(**FIELDS), mixed=True)


def test_loading_warns_of_a_missing_weight(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    reference(folder)
    assert not [w for w in recwarn.list if "missing adapter keys" in str(w.message)]
    from safetensors.torch import load_file, save_file

    path = folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    gone = "base_model.model.model.layers.0.self_attn.v_proj.mixlora_factors_a.weight"
    save_file({name: weight for name, weight in weights.items() if name != gone}, path)
    reference(folder)
    said = [str(w.message) for w in recwarn.list if "missing adapter keys" in str(w.message)]
    assert len(said) == 1 and "layers.0.self_attn.v_proj.mixlora_factors_a" in said[0]
