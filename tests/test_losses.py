"""Losses against hand-computed values."""

import math

import pytest
import torch

from shapeloom.training.clip import contrastive_loss, train_tokenizer
from shapeloom.training.losses import color_loss, occupancy_loss, sdf_loss


def test_sdf_loss_is_truncated():
    true = torch.tensor([[0.05, 0.5, -0.5]])
    assert sdf_loss(torch.tensor([[0.05, 9.0, -9.0]]), true, truncation=0.1).item() == 0
    assert sdf_loss(torch.tensor([[0.02, 0.1, -0.1]]), true, truncation=0.1).item() == pytest.approx(0.1, abs=1e-6)


def test_occupancy_loss_is_cross_entropy_of_the_sign():
    loss = occupancy_loss(torch.tensor([[0.02, -0.02]]), torch.tensor([[1.0, 1.0]]), sharpness=0.02)
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2, abs=1e-6)


def test_color_loss_counts_points_near_the_surface_only():
    predicted = torch.tensor([[[0.5, 0.5, 0.5], [1.0, 1.0, 1.0]]])
    true = torch.zeros(1, 2, 3)
    assert color_loss(predicted, true, torch.tensor([[0.01, 0.9]]), reach=0.1).item() == pytest.approx(0.5)
    assert color_loss(predicted, true, torch.tensor([[0.9, 0.9]]), reach=0.1).item() == 0


def features(*angles: float) -> torch.Tensor:
    return torch.tensor([[math.cos(a), math.sin(a)] for a in angles])


def test_contrastive_loss_without_swaps_is_clips():
    image, text = features(0, 1, 2), features(0.1, 1.2, 2.5)
    meaning = torch.tensor([[1], [2], [3]])
    loss = contrastive_loss(image, text[:, None], torch.tensor(5.0), torch.ones(3, 1).bool(), meaning)
    logits, target = 5 * image @ text.T, torch.arange(3)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    assert loss.mean().item() == pytest.approx(expected.item(), abs=1e-6)


def test_contrastive_loss_spares_equal_meanings_and_sees_swaps():
    image, text = features(0, 0), features(0, 0)
    one = torch.tensor(5.0)
    alike = contrastive_loss(image, text[:, None], one, torch.ones(2, 1).bool(), torch.tensor([[7], [7]]))
    assert alike.abs().max() < 1e-6  # the only other caption means the same: nothing to tell apart
    with_swaps = torch.stack([features(0, 2), features(0.1, 2)], dim=1)
    present, meaning = torch.tensor([[1, 1], [1, 0]]).bool(), torch.tensor([[1, 2], [3, 0]])
    loss = contrastive_loss(features(0, 2), with_swaps, one, present, meaning)
    logits = 5 * features(0, 2) @ features(0, 0.1, 2).T  # caption 0, its swap, caption 1
    to_text = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2]), reduction="none")
    to_image = torch.nn.functional.cross_entropy(logits[:, [0, 2]].T, torch.arange(2), reduction="none")
    assert torch.allclose(loss, (to_text + to_image) / 2, atol=1e-6)


def test_tokenizer_ends_with_its_highest_id_and_reads_any_text():
    tokenizer = train_tokenizer(["a red cube", "a blue ball left of a red cube"] * 10, 400)
    ids = tokenizer.encode("a red cube").ids
    assert ids[-1] == tokenizer.get_vocab_size() - 1 == max(ids) and 0 not in ids
    assert 0 not in tokenizer.encode("ein grüner Würfel 立方体").ids
