"""The quantizer and its observers: against the official implementation's numbers, and by hand."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dfqlib.errors import UserError
from dfqlib.quantizers.fake_quantize import fake_quantize, fake_quantize_per_channel
from dfqlib.quantizers.layers import QUANTIZED, FakeQuantize
from dfqlib.quantizers.observers import OBSERVERS, MovingAverage, Percentile, RunningMinMax, least_squares_shares
from dfqlib.speed.switches import without

OFFICIAL = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / "data" / "quantizer.npz").items()}
BITS = (2, 3, 4, 5, 6, 8)


def assert_official(actual: torch.Tensor, name: str, step: torch.Tensor | float) -> None:
    """Equal to the official value; where a value sits on a rounding tie (rare), one quantization step away."""
    expected = OFFICIAL[name]
    off = ~torch.isclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert off.float().mean() < 0.005
    assert ((actual - expected).abs() <= step * 1.001 + 1e-5).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["conv_weight", "linear_weight"])
def test_weights_equal_the_official_quantizer(name, bits):
    """Among them a channel without a 0 in its range and a constant one."""
    weight = OFFICIAL[name]
    low, high = weight.flatten(1).aminmax(dim=1)
    step = ((high - low) / (2**bits - 1)).view(-1, *[1] * (weight.dim() - 1))
    assert_official(fake_quantize_per_channel(weight, bits), f"{name}_q{bits}", step)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("row", [0, 1, 2])
def test_activations_equal_the_official_quantizer(row, bits):
    low, high = OFFICIAL["activation_ranges"][row]
    quantized = fake_quantize(OFFICIAL["activation"], low, high, bits)
    assert_official(quantized, f"activation_q{bits}_range{row}", (high - low) / (2**bits - 1))


def test_gradient_equals_the_official_one():
    x = OFFICIAL["activation"].clone().requires_grad_()
    low, high = OFFICIAL["activation_ranges"][1]
    fake_quantize(x, low, high, 4).square().sum().backward()
    torch.testing.assert_close(x.grad, OFFICIAL["activation_q4_range1_grad_of_sum_of_squares"], rtol=1e-4, atol=1e-5)


def test_two_bits_by_hand():
    """Levels 0, 1, 2, 3, where halves round to even after the shift by zero = 2; and a range that lacks 0."""
    x = torch.tensor([-5.0, 0.4, 0.6, 1.4, 2.6, 9.0])
    assert fake_quantize(x, torch.tensor(0.0), torch.tensor(3.0), 2).tolist() == [0, 0, 1, 1, 3, 3]
    assert fake_quantize(x + 9, torch.tensor(10.0), torch.tensor(13.0), 2).tolist() == [10, 10, 10, 10, 12, 13]


def test_levels_are_at_most_two_to_the_bits_and_errors_at_most_half_a_step():
    x, constant = torch.rand(1000), torch.full((3, 4), 0.37)
    for bits in BITS:
        quantized = fake_quantize(x, x.min(), x.max(), bits)
        torch.testing.assert_close(fake_quantize(constant, constant.min(), constant.max(), bits), constant)
        assert len(quantized.unique()) <= 2**bits
        assert (quantized - x).abs().max() <= 0.5001 * (x.max() - x.min()) / (2**bits - 1) + 1e-6


def test_gradient_is_identity_also_where_clipped():
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    (fake_quantize(x, torch.tensor(-1.0), torch.tensor(1.0), 3) * torch.arange(9.0)).sum().backward()
    assert x.grad.tolist() == list(range(9))


@pytest.mark.parametrize("fused", [True, False])
def test_a_range_that_learns_gets_the_gradient_of_its_step(fused):
    """Levels 0, 1, 2, 3: what rounds to -1 or 4 is clipped, has no gradient of its own, and moves with the range."""
    x = torch.tensor([-0.6, -0.4, 0.0, 1.3, 3.0, 3.4, 3.6], requires_grad=True)
    stretch = torch.ones((), requires_grad=True)
    with contextlib.nullcontext() if fused else without("fused_rounding"):
        quantized = fake_quantize(x, 0 * stretch, 3 * stretch, 2)
    assert quantized.tolist() == [0, 0, 0, 1, 3, 3, 3]
    weights = torch.arange(1.0, 8.0)
    (quantized * weights).sum().backward()
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]
    # Inside, level - x: 0.4, 0, -0.3, 0, -0.4; clipped, the level itself: 0 and 3.
    assert stretch.grad.item() == pytest.approx(2 * 0.4 - 4 * 0.3 - 6 * 0.4 + 7 * 3, rel=1e-5)


def test_input_is_left_as_it_was_and_memory_format_is_kept():
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    before = x.clone()
    quantized = fake_quantize(x, torch.tensor(-1.0), torch.tensor(1.0), 4)
    assert torch.equal(x, before)
    assert quantized.is_contiguous(memory_format=torch.channels_last)
    assert fake_quantize_per_channel(x, 4).is_contiguous(memory_format=torch.channels_last)


# Observers


def observed(observer, *batches):
    for batch in batches:
        observer.observe(torch.as_tensor(batch))
    return [round(observer.low.item(), 4), round(observer.high.item(), 4)]


@pytest.mark.parametrize(
    ("observer", "batches", "expected"),
    [
        (RunningMinMax(), [[2.0, 5.0]], [0, 5]),  # from 0
        (RunningMinMax(), [[-1.0, 3.0], [-4.0, 2.0], [0.0, 0.0]], [-4, 3]),  # only wider
        (RunningMinMax(), [[-3.0, -2.0]], [-3, 0]),
        (OBSERVERS["sample_mean"](), [[[-1.0, 2.0], [-3.0, 6.0]]], [-2, 4]),
        (OBSERVERS["sample_mean"](), [[[0.0, 2.0], [0.0, 6.0]], [[0.0, 1.0], [0.0, 1.0]]], [0, 4]),
        (Percentile(90), [torch.arange(100.0)], [0, 89]),
        (MovingAverage(), [[1.0]], [1, 1]),
        (MovingAverage(), [[0.0, 1.0]] * 7, [0, 1]),
        (MovingAverage(beta=0.5), [[0.0, 1.0], [0.0, 4.0]], [0, 3]),  # (1 + 2 * 4) / 3
    ],
)
def test_ranges_by_hand(observer, batches, expected):
    assert observed(observer, *batches) == expected


def test_percentile_leaves_out_the_extremes():
    x = torch.cat([torch.linspace(-1, 1, 99_998), torch.tensor([-50.0, 50.0])])
    low, high = observed(Percentile(), x)
    assert -1.01 < low < -0.99 and 0.99 < high < 1.01
    assert observed(Percentile(100), x) == [-50, 50]


@pytest.mark.parametrize("observer", ["mse", "least_squares"])
def test_the_range_of_least_error_is_the_best_of_eighty_shrunk_ones(observer):
    x = torch.cat([torch.rand(4000, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0])])
    observer = OBSERVERS[observer]()
    observer.observe(x, bits=3)

    def error(high):
        return (fake_quantize(x, torch.tensor(0.0), torch.as_tensor(high), 3) - x).square().mean().item()

    best = min((3 * (1 - 0.01 * i) for i in range(80)), key=error)
    assert observer.high.item() == pytest.approx(best, rel=1e-5)
    assert best < 2


def test_least_squares_share_by_hand():
    """Two bits: 0 to 3 fits exactly; beside many ones, an outlier of 5 is best clipped so that a level is at 1."""
    rows = torch.tensor([[0.0, 1.0, 2.0, 3.0] * 250, [1.0] * 998 + [0.0, 5.0]])
    shares = least_squares_shares(rows, 2)
    assert shares[:, 0].tolist() == pytest.approx([1, 0.6])


def test_published_moving_average_compounds_its_correction():
    observer = MovingAverage(compounding_correction=True)
    ranges = []
    for batch in OFFICIAL["range_batches"]:
        observer.observe(batch)
        ranges.append(torch.stack([observer.low, observer.high]))
    torch.testing.assert_close(torch.stack(ranges), OFFICIAL["range_ema_as_published"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OBSERVERS)
def test_every_observer_serves_a_fake_quantizer(name):
    """No range: told. Observing: the range follows the batch, the gradient passes. Then: the range stands still."""
    quantizer = FakeQuantize(4, OBSERVERS[name](), "stage1.relu")
    x = torch.rand(8, 3, 5, 5, requires_grad=True)
    with pytest.raises(UserError, match=r"'stage1\.relu' has no range yet"):
        quantizer(x)
    quantizer.observing = True
    quantizer(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    quantizer.observing = False
    low, high = quantizer.observer.low.clone(), quantizer.observer.high.clone()
    assert low.item() <= 0.02 and 0.2 <= high.item() <= 1
    assert quantizer(10 * x).max() <= high * 1.001
    assert torch.equal(quantizer.observer.low, low) and torch.equal(quantizer.observer.high, high)


def test_bad_observer_parameters_are_refused():
    with pytest.raises(UserError, match="percentile=101"):
        Percentile(101)
    with pytest.raises(UserError, match="beta=1"):
        MovingAverage(beta=1)


# Layers


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
        (nn.Conv2d(4, 8, 3, groups=4, bias=False, dilation=2), (2, 4, 7, 7)),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=2), (2, 4, 7, 7)),
        (nn.Linear(5, 3), (2, 5)),
    ],
)
def test_quantized_layer_is_the_layer_with_a_quantized_weight(layer, shape):
    kind = QUANTIZED[type(layer)]
    x = torch.randn(shape)
    state = torch.get_rng_state()
    quantized, same = kind(layer, 3), kind(layer, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(same(x), layer(x))
    output = quantized(x)
    output.sum().backward()
    assert quantized.weight.grad.abs().sum() > 0
    with torch.no_grad():
        layer.weight.copy_(fake_quantize_per_channel(layer.weight, 3))
    torch.testing.assert_close(output, layer(x))
