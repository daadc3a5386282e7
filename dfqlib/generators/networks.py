"""The generator, from noise and labels to images: one body for every method and every image size."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfqlib.device import channels_last
from dfqlib.errors import UserError
from dfqlib.speed.precision import run
from dfqlib.speed.switches import uses


class UpsampleConv2d(nn.Conv2d):
    """Nearest x2 upsampling, then a 3x3 convolution with padding 1: (B, C, H, W) -> (B, out, 2H, 2W).

    Computed as one transposed convolution with stride 2 and a 4x4 kernel: 16 instead of 36 multiply-adds per input
    pixel and channel pair.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if not uses("folded_upsampling"):
            return run(super().forward, F.interpolate(x, scale_factor=2))
        kernel = upsampling_kernel(upsampling_kernel(self.weight, dim=2), dim=3).transpose(0, 1)
        # The bias is added separately: inside the convolution its gradient is as slow on a CPU as the weights'.
        return run(F.conv_transpose2d, x, kernel, stride=2, padding=1).add_(self.bias.view(-1, 1, 1))


def upsampling_kernel(weight: Tensor, dim: int) -> Tensor:
    """What one input value, doubled, adds to the four outputs whose window (a, b, c) along ``dim`` covers a copy."""
    a, b, c = weight.split(1, dim)
    return torch.cat([c, b + c, a + b, a], dim)


class ConditionalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with a gain and a bias per class; labels are integers (B,), or weights (B, classes) that mix them."""

    def __init__(self, classes: int, channels: int, eps: float) -> None:
        super().__init__(channels, eps=eps, affine=False)
        self.gain = nn.Parameter(torch.ones(classes, channels))
        self.shift = nn.Parameter(torch.zeros(classes, channels))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        mixed = labels.is_floating_point()
        gain, shift = (labels @ each if mixed else each[labels] for each in (self.gain, self.shift))
        return torch.addcmul(shift[:, :, None, None], super().forward(x), gain[:, :, None, None])


class PlainBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that is called with labels, as the conditional one is, and ignores them."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return super().forward(x)


class GeneratorBody(nn.Module):
    """Latent vectors (B, features) and labels (B,) to images (B, C, H, W) of ``shape`` (C, H, W), normalised.

    The last batch norm has no affine part, so each channel of a batch has mean 0 and variance 1. With
    ``classes`` the three inner batch norms are conditional on the label, or on weights (B, classes).
    Source: GDFQ, knowledge matching generator; sizes and constants from the official settings. UserError for a side
    below 4.
    """

    def __init__(self, features: int, shape: tuple[int, int, int] = (3, 32, 32), classes: int | None = None) -> None:
        super().__init__()
        channels, *self.size = shape
        if min(self.size) < 4:
            raise UserError(f"shape={shape} is too small for two x2 upsamplings; allowed: sides of 4 or more.")
        norm = PlainBatchNorm2d if classes is None else partial(ConditionalBatchNorm2d, classes)
        self.start = 128, *(-(-side // 4) for side in self.size)
        self.linear = nn.Linear(features, math.prod(self.start))
        self.norm0 = norm(128, 1e-5)
        self.conv1 = UpsampleConv2d(128, 128)
        self.norm1 = norm(128, 0.8)
        self.conv2 = UpsampleConv2d(128, 64)
        self.norm2 = norm(64, 0.8)
        self.conv3 = nn.Conv2d(64, channels, kernel_size=3, padding=1)
        self.norm3 = nn.BatchNorm2d(channels, affine=False)

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        x = channels_last(run(self.linear, latent).view(-1, *self.start))
        x = self.norm0(x, labels)
        x = F.leaky_relu_(self.norm1(self.conv1(x), labels), 0.2)
        x = F.leaky_relu_(self.norm2(self.conv2(x), labels), 0.2)
        # Two x2 upsamplings give multiples of 4; for 299 pixels one row and one column of 300 are dropped.
        images = torch.tanh(run(self.conv3, x)[..., : self.size[0], : self.size[1]])
        # On a CPU a batch norm of few channels is six times slower in channels-last than in contiguous memory.
        return self.norm3(images.contiguous())


class Generator(nn.Module):
    """GDFQ's generator: noise z (B, latent) and labels (B,) to images (B, C, H, W) of ``shape`` (C, H, W).

    The label's embedding multiplies the noise (published for 32 pixels); with ``conditional`` the label enters through
    conditional batch norms instead (for 224). Source: GDFQ, knowledge matching generator.
    """

    def __init__(
        self, classes: int, latent: int = 100, shape: tuple[int, int, int] = (3, 32, 32), conditional: bool = False
    ) -> None:
        super().__init__()
        self.classes, self.latent = classes, latent
        self.embedding = None if conditional else nn.Embedding(classes, latent)
        self.body = GeneratorBody(latent, shape, classes if conditional else None)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.body(z if self.embedding is None else self.embedding(labels) * z, labels)


def draw_one_label(generator: nn.Module, count: int, random: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Inputs of ``generator``, noise (count, latent), N(0, 1), and uniform labels (count,); the labels, as targets."""
    z = torch.randn(count, generator.latent, generator=random, device=random.device)
    labels = torch.randint(generator.classes, (count,), generator=random, device=random.device)
    return (z, labels), labels
