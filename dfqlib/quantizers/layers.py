"""The layers of a quantized network, and the switch that lets their observers see a batch."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqlib.bits import check_width
from dfqlib.errors import UserError
from dfqlib.quantizers.fake_quantize import (
    channel_ranges,
    fake_quantize,
    fake_quantize_per_channel,
    scale_and_zero_point,
)
from dfqlib.quantizers.observers import CommonRange, RunningMinMax
from dfqlib.speed.precision import full


class FakeQuantize(nn.Module):
    """Fake quantization of activations over the range of its observer, which is updated only while ``observing``.

    ``final`` rounds before it subtracts the zero point, as runtimes do: what a float loses by the subtraction can put a
    value, and with it a flat area of an image, on a tie of two levels.
    """

    def __init__(self, bits: int, observer: RunningMinMax | CommonRange, name: str = "") -> None:
        super().__init__()
        self.bits, self.observer, self.name = bits, observer, name
        self.observing = self._has_range = self.final = False
        self.register_parameter("stretch", None)

    def forward(self, x: Tensor, *part: int) -> Tensor:
        """``x`` (any shape) quantized over the range as it is after this batch. UserError if there is no range.

        ``part`` tells a :class:`CommonRange` which of its values ``x`` is.
        """
        x = full(x)
        if self.observing:
            self.observer.observe(x, self.bits, *part)
        if self.final:
            (scale, zero), half = scale_and_zero_point(*self.range(), self.bits), 2 ** (self.bits - 1)
            return torch.mul(x, scale).round_().sub_(zero).clamp_(-half, half - 1).add_(zero).div_(scale)
        return fake_quantize(x, *self.range(), self.bits)

    def learn_range(self) -> None:
        """Make the range a parameter: ``stretch``, of which both ends are multiples, so that 0 stays a level."""
        self.stretch = nn.Parameter(self.range()[0].new_ones(()))

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """(low, high), scalars; NaN if nothing was observed yet."""
        low, high = self.observer.low, self.observer.high
        return (low, high) if self.stretch is None else (low * self.stretch, high * self.stretch)

    def range(self) -> tuple[Tensor, Tensor]:
        """:attr:`ends`; UserError if nothing was observed yet."""
        if not self.observing and not self._has_range:
            # Read from the device once: later forward passes never wait for it.
            self._has_range = bool(self.observer.low.isfinite())
            if not self._has_range:
                raise UserError(f"activation {self.name!r} has no range yet: run a batch through it while observing.")
        return self.ends

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class QuantizedLayer(nn.Module):
    """Takes over the attributes and parameters of a layer, whose weight each forward pass fake-quantizes.

    One range per output channel, :func:`channel_ranges`, of which ``share`` (O, 1) is used; None uses all of it.
    ``weight_bits`` None leaves the weight in float. The bias stays in float. Where ``grid`` (2, O) is set, the weight
    is already quantized, with these scales and zero points (:func:`dfqlib.quantizers.finalise.finalise`).
    """

    def __init__(self, layer: nn.Module, weight_bits: int | None, symmetric: bool = False) -> None:
        nn.Module.__init__(self)  # a layer's own constructor would draw weights that are replaced at once
        vars(self).update({name: copy.copy(value) for name, value in vars(layer).items()})
        self.weight_bits, self.symmetric = weight_bits, symmetric
        self.register_buffer("share", None)
        self.register_buffer("grid", None)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}"


class RoundedBias(nn.Module):
    """A bias (O,), which trains in float, as it is used: on the ``bits`` levels between its min and max."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = check_width("bias_bits", bits)

    def forward(self, bias: Tensor) -> Tensor:
        return fake_quantize(bias, *torch.aminmax(bias.detach()), self.bits)


class _QuantConv(QuantizedLayer):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, used_weight(self), self.bias)


class QuantConv1d(_QuantConv, nn.Conv1d):
    pass


class QuantConv2d(_QuantConv, nn.Conv2d):
    pass


class QuantConv3d(_QuantConv, nn.Conv3d):
    pass


class _QuantConvTranspose(QuantizedLayer):
    def forward(self, x: Tensor) -> Tensor:
        transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(self.kernel_size) - 1]
        options = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        return transposed(x, used_weight(self), self.bias, *options)


class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    pass


class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    pass


class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    pass


class QuantLinear(QuantizedLayer, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, used_weight(self), self.bias)


QUANTIZED: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
    nn.Linear: QuantLinear,
}  # every layer whose weights are quantized


def by_output_channel(layer: nn.Module, weight: Tensor) -> Tensor:
    """``weight`` of ``layer`` with the output channels first, (O, ...); called on that, the weight as it was."""
    if not getattr(layer, "transposed", False):
        return weight
    return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)  # stored as (I, O / groups, ...)


def used_weight(layer: nn.Module) -> Tensor:
    """The weight that ``layer`` computes with: fake-quantized in a quantized layer, else as it is."""
    bits = getattr(layer, "weight_bits", None)
    if bits is None or layer.grid is not None:
        return layer.weight
    rows = by_output_channel(layer, layer.weight)
    return by_output_channel(layer, fake_quantize_per_channel(rows, bits, layer.share, layer.symmetric))


def integer_weight(layer: QuantizedLayer) -> tuple[Tensor, Tensor, Tensor]:
    """``layer``'s weight as integers: levels, int8 in its shape, and the scale and zero point (O,) of each channel.

    Output channel o of :func:`used_weight` is (levels + zero[o]) / scale[o], bit for bit; as in
    :func:`scale_and_zero_point`, scales are steps per unit and ONNX's zero point is ``-zero``.
    """
    rows, half = by_output_channel(layer, layer.weight.detach()), 2 ** (layer.weight_bits - 1)
    if layer.grid is None:
        ranges = channel_ranges(rows, layer.weight_bits, layer.share, layer.symmetric)
        scale, zero = scale_and_zero_point(*ranges, layer.weight_bits)
    else:
        scale, zero = (each.view(-1, *[1] * (rows.dim() - 1)) for each in layer.grid)
    levels = torch.mul(rows, scale).sub_(zero).round_().clamp_(-half, half - 1)
    return by_output_channel(layer, levels).to(torch.int8), scale.flatten(), zero.flatten()


@contextlib.contextmanager
def observing(student: nn.Module) -> Iterator[None]:
    """Within this context, each forward pass of ``student`` updates its activation ranges."""
    quantizers = [module for module in student.modules() if isinstance(module, FakeQuantize)]
    for quantizer in quantizers:
        quantizer.observing = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.observing = False
