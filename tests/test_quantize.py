"""Networks quantized whole: what is found, where fake quantization stands, what is refused, what the table says."""

import functools
import weakref

import pytest
import torch
import torchvision
from pytorchcv.model_provider import get_model
from torch import nn
from torch.ao.nn import qat
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn import functional as F

from dfqlib.bits import BitWidths
from dfqlib.errors import UserError
from dfqlib.quantizers import calibrate, round_weights
from dfqlib.quantizers.convert import quantize_model
from dfqlib.quantizers.describe import describe, model_bytes
from dfqlib.quantizers.fake_quantize import fake_quantize_per_channel
from dfqlib.quantizers.layers import FakeQuantize, QuantConv2d, QuantLinear, observing
from dfqlib.quantizers.observers import MovingAverage
from dfqlib.quantizers.round_weights import columns, round_rows
from dfqlib.speed.scale_weights import scale_weights


class Block(nn.Module):
    """A residual block that calls one ReLU module twice, one function and one in-place method."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.relu6 = nn.ReLU6()
        self.linear = nn.Linear(4, 5)

    def forward(self, x):
        x = self.relu(self.conv1(x))
        y = F.relu(self.depthwise(x))
        y = self.relu(self.bn(self.grouped(y)) + x)
        y = self.relu6(y * 2).mean((2, 3)).relu_()
        return self.linear(y)


def fake_quantizers(student):
    return {m.name: m for m in student.modules() if isinstance(m, FakeQuantize)}


def quantized(model, weight=4, activation=4):
    return quantize_model(model, BitWidths(weight, activation))


def calibrated(model, x, weight=4, activation=4, observer="moving_average"):
    return calibrate.calibrated(model, BitWidths(weight, activation), x, observer)


def test_student_computes_what_quantization_by_hand_computes():
    """Four calls of ReLU and one of ReLU6, each quantized over its own range; the rest stays in float."""
    model, x = Block().eval(), torch.randn(2, 3, 6, 6)
    student = calibrated(model, x, 4, 3, observer="minmax")

    quantizers = iter(fake_quantizers(student).values())

    def relu(value, kind=F.relu):
        return next(quantizers)(kind(value))

    with torch.no_grad():
        for layer in (model.conv1, model.depthwise, model.grouped, model.linear):
            layer.weight.copy_(fake_quantize_per_channel(layer.weight, 4))
        a = relu(model.conv1(x))
        b = relu(model.bn(model.grouped(relu(model.depthwise(a)))) + a)
        expected = model.linear(relu(relu(b * 2, F.relu6).mean((2, 3))))
        torch.testing.assert_close(student(x), expected)
    assert len({q.observer.high.item() for q in fake_quantizers(student).values()}) >= 4


@pytest.mark.parametrize(
    "relu",
    [
        F.relu,
        torch.relu,
        torch.relu_,
        F.relu6,
        nn.ReLU(),
        nn.ReLU6(inplace=True),
        lambda x: x.relu(),
        lambda x: x.relu_(),
        lambda x: F.relu(x, inplace=True),
        lambda x: F.relu6(x, True),
        lambda x: (F.relu(x, inplace=True), x)[1],  # whose result is not taken
    ],
)
def test_every_way_to_write_a_relu(relu):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = relu if isinstance(relu, nn.Module) else None

        def forward(self, x):
            return (self.act or relu)(x + 0)

    x = torch.linspace(-3, 3, 64).view(1, 64)
    output = calibrated(Net(), x, None, 2)(x)
    assert output.unique().tolist() == pytest.approx([0, 1, 2, 3])


def test_relus_with_similar_names_keep_their_own_ranges_and_nothing_else_has_one():
    model = nn.Sequential()
    for outer, inner in (("a_b", "c"), ("a", "b_c")):
        model.add_module(outer, nn.Sequential())
        model.get_submodule(outer).add_module(inner, nn.ReLU())
    model.extend([nn.Conv2d(3, 4, 3), nn.Hardswish(), nn.LeakyReLU(), nn.Sigmoid(), nn.Linear(16, 2)])
    assert list(fake_quantizers(quantized(model))) == ["a_b.c", "a.b_c"]


@pytest.mark.parametrize(
    "name, size, layers, relus",
    [
        ("resnet20_cifar10", 32, 22, 19),
        ("resnet18", 224, 21, 17),
        ("resnet50", 224, 54, 49),
        ("inceptionv3", 299, 95, 94),
        ("mobilenetv2_w1", 224, 54, 36),
        ("shufflenet_g1_w1", 224, 50, 33),
        ("sqnxt23_w2", 224, 112, 132),
        ("torchvision/resnet18", 224, 21, 17),
        ("torchvision/mobilenet_v2", 64, 53, 35),
        ("torchvision/shufflenet_v2_x0_5", 64, 57, 37),
    ],
)
def test_known_architectures(name, size, layers, relus):
    """In float the traced copy is the model, bit for bit; quantized, every layer and every ReLU call is found."""
    factory = torchvision.models.get_model if name.startswith("torchvision/") else get_model
    model = factory(name.removeprefix("torchvision/")).eval()
    student = quantized(model)
    assert len(fake_quantizers(student)) == relus
    assert sum(isinstance(m, (QuantConv2d, QuantLinear)) for m in student.modules()) == layers
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert torch.equal(quantized(model, None, None)(x), model(x))
        with observing(student):
            observed = student(x)
        assert observed.isfinite().all() and torch.equal(student(x), observed)


def test_given_model_stays_as_it_was():
    """Its weights, mode, hooks and gradients' switches: the student has its own."""
    model, x = Block().train().requires_grad_(False), torch.randn(4, 3, 6, 6)
    calls = []
    model.conv1.register_forward_hook(lambda *_: calls.append(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    student = calibrated(model, x)
    assert not calls
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    student(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert student.bn.running_mean.abs().sum() == 0
    optimizer.step()
    assert not student.training and all(p.requires_grad for p in student.parameters())
    assert model.training and not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not torch.equal(student.conv1.weight, model.conv1.weight)
    model(x)
    assert calls == [1]


def test_channels_last_and_dtype_are_kept():
    student = quantized(Block().to(memory_format=torch.channels_last))
    assert student.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert quantized(Block().double()).conv1.weight.dtype == torch.float64


def two_norms(images):
    """A network whose batch norms hold the statistics of ``images``."""
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU(), nn.Conv2d(4, 5, 3)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(5, momentum=None))
    model(images)
    return model.eval()


def test_batch_norms_are_corrected_by_hand():
    """Images 1, 3 have mean 2 and variance 1; at twice the weight mean 4 and variance 4."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0.0))
    model[0].weight.data.fill_(1)
    model[1].running_mean.fill_(5), model[1].running_var.fill_(3)
    student = quantized(model.eval(), None, None)
    student.get_submodule("0").weight.data.mul_(2)
    calibrate.correct_batch_norms(student, model, torch.tensor([1.0, 3.0]).view(2, 1, 1, 1))
    norm = student.get_submodule("1")
    assert (norm.running_mean.item(), norm.running_var.item()) == pytest.approx((5 + 4 - 2, 3 * 4))


def test_correction_holds_no_activations():
    held, images = [], torch.randn(64, 3, 8, 8)
    model = two_norms(images)
    model[1].register_forward_pre_hook(lambda _, inputs: held.append(weakref.ref(inputs[0])))
    model[4].register_forward_pre_hook(lambda *_: held.append(held[0]() is None))
    calibrate.correct_batch_norms(quantized(model, None, None), model, images)
    assert held[1]


def test_correction_undoes_a_change_of_scale_layer_by_layer():
    """The second batch norm is right only if it was corrected behind the first; done twice it changes nothing."""
    images = torch.randn(64, 3, 8, 8)
    model = two_norms(images)
    student = quantized(model, None, None)
    for name, scale in (("0", 2), ("3", 0.5)):
        student.get_submodule(name).weight.data.mul_(scale)
    for _ in range(2):
        calibrate.correct_batch_norms(student, model, images)
        torch.testing.assert_close(student(images), model(images), rtol=1e-3, atol=1e-3)


def test_corrected_calibration_is_closer_to_the_network_and_repeats():
    images = torch.randn(64, 3, 8, 8)
    model = two_norms(images)
    model[0].weight.data[0, 0, 0, 0] = 4  # an outlier, which takes most levels of its channel
    model.train()(images), model.eval()
    fit = functools.partial(calibrate.corrected, fit_weights=True)
    makers = calibrate.calibrated, calibrate.corrected, calibrate.corrected, fit, calibrate.compensated
    published, corrected, again, fitted, compensated = (make(model, BitWidths(3, 3), images) for make in makers)

    def gap(student):
        return (student(images) - model(images)).square().mean().item()

    assert gap(compensated) < gap(fitted) < gap(corrected) < 0.9 * gap(published) and gap(again) == gap(corrected)
    assert fitted.get_submodule("0").share[0] < 1
    assert model_bytes(fitted) == model_bytes(published)


def test_a_weight_makes_up_for_the_rounding_of_those_before_it():
    """On the grid of whole numbers, without correlation and with inputs of which the first two are always the same."""
    rows, grid = torch.tensor([[[0.4, 0.4, 1.3], [0.7, 0.6, -0.6]]]), (torch.ones(1, 2), torch.zeros(1, 2))
    apart, same = torch.eye(3)[None].double(), torch.eye(3)[None].double()
    same[0, 0, 1] = same[0, 1, 0] = 1
    assert round_rows(rows, apart, *grid, 4).tolist() == [[[0, 0, 1], [1, 1, -1]]]
    together = round_rows(rows, same, *grid, 4)
    assert together[..., :2].sum(2).tolist() == [[1, 1]] and together[..., 2].tolist() == [[1, -1]]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rounded_weights_keep_the_output(groups, monkeypatch):
    """In a convolution with groups, stride and padding, also where its rows are rounded in parts."""
    layer = nn.Conv2d(4, 8, 3, stride=2, padding=(1, 2), groups=groups, padding_mode="reflect")
    x = (torch.randn(16, 4, 1, 1) + 0.3 * torch.randn(16, 4, 9, 9)).relu()
    seen = columns(layer, x)
    weight = layer.weight.flatten(1).unflatten(0, (groups, -1))
    out = (weight @ seen).flatten(0, 1).unflatten(1, (16, 5, 6)).transpose(0, 1) + layer.bias[:, None, None]
    torch.testing.assert_close(out, layer(x))
    for largest in (4096, 5):
        monkeypatch.setattr(round_weights, "LARGEST", largest)
        nearest, rounded = (quantize_model(nn.Sequential(layer), BitWidths(3, None)) for _ in range(2))
        round_weights.round_weights(rounded, x)
        errors = [(student(x) - layer(x)).square().mean() for student in (rounded, nearest)]
        assert errors[0] < 0.8 * errors[1]


def test_student_is_loaded_from_its_state():
    x = torch.randn(2, 3, 6, 6)
    student, other = calibrated(Block(), x), quantized(Block())
    other.load_state_dict(student.state_dict())
    assert torch.equal(other(x), student(x))


def test_bit_widths_by_layer_and_an_observer_of_ones_own():
    x = torch.randn(2, 3, 6, 6)
    weight_bits = {"conv1": 8, "depthwise": None, "grouped": 2, "linear": None}
    activation_bits = {"relu": 8, "relu:2": 4, "relu:3": None, "relu6": 3, "relu:4": 2}
    published = functools.partial(MovingAverage, compounding_correction=True)
    student = calibrated(Block(), x, weight_bits, activation_bits, published)
    assert all(q.observer.compounding_correction for q in fake_quantizers(student).values())
    assert {n: student.get_submodule(n).weight_bits for n in weight_bits} == weight_bits
    assert {n: q.bits for n, q in fake_quantizers(student).items()} == {"relu": 8, "relu:2": 4, "relu6": 3, "relu:4": 2}


@pytest.mark.parametrize(
    "weight, activation, observer, message",
    [
        (1, 4, "minmax", "weight bits=1 is not a supported bit width; allowed: whole numbers from 2 to 8"),
        (4, 9, "minmax", "activation bits=9 is not a supported bit width"),
        (4, 4, "minmix", "observer='minmix' is unknown \\(did you mean 'minmax'\\?\\)"),
        ({"conv1": 4}, 4, "minmax", "weight bits give no width for layer 'depthwise' \\(3 missing\\)"),
        ({"conv_1": 4}, 4, "minmax", "layer in weight bits='conv_1' is unknown \\(did you mean 'conv1'\\?\\)"),
        ({"conv1": 12}, 4, "minmax", "weight bits\\['conv1'\\]=12"),
    ],
)
def test_bad_arguments_are_refused(weight, activation, observer, message):
    with pytest.raises(UserError, match=message):
        quantize_model(Block(), BitWidths(weight, activation), observer)


# Models that cannot be quantized whole are refused by name.


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class BorrowedWeight(nn.Module):
    """Computes with the weight of its layer without calling it, and with kernels that depend on its input."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(3, 3), function

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Sequential(nn.ReLU(), Branching()), "module '1' \\(Branching\\): symbolically traced variables cannot"),
        (Branching(), "forward of Branching"),
        (BorrowedWeight(lambda self, x: F.conv2d(x, x)), "BorrowedWeight calls conv2d on weights that depend on its"),
        (BorrowedWeight(lambda self, x: x * self.linear.weight), "reads 'linear.weight' without calling 'linear'"),
        (nn.Sequential(nn.LSTM(3, 3)), "Sequential has weights in '0' \\(LSTM\\), which cannot be quantized"),
        (Block().half(), "Block has weights of torch.float16"),
        (nn.Sequential(nn.TransformerEncoderLayer(4, 2)), "hides '.*' inside module '0' \\(TransformerEncoderLayer\\)"),
        (nn.Sequential(qat.Conv2d(3, 3, 1, qconfig=get_default_qat_qconfig())), "qat.* at '0', which is no layer"),
        (quantized(Block()), "is already quantized \\(at 'conv1'\\)"),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(model, message):
    with pytest.raises(UserError, match=message):
        quantized(model)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions_may_be_functions(dims):
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    model = BorrowedWeight(lambda self, x: function(x, self.kernel, stride=2, groups=3))
    model.kernel, x = nn.Parameter(torch.randn(3, 2, *[3] * dims)), torch.randn(2, 3, *[4] * dims)
    torch.testing.assert_close(quantize_model(model, BitWidths(8, None))(x), model(x), rtol=0.1, atol=0.1)


def test_description_by_hand():
    model, x = Block(), torch.randn(2, 3, 6, 6)
    student = calibrated(model, x, {"conv1": 4, "depthwise": 3, "grouped": 2, "linear": None}, 6)
    table = describe(student)
    rows = table.set_index("layer")
    assert list(table.layer[:5]) == ["input", "conv1", "relu", "depthwise", "relu:2"]
    assert list(table.kind) == [
        "input", "conv", "relu", "depthwise conv", "relu", "grouped conv", "batchnorm", "relu", "relu6", "relu",
        "linear", "biases, batch norm", "total",
    ]  # fmt: skip
    assert rows.bytes[["conv1", "depthwise", "grouped", "linear"]].tolist() == [54, 14, 2, 80]  # 36 * 3 / 8 rounded up
    assert rows.float_bytes[["conv1", "depthwise", "grouped", "linear"]].tolist() == [432, 144, 32, 80]
    assert (rows.weight_bits["linear"], rows.activation_bits["input"]) == (32, 32)  # in float
    rest = 4 * (4 + 4 + 5 + 4 * 4)  # biases of conv1, grouped and linear; four vectors of the batch norm
    assert table.bytes.tolist()[-2:] == [rest, rest + 54 + 14 + 2 + 80]
    assert table.float_bytes.iloc[-1] == model_bytes(model) == 4 * (108 + 36 + 8 + 20) + rest
    assert table.bytes.iloc[-1] == model_bytes(student)
    assert rows.low["conv1"] == pytest.approx(model.conv1.weight.min().item())
    quantizer = fake_quantizers(student)["relu:2"]
    assert (rows.activation_bits["relu:2"], rows.high["relu:2"]) == (6, pytest.approx(quantizer.observer.high.item()))
    timed = describe(student, {"float": 2.0, "fake-quantized": 3.5})
    assert timed[table.columns].iloc[:-2].equals(table)
    assert timed.set_index("kind").milliseconds.dropna().to_dict() == {"float": 2.0, "fake-quantized": 3.5}


def test_a_batch_norm_that_runs_twice_is_corrected_by_the_mean_over_its_calls():
    """The network's calls meet means 2 and -3; the student's 4, and after mean 7 and variance 4 there, -1.5."""
    model = Twice().eval()
    student = quantized(model, None, None)
    student.conv.weight.data.mul_(2)
    calibrate.correct_batch_norms(student, model, torch.tensor([1.0, 3.0]).view(2, 1, 1, 1))
    assert student.norm.running_mean.item() == pytest.approx(5 + ((4 - 2) + (-1.5 + 3)) / 2)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0.0)
        self.conv.weight.data.fill_(1), self.norm.running_mean.fill_(5)

    def forward(self, x):
        return self.norm(self.norm(self.conv(x)))


def test_biases_stay_in_float_or_are_rounded_and_train():
    model, x = Block().eval(), torch.randn(4, 3, 6, 6)
    plain, student = (quantize_model(model, BitWidths(4, 4), bias_bits=bits) for bits in (None, 2))
    assert torch.equal(plain.linear.bias, model.linear.bias) and student.depthwise.bias is None
    with observing(student):
        student(x)
    bias = student.linear.bias.detach()
    low, high = model.linear.bias.aminmax()
    assert len(bias.unique()) <= 4 and (bias - model.linear.bias).abs().max() <= (high - low) / 6 + 1e-6
    scale_weights(student)(x).square().sum().backward()  # gradients as of a float bias, also where a batch norm scales
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in student.named_parameters() if "bias" in n)
    torch.testing.assert_close(scale_weights(student)(x), student(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="bias_bits=9"):
        quantize_model(model, BitWidths(4, 4), bias_bits=9)
