"""Generators equal the official ones, and their fast upsampling equals the plain one."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dfqlib.errors import UserError
from dfqlib.generators.networks import ConditionalBatchNorm2d, Generator, UpsampleConv2d

DATA = Path(__file__).parent / "data" / "generator_gdfq.npz"
OFFICIAL_NAMES = {  # our module: its name in the official code for 32 x 32, and for 224 x 224
    "embedding": ("label_emb", None),
    "body.linear": ("l1.0", "l1.0"),
    "body.norm0": ("conv_blocks0.0", "conv_blocks0_0"),
    "body.conv1": ("conv_blocks1.0", "conv_blocks1_0"),
    "body.norm1": ("conv_blocks1.1", "conv_blocks1_1"),
    "body.conv2": ("conv_blocks2.0", "conv_blocks2_0"),
    "body.norm2": ("conv_blocks2.1", "conv_blocks2_1"),
    "body.conv3": ("conv_blocks2.3", "conv_blocks2_3"),
    "body.norm3": ("conv_blocks2.5", "conv_blocks2_5"),
}
OFFICIAL_PARAMETERS = {"gain": "weights.weight", "shift": "biases.weight"}


def load_official(generator: Generator, arrays: dict, prefix: str, column: int) -> None:
    """Fill ``generator`` with the official weights; every tensor of either side must find its partner."""
    state, unused = {}, {k for k in arrays if k.startswith(f"{prefix}/state/")}
    for name, own in generator.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = own
            continue
        module, _, parameter = name.rpartition(".")
        official = f"{OFFICIAL_NAMES[module][column]}.{OFFICIAL_PARAMETERS.get(parameter, parameter)}"
        state[name] = torch.from_numpy(arrays[f"{prefix}/state/{official}"])
        unused.remove(f"{prefix}/state/{official}")
    assert not unused
    generator.load_state_dict(state)


@pytest.mark.parametrize(
    ("prefix", "column", "options"),
    [
        ("cifar", 0, {"classes": 10}),
        ("imagenet_16px", 1, {"classes": 1000, "size": 16, "conditional": True}),
    ],
)
def test_generator_equals_the_official_one(prefix, column, options):
    arrays = dict(np.load(DATA))
    generator = Generator(**options)
    load_official(generator, arrays, prefix, column)
    images = generator(torch.from_numpy(arrays[f"{prefix}/z"]), torch.from_numpy(arrays[f"{prefix}/labels"]))
    torch.testing.assert_close(images, torch.from_numpy(arrays[f"{prefix}/images"]), rtol=1e-4, atol=1e-5)


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


def test_images_look_normalised_and_follow_seed():
    torch.manual_seed(0)
    generator = Generator(classes=10)
    z, labels = torch.randn(16, 100), torch.arange(16) % 10
    images = generator(z, labels)
    assert images.shape == (16, 3, 32, 32)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), atol=1e-2, rtol=0)
    torch.manual_seed(0)
    assert torch.equal(Generator(classes=10)(z, labels), images)


def test_conditional_batch_norm_applies_gain_and_shift_of_the_label():
    norm = ConditionalBatchNorm2d(classes=3, channels=2, eps=1e-5)
    x = torch.randn(4, 2, 5, 5)
    labels = torch.tensor([0, 1, 2, 1])
    standardised = norm(x, labels)
    norm.gain.data[1], norm.shift.data[1] = torch.tensor([2.0, 3.0]), torch.tensor([-1.0, 4.0])
    changed = norm(x, labels)
    torch.testing.assert_close(changed[0], standardised[0])
    torch.testing.assert_close(changed[1, 0], 2 * standardised[1, 0] - 1)
    torch.testing.assert_close(changed[3, 1], 3 * standardised[3, 1] + 4)


def test_conditional_batch_norm_mixes_gains_and_shifts_by_weight():
    norm = ConditionalBatchNorm2d(classes=3, channels=1, eps=1e-5)
    norm.gain.data[:, 0], norm.shift.data[:, 0] = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0.0, 1.0, -1.0])
    x = torch.randn(2, 1, 5, 5)
    standardised = norm(x, torch.tensor([0, 0]))
    mixed = norm(x, torch.tensor([[0.0, 0.75, 0.25], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(mixed[0], 2.75 * standardised[0] + 0.5)
    torch.testing.assert_close(mixed[1], standardised[1])


@pytest.mark.parametrize("size", [4, 30, 31])
def test_any_size_from_4_pixels_can_be_made(size):
    generator = Generator(classes=3, latent=5, size=size)
    images = generator(torch.randn(4, 5), torch.tensor([0, 1, 2, 0]))
    assert images.shape == (4, 3, size, size)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)


def test_a_size_the_body_cannot_reach_is_refused():
    with pytest.raises(UserError, match="size=3 "):
        Generator(classes=10, size=3)
