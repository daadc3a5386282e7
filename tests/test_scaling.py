"""A batch norm that scales weights instead of activations changes no answer and no gradient, and copies nothing."""

import pytest
import torch
from test_folding import with_statistics
from torch import nn
from torch.nn import functional as F

from dfqlib.bits import BitWidths
from dfqlib.models.zoo import MODELS, build
from dfqlib.quantizers.convert import quantize_model
from dfqlib.quantizers.layers import observing
from dfqlib.speed.scale_weights import ScaledConv2d, scale_weights
from dfqlib.speed.switches import without


def student_of(network: nn.Module, size: int) -> tuple[nn.Module, torch.Tensor]:
    """A W4A4 student in double precision with ranges, and two images for it."""
    torch.manual_seed(0)
    student = quantize_model(with_statistics(network), BitWidths(4, 4)).double()
    images = torch.randn(2, 3, size, size, dtype=torch.double)
    with torch.no_grad(), observing(student):
        student(images)
    return student, images


def assert_same(scaled: nn.Module, student: nn.Module, images: torch.Tensor) -> None:
    """The same logits and gradients."""
    results = []
    for network in (scaled, student):
        given = images.clone().requires_grad_()
        logits = network(given)
        loss = F.cross_entropy(logits, torch.tensor([0, 1]))
        results.append([logits, *torch.autograd.grad(loss, [given, *student.parameters()])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["resnet20_cifar10", "torchvision/resnet18", "mobilenetv2_w1", "shufflenet_g1_w1"])
def test_answers_and_gradients_stay_the_same(name):
    student, images = student_of(build(name), MODELS[name].input_size)
    scaled = scale_weights(student)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in student.modules())
    assert sum(isinstance(module, ScaledConv2d) for module in scaled.modules()) == norms
    assert_same(scaled, student, images)


class Mixed(nn.Module):
    """One norm of its own with a bias before it, one behind a convolution that is used twice, and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.two, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.factor = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(F.relu(self.norm(self.one(x))))
        return (self.other(x) + self.factor * x).mean((2, 3))


def test_layers_are_shared_and_the_network_stays_as_it_was():
    student, images = student_of(Mixed(), 8)
    before, names = student.code, list(student.state_dict())
    scaled = scale_weights(student)
    assert [module.norm for module in scaled.modules() if isinstance(module, ScaledConv2d)] == [student.norm]
    assert_same(scaled, student, images)
    assert student.code == before and list(student.state_dict()) == names
    assert {id(p) for p in scaled.parameters()} == {id(p) for p in student.parameters()}
    with torch.no_grad():
        student.one.weight.mul_(2)
        student.norm.running_mean.add_(1)
    torch.testing.assert_close(scaled(images), student(images))


def test_in_training_mode_the_batchs_own_statistics_are_used_and_move():
    student, images = student_of(Mixed(), 8)
    scaled, before = scale_weights(student.train()), student.norm.running_mean.clone()
    found = scaled(images)
    assert not torch.equal(student.norm.running_mean, before)
    torch.testing.assert_close(found, student(images))


def test_others_and_without_it_the_network_itself():
    network = Mixed()
    assert scale_weights(network) is network
    student, _ = student_of(network, 8)
    with without("scaled_weights"):
        assert scale_weights(student) is student
