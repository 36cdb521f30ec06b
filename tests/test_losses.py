"""Losses against hand-computed values."""

import math

import pytest
import torch

from shapeloom.training.clip import contrastive_loss, train_tokenizer
from shapeloom.training.losses import (
    color_loss,
    distill_color_loss,
    distill_sdf_loss,
    mesh_render_loss,
    nerf_color_loss,
    occupancy_loss,
    premultiply,
    sdf_loss,
    transmittance_loss,
)


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


# Two assets of two rays. Of the first: one ray too red by 0.3, one missed altogether; the second is right.
RENDER = torch.tensor([[[0.8, 0.2, 0.4, 1.0], [0.0, 0.0, 0.0, 0.0]], [[0.1, 0.2, 0.3, 0.5], [0.0, 0.0, 0.0, 0.0]]])
TARGET = torch.tensor([[[0.5, 0.2, 0.4, 1.0], [0.6, 0.3, 0.0, 0.6]], [[0.1, 0.2, 0.3, 0.5], [0.0, 0.0, 0.0, 0.0]]])
PICTURES = (RENDER[..., :3], RENDER[..., 3], TARGET[..., :3], TARGET[..., 3])


def test_premultiplied_colours_are_those_on_black():
    rgb, alpha = premultiply(torch.tensor([[1.0, 0.5, 0.0, 0.5], [0.3, 0.3, 0.3, 0.0]]))
    assert rgb.tolist() == [[0.5, 0.25, 0.0], [0.0, 0.0, 0.0]] and alpha.tolist() == [0.5, 0.0]


def test_nerf_color_loss_on_black_and_on_a_background():
    assert nerf_color_loss(*PICTURES).tolist() == pytest.approx([(0.3 + 0.6 + 0.3) / 6, 0])
    # On white the missed ray shows white: its target is (1, 0.7, 0.4), so what differs is green and blue.
    assert nerf_color_loss(*PICTURES, background=1.0).tolist() == pytest.approx([(0.3 + 0.3 + 0.6) / 6, 0])
    own = torch.tensor([[[0.0, 0.0, 1.0]], [[1.0, 1.0, 1.0]]])  # one for each asset
    assert nerf_color_loss(*PICTURES, background=own).tolist() == pytest.approx([(0.3 + 0.6 + 0.3 + 0.6) / 6, 0])


def test_transmittance_loss_is_that_of_alpha():
    assert transmittance_loss(PICTURES[1], PICTURES[3]).tolist() == pytest.approx([0.3, 0])
    transmittances = (1 - PICTURES[1], 1 - PICTURES[3])
    assert transmittance_loss(*transmittances).tolist() == pytest.approx([0.3, 0])


def test_distilled_distances_are_truncated_as_targets_only():
    predicted = torch.tensor([[0.1, 0.5], [0.0, -0.2]], requires_grad=True)
    true = torch.tensor([[0.4, -3.0], [0.0, -0.2]])
    assert distill_sdf_loss(predicted, true).tolist() == pytest.approx([(0.09 + 12.25) / 2, 0])
    loss = distill_sdf_loss(predicted, true, truncation=0.3)
    assert loss.tolist() == pytest.approx([(0.04 + 0.64) / 2, 0])
    loss.sum().backward()
    assert predicted.grad.flatten().tolist() == pytest.approx([-0.2, 0.8, 0, 0])  # beyond the truncation too


def test_distilled_colours_near_and_everywhere():
    predicted = torch.tensor([[[0.5, 0.5, 0.5], [1.0, 0.0, 0.0]]])
    true, distance = torch.zeros(1, 2, 3), torch.tensor([[0.01, -0.9]])
    assert distill_color_loss(predicted, true, distance).item() == pytest.approx((0.25 + 1 / 3) / 2)
    assert distill_color_loss(predicted, true, distance, reach=0.1).item() == pytest.approx(0.25)
    assert distill_color_loss(predicted, true, distance, reach=0.001).item() == 0


def test_mesh_render_loss_is_the_mean_over_four_channels():
    expected = (RENDER - TARGET).square().flatten(1).mean(1)
    assert torch.allclose(mesh_render_loss(*PICTURES), expected) and expected[0] > 0
    views = [picture[:, None, None] for picture in PICTURES]  # [B, V, H, W(, 3)]
    assert torch.allclose(mesh_render_loss(*views), expected)


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
