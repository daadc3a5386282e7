"""Students for an integer runtime: what lies on a grid, symmetric weights, and the network that a file holds."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfqlib.bits import BitWidths
from dfqlib.errors import UserError
from dfqlib.quantizers import calibrate
from dfqlib.quantizers.convert import quantize_model
from dfqlib.quantizers.describe import describe
from dfqlib.quantizers.fake_quantize import fake_quantize, scale_and_zero_point
from dfqlib.quantizers.finalise import finalise
from dfqlib.quantizers.layers import QUANTIZED, FakeQuantize, QuantizedLayer, integer_weight
from dfqlib.quantizers.sites import grids

INTEGER = {"sites": "integer", "weights": "symmetric"}


class By(nn.Module):
    """Named layers, and how ``forward`` uses them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.use = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.use(self, x)


def conv(channels=3, out=3, **options):
    return nn.Conv2d(channels, out, 1, **options)


def residual(net, x):
    x = net.relu(net.bn1(net.conv1(x)))
    return net.fc(net.relu(net.bn2(net.conv2(x)) + x).mean((2, 3)))


def residual_network():
    torch.manual_seed(0)
    layers = {"conv1": conv(), "bn1": nn.BatchNorm2d(3), "relu": nn.ReLU(), "conv2": conv(), "bn2": nn.BatchNorm2d(3)}
    network = By(residual, **layers, fc=nn.Linear(3, 5))
    for norm, gains in ((network.bn1, [2.0, -1.5, 1e-15]), (network.bn2, [1.0, 0.0, -0.5])):
        norm.weight.data, norm.bias.data = torch.tensor(gains), torch.randn(3)
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    return network.eval()


def fire(net, x):
    x = F.relu(net.squeeze(x))
    return net.last(F.max_pool2d(torch.cat([F.relu(net.left(x)), net.right(x)], 1), 2))


def attended(net, x):
    return net.fc((net.conv(x) * torch.sigmoid(net.gate(x))).flatten(1))


def shuffled(net, x):
    one, two = net.conv(x).chunk(3, 1)[:2]
    return net.fc(torch.cat([one, net.pointwise(two)], 1))


def sized(net, x):
    batch = x.shape[0] * 1
    return net.fc(net.act(net.drop(net.bn(net.conv(x)))).view(batch, -1))


@pytest.mark.parametrize(
    "network, names",
    [
        (residual_network(), ["input", "relu", "bn2", "relu:2"]),
        # Parts of a concatenation have one grid, which pooling by maximum keeps.
        (By(fire, squeeze=conv(), left=conv(), right=conv(), last=conv(6)), ["input", "relu", "relu:2"]),
        (
            By(attended, conv=conv(), gate=conv(), fc=nn.Linear(12, 2)),
            ["input", "conv.output", "gate.output", "sigmoid", "mul"],
        ),
        (By(shuffled, conv=conv(), pointwise=conv(1, 1), fc=nn.LazyLinear(2)), ["input", "conv.output"]),
        # A dropout does not part a batch norm from its activation; sizes and numbers are no activations.
        (
            By(sized, conv=conv(), bn=nn.BatchNorm2d(3), drop=nn.Dropout(), act=nn.ReLU(), fc=nn.Linear(12, 2)),
            ["input", "act"],
        ),
        (nn.Sequential(conv(), nn.BatchNorm2d(3), nn.SiLU(), conv(), nn.GELU()), ["input", "1", "2"]),
        (By(lambda net, x: net.fc(F.hardswish(x.add_(1))), fc=nn.LazyLinear(2)), ["input", "add", "hardswish"]),
        (By(lambda net, x: net.conv(net.conv(net.conv(x))), conv=conv()), ["input", "conv.output", "conv.output:2"]),
        # A ReLU of what lies on a grid, for something else needs it there, lies there too.
        (
            By(lambda net, x: net.fc(F.relu(y := net.conv(x)) + y), conv=conv(), fc=conv()),
            ["input", "conv.output", "add"],
        ),
        (
            By(lambda net, x: net.fc(net.conv(x).max(2).values), conv=conv(), fc=nn.Linear(2, 2)),
            ["input", "conv.output", "fc.getitem"],
        ),
        (nn.Sequential(nn.Upsample(scale_factor=2), conv(), nn.ReLU(), nn.Softmax(1)), ["input"]),
    ],
)
def test_what_an_integer_runtime_needs_has_one_quantizer_each(network, names):
    x = torch.randn(2, 3, 2, 2)
    network(x.clone())  # for lazy layers
    student = calibrate.calibrated(network.eval(), BitWidths(8, 8), x, **INTEGER)
    assert list(dict.fromkeys(m.name for m in student.modules() if isinstance(m, FakeQuantize))) == names
    on_grid = grids(student)
    for node in student.graph.nodes:
        module = student.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, QuantizedLayer):
            assert node.args[0] in on_grid
    assert describe(student).activation_bits.ne(32).all()
    torch.testing.assert_close(student(x), network(x), rtol=0.1, atol=0.1)


def test_integer_student_computes_what_quantization_by_hand_computes():
    """The input over its known range at 8 bits; both summands, not their sum; the mean on its input's grid."""
    network, x = residual_network(), torch.rand(4, 3, 6, 6)
    student = calibrate.calibrated(network, BitWidths(None, 3), x, sites="integer", input_range=(0, 1))
    high = {m.name: m.observer.high for m in student.modules() if isinstance(m, FakeQuantize)}
    low = {m.name: m.observer.low for m in student.modules() if isinstance(m, FakeQuantize)}
    assert (low["input"], high["input"]) == (0, 1)

    def rounded(name, values, bits=3):
        return fake_quantize(values, low[name], high[name], bits)

    first = rounded("relu", F.relu(network.bn1(network.conv1(rounded("input", x, 8)))))
    total = rounded("relu:2", F.relu(rounded("bn2", network.bn2(network.conv2(first))) + first))
    torch.testing.assert_close(student(x), network.fc(rounded("relu:2", total.mean((2, 3)))))


@pytest.mark.parametrize("observer", ["minmax", "moving_average"])
def test_parts_of_a_concatenation_are_rounded_over_the_range_of_all(observer):
    one, ten = conv(1, 1, bias=False), conv(1, 1, bias=False)
    network = By(lambda net, x: net.last(torch.cat([net.one(x), net.ten(x)], 1)), one=one, ten=ten, last=conv(2))
    network.one.weight.data.fill_(-1), network.ten.weight.data.fill_(10)
    x = torch.linspace(0.5, 1, 64).view(1, 1, 8, 8)
    row = describe(calibrate.calibrated(network, BitWidths(None, 8), x, observer, sites="integer")).iloc[2]
    assert (row.layer, row.low, row.high) == ("one.output", pytest.approx(-1, 0.01), pytest.approx(10, 0.01))


def test_images_are_clipped_to_the_pixels_range_where_it_is_known():
    torch.manual_seed(0)
    network, x = nn.Sequential(conv(), nn.BatchNorm2d(3), nn.ReLU(), conv()).eval(), 5 * torch.randn(4, 3, 2, 2)
    known = torch.tensor([-1.0, -2, -3]).view(3, 1, 1), torch.tensor([1.0, 2, 4]).view(3, 1, 1)
    for make in (calibrate.calibrated, calibrate.corrected):
        make = functools.partial(make, network, BitWidths(8, 4), sites="integer")
        clipped, same = (make(images, input_range=known) for images in (x, x.clamp(*known)))
        assert describe(clipped).equals(describe(same)) and torch.equal(clipped(x), same(x))
        seen, free = (describe(student).set_index("layer") for student in (clipped, make(x)))
        assert (seen.low["input"], seen.high["input"], seen.activation_bits["input"]) == (-3, 4, 8)
        assert free.high["input"] > 6 and free.high["2"] > seen.high["2"]


def test_symmetric_weights_by_hand():
    """Three bits, levels -4 .. 3, the channel's max |w| at 3; a share of 0.5 cuts off at level -4."""
    layer = nn.Linear(4, 3, bias=False)
    layer.weight.data = torch.tensor([[3.0, -3, 1.4, 0.6], [-6, 1, 2, 4], [0, 0, 0, 0]])
    quantized = QUANTIZED[nn.Linear](layer, 3, symmetric=True)
    levels, scale, zero = integer_weight(quantized)
    assert levels.tolist() == [[3, -3, 1, 1], [-3, 0, 1, 2], [0, 0, 0, 0]] and levels.dtype == torch.int8
    assert scale[:2].tolist() == pytest.approx([1, 0.5]) and zero.tolist() == [0, 0, 0]
    assert torch.equal(quantized(torch.eye(4)).T, (levels + zero[:, None]) / scale[:, None])
    quantized.share = torch.tensor([[1.0], [0.5], [1.0]])
    assert integer_weight(quantized)[0][1].tolist() == [-4, 1, 2, 3]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in QUANTIZED if kind is not nn.Linear])
def test_each_output_channel_has_a_range_of_its_own(kind, symmetric):
    """In groups and transposed convolutions, too: enlarging one channel's weights changes no other channel."""
    torch.manual_seed(0)
    layer = kind(4, 6, 2, groups=2, bias=False)
    outputs = layer(x := torch.randn(1, 4, *[3] * len(layer.kernel_size)))
    rounded = QUANTIZED[kind](layer, 4, symmetric)(x)
    torch.testing.assert_close(rounded, outputs, rtol=0.2, atol=0.2)
    assert not torch.equal(rounded, outputs)
    with torch.no_grad():
        (layer.weight[2:, 1] if layer.transposed else layer.weight[4]).mul_(100)  # output channel 4
    changed = (QUANTIZED[kind](layer, 4, symmetric)(x) - rounded).abs().flatten(2).amax((0, 2)) > 1e-4
    assert changed.tolist() == [False] * 4 + [True, False]


@pytest.mark.parametrize("weights", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [4, None])
def test_folding_the_batch_norms_changes_nothing(weights, bits):
    """With gains that are positive, negative, 0 and next to it."""
    network, x = residual_network(), torch.randn(4, 3, 6, 6)
    student = calibrate.calibrated(network, BitWidths(bits, 8), x, sites="integer", weights=weights)
    final = finalise(student, round_biases=False)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in final.modules())
    torch.testing.assert_close(final(x), student(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["symmetric", "asymmetric"])
def test_a_final_student_holds_whole_numbers_only(weights):
    """Weights are levels of their grid, biases steps of input times weight that fit into int32."""
    network, x = residual_network(), torch.randn(4, 3, 6, 6)
    student = calibrate.compensated(network, BitWidths(4, 4), x, sites="integer", weights=weights)
    final = finalise(student)
    quantizers = grids(final)
    layers = [node for node in final.graph.nodes if isinstance(getattr(final, str(node.target), None), QuantizedLayer)]
    assert len(layers) == 3
    for node in layers:
        layer, quantizer = final.get_submodule(node.target), quantizers[node.args[0]]
        levels, scale, zero = integer_weight(layer)
        assert levels.min() >= -8 and levels.max() <= 7 and (weights == "asymmetric" or not zero.any())
        on_grid = ((levels.flatten(1) + zero[:, None]) / scale[:, None]).view_as(layer.weight)
        assert torch.equal(layer.weight, on_grid) and torch.isfinite(1 / scale).all()
        steps = layer.bias.double() * scale * scale_and_zero_point(*quantizer.range(), quantizer.bits)[0]
        assert steps.abs().max() < 2**31
        torch.testing.assert_close(steps, steps.round(), rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(final(x), student(x), rtol=0.5, atol=0.5)
    assert not torch.equal(final.fc.bias, network.fc.bias)


def test_a_batch_norm_over_tokens_is_not_folded_into_their_linear_layer():
    network = nn.Sequential(nn.Flatten(2), nn.Linear(4, 8), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(8, 2)).eval()
    network[2].running_mean.normal_()
    student = calibrate.calibrated(network, BitWidths(8, 8), x := torch.randn(4, 3, 2, 2), **INTEGER)
    torch.testing.assert_close(finalise(student, round_biases=False)(x), student(x))


def test_a_layer_that_is_called_twice_becomes_two():
    def twice(net, x):
        return net.last(net.after(net.conv(net.first(net.conv(x)))))

    torch.manual_seed(0)
    network = By(twice, conv=conv(), first=nn.BatchNorm2d(3), after=nn.BatchNorm2d(3), last=conv())
    network(x := torch.randn(64, 3, 2, 2))
    student = calibrate.calibrated(network.eval(), BitWidths(8, 8), x, **INTEGER)
    assert describe(finalise(student)).weight_bits.count() == 3
    torch.testing.assert_close(finalise(student, round_biases=False)(x), student(x), rtol=1e-5, atol=1e-5)


def test_a_student_without_ranges_is_not_final():
    with pytest.raises(UserError, match=r"activation '.*' has no range yet"):
        finalise(quantize_model(residual_network(), BitWidths(8, 8), **INTEGER))


@pytest.mark.parametrize(
    "network, bits, options, message",
    [
        (
            nn.Sequential(conv(), nn.SiLU(), nn.Sigmoid()),
            (4, 4),
            {},
            "activation bits=4 apply to nothing: sites='papers' are ReLU and ReLU6, and the nonlinearities of "
            "Sequential are sigmoid, silu; allowed: None, or sites='integer'",
        ),
        (nn.ReLU(), (None, 4), {"sites": "integer"}, "activation bits=4 apply to nothing: .* ReLU has no such layer"),
        (nn.Sequential(nn.ReLU()), (4, 4), {}, "weight bits=4 apply to nothing"),
        (conv(), (4, 4), {"sites": "integers"}, r"sites='integers' is unknown \(did you mean 'integer'\?\)"),
        (conv(), (4, 4), {"weights": "symetric"}, r"weights='symetric' is unknown \(did you mean 'symmetric'\?\)"),
    ],
)
def test_bits_that_apply_to_nothing_are_refused(network, bits, options, message):
    with pytest.raises(UserError, match=message):
        quantize_model(network, BitWidths(*bits), **options)


def test_what_stays_in_float_is_told():
    network = By(lambda net, x: F.silu(net.conv(x) + x) * net.scale, conv=conv())
    network.scale = nn.Parameter(torch.ones(3, 1, 1))
    table = describe(quantize_model(nn.Sequential(network, conv(), nn.ReLU()), BitWidths(4, 4))).set_index("layer")
    told = table[(table.activation_bits == 32) | (table.weight_bits == 32)]
    assert list(told.index) == ["input", "0.conv.output", "0.add", "0.silu", "0.mul", "0.scale"]
    assert table.activation_bits["2"] == 4 and table.bytes["0.scale"] == 12


def test_no_average_in_a_final_student_is_halfway_between_two_levels():
    network = By(
        lambda net, x: net.fc(F.avg_pool2d(F.relu(net.conv(x)), 2).flatten(1)), conv=conv(), fc=nn.Linear(3, 2)
    )
    student = calibrate.calibrated(network, BitWidths(8, 4), torch.randn(8, 3, 2, 2), **INTEGER)
    final, levels = finalise(student), torch.arange(16.0)
    relu, average = [final.get_submodule(n.target) for n in final.graph.nodes if "fake_quantize" in str(n.target)][1:]
    step = 1 / scale_and_zero_point(*relu.range(), 4)[0]
    halfway = (levels[:-1] + 0.5) * step
    assert torch.equal(average(halfway * (1 - 1e-6)), average(halfway * (1 + 1e-6)))
