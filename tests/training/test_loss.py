"""The loss on gathered positions equals the plain one, however a step is cut into batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlora_cli.models.forward import head_sees_only, label_positions, token_loss
from mixlora_cli.models.tiny import build_tiny


def test_label_positions_by_hand() -> None:
    labels = torch.tensor([[-100, -100, 7, 8], [5, -100, -100, 9]])
    predicts, targets = label_positions(labels)
    # Token t is predicted at t - 1; nothing predicts a row's first token, and the last position predicts nothing.
    assert predicts.tolist() == [[False, True, True, False], [False, False, True, False]]
    assert targets.tolist() == [7, 8, 9]


def test_head_computes_the_wanted_rows_only_and_is_left_as_it_was() -> None:
    head = nn.Linear(3, 5, bias=False)
    # Whole numbers: processors sum products of few rows and of many in different orders.
    head.weight.data = torch.randint(-9, 10, (5, 3)).float()
    hidden = torch.randint(-9, 10, (2, 4, 3)).float()
    predicts = torch.tensor([[False, True, True, False], [False, False, True, False]])
    full: Tensor = head(hidden)
    with head_sees_only(head, predicts):
        assert torch.equal(head(hidden), full[predicts])
    assert torch.equal(head(hidden), full)


def test_equals_the_models_own_loss_and_gradient() -> None:
    """Oracle: transformers' loss over all logits, on a padded batch with a picture."""
    base = build_tiny()
    model = base.model
    torch.manual_seed(0)
    ids = torch.randint(10, 200, (3, 24))
    ids[:, : len(base.chat.picture_tokens)] = base.chat.image_token_ids[0]
    labels = torch.where(torch.rand(ids.shape) < 0.4, ids, -100)
    labels[:, :6] = -100
    mask = torch.ones_like(ids)
    mask[1, 17:], labels[1, 17:] = 0, -100
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(3, 3, 16, 16)}
    weight = model.model.language_model.layers[0].mlp.up_proj.weight.requires_grad_(True)

    expected = model(**inputs, labels=labels).loss
    (expected_gradient,) = torch.autograd.grad(expected, weight)
    predicts, targets = label_positions(labels)
    with head_sees_only(model.get_output_embeddings(), predicts):
        logits = model(**inputs).logits
    loss = token_loss(logits, targets, len(targets))
    (gradient,) = torch.autograd.grad(loss, weight)

    assert logits.shape == (len(targets), len(base.tokenizer))
    assert torch.allclose(loss, expected, rtol=1e-6, atol=0)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-7)


def test_batches_of_a_step_add_up_to_the_whole() -> None:
    logits, targets = torch.randn(9, 5), torch.randint(5, (9,))
    whole = F.cross_entropy(logits, targets)
    parts = token_loss(logits[:2], targets[:2], 9) + token_loss(logits[2:], targets[2:], torch.tensor(9))
    assert torch.allclose(parts, whole)


def test_a_batch_without_labels_gives_zero_with_a_zero_gradient() -> None:
    head = nn.Linear(3, 5)
    loss = token_loss(head(torch.zeros(0, 3)), torch.zeros(0, dtype=torch.long), 0)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(head.weight.grad, torch.zeros(5, 3))
