"""The same few training instances, read every now and then without a trace: which factors do they get now?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mixlora_cli.method.layer import MixLoraLinear
from mixlora_cli.method.model import MixLoraModel


def adapted_layers(model: MixLoraModel) -> dict[str, MixLoraLinear]:
    """The adapted layers of the language model, by name; a tower's would see other rows, or nothing at all."""
    return {
        name: layer
        for name, layer in model.model.named_modules()
        if isinstance(layer, MixLoraLinear) and "language_model" in name
    }


def selected(layers: Sequence[MixLoraLinear], adapter: str = "default") -> tuple[Tensor, Tensor]:
    """Factors that the last forward pass's instances got in L layers: of A and of B, (L, B, r) each.

    What `MixLoraModel.selections` gives, without a walk through all modules of the model.
    """
    last = [layer.last_selection[adapter] for layer in layers]
    selections = [selection for selection in last if selection is not None]
    assert len(selections) == len(layers), "a layer had no part in the forward pass"
    return torch.stack([s.index_a for s in selections]), torch.stack([s.index_b for s in selections])


class Probe:
    """Reads one batch in evaluation mode; calling it gives the `selected` factors.

    Args:
        read: runs the batch through the model.
    """

    def __init__(
        self, model: MixLoraModel, layers: Sequence[MixLoraLinear], read: Callable[[], object]
    ) -> None:
        self._model = model
        self._layers = layers
        self._read = read

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Factors of A and of B now, (L, B, r) each."""
        with undisturbed(self._model, self._layers), torch.no_grad():
            self._read()
            return selected(self._layers)


@contextmanager
def undisturbed(model: MixLoraModel, layers: Sequence[MixLoraLinear]) -> Iterator[None]:
    """Inside, the model is in evaluation mode; outside, nothing of it shows.

    Modes of all modules, the routing context, the layers' last selections and the random generators are put back.
    """
    modes = [(module, module.training) for module in model.modules()]
    context = dict(vars(model.context))
    selections = [dict(layer.last_selection) for layer in layers]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        # The loss that balances the routers is about the batches that they learn from.
        model.context.collect_balance = False
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            vars(model.context).update(context)
            for layer, selection in zip(layers, selections, strict=True):
                layer.last_selection = selection
