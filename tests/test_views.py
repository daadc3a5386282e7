"""Network probes: the network's own logits, attentions of its residual units, Grad-CAM by closed form and autograd."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from pytorchcv.model_provider import get_model
from torch import nn
from torchvision.models import resnet18

from dfqlib.bits import BitWidths
from dfqlib.errors import UserError
from dfqlib.finetuning.grad_cam import grad_cam, map_correlation
from dfqlib.finetuning.network_views import NetworkProbe, channel_attention
from dfqlib.methods.reconstruct import make_student, reconstruct
from dfqlib.models.zoo import build
from dfqlib.quantizers.calibrate import calibrated


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
    return calibrated(teacher, BitWidths(4, 4), torch.randn(8, 3, 32, 32), "moving_average")


@pytest.fixture(scope="module")
def integer_student(teacher):
    return calibrated(teacher, BitWidths(4, 8), torch.randn(8, 3, 32, 32), sites="integer").double()


def headed(*head):
    """A convolution with its batch norm and ReLU under ``head``, without residual units."""
    return lived(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), *head))


class By(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def map_by_hand(network, images, module):
    """Grad-CAM of each image's top class by a forward and a backward pass with a hook on ``module``."""
    kept = []
    with module.register_forward_hook(lambda _, inputs, output: kept.append(output)):
        logits = network(images.clone().requires_grad_())
    gradient = torch.autograd.grad(logits.max(1).values.sum(), kept[0])[0]
    weights = gradient.mean((2, 3), keepdim=True).clamp(min=0)
    maps = (weights * kept[0]).sum(1, keepdim=True).relu()
    maps = F.interpolate(maps, images.shape[-2:], mode="bilinear")[:, 0]
    low, high = maps.amin((1, 2), True), maps.amax((1, 2), True)
    return ((maps - low) / (high - low).clamp(min=1e-8)).detach()  # of a class that nothing speaks for it is 0


@pytest.mark.parametrize("which", ["teacher", "student", "integer_student"])
def test_maps_by_closed_form_and_by_autograd_are_equal(which, request):
    network = request.getfixturevalue(which)
    images = torch.randn(4, 3, 32, 32).to(next(network.parameters()))
    closed, slow = NetworkProbe(network), NetworkProbe(network, autograd=True)
    assert closed.closed_form and not slow.closed_form
    with torch.no_grad():
        ours, theirs = closed(images, saliency=True), slow(images, saliency=True)
    assert ours.saliency.shape == (4, 32, 32) and ours.saliency.std() > 0.05
    torch.testing.assert_close(ours.saliency, theirs.saliency.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.logits, network(images))


def test_gradients_of_maps_are_equal_too(student):
    # In double precision: cells of a student's rounded activations tie for a map's minimum, and single precision's
    # rounding would choose which of them the gradient goes to.
    student = copy.deepcopy(student).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    gradients = []
    for autograd in (False, True):
        student.zero_grad()
        (NetworkProbe(student, autograd=autograd)(images, saliency=True).saliency ** 2).mean().backward()
        gradients.append(student.get_submodule("features.init_block.conv").weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_maps_equal_those_by_hand(teacher, student):
    images, last, found = torch.randn(3, 3, 32, 32), "features.stage3.unit3", []
    cases = (teacher, "activations", last), (teacher, "convolution", f"{last}.body.conv2.conv")
    for network, layer, module in (*cases, (student, *cases[1][1:])):
        with torch.no_grad():
            found.append(NetworkProbe(network, layer)(images, saliency=True).saliency.detach())
        expected = map_by_hand(network, images, network.get_submodule(module))
        torch.testing.assert_close(found[-1], expected, rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().mean() > 0.01  # another kind of map


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
    network, images = headed(By(pool), nn.Linear(5, 4)), torch.randn(3, 3, 8, 8)
    probe = NetworkProbe(network)
    assert probe.closed_form
    torch.testing.assert_close(probe(images, saliency=True).saliency.detach(), map_by_hand(network, images, network[2]))


@pytest.mark.parametrize(
    "head",
    [
        [nn.Flatten(), nn.Linear(320, 7), nn.ReLU(), nn.Linear(7, 4)],
        [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(20, 4)],  # a window that leaves 2 x 2 positions
        [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 4)],
        [By(lambda x: x.mean((1, 2))), nn.Linear(8, 4)],  # not over space
    ],
    ids=str,
)
def test_a_head_that_is_not_global_pooling_and_linear_goes_by_autograd(head):
    network, images = headed(*head), torch.randn(3, 3, 8, 8)
    probe = NetworkProbe(network)
    assert not probe.closed_form and probe.units == 0
    with torch.no_grad():
        found = probe(images, saliency=True)
    expected = map_by_hand(network, images, network[0])
    torch.testing.assert_close(found.saliency.detach(), expected, rtol=1e-4, atol=1e-5)
    assert found.attentions == [] and not found.detach().logits.requires_grad


def test_attentions_are_of_the_units_bodies_and_outputs_behind_their_relus(teacher, student):
    images, kept = torch.randn(2, 3, 32, 32), []
    for network in (teacher, student):
        view = NetworkProbe(network)(images)
        assert view.saliency is None
        for part in (view.attentions, view.outputs):
            assert [a.shape[1] for a in part] == [16] * 3 + [32] * 3 + [64] * 3
    network = lived(resnet18(num_classes=5))  # adds in place
    network.layer1[0].bn2.register_forward_hook(lambda _, inputs, output: kept.append(output.clone()))
    network.layer2.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].clone()))
    network(images)
    view = NetworkProbe(network)(images)
    assert len(view.attentions) == len(view.outputs) == 8
    torch.testing.assert_close(view.outputs[1], kept[1])
    torch.testing.assert_close(view.attentions[0], channel_attention(kept[0]))
    sum(attention.square()[:, 0].sum() for attention in view.attentions).backward()  # nothing needed is overwritten


class Unit(nn.Sequential):
    """A residual unit without a ReLU of its own."""

    def forward(self, x):
        return x + super().forward(x)


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Flatten(), nn.Linear(48, 8), Unit(nn.Linear(8, 8)), nn.Linear(8, 5)], (4, 8)),
        ([nn.Flatten(2), Unit(nn.Conv1d(3, 3, 1)), nn.Conv1d(3, 5, 16), nn.Flatten()], (4, 3, 16)),
        ([nn.Flatten(2), nn.Linear(16, 6), Unit(nn.Linear(6, 6)), nn.Flatten(), nn.Linear(18, 5)], (4, 3, 6)),  # tokens
    ],
)
def test_units_without_maps_can_be_tuned_by(layers, shape):
    network, images = nn.Sequential(*layers), torch.randn(4, 3, 4, 4)
    student = calibrated(network.eval(), BitWidths(8, 8), images, sites="integer")
    teacher, ours = SimpleNamespace(network=network), make_student(student)
    assert reconstruct(teacher, {"ours": ours}, images, iterations=2, batch=4).students["ours"][-1] < 1
    view = NetworkProbe(student)(images)
    assert [each.shape for each in view.outputs] == [shape] and view.attentions == []


def test_a_units_output_is_behind_its_relu_also_where_the_sum_is_quantized():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), By(lambda x: F.relu(y := x + x.tanh()) + y), nn.Conv2d(3, 5, 1))
    images = torch.randn(4, 3, 4, 4)
    student = calibrated(network.eval(), BitWidths(8, 8), images, sites="integer")
    theirs, ours = (NetworkProbe(each)(images).outputs[0] for each in (network, student))
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_a_probe_shares_the_students_weights(student):
    student, images = copy.deepcopy(student), torch.randn(2, 3, 32, 32)
    probe = NetworkProbe(student)
    with torch.no_grad():
        student.get_submodule("output").weight.add_(0.3 * torch.randn(10, 64, 1, 1).squeeze())
        torch.testing.assert_close(probe(images).logits, student(images))


@pytest.mark.parametrize("name", ["resnet34_cifar100", "mobilenetv2_w1", "shufflenet_g1_w1", "sqnxt23_w2"])
def test_published_models_have_units_and_maps(name):
    network = lived(build(name))
    size = 32 if "cifar" in name else 224
    probe = NetworkProbe(network)
    with torch.no_grad():
        view = probe(torch.randn(1, 3, size, size), saliency=True)
    assert probe.closed_form and probe.units > 8
    assert view.saliency.shape == (1, size, size) and view.saliency.isfinite().all()


def test_grad_cam_by_hand():
    activations = torch.tensor([[[[1.0, 2.0]], [[5.0, -4.0]]]])  # two channels, one row of two
    for gradient, expected in (
        ([[[[1.0]], [[1.0]]]], [[1.0, 0.0]]),  # sums 6 and -2
        ([[[[1.0, 3.0]], [[-2.0, 1.0]]]], [[0.0, 1.0]]),  # weights 2 and 0, sums 2 and 4
        ([[[[0.0]], [[-1.0]]]], [[0.0, 0.0]]),
    ):
        assert grad_cam(activations, torch.tensor(gradient), (1, 2)).tolist() == [expected]
    activations, gradient = torch.tensor([[[[3.0, 0, 0]], [[0, 2.0, 0]]]]), torch.tensor([[[[1.0]], [[2.0]]]])
    for cam, expected in (("gradcam", 3 / 4), ("gradcam++", (3 / 5) / (2 * 2 / 6))):  # weights 1 and 2; 1/5 and 2/6
        (map_,) = grad_cam(activations, gradient, (1, 3), cam).tolist()
        assert map_[0] == pytest.approx([expected, 1, 0])


def test_map_correlation():
    maps = torch.rand(3, 4, 4)
    both = torch.stack([2 * maps[0] + 1, -maps[1], torch.ones(4, 4)])
    torch.testing.assert_close(map_correlation(maps, both), torch.tensor([1.0, -1.0, 0.0]))


def test_what_cannot_be_probed_is_refused():
    with pytest.raises(UserError, match="layer='conv'"):
        NetworkProbe(nn.Linear(2, 2), "conv")
    with pytest.raises(UserError, match="saliency=True: the network has no 2D conv"):
        NetworkProbe(nn.Linear(2, 2))(torch.randn(1, 2), saliency=True)
