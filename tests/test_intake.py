"""A network that a user brings: what synthesis and students see of it is the network, or it is refused by name."""

import collections
import dataclasses
import math

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchvision.ops import FrozenBatchNorm2d

from dfqlib.errors import UserError
from dfqlib.methods.zeroq import distil_images
from dfqlib.models.batch_norm_statistics import BatchNormInputs
from dfqlib.models.teacher import Teacher
from dfqlib.quantizers.trace import trace, weight_layers
from dfqlib.schedules import ImageSchedule
from dfqlib.speed.fold_batch_norms import FoldedNorm


def net(norm: nn.Module | None = None, conv: nn.Module | None = None) -> nn.Sequential:
    """Layers 0, 3 and 8 with weights; batch norms 1 and 4."""
    torch.manual_seed(0)
    first = [conv or nn.Conv2d(3, 8, 3), norm or nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *head())


def head() -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]


def trained(network: nn.Module) -> nn.Module:
    """Batch norms, frozen ones too, hold numbers that all differ from 0 and 1."""
    for module in network.modules():
        if getattr(module, "running_mean", None) is not None:
            with torch.no_grad():
                for name in ("weight", "bias", "running_mean", "running_var"):
                    getattr(module, name, torch.empty(0)).uniform_(0.5, 1.5)
    return network.eval()


def teacher_of(network: nn.Module, channels: int = 3, classes: int | None = 10, **options) -> Teacher:
    return Teacher.from_module(network, classes, (0.5,) * channels, (0.25,) * channels, **{"input_size": 12} | options)


def images(count: int = 5, channels: int = 3, height: int = 12, width: int = 12) -> torch.Tensor:
    return torch.randn(count, channels, height, width)


class NormAct(nn.BatchNorm2d):
    """Batch norm and activation in one module, in functions, after a look at the input."""

    def forward(self, x):
        torch._assert(x.ndim == 4, "four dimensions")
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return F.relu(x)


class SuperNorm(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class Renamed(nn.BatchNorm2d):
    pass


class SameConv(nn.Conv2d):
    """As much padding as the size of the input needs, and no lower precision."""

    def forward(self, x):
        rows, columns = (max((math.ceil(side / 2) - 1) * 2 + 3 - side, 0) for side in x.shape[-2:])
        if rows > 0 or columns > 0:
            x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        with torch.autocast(device_type=x.device.type, enabled=False):
            return F.conv2d(x, self.weight, self.bias, 2)


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class FrozenPlain(nn.Module):
    """A frozen batch norm without gain and shift."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.rand(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x):
        return (x - self.running_mean[:, None, None]) / (self.running_var[:, None, None] + 1e-5).sqrt()


class FrozenAct(FrozenBatchNorm2d):
    """A frozen batch norm that keeps its activation as a child."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


NORMS = [NormAct, SuperNorm, Renamed, FrozenBatchNorm2d, FrozenPlain, FrozenAct, nn.SyncBatchNorm]


@pytest.mark.parametrize(
    "network",
    [net(norm(8)) for norm in NORMS] + [net(conv=conv(3, 8, 3)) for conv in (SameConv, StandardisedConv)],
    ids=lambda network: f"{type(network[0]).__name__}, {type(network[1]).__name__}",
)
def test_layers_of_ones_own_are_seen_under_their_names(network):
    x, plain = images(), trained(network)
    teacher = teacher_of(plain)
    assert len(distil_images(teacher, ImageSchedule(images=2, synthesis_iterations=2)).losses[0]) == 2
    for seen in (teacher.network, teacher.folded):
        with BatchNormInputs(seen) as inputs:
            torch.testing.assert_close(seen(x), plain(x), rtol=1e-4, atol=1e-4)
            assert [layer.name for layer in inputs.layers] == ["1", "4"]
        torch.testing.assert_close(inputs_mean(seen, x, "1"), plain[0](x).mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert weight_layers(trace(teacher.network)) == ["0", "3", "8"]
    assert isinstance(teacher.folded.get_submodule("1"), FoldedNorm)


def inputs_mean(network, x, name):
    with BatchNormInputs(network) as inputs:
        network(x)
        return next(layer for layer in inputs.layers if layer.name == name).mean_var()[0]


class Functions(nn.Module):
    """All that is usually a module is a function on parameters of the network itself."""

    def __init__(self):
        super().__init__()
        self.kernel, self.matrix = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(8, 10))
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("variance", torch.rand(8) + 0.5)

    def forward(self, x, mask=None):
        x = x if mask is None else x * mask
        x = F.relu(F.batch_norm(F.conv2d(x, self.kernel, padding=1), self.mean, self.variance))
        return x.mean((2, 3)) @ self.matrix


class Extra(nn.Conv2d):
    """Keeps more than tensors in its state."""

    def get_extra_state(self):
        return {"version": 1}


class Shared(nn.Module):
    """Runs one convolution and one batch norm twice, and a layer whose weight is another's."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.tied = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.tied.weight, self.norm, self.linear = self.again.weight, nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        for _ in range(2):
            x = self.norm(self.again(x)).relu()
        return self.linear(self.tied(x).mean((2, 3)))


@pytest.mark.parametrize(
    "network, norms, layers",
    [
        (Functions(), ["mean"], ["kernel", "matrix"]),
        (Shared(), ["norm", "norm:2", "norm:3"], ["first", "again", "tied", "linear"]),
        (nn.DataParallel(net()), ["1", "4"], ["0", "3", "8"]),
        (nn.Sequential(nn.Conv2d(3, 8, 12), nn.BatchNorm2d(8), *head()), ["1"], ["0", "4"]),  # maps of one position
        *(
            (nn.Sequential(nn.Flatten(), nn.Linear(432, 8), norm(8), nn.Linear(8, 10)), ["2"], ["1", "3"])
            for norm in (nn.BatchNorm1d, nn.SyncBatchNorm)
        ),
        (net(nn.BatchNorm2d(8, bias=False)), ["1", "4"], ["0", "3", "8"]),
        (net(conv=Extra(3, 8, 3)), ["1", "4"], ["0", "3", "8"]),
        (torchvision.models.mobilenet_v3_small(num_classes=10), 34, 54),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_runs_is_seen_and_images_are_made(network, norms, layers):
    teacher = teacher_of(network, input_size=32 if isinstance(norms, int) else 12)
    losses = distil_images(teacher, ImageSchedule(images=2, synthesis_iterations=2)).losses[0]
    assert all(map(math.isfinite, losses))
    with BatchNormInputs(teacher.folded) as inputs:
        teacher.folded(torch.randn(2, *teacher.entry.image_shape))
        names = [layer.name for layer in inputs.layers]
    found = weight_layers(trace(teacher.network))
    assert (names, found) == (norms, layers) or (len(names), len(found)) == (norms, layers)


def hooked(hook):
    network = net()
    network[3].register_forward_hook(hook)
    return network


def loaded_spectral_norm():
    """Its state is loaded after the last pass, so the weight that its hook left behind is not its own."""
    network = net(conv=spectral_norm(nn.Conv2d(3, 8, 3)))
    network(images())
    with torch.no_grad():
        network[0].weight_orig.normal_()
    return network


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    "make",
    [
        loaded_spectral_norm,
        lambda: net(conv=parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))),
        lambda: net(conv=weight_norm(nn.Conv2d(3, 8, 3))),
        lambda: net(conv=parametrizations.weight_norm(nn.Conv2d(3, 8, 3))),
        lambda: net(conv=prune.l1_unstructured(nn.Conv2d(3, 8, 3), "weight", 0.5)),
        lambda: hooked(lambda *_: None),
    ],
)
def test_computed_weights_are_kept_and_harmless_hooks_dropped(make):
    network, x = make(), images()
    teacher, keys = teacher_of(network), list(network.state_dict())
    expected = network.eval()(x)
    for seen in (teacher.network, teacher.folded):
        torch.testing.assert_close(seen(x), expected, rtol=1e-4, atol=1e-4)
    assert list(network.state_dict()) == keys  # the given network keeps what computes its weights
    assert set(teacher.network.state_dict()) == set(net().state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted_and_said(dtype):
    network = net().to(dtype)
    with pytest.warns(UserWarning, match=f"converted from {dtype} to float32"):
        teacher = teacher_of(network)
    assert teacher.network(images()).dtype == torch.float32 and network[0].weight.dtype == dtype
    assert f"from {dtype}" in teacher.source
    if dtype.itemsize < 4:
        with pytest.raises(UserError, match=f"weights of {dtype}"):
            trace(network)


@pytest.mark.parametrize("channels, size", [(1, 12), (5, (12, 16))])
def test_channels_and_shapes(channels, size):
    network = net(conv=nn.Conv2d(channels, 8, 3))
    teacher = teacher_of(network, channels, input_size=size)
    shape = (channels, *(size if isinstance(size, tuple) else (size, size)))
    assert teacher.entry.image_shape == shape
    assert distil_images(teacher, ImageSchedule(images=2, synthesis_iterations=2)).images.shape == (2, *shape)
    low, high = teacher.entry.input_range
    assert low.shape == (channels, 1, 1) and (low.unique().item(), high.unique().item()) == (-2, 2)
    with pytest.raises(UserError, match=f"images of 2 channels; own takes {channels}"):
        teacher.normalise(torch.zeros(1, 2, 12, 12, dtype=torch.uint8))


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    features: torch.Tensor


class Several(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.kind = net(), kind

    def forward(self, x):
        return self.kind(self.body(x), x.mean((2, 3)))


@pytest.mark.parametrize(
    "kind, key",
    [
        (lambda logits, other: {"logits": logits, "features": other}, "logits"),
        (lambda logits, other: (other, logits), 1),
        (collections.namedtuple("Named", "logits features"), "logits"),
        (Output, "logits"),
    ],
)
def test_logits_among_several_outputs_are_named(kind, key):
    network, x = Several(kind), images()
    teacher = teacher_of(network, logits=key)
    for seen in (teacher.network, teacher.folded, trace(teacher.network)):
        torch.testing.assert_close(seen(x), network.eval().body(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=rf"logits=None names none of .* of .*'{key}' \(3, 10\)"):
        teacher_of(network)


def with_value(value):
    network = net()
    network[1].running_var[0] = value
    return network


class Dynamic(nn.Module):
    """A kernel that is computed from an image, though it is always the same."""

    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x):
        return self.body(F.conv2d(x, 0 * x[0, 0, 0, 0] + torch.ones(3, 3, 1, 1)))


class Hidden(Functions):
    """Its batch norm is a function, and its code leaves torch."""

    def forward(self, x):
        return torch.tensor(super().forward(x).tolist())


@pytest.mark.parametrize(
    "network, options, message",
    [
        (hooked(lambda *values: 2 * values[2]), {}, "without its hooks, in plain layers, its logits are"),
        (Hidden(), {}, "network=Hidden cannot be used as it is: Hidden cannot be traced by torch.fx"),
        (with_value(math.nan), {}, r"network=Sequential holds values that are not a number, in '1.running_var'"),
        (with_value(-1.0), {}, "returns logits that are not finite"),
        (net(), {"logits": "out"}, r"logits='out' names none of what network=Sequential returns, a Tensor"),
        (net(), {"channels": 4}, r"cannot take images of shape \(4, 12, 12\).*; input_size, mean and std say"),
        (
            nn.Sequential(*net(), nn.Linear(10, 7)),
            {},
            r"returns \(3, 7\) for 3 images; allowed: \(3, 10\), for classes",
        ),
        (
            nn.Sequential(*net(), nn.Linear(10, 1)),
            {"classes": None},
            "returns 1 logit per image; allowed: 2 or more",
        ),
        (
            nn.Sequential(*net(), nn.Softmax(1)),
            {},
            "returns probabilities; allowed: logits, so pass it without its softmax",
        ),
        (torch.jit.script(net()), {}, "is a TorchScript module"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_what_is_not_the_same_network_is_refused_by_name(network, options, message):
    with pytest.raises(UserError, match=message):
        teacher_of(network, **options)


class Branching(nn.Module):
    """Decides by an image's values."""

    def __init__(self, decide):
        super().__init__()
        self.body, self.decide = net(), decide

    def forward(self, x):
        return self.body(x) if self.decide(x) else self.body(-x)


@pytest.mark.parametrize(
    "network, message",
    [
        (Dynamic(), "Dynamic calls conv2d on weights that depend on its input"),
        (Branching(lambda x: x.mean() < 5), "symbolically traced variables cannot be used"),
        (Branching(lambda x: x.mean().item() < 5), "symbolically traced variables cannot be used"),
    ],
)
def test_a_network_that_no_student_can_be_made_of_still_gives_images(network, message):
    teacher = teacher_of(network)
    assert len(distil_images(teacher, ImageSchedule(images=2, synthesis_iterations=2)).images) == 2
    with pytest.raises(UserError, match=message):
        trace(teacher.network)
    with pytest.raises(UserError, match=r"depend on its input|decides by the values of the images"):
        trace(teacher.network, images())
