"""The layers of a quantized network, and the switch that lets their observers see a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from dfqlib.errors import UserError
from dfqlib.quantizers.fake_quantize import fake_quantize, fake_quantize_per_channel
from dfqlib.quantizers.observers import RunningMinMax


class FakeQuantize(nn.Module):
    """Fake quantization of activations over the range of its observer, which looks on only while ``observing``."""

    def __init__(self, bits: int, observer: RunningMinMax, name: str = "") -> None:
        super().__init__()
        self.bits = bits
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


def set_observing(student: nn.Module, on: bool) -> None:
    """Let the observers of ``student`` update their ranges at each forward, or stand still."""
    for module in student.modules():
        if isinstance(module, FakeQuantize):
            module.observing = on


@contextlib.contextmanager
def observing(student: nn.Module) -> Iterator[None]:
    """Inside, each forward of ``student`` updates its activation ranges."""
    set_observing(student, True)
    try:
        yield
    finally:
        set_observing(student, False)
