"""The two-dimensional experiment: classifier learned, points made from it alone."""

import torch

from dfqlib.losses import bns_loss
from dfqlib.methods import toy
from dfqlib.models.batch_norm_statistics import BatchNormInputs


def test_labels_are_the_sign_of_the_product():
    points, labels = toy.real_points(500, seed=1)
    assert points.shape == (500, 2) and points.abs().max() <= 4
    assert torch.equal(labels, ((points[:, 0] > 0) == (points[:, 1] > 0)).long())
    assert torch.equal(points, toy.real_points(500, seed=1)[0])


def test_classifier_and_points_made_from_it():
    torch.manual_seed(0)
    points, labels = toy.real_points(200)
    teacher = toy.train_classifier(points, labels, iterations=80)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert (teacher(points).argmax(1) == labels).float().mean() > 0.95

    def gap(points):
        with BatchNormInputs(teacher) as norms, torch.no_grad():
            teacher(points)
            return bns_loss(norms.layers)

    torch.manual_seed(0)
    noise = torch.randn(200, 2)
    torch.manual_seed(0)
    assert gap(toy.zeroq_points(teacher, 200, iterations=40)) < 0.5 * gap(noise)
    made, asked = toy.gdfq_points(teacher, 200, iterations=80)
    assert made.shape == (200, 2)
    assert (teacher(made).argmax(1) == asked).float().mean() > 0.9
