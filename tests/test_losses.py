"""Losses equal the official code's, and hand-worked values."""

import math

import pytest
import torch
from official import recorded_forward, recorded_losses
from torch import nn

from dfqlib.losses import bns_loss, distillation_kl, generator_loss, student_loss
from dfqlib.methods.zeroq import zeroq_statistics_loss
from dfqlib.models.batch_norm_statistics import BatchNormInput, BatchNormInputs


@pytest.fixture(scope="module")
def official():
    return recorded_losses()


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs.reshape(()), rtol=1e-4, atol=1e-5)


def test_losses_of_images_equal_the_official_ones_for_hard_and_soft_labels(official):
    logits, layers = recorded_forward()
    torch.testing.assert_close(logits, official["teacher_logits"], rtol=1e-4, atol=1e-5)
    close(bns_loss(layers), official["gdfq_bns"])
    close(zeroq_statistics_loss(official["images"], layers), official["zeroq_loss"])
    close(generator_loss(logits, official["labels"], layers), official["gdfq_generator_loss"])
    close(generator_loss(logits, official["qimera_soft_targets"], layers), official["qimera_generator_loss"])


def test_student_loss_equals_the_official_one_with_its_quirk(official):
    arguments = official["student_logits"], official["teacher_logits"], official["labels"]
    close(student_loss(*arguments, mean_over_classes=True), official["gdfq_student_loss"])
    ce = student_loss(*arguments, kl_weight=0)
    close(student_loss(*arguments) - ce, 10 * (official["gdfq_student_loss"] - ce))


def test_kl_by_hand():
    # T = (3/4, 1/4), S = (1/2, 1/2) at tau 1: 3/4 log(3/2) + 1/4 log(1/2)
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    by_hand = torch.tensor(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    torch.testing.assert_close(distillation_kl(teacher, student, temperature=1), by_hand)
    torch.testing.assert_close(distillation_kl(teacher, student, 1, mean_over_classes=True), by_hand / 2)
    # The mean over the batch does not depend on how often a sample is repeated.
    torch.testing.assert_close(distillation_kl(teacher.repeat(5, 1), student.repeat(5, 1), 1), by_hand)
    # Logits twice as large at twice the temperature: the same divergence, times tau squared.
    torch.testing.assert_close(distillation_kl(2 * teacher, student, temperature=2), 4 * by_hand)


def test_cross_entropy_by_hand():
    logits, labels = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    by_hand = torch.tensor((math.log(4 / 3) + math.log(2)) / 2)
    torch.testing.assert_close(student_loss(logits, logits, labels, kl_weight=0), by_hand)
    torch.testing.assert_close(student_loss(logits, logits, labels), by_hand)  # KL of equal logits is 0
    for given in (labels, torch.eye(2)):
        torch.testing.assert_close(generator_loss(logits, given, [], bns_weight=0), by_hand)


def test_bns_by_hand():
    norm = nn.BatchNorm2d(1)
    norm.running_mean.fill_(1.0)
    norm.running_var.fill_(3.0)
    inputs = torch.tensor([0.0, 2.0, 4.0, 6.0]).view(2, 1, 1, 2)  # mean 3, biased variance 5
    torch.testing.assert_close(bns_loss([BatchNormInput("norm", inputs, norm)]), torch.tensor(4.0 + 4.0))
    far = BatchNormInput("far", inputs + 2, norm)  # mean 5, biased variance 5
    torch.testing.assert_close(bns_loss([BatchNormInput("norm", inputs, norm), far]), torch.tensor((8.0 + 20.0) / 2))


def test_statistics_reach_the_images_by_gradient():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    for loss in (zeroq_statistics_loss, lambda _, layers: bns_loss(layers)):
        images = torch.randn(2, 3, 6, 6, requires_grad=True)
        with BatchNormInputs(network) as norms:
            network(images)
            loss(images, norms.layers).backward()
        assert images.grad.isfinite().all() and images.grad.abs().sum() > 0
