"""Images by spatial frequency: radial power spectrum, and the low-pass filter of SynQ."""

import torch
from torch import Tensor

from dfqlib.errors import check_range


def radius(images: Tensor) -> Tensor:
    """Distance (H, W) of each entry of an unshifted spectrum of ``images`` from frequency 0, in cycles per image."""
    y, x = (torch.fft.fftfreq(side, 1 / side, device=images.device) for side in images.shape[-2:])
    return torch.hypot(y[:, None], x[None, :])


def low_pass(images: Tensor, cutoff: float = 80.0) -> Tensor:
    """``images`` (..., H, W) with each frequency at distance d from 0 multiplied by exp(-d^2 / (2 D0^2)).

    ``cutoff`` is D0, in cycles per image, so the same number filters small images less: at D0 = 80 an image of 224
    pixels keeps 38 % of an amplitude at its highest horizontal frequency, one of 32 pixels 98 %. Source: SynQ,
    Gaussian low-pass filter.
    """
    check_range("cutoff", cutoff, 1e-6, 1e9)
    gain = torch.exp(-radius(images).square() / (2 * cutoff**2))
    return torch.fft.ifft2(torch.fft.fft2(images) * gain).real


def radial_power(images: Tensor) -> Tensor:
    """Mean power at whole distances 0, 1, 2, ... from frequency 0, over all images and channels of (..., H, W).

    Power is that of an orthonormal Fourier transform, so white noise of variance 1 has power 1 everywhere. Distances go
    to half the shorter side, the highest frequency that every direction has.
    """
    power = torch.fft.fft2(images, norm="ortho").abs().square().flatten(0, -3).mean(0).flatten()
    ring = radius(images).round().long().flatten()
    rings = int(ring.max()) + 1
    sums = power.new_zeros(rings).scatter_add_(0, ring, power)
    return (sums / torch.bincount(ring, minlength=rings))[: min(images.shape[-2:]) // 2 + 1]
