"""The uniform quantizer all five papers share, the observers that choose its range, and the layers that apply it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqlib.acceleration import uses
from dfqlib.errors import UserError, check_bits, check_range


def scale_and_zero_point(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Steps per unit of ``x``, and the whole number of steps from 0 to the middle of the range (low, high).

    ``scale = (2^k - 1) / max(high - low, 1e-8)``, ``zero = round(scale * low) + 2^(k-1)``; any shape. The zero point
    may lie outside the k-bit integers: that is how a range without 0 is stored.
    """
    scale = (2**bits - 1) / (high - low).clamp(min=1e-8)
    return scale, torch.round(scale * low) + 2 ** (bits - 1)


def round_to_grid(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The nearest of the ``2^bits`` levels over (low, high) to each element of ``x``."""
    scale, zero = scale_and_zero_point(low, high, bits)
    half = 2 ** (bits - 1)
    return (torch.round(scale * x - zero).clamp(-half, half - 1) + zero) / scale


class _StraightThrough(torch.autograd.Function):
    """:func:`round_to_grid` forward, identity backward: nothing is saved, the gradient is passed on as it is."""

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
    straight-through identity for every element, also for clipped ones; none flows to low and high.
    Source: the quantizer of ZeroQ, GDFQ, Qimera, DSG, HAST and SaFT alike. Raises UserError for bits outside 2 to 8.
    """
    check_bits("bits", bits)
    if uses("fused_rounding"):
        return _StraightThrough.apply(x, low, high, bits)
    return x + (round_to_grid(x, low, high, bits) - x).detach()


def fake_quantize_per_channel(weight: Tensor, bits: int) -> Tensor:
    """``weight`` (O, ...) fake-quantized with one range per output channel: the channel's own min and max."""
    shape = (-1,) + (1,) * (weight.dim() - 1)
    low, high = torch.aminmax(weight.detach().flatten(1), dim=1)
    return fake_quantize(weight, low.view(shape), high.view(shape), bits)


class RunningMinMax(nn.Module):
    """Running min of batch minima and running max of batch maxima, both from 0 (ZeroQ; DSG's "minmax").

    The base of all observers: ``low`` and ``high`` are buffers with one value each, NaN until the first ``observe``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(float("nan")))
        self.register_buffer("high", torch.tensor(float("nan")))

    @torch.no_grad()
    def observe(self, x: Tensor, bits: int = 8) -> None:
        """Widen the range by the one of the batch ``x`` (N, ...); ``bits`` matters to MeanSquaredError only."""
        low, high = self.batch_range(x, bits)
        # fmin and fmax ignore the NaN of a range not seen yet.
        self.low.copy_(torch.fmin(self.low, low.clamp(max=0)))
        self.high.copy_(torch.fmax(self.high, high.clamp(min=0)))

    def batch_range(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """The range (low, high) of one batch."""
        return x.amin(), x.amax()  # on a CPU in half the time of aminmax over all elements


class SampleMeanMinMax(RunningMinMax):
    """Mean over the batch of each sample's min (max), then running min (max) from 0: DSG's default, there "ema"."""

    def batch_range(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(x.flatten(1), dim=1)
        return low.mean(), high.mean()


class Percentile(RunningMinMax):
    """The values below and above which 100 - ``percentile`` per cent of a batch lie, then running min (max) from 0."""

    def __init__(self, percentile: float = 99.999) -> None:
        super().__init__()
        self.percentile = check_range("percentile", percentile, 50, 100)

    def batch_range(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        values = x.flatten()
        beyond = round(values.numel() * (1 - self.percentile / 100)) + 1
        return values.topk(beyond, largest=False).values.max(), values.topk(beyond).values.min()


class MeanSquaredError(RunningMinMax):
    """The range with the least mean squared quantization error among the batch's own shrunk by 0, 1, ..., 79 %."""

    def batch_range(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        low, high = x.amin(), x.amax()
        shrink = 1 - 0.01 * torch.arange(80, device=x.device)
        errors = torch.stack([F.mse_loss(fake_quantize(x, low * s, high * s, bits), x) for s in shrink])
        best = shrink.gather(0, errors.argmin(0, keepdim=True)).squeeze()  # indexed by one number it would be read
        return low * best, high * best


class MovingAverage(RunningMinMax):
    """Exponential moving average of batch min and max, corrected for its start at 0 (GDFQ and all later papers).

    After t batches the average is divided by ``1 - beta^t``. ``compounding_correction=True`` is the published code's
    quirk: it stores the divided value back, so that the corrections multiply and a constant 1 reads 1, 5.3, 17.8, ...
    before it decays towards 1 over some 100 batches.
    """

    def __init__(self, beta: float = 0.9, compounding_correction: bool = False) -> None:
        super().__init__()
        self.beta = check_range("beta", beta, 0, 0.9999)
        self.compounding_correction = compounding_correction
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("batches", torch.zeros(()))

    @torch.no_grad()
    def observe(self, x: Tensor, bits: int = 8) -> None:
        self.batches += 1
        self.average.mul_(self.beta).add_(torch.stack(self.batch_range(x, bits)), alpha=1 - self.beta)
        corrected = self.average / (1 - self.beta**self.batches)
        if self.compounding_correction:
            self.average.copy_(corrected)
        self.low.copy_(corrected[0])
        self.high.copy_(corrected[1])


OBSERVERS: dict[str, type[RunningMinMax]] = {
    "minmax": RunningMinMax,
    "sample_mean": SampleMeanMinMax,
    "percentile": Percentile,
    "mse": MeanSquaredError,
    "moving_average": MovingAverage,
}


class FakeQuantize(nn.Module):
    """Fake quantization of activations over the range of its observer, which looks on only while ``observing``."""

    def __init__(self, bits: int, observer: RunningMinMax, name: str = "") -> None:
        super().__init__()
        self.bits = check_bits("activation_bits", bits)
        self.observer = observer
        self.name = name
        self.observing = False
        self._has_range = False

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (any shape) quantized with the range as it stands after this batch. UserError without a range."""
        if self.observing:
            self.observer.observe(x, self.bits)
        elif not self._has_range:
            # Asked of the device once: afterwards a forward never waits for it.
            self._has_range = bool(self.observer.low.isfinite())
            if not self._has_range:
                raise UserError(f"activation {self.name!r} has no range yet: run a batch through it while observing.")
        return fake_quantize(x, self.observer.low, self.observer.high, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class QuantConv2d(nn.Conv2d):
    """A Conv2d whose weight is fake-quantized per output channel at each forward; ``weight_bits`` None leaves it float.

    It takes over the given layer's parameters; the bias stays in float.
    """

    def __init__(self, layer: nn.Conv2d, weight_bits: int | None) -> None:
        # On the meta device the weights about to be replaced cost neither memory nor random numbers.
        super().__init__(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
            device="meta",
        )
        self.weight, self.bias, self.weight_bits = layer.weight, layer.bias, weight_bits

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, used_weight(self), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}"


class QuantLinear(nn.Linear):
    """A Linear whose weight is fake-quantized per output row at each forward; else as :class:`QuantConv2d`."""

    def __init__(self, layer: nn.Linear, weight_bits: int | None) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias, self.weight_bits = layer.weight, layer.bias, weight_bits

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, used_weight(self), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}"


def used_weight(layer: nn.Module) -> Tensor:
    """The weight as ``layer`` computes with it: fake-quantized if it is a quantized layer, else as it is."""
    bits = getattr(layer, "weight_bits", None)
    return layer.weight if bits is None else fake_quantize_per_channel(layer.weight, bits)
