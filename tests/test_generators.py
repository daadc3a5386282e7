"""Generators equal the official ones, and their fast upsampling equals plain upsampling."""

import pytest
import torch
import torch.nn.functional as F
from official import load_official, recorded

from dfqlib.errors import UserError
from dfqlib.generators.networks import ConditionalBatchNorm2d, Generator, UpsampleConv2d


@pytest.mark.parametrize(
    ("prefix", "column", "options"),
    [("cifar", 0, {"classes": 10}), ("imagenet_16px", 1, {"classes": 1000, "shape": (3, 16, 16), "conditional": True})],
)
def test_generator_equals_the_official_one(prefix, column, options):
    tensors, generator = recorded("generator_gdfq"), Generator(**options)
    load_official(generator, tensors, f"{prefix}/state/", column)
    images = generator(tensors[f"{prefix}/z"], tensors[f"{prefix}/labels"])
    torch.testing.assert_close(images, tensors[f"{prefix}/images"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (2, 5, 3, 7), (1, 5, 1, 1)])
def test_fast_upsampling_equals_upsample_then_convolve_with_gradients(shape, memory_format):
    torch.manual_seed(0)
    conv = UpsampleConv2d(5, 6)
    x = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
    plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), conv.weight, conv.bias, padding=1)
    direction = torch.randn(plain.shape)
    wanted = torch.autograd.grad((plain * direction).sum(), [x, conv.weight, conv.bias])
    fast = conv(x)
    got = torch.autograd.grad((fast * direction).sum(), [x, conv.weight, conv.bias])
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_conditional_batch_norm_has_gain_and_shift_of_the_label_or_a_mixture():
    norm = ConditionalBatchNorm2d(classes=3, channels=1, eps=1e-5)
    x, labels = torch.randn(2, 1, 5, 5), torch.tensor([1, 2])
    standardised = norm(x, labels)
    norm.gain.data[:, 0], norm.shift.data[:, 0] = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0.0, 1.0, -1.0])
    changed, mixed = norm(x, labels), norm(x, torch.tensor([[0.0, 0.75, 0.25], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(changed[0], 2 * standardised[0] + 1)
    torch.testing.assert_close(changed[1], 5 * standardised[1] - 1)
    torch.testing.assert_close(mixed[0], 2.75 * standardised[0] + 0.5)
    torch.testing.assert_close(mixed[1], standardised[1])


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 30, 31), (1, 32, 32), (5, 8, 16)])
def test_images_of_any_shape_from_4_pixels_are_normalised(shape):
    images = Generator(classes=3, latent=5, shape=shape)(torch.randn(8, 5), torch.arange(8) % 3)
    assert images.shape == (8, *shape)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(shape[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(shape[0]), atol=1e-2, rtol=0)


def test_a_size_the_body_cannot_reach_is_refused():
    with pytest.raises(UserError, match=r"shape=\(3, 32, 3\) "):
        Generator(classes=10, shape=(3, 32, 3))
