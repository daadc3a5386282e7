"""HAST's loss equals the official one; its images are hard, follow from the seed, and heed crops and centres."""

import math

import pytest
import torch
import torch.nn.functional as F
from official import recorded_forward, recorded_losses
from torch import nn

from dfqlib.data.crops import RandomCrops
from dfqlib.errors import UserError
from dfqlib.losses import bns_loss, difficulty
from dfqlib.methods import hast
from dfqlib.methods.hast import hast_loss
from dfqlib.models.batch_norm_statistics import BatchNormInput, BatchNormInputs
from dfqlib.models.teacher import Teacher, load_teacher
from dfqlib.schedules import HardImageSchedule


@pytest.fixture(scope="module")
def small():
    """A teacher of four classes on 8 x 8 images, whose batch norms have seen data."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1)]
    network = nn.Sequential(*layers, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.append(nn.Linear(8, 4))
    for _ in range(20):
        network(torch.randn(32, 3, 8, 8) * 2 + 1)
    return Teacher.from_module(network, 4, (0.5,) * 3, (0.25,) * 3, input_size=8)


def test_loss_equals_the_official_one():
    official, (logits, layers) = recorded_losses(), recorded_forward()
    ours = hast_loss(logits, official["labels"], layers, beta=10, gamma=2)
    torch.testing.assert_close(ours, official["hast_loss_beta10_gamma2"].reshape(()), rtol=1e-4, atol=1e-5)


def test_loss_by_hand():
    # p_y = 3/4 and 1/2: (1/4)^2 log(4/3) and (1/2)^2 log 2
    logits, labels = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    inputs = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)  # mean 2, variance 1 against 0, 1
    layers = [BatchNormInput("norm", inputs, nn.BatchNorm2d(1))]
    torch.testing.assert_close(difficulty(logits, labels), torch.tensor([0.25, 0.5]))
    hard = (math.log(4 / 3) / 16 + math.log(2) / 4) / 2
    torch.testing.assert_close(hast_loss(logits, labels, layers, 10, 2), torch.tensor(4 + 10 * hard))
    plain = 4 + 3 * F.cross_entropy(logits, labels)
    torch.testing.assert_close(hast_loss(logits, labels, layers, beta=3, gamma=0), plain)
    shares = torch.tensor([[0.5, 0.5], [0.0, 1.0]])  # p = 3/4 and 1/4 by halves
    torch.testing.assert_close(difficulty(logits, shares), torch.tensor([0.5, 0.5]))


def test_easy_samples_lose_their_pull_and_stay_finite():
    logits = torch.tensor([[40.0, 0.0], [0.0, 1.0]], requires_grad=True)
    layers = [BatchNormInput("norm", torch.zeros(2, 1, 1, 1), nn.BatchNorm2d(1))]
    for gamma in (0.5, 2.0):
        (gradient,) = torch.autograd.grad(hast_loss(logits, torch.tensor([0, 0]), layers, 1, gamma), logits)
        assert gradient.isfinite().all()
        assert gradient[0].abs().max() < 1e-6 < gradient[1].abs().max()


def schedule(images=8, iterations=30, **options):
    options = {"synthesis_batch": max(2, images), "synthesis_lr": 0.1} | options
    return HardImageSchedule(images=images, synthesis_iterations=iterations, **options)


def test_images_follow_from_the_seed_and_every_batch_has_its_losses(small):
    some = schedule(6, 3, synthesis_batch=4)
    first, again, other = (hast.hard_images(small, some, seed=seed) for seed in (1, 1, 2))
    assert first.images.shape == (6, 3, 8, 8) and first.labels.shape == (6,) and not first.images.requires_grad
    assert [len(curve) for curve in first.losses] == [3, 3]
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)


def test_synthesis_brings_statistics_and_labels_together(small):
    made = hast.hard_images(small, schedule(32, 60), beta=1, gamma=1)
    start = hast.hard_images(small, schedule(32, 1, synthesis_lr=1e-9, synthesis_min_lr=0.0), beta=1, gamma=1)
    gaps, right = [], []
    for images in (start.images, made.images):
        with BatchNormInputs(small.network) as norms:
            right.append((small.network(images).argmax(1) == made.labels).float().mean())
            gaps.append(bns_loss(norms.layers))
    assert gaps[1] < 0.3 * gaps[0] and right[1] > right[0]


def test_images_refined_for_mixed_labels_leave_the_teacher_less_sure(small):
    start = hast.hard_images(small, schedule(32, 1))
    alone, all_of_them = (hast.refined(small, start, 40, mixed=mixed) for mixed in (0, 2))
    assert torch.equal(all_of_them.images[:32], alone.images) and torch.equal(
        all_of_them.labels, start.labels.repeat(3)
    )
    sure = [small.network(part).softmax(1).amax(1).mean() for part in all_of_them.images.split(32)]
    assert len(sure) == 3 and sure[0] > max(sure[1:])


def test_a_mixed_label_is_of_two_classes_mostly_of_the_first():
    labels = torch.arange(1000) % 4
    shares = hast.mixed_labels(labels, 4, torch.Generator().manual_seed(0))
    own = shares.gather(1, labels[:, None])
    torch.testing.assert_close(shares.sum(1), torch.ones(1000))
    assert ((shares > 0).sum(1) == 2).all() and own.min() >= 0.3 and abs(own.mean() - 0.65) < 0.02
    assert all((shares[labels == k].sum(0) > 0).all() for k in range(4))  # every other class is drawn


def test_crops_are_taken_in_every_second_iteration(small):
    seen = []
    hast.hard_images(small, schedule(4, 5), crops=lambda images: seen.append(images) or images)
    assert len(seen) == 2
    hast.hard_images(small, schedule(4, 2), crops=RandomCrops(8))  # gradients pass through real crops


def test_centres_are_one_image_a_class_that_the_teacher_names_so(small):
    centres = hast.calibration_centres(small, schedule(iterations=60))
    assert centres.images.shape == (4, 3, 8, 8)
    assert (small.network(centres.images).argmax(1) == torch.arange(4)).all()
    assert list(centres.statistics) == ["4"]  # of two batch norms the deeper one
    assert [list(hast.deeper_half(range(n))) for n in (1, 2, 5)] == [[0], [1], [2, 3, 4]]
    with BatchNormInputs(small.network) as norms:
        small.network(centres.images)
        assert hast.centre_gap(norms.layers, torch.arange(4), centres) < 1e-12
        assert hast.centre_gap(norms.layers, torch.tensor([1, 0, 2, 3]), centres) > 0


def test_centre_gap_by_hand():
    # One sample of two positions 1 and 3: mean 2, unbiased variance 2. Its class's centre: mean 0, deviation 1.
    layers = [BatchNormInput("deep", torch.tensor([1.0, 3.0]).view(1, 1, 1, 2), nn.BatchNorm2d(1))]
    centres = hast.Centres(torch.empty(0), {"deep": (torch.tensor([[9.0], [0.0]]), torch.tensor([[9.0], [1.0]]))})
    by_hand = torch.tensor(4 + ((2 + 1e-6) ** 0.5 - 1) ** 2)
    torch.testing.assert_close(hast.centre_gap(layers, torch.tensor([1]), centres), by_hand)


def test_centres_draw_images_to_their_class(small):
    centres = hast.calibration_centres(small, schedule())
    gaps = []
    for guides in (None, centres):
        made = hast.hard_images(small, schedule(), beta=0, centres=guides)
        with BatchNormInputs(small.network) as norms:
            small.network(made.images)
            gaps.append(hast.centre_gap(norms.layers, made.labels, centres))
    assert gaps[1] < gaps[0]


def test_the_embedded_teacher_takes_all_settings():
    made = hast.hard_images(load_teacher("resnet20_cifar10"), schedule(2, 2), *hast.PUBLISHED["cifar100"])
    assert made.images.isfinite().all() and made.images.shape == (2, 3, 32, 32)


@pytest.mark.parametrize("setting", ["beta", "gamma"])
def test_weights_out_of_range_are_refused(small, setting):
    with pytest.raises(UserError, match=f"{setting}=-1"):
        hast.hard_images(small, schedule(), **{setting: -1})
