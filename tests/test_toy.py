"""The two-dimensional experiment: a classifier learns points, and points are made from it alone."""

import torch

from dfqlib.losses import bns_loss
from dfqlib.methods import toy
from dfqlib.models.batch_norm_statistics import BatchNormInputs


def test_classifier_and_points_made_from_it():
    torch.manual_seed(0)
    points, labels = toy.real_points(200)
    assert points.shape == (200, 2) and points.abs().max() <= 4
    assert torch.equal(labels, ((points[:, 0] > 0) == (points[:, 1] > 0)).long())
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
    made, requested = toy.gdfq_points(teacher, 200, iterations=80)
    assert made.shape == (200, 2) and (teacher(made).argmax(1) == requested).float().mean() > 0.9
