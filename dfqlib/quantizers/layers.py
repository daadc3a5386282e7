"""The layers of a quantized network, and the switch that lets their observers see a batch."""

import contextlib
import copy
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from dfqlib.errors import UserError
from dfqlib.quantizers.fake_quantize import fake_quantize, fake_quantize_per_channel
from dfqlib.quantizers.observers import RunningMinMax


class FakeQuantize(nn.Module):
    """Fake quantization of activations over the range of its observer, which is updated only while ``observing``.

    ``clips_gradient`` as for :func:`fake_quantize`.
    """

    def __init__(self, bits: int, observer: RunningMinMax, name: str = "") -> None:
        super().__init__()
        self.bits, self.observer, self.name = bits, observer, name
        self.observing = self._has_range = self.clips_gradient = False

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (any shape) quantized over the range as it is after this batch. UserError if there is no range."""
        if self.observing:
            self.observer.observe(x, self.bits)
        elif not self._has_range:
            # Read from the device once: later forward passes never wait for it.
            self._has_range = bool(self.observer.low.isfinite())
            if not self._has_range:
                raise UserError(f"activation {self.name!r} has no range yet: run a batch through it while observing.")
        return fake_quantize(x, self.observer.low, self.observer.high, self.bits, self.clips_gradient)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class QuantizedLayer(nn.Module):
    """Takes over the attributes and parameters of a Conv2d or Linear, whose weight each forward pass fake-quantizes.

    One range per output channel; ``weight_bits`` None leaves the weight in float. The bias stays in float. ``share``
    (O, 1) is the part of each channel's min and max that is its range; None takes all of it.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, weight_bits: int | None) -> None:
        nn.Module.__init__(self)  # a layer's own constructor would draw weights that are replaced at once
        vars(self).update({name: copy.copy(value) for name, value in vars(layer).items()})
        self.weight_bits = weight_bits
        self.register_buffer("share", None)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}"


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, used_weight(self), self.bias)


class QuantLinear(QuantizedLayer, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, used_weight(self), self.bias)


def used_weight(layer: nn.Module) -> Tensor:
    """The weight that ``layer`` computes with: fake-quantized in a quantized layer, else as it is."""
    bits = getattr(layer, "weight_bits", None)
    return layer.weight if bits is None else fake_quantize_per_channel(layer.weight, bits, layer.share)


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
