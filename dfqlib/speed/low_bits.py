"""Students that compute with whole numbers: products of int8 levels, summed in int32, scales and zero points outside.

These sums are exact, so the result is that of fake quantization up to the rounding of its float sums.
"""

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from dfqlib.quantizers.fake_quantize import scale_and_zero_point
from dfqlib.quantizers.layers import FakeQuantize, QuantConv2d, integer_weight
from dfqlib.quantizers.sites import operation
from dfqlib.speed.scale_weights import ScaledConv2d


class Levels(nn.Module):
    """What ``quantizer`` makes of a value, as uint8 levels: (level - ``zero_point``) / ``scale``."""

    def __init__(self, quantizer: FakeQuantize) -> None:
        super().__init__()
        self.scale, self.zero = scale_and_zero_point(*quantizer.range(), quantizer.bits)
        self.half = 2 ** (quantizer.bits - 1)
        self.zero_point = self.half - self.zero.item()

    def forward(self, x: Tensor, *part: int) -> Tensor:
        steps = torch.mul(x, self.scale).sub_(self.zero).round_()
        # By way of int8, to which a CPU converts eight times as fast.
        return steps.clamp_(-self.half, self.half - 1).to(torch.int8).view(torch.uint8).add_(self.half)


class Values(nn.Module):
    """The float32 values of :class:`Levels`, as its quantizer gives them."""

    def __init__(self, levels: Levels) -> None:
        super().__init__()
        self.scale, self.zero_point = levels.scale, levels.zero_point

    def forward(self, levels: Tensor) -> Tensor:
        return levels.float().sub_(self.zero_point).div_(self.scale)


class IntegerConv2d(nn.Module):
    """A quantized convolution, and the batch norm after it: levels, uint8 (B, I, H, W), to float32 (B, O, h, w)."""

    def __init__(self, layer: nn.Module, given: Levels) -> None:
        super().__init__()
        convolution: Any = _convolution(layer)
        gain, bias = layer.affine() if isinstance(layer, ScaledConv2d) else (1.0, convolution.bias)
        weight, scale = _whole_weight(convolution)
        step, given_by = gain / scale, (1 / given.scale.item(), int(given.zero_point))
        spans = *map(list, (convolution.stride, convolution.padding, convolution.dilation)), convolution.groups
        packed = torch.ops.onednn.qconv_prepack(weight.to(torch.int8), step, *given_by, *spans)
        zero = torch.zeros(len(scale), dtype=torch.int64)
        self.arguments: tuple = *given_by, packed, step, zero, bias, *spans, 1.0, 0, torch.float32, "none", [], ""

    def forward(self, levels: Tensor) -> Tensor:
        return torch.ops.onednn.qconv2d_pointwise(levels, *self.arguments)


def _convolution(layer: nn.Module) -> nn.Module:
    return layer.convolution if isinstance(layer, ScaledConv2d) else layer


def _whole_weight(convolution: QuantConv2d) -> tuple[Tensor, Tensor]:
    """Whole numbers (O, I, h, w) and the scale (O,) of each channel, of which the weight is the quotient."""
    levels, scale, zero = integer_weight(convolution)
    return levels + zero.view(-1, 1, 1, 1), scale


def _fits(layer: nn.Module) -> bool:
    """Whether ``layer`` is a convolution whose whole numbers are int8: those of 8 bits are, if they are symmetric."""
    convolution = _convolution(layer)
    if not isinstance(convolution, QuantConv2d) or convolution.weight_bits is None:
        return False
    padded = isinstance(convolution.padding, str) or convolution.padding_mode != "zeros"
    whole, _ = _whole_weight(convolution)
    return not padded and bool(((whole >= -128) & (whole <= 127)).all())


@torch.no_grad()
def in_low_bits(student: nn.Module) -> nn.Module:
    """A copy of ``student``, as it is now, that computes convolutions in int8 where input and weights are quantized.

    ``student`` is what :func:`.scale_weights.scale_weights` returns. Returned unchanged: what is no torch.fx network,
    and any network where a processor has no such units (other kernels saturate) or the device is another.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in student.parameters())
    if not isinstance(student, fx.GraphModule) or not on_cpu or not torch.cpu._is_vnni_supported():
        return student
    graph, parts = copy.deepcopy(student.graph), {}
    for node in list(graph.nodes):
        if node.op not in ("call_module", "get_attr") or node.target in parts:
            continue
        parts[node.target] = part = operator.attrgetter(node.target)(student)
        if not isinstance(part, FakeQuantize) or part.final:
            continue
        modules = {user: student.get_submodule(user.target) for user in node.users if user.op == "call_module"}
        layers, levels = {user: module for user, module in modules.items() if _fits(module)}, Levels(part)
        if not layers or not 0 <= levels.zero_point <= 255:
            continue
        others, value = set(node.users) - set(layers), node.all_input_nodes[0]
        if levels.zero_point == 0 and operation(student, value) == "relu" and len(value.users) == 1:
            node.replace_input_with(value, value.all_input_nodes[0])  # levels below 0 are cut off anyway
            graph.erase_node(value)
        node.target = f"levels.{node.name}"
        parts[node.target] = levels
        for user, layer in layers.items():
            user.target = f"integer.{user.name}"
            parts[user.target] = IntegerConv2d(layer, levels)
        if others:
            with graph.inserting_after(node):
                values = graph.call_module(f"values.{node.name}", (node,))
            parts[values.target] = Values(levels)
            node.replace_all_uses_with(values, delete_user_cb=others.__contains__)
    return fx.GraphModule(parts, graph).eval()
