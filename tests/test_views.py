"""Viewers: the network's own answers, attentions of its residual units, Grad-CAM with and without a backward pass."""

import copy

import pytest
import torch
import torch.nn.functional as F
from pytorchcv.model_provider import get_model
from torch import nn
from torchvision.models import resnet18

from dfqlib.errors import UserError
from dfqlib.finetuning.grad_cam import cam_weights, convolution_gradient, grad_cam, map_correlation
from dfqlib.finetuning.network_views import LAYERS, NetworkProbe, channel_attention
from dfqlib.models.zoo import build
from dfqlib.quantizers.convert import quantize_model
from dfqlib.quantizers.layers import observing


def lived(network):
    """``network`` in eval mode with batch norms that are not as new."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


@pytest.fixture(scope="module")
def teacher():
    return lived(get_model("resnet20_cifar10")).requires_grad_(False)


@pytest.fixture(scope="module")
def student(teacher):
    network = quantize_model(teacher, 4, 4)
    with observing(network), torch.no_grad():
        network(torch.randn(8, 3, 32, 32))
    return network


class TwoLayers(nn.Module):
    """A head that is not pool + linear, without residual units."""

    def __init__(self, classes=4):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
        self.hidden, self.output = nn.Linear(5 * 36, 7), nn.Linear(7, classes)

    def forward(self, x):
        return self.output(F.relu(self.hidden(self.features(x).flatten(1))))


class FixedWindow(nn.Module):
    """An average pool that leaves 2 x 2 positions, flattened: not a global one."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.AvgPool2d(4))
        self.output = nn.Linear(20, 4)

    def forward(self, x):
        return self.output(self.features(x).flatten(1))


def map_by_hand(network, images, module):
    """Grad-CAM of each image's top class by a forward and a backward pass with a hook on ``module``."""
    kept = []
    handle = module.register_forward_hook(lambda _, inputs, output: kept.append(output))
    logits = network(images.clone().requires_grad_())
    handle.remove()
    gradient = torch.autograd.grad(logits.max(1).values.sum(), kept[0])[0]
    weights = gradient.mean((2, 3), keepdim=True).clamp(min=0)
    maps = (weights * kept[0]).sum(1, keepdim=True).relu()
    maps = F.interpolate(maps, images.shape[-2:], mode="bilinear")[:, 0]
    low, high = maps.amin((1, 2), True), maps.amax((1, 2), True)
    return ((maps - low) / (high - low).clamp(min=1e-8)).detach()  # of a class that nothing speaks for it is 0


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_maps_with_and_without_a_backward_pass_are_equal(which, layer, request):
    network = request.getfixturevalue(which)
    images = torch.randn(4, 3, 32, 32)
    short, long = NetworkProbe(network, layer), NetworkProbe(network, layer, autograd=True)
    assert short.closed and not long.closed
    with torch.no_grad():
        ours, theirs = short(images, saliency=True), long(images, saliency=True)
    assert ours.saliency.shape == (4, 32, 32) and ours.saliency.std() > 0.05
    torch.testing.assert_close(ours.saliency, theirs.saliency.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.logits, network(images))


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_of_maps_are_equal_too(student, layer):
    # In double precision: cells of a student's rounded activations tie for a map's minimum, and single precision's
    # rounding would choose which of them the gradient goes to.
    student = copy.deepcopy(student).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    gradients = []
    for autograd in (False, True):
        student.zero_grad()
        (NetworkProbe(student, layer, autograd)(images, saliency=True).saliency ** 2).mean().backward()
        gradients.append(student.get_submodule("features.init_block.conv").weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_maps_equal_those_by_hand(teacher):
    images = torch.randn(3, 3, 32, 32)
    last = teacher.features.stage3.unit3
    with torch.no_grad():
        of_features = NetworkProbe(teacher)(images, saliency=True).saliency
        of_convolution = NetworkProbe(teacher, "convolution")(images, saliency=True).saliency
    torch.testing.assert_close(of_features, map_by_hand(teacher, images, last), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_convolution, map_by_hand(teacher, images, last.body.conv2.conv), rtol=1e-4, atol=1e-5)
    assert (of_features - of_convolution).abs().mean() > 0.01  # another kind of map


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: x.mean((2, 3)),
        lambda x: torch.mean(x, dim=[-1, -2]),
        lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
        lambda x: F.adaptive_avg_pool2d(x, output_size=(1, 1)).squeeze(),
    ],
)
def test_global_pooling_by_functions_is_recognised(pool):
    class Pooled(TwoLayers):
        def __init__(self):
            super().__init__()
            self.output = nn.Linear(5, 4)

        def forward(self, x):
            return self.output(pool(self.features(x)))

    network, images = lived(Pooled()), torch.randn(3, 3, 8, 8)
    viewer = NetworkProbe(network)
    assert viewer.closed
    torch.testing.assert_close(
        viewer(images, saliency=True).saliency.detach(), map_by_hand(network, images, network.features[2])
    )


@pytest.mark.parametrize("kind", [TwoLayers, FixedWindow])
def test_a_head_that_is_not_pool_and_linear_goes_by_autograd(kind):
    network = lived(kind())
    viewer = NetworkProbe(network)
    assert not viewer.closed and viewer.units == 0
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        view = viewer(images, saliency=True)
    expected = map_by_hand(network, images, network.features[0])
    torch.testing.assert_close(view.saliency.detach(), expected, rtol=1e-4, atol=1e-5)
    assert view.attentions == [] and not view.detach().logits.requires_grad


def test_attentions_are_those_of_the_units_bodies(teacher, student):
    images = torch.randn(2, 3, 32, 32)
    for network, last in ((teacher, "features.stage2.unit1.body.conv2.bn"), (student, None)):
        view = NetworkProbe(network)(images)
        assert view.saliency is None and len(view.attentions) == 9
        assert [a.shape[1] for a in view.attentions] == [16] * 3 + [32] * 3 + [64] * 3
        if last:
            kept = []
            handle = network.get_submodule(last).register_forward_hook(lambda _, i, output, to=kept: to.append(output))
            network(images)
            handle.remove()
            torch.testing.assert_close(view.attentions[3], channel_attention(kept[0]))


def test_a_sum_in_place_leaves_the_attention_as_it_is():
    network = lived(resnet18(num_classes=5))
    kept = []
    network.layer1[0].bn2.register_forward_hook(lambda _, inputs, output: kept.append(output.clone()))
    images = torch.randn(2, 3, 32, 32)
    network(images)
    view = NetworkProbe(network)(images)
    assert len(view.attentions) == 8
    torch.testing.assert_close(view.attentions[0], channel_attention(kept[0]))
    sum(attention.square()[:, 0].sum() for attention in view.attentions).backward()  # nothing needed is overwritten


def test_a_viewer_shares_the_students_weights(student):
    viewer = NetworkProbe(student)
    weight = student.get_submodule("output").weight
    images = torch.randn(2, 3, 32, 32)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.add_(0.3 * torch.randn(weight.shape))
        torch.testing.assert_close(viewer(images).logits, student(images))
        weight.copy_(kept)


@pytest.mark.parametrize("name", ["resnet34_cifar100", "mobilenetv2_w1", "shufflenet_g1_w1", "sqnxt23_w2"])
def test_published_models_have_units_and_maps(name):
    network = lived(build(name))
    size = 32 if "cifar" in name else 224
    viewer = NetworkProbe(network)
    with torch.no_grad():
        view = viewer(torch.randn(1, 3, size, size), saliency=True)
    assert viewer.closed and viewer.units > 8
    assert view.saliency.shape == (1, size, size) and view.saliency.isfinite().all()


def test_grad_cam_by_hand():
    activations = torch.tensor([[[[1.0, 2.0]], [[5.0, -4.0]]]])  # two channels, one row of two
    torch.testing.assert_close(cam_weights(torch.tensor([[[[1.0, 3.0]], [[-2.0, 1.0]]]])), torch.tensor([[2.0, 0.0]]))
    maps = grad_cam(activations, torch.tensor([[1.0, 1.0]]), (1, 2))  # sums 6 and -2
    torch.testing.assert_close(maps, torch.tensor([[[1.0, 0.0]]]))
    assert (grad_cam(activations, torch.zeros(1, 2), (4, 4)) == 0).all()


def test_convolution_gradient_by_hand():
    norm = nn.BatchNorm2d(2, eps=0).eval()
    norm.weight.data = torch.tensor([2.0, -3.0])
    norm.running_var = torch.tensor([4.0, 9.0])
    features = torch.tensor([[[[0.0, 1.0]], [[2.0, 3.0]]]])
    gradient = convolution_gradient(torch.tensor([1.0, 5.0]).view(1, 2, 1, 1), features, norm)
    torch.testing.assert_close(gradient, torch.tensor([[[[0.0, 1.0]], [[-5.0, -5.0]]]]))


def test_map_correlation():
    maps = torch.rand(3, 4, 4)
    both = torch.stack([2 * maps[0] + 1, -maps[1], torch.ones(4, 4)])
    torch.testing.assert_close(map_correlation(maps, both), torch.tensor([1.0, -1.0, 0.0]))


def test_what_cannot_be_viewed_is_refused():
    with pytest.raises(UserError, match="layer='conv'"):
        NetworkProbe(nn.Linear(2, 2), "conv")
    with pytest.raises(UserError, match="no convolution"):
        NetworkProbe(nn.Sequential(nn.Linear(2, 2)))
