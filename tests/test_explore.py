import math

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from dfqlib.bits import BitWidths
from dfqlib.errors import UserError
from dfqlib.notebook.explore import before_and_after, controls, rounding_error
from dfqlib.quantizers.calibrate import calibrated


@pytest.fixture
def student():
    """One convolution that doubles its input, and a ReLU; the images 0, 1, 2, 3 give activations 0, 2, 4, 6."""
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU())
    nn.init.constant_(network[0].weight, 2.0)
    return calibrated(network.eval(), BitWidths(None, 8), images())


def images():
    return torch.tensor([0.0, 1.0, 2.0, 3.0]).view(4, 1, 1, 1)


def test_activations_are_rounded_over_the_range_of_calibration(student):
    before, after = before_and_after(student, "1", 2, images() / 2)
    assert before.flatten().tolist() == [0, 1, 2, 3]
    # Four levels over the range (0, 6): 0, 2, 4, 6; a tie goes to the even step.
    torch.testing.assert_close(after.flatten(), torch.tensor([0.0, 0.0, 2.0, 4.0]))
    torch.testing.assert_close(student(images()), 2 * images(), msg="the student is as it was")


def test_weights_are_rounded_channel_by_channel(student):
    weight = torch.tensor([[0.0, 1.0, 3.0], [0.0, 20.0, 30.0]])
    student.get_submodule("0").weight = nn.Parameter(weight.view(2, 3, 1, 1))
    before, after = before_and_after(student, "0", 2, images())
    assert before.flatten(1).tolist() == weight.tolist() and not after.requires_grad
    torch.testing.assert_close(after.flatten(1), weight)


@pytest.mark.parametrize(("layer", "bits"), [("2", 4), ("0", 1), ("1", 9)])
def test_unknown_layers_and_bits_are_refused(student, layer, bits):
    with pytest.raises(UserError):
        before_and_after(student, layer, bits, images())


def test_rounding_error_by_hand():
    before = torch.tensor([-1.0, 1.0])  # variance 1
    error, below = rounding_error(before, torch.tensor([-1.1, 1.1]))
    assert error == pytest.approx(0.01) and below == pytest.approx(20)
    assert rounding_error(before, before) == (0, math.inf)


def test_a_control_redraws_the_figure_that_is_shown():
    drawn = []

    def draw(bits=4, source="noise", label=1):
        drawn.append((bits, source, label))
        return plt.figure(figsize=(bits, 1))

    box = controls(draw, bits=range(2, 9), source=["real", "noise"], label={"cat": 0, "dog": 1})
    slider, source, label = box.children[0].children
    assert [control.description for control in (slider, source, label)] == ["bits", "source", "label"]
    assert (slider.value, source.value, label.label) == (4, "noise", "dog")
    first = bytes(box.children[1].value)
    slider.value = 8
    second = bytes(box.children[1].value)
    assert second[1:4] == b"PNG" and second != first
    label.label = "cat"
    assert drawn == [(4, "noise", 1), (8, "noise", 1), (8, "noise", 0)]
    assert not plt.get_fignums()
