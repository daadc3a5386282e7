"""The low-pass filter and the radial spectrum, by hand; random crops."""

import math

import pytest
import torch

from dfqlib.data.crops import RandomCrops
from dfqlib.data.spectrum import low_pass, radial_power
from dfqlib.errors import UserError


def wave(frequency, size=16):
    x = torch.arange(size) / size
    return torch.cos(2 * math.pi * frequency * x).expand(size, size).clone()


@pytest.mark.parametrize("frequency", [0, 1, 5, 8])
def test_a_wave_keeps_the_share_of_its_frequency(frequency):
    for image in (wave(frequency), wave(frequency).T):
        share = math.exp(-(frequency**2) / (2 * 4.0**2))
        torch.testing.assert_close(low_pass(image[None, None], 4.0)[0, 0], share * image, rtol=1e-5, atol=1e-6)


def test_filter_keeps_the_mean_reaches_every_image_alone_and_passes_gradients():
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    filtered = low_pass(images, 2.0)
    torch.testing.assert_close(filtered.mean((2, 3)), images.mean((2, 3)))
    torch.testing.assert_close(filtered[1], low_pass(images[1], 2.0))
    assert filtered.var() < 0.5 * images.var()
    torch.testing.assert_close(low_pass(images, 1e6), images)
    filtered.sum().backward()
    assert images.grad.isfinite().all()
    with pytest.raises(UserError, match="cutoff="):
        low_pass(images, 0)


def test_radial_power_of_a_wave_and_of_noise():
    power = radial_power(wave(3)[None, None])
    assert power.shape == (9,) and power.argmax() == 3
    assert power[[0, 1, 2, 5, 6]].max() < 1e-9
    # Parseval: the sum of squares, 16 * 16 / 2, is on the 16 entries of the ring that round to 3 cycles.
    entries = sum(round(math.hypot(x, y)) == 3 for x in range(-8, 8) for y in range(-8, 8))
    torch.testing.assert_close(power[3], torch.tensor(128.0 / entries))
    noise = radial_power(torch.randn(200, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(noise, torch.ones(9), rtol=0.15, atol=0)


def test_crops_follow_their_own_seed_and_differ_between_images():
    images = torch.randn(1, 3, 12, 12).repeat(6, 1, 1, 1)
    first, second = RandomCrops(12, seed=3), RandomCrops(12, seed=3)
    state = torch.get_rng_state()
    one, two = first(images), first(images)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    assert torch.equal(one, second(images)) and torch.equal(two, second(images))
    assert not torch.equal(one, two) and not torch.equal(one[0], one[1])
    assert one.shape == images.shape
    torch.testing.assert_close(RandomCrops(12, seed=3, then=low_pass)(images), low_pass(one))


def test_crops_of_everything_are_the_image_or_its_mirror_image():
    images = torch.randn(8, 3, 12, 12)
    made = RandomCrops(12, scale=(1.0, 1.0))(images)
    mirrored = [not torch.allclose(one, of) for one, of in zip(made, images, strict=True)]
    assert 0 < sum(mirrored) < 8
    for one, of, flip in zip(made, images, mirrored, strict=True):
        torch.testing.assert_close(one, of.flip(2) if flip else of)
