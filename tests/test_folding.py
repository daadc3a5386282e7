"""Folding batch norms changes neither what a network answers nor the statistics that synthesis reads."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfqlib.losses import bns_loss
from dfqlib.methods.zeroq import zeroq_statistics_loss
from dfqlib.models.batch_norm_statistics import BatchNormInputs
from dfqlib.models.teacher import Teacher, load_teacher
from dfqlib.models.zoo import MODELS, build
from dfqlib.speed.fold_batch_norms import FoldedNorm, fold_batch_norms

IMAGENET = [name for name, entry in MODELS.items() if entry.dataset == "imagenet"]


def with_statistics(network: nn.Module) -> nn.Module:
    """``network`` in eval mode with batch norms as after a training: all their numbers differ from 0 and 1."""
    torch.manual_seed(0)
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return network.eval().requires_grad_(False)


def seen(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list, torch.Tensor]:
    """Logits, (name, mean, variance) of every batch norm's input, and the gradient of ZeroQ's loss and L_BNS."""
    images = images.clone().requires_grad_()
    with BatchNormInputs(network) as norms:
        logits = network(images)
        loss = bns_loss(norms.layers) + zeroq_statistics_loss(images, norms.layers)
        (gradient,) = torch.autograd.grad(loss, images)
        return logits, [(layer.name, *layer.mean_var()) for layer in norms.layers], gradient


def assert_same(folded: nn.Module, network: nn.Module, images: torch.Tensor) -> None:
    ours, theirs = seen(folded, images), seen(network, images)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-4)
    assert [name for name, *_ in ours[1]] == [name for name, *_ in theirs[1]]
    for (_, *found), (_, *expected) in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-3, atol=1e-4 * theirs[2].abs().max().item())


@pytest.mark.parametrize("name", ["resnet20_cifar10", "resnet20_cifar100", *IMAGENET])
def test_a_folded_network_stays_the_same(name):
    # Double precision: deep networks without training magnify rounding.
    network = with_statistics(build(name)).double() if name in IMAGENET else load_teacher(name).network.double()
    folded = fold_batch_norms(network)
    assert any(isinstance(module, FoldedNorm) for module in folded.modules())
    assert_same(folded, network, torch.randn(2, 3, *[MODELS[name].input_size] * 2, dtype=torch.double))


class Net(nn.Module):
    """One batch norm that may be folded, called by name, and four that may not.

    Those are shared, without a convolution, behind one that is used elsewhere, and without a gain.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(5))

    def forward(self, x):
        given, x = x, self.norms[0](input=self.convs[0](input=x))
        x += given
        x = F.relu(x, inplace=True)
        x = self.norms[1](self.convs[1](x))
        x = self.norms[1](self.convs[2](x))
        x = self.norms[2](input=torch.tanh(x))
        y = self.convs[3](x)
        y = y + self.norms[3](y)
        return self.norms[4](self.convs[4](y)).mean((2, 3))


@pytest.mark.parametrize("gain, shift", [(0.0, 0.5), (1e-24, 0.0)])
def test_what_cannot_be_folded_stays_as_it_is(gain, shift):
    network = with_statistics(Net())
    network.norms[4].weight[1], network.norms[4].bias[1] = gain, shift
    folded = fold_batch_norms(network)
    assert [i for i in range(5) if isinstance(folded.get_submodule(f"norms.{i}"), FoldedNorm)] == [0]
    assert_same(folded, network, torch.randn(4, 3, 8, 8))
    assert isinstance(network.norms[0], nn.BatchNorm2d)  # the given one is left alone


class Sums(nn.Module):
    """ReLUs of sums: one read by its ReLU alone, one read elsewhere too, and one ReLU that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.alone, self.shared, self.twice = nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x):
        x = self.alone(self.norm(self.conv(x)) + x)
        total = torch.add(x, x)
        x = self.shared(total) * total
        return (self.twice(x + 1) + self.twice(x)).mean((2, 3))


def test_a_relu_writes_over_a_sum_only_where_nothing_else_reads_it():
    network = with_statistics(Sums())
    folded = fold_batch_norms(network)
    assert [name for name in ("alone", "shared", "twice") if folded.get_submodule(name).inplace] == ["alone"]
    assert_same(folded, network, torch.randn(4, 3, 8, 8))
    assert not network.alone.inplace  # the given one is left alone


class Overwriting(nn.Sequential):
    """Reads a tensor after ``overwrite`` wrote into it."""

    def __init__(self, overwrite):
        super().__init__(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
        self.overwrite = overwrite

    def forward(self, x):
        y = self[1](self[0](x))
        return (self.overwrite(y) + y).mean((2, 3))


@pytest.mark.parametrize("overwrite", [nn.ReLU(True), lambda x: F.relu(x, inplace=True)])
def test_what_is_read_after_it_was_overwritten_stays_the_same(overwrite):
    network = with_statistics(Overwriting(overwrite))
    folded = fold_batch_norms(network)
    assert isinstance(folded.get_submodule("1"), FoldedNorm)
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(folded(x), network(x))


def test_a_network_that_overwrites_its_tensors_is_returned_as_it_is():
    network = Overwriting(torch.relu_)
    assert fold_batch_norms(network) is network


def test_a_teacher_folds_a_copy_once():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    network = with_statistics(nn.Sequential(*layers))
    teacher = Teacher.from_module(network, 4, (0.5,) * 3, (0.5,) * 3)
    assert isinstance(teacher.folded.get_submodule("1"), FoldedNorm)
    assert isinstance(teacher.network[1], nn.BatchNorm2d)
    assert teacher.folded is teacher.folded
