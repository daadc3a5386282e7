"""Sensitivities against students with one quantized layer, and the Pareto frontier against all assignments."""

import copy
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from dfqlib.bits import BitWidths
from dfqlib.errors import UserError
from dfqlib.quantizers.calibrate import calibrated
from dfqlib.quantizers.convert import quantize_model
from dfqlib.quantizers.mixed_precision import layer_sizes, mean_kl, of_activations, pareto_frontier, sensitivity


class Net(nn.Module):
    """Residual, with in-place operations on tensors needed again, and a convolution called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.shortcut = nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        x = self.relu(self.stem(x))
        y = self.body(self.relu(self.body(x)))
        y += self.shortcut(x)
        return self.head(self.relu(y).mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def table(net, images):
    return sensitivity(net, images)


def test_kl_by_hand():
    teacher, student = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    by_hand = (0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)) / 2
    assert mean_kl(teacher.log(), student.log()).item() == pytest.approx(by_hand, rel=1e-5)


def test_sensitivity_is_that_of_one_quantized_layer_alone(net, images, table):
    layers = ["stem", "body", "shortcut", "head"]
    assert list(table.index) == layers and list(table.columns) == [2, 4, 8]
    for layer, bits in itertools.product(layers, (2, 4, 8)):
        one = quantize_model(net, BitWidths({**dict.fromkeys(layers), layer: bits}, None))
        with torch.no_grad():
            expected = mean_kl(net(images), one(images)).item()
        assert table.loc[layer, bits] == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert (table[2] > table[4]).all() and (table[4] > table[8]).all()


def test_activations_are_quantized_one_at_a_time_and_sized_by_hand(net, images):
    table, sizes = of_activations(net, images, (2, 8))
    rest = dict.fromkeys(table.index[1:])
    with torch.no_grad():
        student = calibrated(net, BitWidths(None, {table.index[0]: 2, **rest}), images)
        assert table.iloc[0, 0] == pytest.approx(mean_kl(net(images), student(images)).item(), rel=1e-6)
    assert (table[2] > table[8]).all() and len(table) == 3  # calls of the ReLU
    assert sizes.to_numpy().tolist() == [[36, 144]] * 3  # 4 channels of 6 x 6
    whole = pareto_frontier(table, sizes)[-1].bits
    assert quantize_model(net, BitWidths(None, whole)) and set(whole.values()) == {8}


def test_sensitivity_leaves_teacher_and_images_alone(net, images):
    before = copy.deepcopy([*net.parameters(), images])
    sensitivity(net, images, bits=(2,))
    assert all(map(torch.equal, before, [*net.parameters(), images]))


def test_sizes_by_hand(net):
    assert layer_sizes(net, (2, 4)).to_dict("list") == {2: [27, 36, 4, 10], 4: [54, 72, 8, 20]}


def undominated(assignments):
    """(size, sensitivity) of the assignments that no other is at least as good as in both, by comparing all."""
    points = sorted({(size, round(total, 12)) for size, total in assignments})
    return [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]


def brute_force(table, sizes):
    for widths in itertools.product(table.columns, repeat=len(table)):
        yield tuple(
            sum(of.loc[chosen].item() for chosen in zip(of.index, widths, strict=True)) for of in (sizes, table)
        )


@pytest.mark.parametrize("seed", range(8))
def test_frontier_equals_brute_force_with_ties_and_disorder(seed):
    """Equal sizes, equal sensitivities and wide layers less sensitive at fewer bits: nothing is taken for granted."""
    random = np.random.default_rng(seed)
    index, columns = [f"layer{i}" for i in range(5)], [2, 4, 8]
    table = pd.DataFrame(random.integers(0, 9, (5, 3)) / 8, index, columns)
    sizes = pd.DataFrame(random.integers(1, 9, (5, 3)), index, columns)
    assert [(a.size, a.sensitivity) for a in pareto_frontier(table, sizes)] == undominated(brute_force(table, sizes))


def test_every_point_is_its_bit_widths(net, table):
    sizes = layer_sizes(net)
    frontier = pareto_frontier(table, sizes)
    assert (frontier.sizes[0], frontier.sizes[-1]) == (sizes[2].sum(), sizes[8].sum())
    for point in frontier:
        assert list(point.bits) == list(table.index)
        assert point.size == sum(sizes.loc[layer, bits] for layer, bits in point.bits.items())
        assert point.sensitivity == pytest.approx(sum(table.loc[layer, bits] for layer, bits in point.bits.items()))


def test_best_under_a_budget(net, table):
    frontier = pareto_frontier(table, layer_sizes(net))
    for budget in (frontier.sizes[0], 200, 200.5, 1e9):
        best = frontier.best_under(budget)
        assert best.size <= budget
        assert best.sensitivity == min(p.sensitivity for p in frontier if p.size <= budget)
    assert frontier[-1].bits == dict.fromkeys(table.index, 8)
    with pytest.raises(UserError, match="budget=76 is too small; allowed: at least 77 bytes"):
        frontier.best_under(76)


def test_what_does_not_fit_is_refused(net, images, table):
    with pytest.raises(UserError, match="bits=9 is not a supported bit width"):
        sensitivity(net, images, (2, 9))
    with pytest.raises(UserError, match="same layers and bit widths"):
        pareto_frontier(table, layer_sizes(net, (2, 4)))
