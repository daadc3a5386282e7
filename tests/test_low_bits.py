"""A student that computes with whole numbers gives what fake quantization gives."""

import pytest
import torch
from torch import nn

from dfqlib.bits import BitWidths
from dfqlib.data.image_sets import balanced_subset, embedded_test
from dfqlib.models.evaluate import predict
from dfqlib.models.teacher import load_teacher
from dfqlib.quantizers.calibrate import calibrated
from dfqlib.speed import precision
from dfqlib.speed.low_bits import IntegerConv2d, in_low_bits

units = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="the processor has no units for int8")


def integer_layers(network: nn.Module) -> int:
    return sum(isinstance(module, IntegerConv2d) for module in network.modules())


@units
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, False), (7, False), (8, True)])
@torch.no_grad()
def test_exact_sums_are_equal_to_the_last_bit(bits, symmetric):
    """All steps are 1, so that all products and sums are whole numbers, below 2^24, which float32 holds."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.ReLU(), nn.Conv2d(32, 8, 3, padding=1, stride=2))
    half = 2 ** (bits - 1)
    weight = torch.randint(-half, half, (8, 32, 3, 3)).float()
    weight[:, 0, 0, 0], weight[:, 0, 0, 1] = (-half, half - 1)
    if symmetric:
        weight.clamp_(min=1 - half)
    network[1].weight.copy_(weight)
    network[1].bias.copy_(torch.arange(8.0))
    images = torch.randint(-3, 2**bits, (2, 32, 9, 9)).float()
    images[0, 0, 0, 0] = 2**bits - 1
    weights = "symmetric" if symmetric else "asymmetric"
    student = calibrated(network, BitWidths(bits, bits), images, weights=weights)
    low = in_low_bits(student)
    assert integer_layers(low) == 1 and torch.equal(low(images), student(images))
    exact = nn.functional.conv2d(images.relu().double(), weight.double(), network[1].bias.double(), 2, 1)
    assert torch.equal(low(images).double(), exact)


@pytest.mark.parametrize(
    ("width", "options", "layers"),
    [
        (BitWidths(4, 4), {}, 20),
        (BitWidths(8, 8), {}, 0),  # asymmetric weights of 8 bits are no int8
        (BitWidths(8, 8), {"sites": "integer", "weights": "symmetric"}, 21),
    ],
)
def test_a_student_classifies_the_same(width, options, layers):
    teacher, test = load_teacher("resnet20_cifar10"), balanced_subset(embedded_test("cifar10"), 10, "10 per class")
    student = calibrated(teacher.network, width, teacher.normalise(test.pixels[:16]), **options)
    expected = predict(student, test, teacher)
    try:
        precision.use("bfloat16")
        found = predict(student, test, teacher)
    finally:
        precision.use("float32")
    # A sum that float32 rounds can fall on the other side of a tie of two levels.
    assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.99
    torch.testing.assert_close(found.mean(0), expected.mean(0), rtol=0.01, atol=0.01)
    if torch.cpu._is_vnni_supported():
        assert integer_layers(in_low_bits(student)) == layers


def test_a_student_that_diverged_and_a_float_network_stay_as_they_are():
    teacher = load_teacher("resnet20_cifar10")
    assert in_low_bits(teacher.network) is teacher.network
    student = calibrated(teacher.network, BitWidths(4, 4), torch.randn(4, 3, 32, 32))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(float("nan"))
        assert not in_low_bits(student)(torch.randn(2, 3, 32, 32)).isfinite().any()
