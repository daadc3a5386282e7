"""The uniform quantizer that all papers share: tensors rounded to a k-bit grid and kept in float."""

from typing import Any

import torch
from torch import Tensor

from dfqlib.speed.switches import uses


def scale_and_zero_point(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Steps per unit of ``x``, and the whole number of steps from 0 to the middle of the range (low, high).

    ``scale = (2^k - 1) / max(high - low, 1e-8)``, ``zero = round(scale * low) + 2^(k-1)``; any shape. The zero point
    lies outside the k-bit integers if the range does not contain 0.
    """
    scale = (2**bits - 1) / (high - low).clamp(min=1e-8)
    return scale, torch.round(scale * low) + 2 ** (bits - 1)


class _StraightThrough(torch.autograd.Function):
    """Rounds in the forward pass; the backward pass is the identity, so no tensor is saved for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
        scale, zero = scale_and_zero_point(low, high, bits)
        half = 2 ** (bits - 1)
        # In place after the first product: one new tensor and, on a CPU, an eighth of the time of torch's own fused
        # kernel, which is not vectorised there (and whose gradient is zero where it clips).
        steps = torch.mul(x, scale).sub_(zero).round_().clamp_(-half, half - 1)
        return steps.add_(zero).div_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient, None, None, None


def fake_quantize(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """``x`` rounded to the ``2^bits`` levels of a uniform asymmetric quantizer over (low, high), still in float.

    x: any shape; low, high: one value, or shapes that broadcast with x (one range per channel). The gradient is the
    straight-through identity for every element, clipped ones included; low and high get none.
    Source: the quantizer of ZeroQ, GDFQ, Qimera, DSG, HAST and SaFT alike.
    """
    if uses("fused_rounding"):
        return _StraightThrough.apply(x, low, high, bits)
    scale, zero = scale_and_zero_point(low, high, bits)
    half = 2 ** (bits - 1)
    rounded = (torch.round(scale * x - zero).clamp(-half, half - 1) + zero) / scale
    return x + (rounded - x).detach()


def fake_quantize_per_channel(weight: Tensor, bits: int, share: Tensor | None = None) -> Tensor:
    """``weight`` (O, ...) fake-quantized with one range per output channel: the channel's own min and max.

    With ``share`` (O, 1) the range is that share of it.
    """
    shape = (-1,) + (1,) * (weight.dim() - 1)
    bounds = torch.aminmax(weight.detach().flatten(1), dim=1, keepdim=True)
    low, high = ((bound if share is None else bound * share).view(shape) for bound in bounds)
    return fake_quantize(weight, low, high, bits)
