"""What scripts/gpu_check.py measures in its own process: one layer in every form, and a model with random weights."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache, partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from mixlora_cli.analysis import gpu_memory
from mixlora_cli.analysis.bench import goals, layers, whole
from mixlora_cli.analysis.bench.counters import Rounds, Variant, interleave, peak_bytes, resting_bytes
from mixlora_cli.config import AdapterConfig, RoutingConfig
from mixlora_cli.method.model import MixLoraModel
from mixlora_cli.models import adapters, forward, load, skeleton, tiny
from mixlora_cli.stats import Estimate, ratio_of_medians

LINEAR, LORA, OURS, DENSE, PUBLISHED = layers.LINEAR, layers.LORA, "mixlora_e16", "dense", layers.PUBLISHED
RANK, FACTORS = 4, 16
INSTANCES, TEXT, LABELS = 8, 144, 20
"""Of a step; tokens beside a picture's (256 in the paper's model); tokens with loss, as in docs/paper-scale.md."""
CARDS, EPOCHS, TRAINING, PADDING = 4, 3, 191_105, 0.2
"""Of the training in docs/paper-scale.md: cards, epochs, instances, share of padding."""
PROMPTS = 16
NOTES = (
    "ms: median [quartiles]. to LoRA: time over LoRA's [95 %]; extra: the same above the frozen layer's time.",
    "dense: all E inner products, of which an E x E matrix for each instance keeps r. Steps have no padding.",
    f"hours: {EPOCHS} epochs of {TRAINING:,} instances, {PADDING:.0%} padding, on {CARDS} "
    "such cards that lose nothing to each other.",
    "MFU: of the card's bf16 peak; 4 N operations a token (weights have no gradient), 6 N with checkpointing (forward "
    "twice); N: the decoder's weights without embeddings.",
)
Rows = dict[str, dict[str, Any]]
"""By variant what stands in its columns."""
Case = Callable[[float], Rows]
"""Measures until that `time.monotonic()`."""


def timed(
    runs: Mapping[str, Variant], device: torch.device, until: float
) -> tuple[dict[str, list[float]], Rows]:
    """Seconds of five rounds, and of more until then; what a table says of them."""
    times = interleave(runs, Rounds(5, warmup=2, min_seconds=until - time.monotonic()), device)
    rows: Rows = {}
    for name, seconds in times.items():
        low, middle, high = (1000 * cut for cut in quantiles(seconds, n=4, method="inclusive"))
        spread, ratio = Estimate(middle, low, high), ratio_of_medians(seconds, times[LORA])
        rows[name] = {"rounds": len(seconds), "ms": asdict(spread), "to LoRA": asdict(ratio)}
    return times, rows


class Dense(layers.PublishedForm):
    """All E inner products of each token, of which a matrix (E, E) for each instance keeps r, in the places of B's."""

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, S, d_in), (B, S) -> (B, S, d_out)."""
        chosen = self._indices(inputs_embeds, attention_mask)
        of_a, of_b = (nn.functional.one_hot(index, FACTORS).float() for index in chosen)
        inner = nn.functional.linear(inputs_embeds, self.factors_a.weight)
        kept = inner @ (self.scaling * of_a.transpose(1, 2) @ of_b)
        return self.linear(inputs_embeds) + kept @ self.factors_b.weight


def layer_cases(device: torch.device, is_tiny: bool) -> dict[str, Case]:
    """Each shape with eight instances and with one."""
    shapes, tokens = ([(64, 96)], 12) if is_tiny else ([(4096, 4096), (4096, 11008)], 600)
    sizes = [(*shape, "bf16", number, tokens, RANK) for shape in shapes for number in (INSTANCES, 1)]
    cases = [layers.LayerCase(*size) for size in sizes]
    return {f"{one.d_in}x{one.d_out} {one.batch} x {tokens}": partial(layer, one, device) for one in cases}


def layer(case: layers.LayerCase, device: torch.device, until: float) -> Rows:
    """Every form around one frozen layer, forward and backward."""
    bench = layers.build_bench(case, FACTORS, [FACTORS], device)
    models: dict[str, Any] = bench.models
    dense = Dense(models[LINEAR].proj, RANK, FACTORS, models[PUBLISHED].scaling).to(device).train()
    for weight in (dense.factors_a.weight, dense.factors_b.weight):
        nn.init.normal_(weight, std=layers.SPREAD)
    models[DENSE] = dense
    times, rows = timed(bench.variants(), device, until)
    above = {name: goals.above_linear(seconds, times[LINEAR]) for name, seconds in times.items()}
    for name in times.keys() - {LINEAR}:
        rows[name]["extra to LoRA"] = asdict(ratio_of_medians(above[name], above[LORA]))
    return rows


def step_cases(device: torch.device, is_tiny: bool) -> dict[str, Case]:
    """Optimizer steps, and answers, of a model with random weights."""

    @cache
    def base() -> Any:
        config = tiny.build_tiny().model.config if is_tiny else skeleton.published_config("llava_v1_7b")
        config._attn_implementation = "sdpa"
        with torch.device(device):
            model: Any = load.auto_class(config, "llava_v1_7b").from_config(config, dtype=torch.bfloat16)
        return model.requires_grad_(False).eval()

    return {
        "checkpointing": lambda until: steps(base(), True, until),
        "no checkpointing": lambda until: steps(base(), False, until),
        "generation": lambda until: generation(base(), 4 if is_tiny else 32, until),
    }


def random_batch(base: Any, instances: int) -> dict[str, Tensor]:
    """Instances of a picture and text, of equal length; the last tokens carry loss."""
    config, side = base.config, base.config.vision_config.image_size
    ids = torch.randint(10, 300, (instances, config.image_seq_length + TEXT), device=base.device)
    ids[:, 1 : 1 + config.image_seq_length] = config.image_token_id
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :-LABELS] = forward.IGNORE
    pixels = torch.randn(instances, 3, side, side, dtype=base.dtype, device=base.device)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "labels": labels}


def adapted(base: Any, name: str) -> Any:
    """A new adapter around the same frozen weights."""
    adapter = AdapterConfig(name="lora" if name == LORA else "mixlora")
    routing = RoutingConfig(name="instance")
    with base.device:
        model: Any = adapters.attach_adapter(whole.sharing_weights(base), adapter, routing, RANK, FACTORS)
        if name != LORA:
            model.base_model.skip_calibration()
        if name == PUBLISHED:
            layers.into_published_form(model)
    return model


class Step:
    """Called, it makes one optimizer step: forward, loss, backward, clipping, AdamW."""

    def __init__(self, model: Any, batch: dict[str, Tensor], checkpointing: bool) -> None:
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        self.model, self.batch = model.train(), batch
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=4e-5)

    def __call__(self) -> None:
        """The backward pass, too, keeps its inputs' types: under checkpointing it computes layers again."""
        self.optimizer.zero_grad(set_to_none=True)
        model, batch = self.model, dict(self.batch)
        head, is_mixlora = model.get_base_model().lm_head, isinstance(model.base_model, MixLoraModel)
        with forward.inputs_keep_their_dtype(model):
            with torch.autocast(batch["input_ids"].device.type, dtype=torch.bfloat16):
                output, _, targets = forward.labelled_pass(model, batch, head, is_mixlora)
                loss = forward.token_loss(output.logits, targets, len(targets))
            loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()

    def peak(self) -> int:
        """Bytes: what rests between two steps, and the most that a step adds."""
        self()  # the optimizer makes its state
        self.optimizer.zero_grad(set_to_none=True)
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        resting = resting_bytes([*self.model.parameters(), *self.model.buffers(), *state])
        return resting + peak_bytes(self, self.batch["input_ids"].device)


def steps(base: Any, checkpointing: bool, until: float) -> Rows:
    """What fits of LoRA, MixLoRA and the published form: each alone for its memory, then interleaved."""
    rows: Rows = {}
    runs: dict[str, Step] = {}
    batch = random_batch(base, INSTANCES)
    for name in (LORA, OURS, PUBLISHED):
        try:
            runs[name] = Step(adapted(base, name), batch, checkpointing)
            rows[name] = {"peak GiB": runs[name].peak() / gpu_memory.GIB}
        except torch.OutOfMemoryError as error:
            runs.pop(name, None)
            rows[name] = {"note": f"does not fit: {str(error).partition('. GPU')[0]}"}
        gc.collect()
        torch.cuda.empty_cache()
    times, spread = timed({name: Variant(run) for name, run in runs.items()}, base.device, until)
    decoder = base.get_decoder()
    weights = sum(p.numel() for p in decoder.parameters()) - decoder.get_input_embeddings().weight.numel()
    tokens, peak = batch["input_ids"].numel(), peak_operations(card_name(base.device))
    num_steps = EPOCHS * TRAINING / (1 - PADDING) / (CARDS * INSTANCES)
    for name, seconds in times.items():
        speed = tokens / median(seconds)
        mfu = (6 if checkpointing else 4) * weights * speed / peak if peak else None
        hours = num_steps * median(seconds) / 3600
        rows[name] |= spread[name] | {"tokens/s": speed, "MFU": mfu, "hours": hours}
    return rows


def generation(base: Any, new_tokens: int, until: float) -> Rows:
    """One batch of prompts, all equally long, answered greedily."""
    prompts = random_batch(base, PROMPTS)
    del prompts["labels"]
    settings = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}

    def answer(model: Any) -> None:
        with torch.inference_mode(), forward.matrix_products_in(model, base.dtype, base.device.type):
            model.generate(**prompts, **settings, pad_token_id=0)

    runs = {name: Variant(partial(answer, adapted(base, name).eval())) for name in (LORA, OURS)}
    times, rows = timed(runs, base.device, until)
    for name, seconds in times.items():
        rows[name]["tokens/s"] = PROMPTS * new_tokens / median(seconds)
    return rows


def card_name(device: torch.device) -> str:
    """Of the GPU; `cpu` without one."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_operations(card: str) -> float | None:
    """Dense bf16 operations a second of a card that `mixlora plan` knows."""
    names = {re.sub("^rtx|-.*", "", key): gpu for key, gpu in gpu_memory.GPUS.items()}
    return next((gpu.tflops * 1e12 for name, gpu in names.items() if name in card.lower()), None)
