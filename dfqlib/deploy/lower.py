"""A finalised student in ``quantized_decomposed`` operations, which ONNX and ``.pt2`` have a form for."""

import copy
import math

import torch
import torch.ao.quantization.fx._decomposed  # registers the operations
from torch import Tensor, fx, nn

from dfqlib.errors import UserError
from dfqlib.quantizers.fake_quantize import scale_and_zero_point
from dfqlib.quantizers.layers import FakeQuantize, QuantizedLayer, integer_weight
from dfqlib.quantizers.sites import grids, is_relu, operation

_OPERATIONS = torch.ops.quantized_decomposed
_INT8, _UINT8, _INT32 = (-128, 127, torch.int8), (0, 255, torch.uint8), (-(2**31), 2**31 - 1, torch.int32)


def lower(final: fx.GraphModule) -> fx.GraphModule:
    """A copy of a student that :func:`.finalise.finalise` made, with the same outputs up to the last digits of floats.

    Activations become uint8, weights int8, each with its zero point; fewer bits use fewer of these levels. Biases whose
    layer has a quantized input are int32 in steps of input step x weight step. UserError, naming it, for a layer or an
    activation whose zero point is none of its type's, and for a transposed convolution in groups.
    """
    lowered, on_grid = copy.deepcopy(final), grids(final)
    steps = {node.name: _step(quantizer) for node, quantizer in on_grid.items()}
    for node in lowered.graph.nodes:
        module = lowered.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, FakeQuantize):
            value, bounds = node.args[0], (-math.inf, math.inf)
            if is_relu(lowered, clip := value) and len(clip.users) == 1:
                value, bounds = clip.all_input_nodes[0], (0, 6 if operation(lowered, clip) == "relu6" else math.inf)
            node.target, node.args = f"quantize.{node.name}", (value,)
            lowered.add_submodule(node.target, _Quantize(module, *bounds))
        elif isinstance(module, QuantizedLayer) and module.weight_bits is not None:
            kind = type(f"Integer{type(module).__name__}", (IntegerLayer, type(module)), {})
            lowered.set_submodule(node.target, kind(node.target, module, steps.get(node.all_input_nodes[0].name)))
    lowered.graph.eliminate_dead_code()
    lowered.delete_all_unused_submodules()
    lowered.recompile()
    return lowered.eval()


def _step(quantizer: FakeQuantize) -> Tensor:
    return 1 / scale_and_zero_point(*quantizer.range(), quantizer.bits)[0]


class _Quantize(nn.Module):
    """A :class:`FakeQuantize`, after a clip to ``low`` and ``high``, by way of uint8.

    Fewer than 8 bits use the first levels. These are clipped and not the float before: a runtime joins only what rounds
    right after it with a convolution.
    """

    def __init__(self, quantizer: FakeQuantize, low: float, high: float) -> None:
        super().__init__()
        self.step, highest = _step(quantizer).item(), 2**quantizer.bits - 1
        zero = scale_and_zero_point(*quantizer.range(), quantizer.bits)[1]
        self.zero_point = 2 ** (quantizer.bits - 1) - int(zero)
        if not 0 <= self.zero_point <= 255:
            low, high = (bound.item() for bound in quantizer.range())
            held = f"activation {quantizer.name!r} has the range {low:.4g} to {high:.4g}, which has no uint8 zero point"
            raise UserError(f"{held}; allowed: sites='integer', whose ranges hold 0.")
        ends = (min(max(bound / self.step + self.zero_point, 0), highest) for bound in (low, high))
        self.levels = tuple(map(round, ends))

    def forward(self, x: Tensor) -> Tensor:
        levels = _OPERATIONS.quantize_per_tensor(x, self.step, self.zero_point, *_UINT8)
        if self.levels != _UINT8[:2]:
            levels = levels.clamp(*self.levels)
        return _OPERATIONS.dequantize_per_tensor(levels, self.step, self.zero_point, *_UINT8)


class IntegerLayer(nn.Module):
    """Makes weight and bias of a quantized layer what its ``levels``, and the levels of its bias, stand for."""

    def __init__(self, name: str, layer: QuantizedLayer, input_step: Tensor | None) -> None:
        super().__init__(layer, None)
        transposed = getattr(layer, "transposed", False)
        if transposed and layer.groups > 1:
            raise UserError(f"layer {name!r} is a transposed convolution in groups, whose weights have no one axis of "
                            "output channels; it cannot be exported.")  # fmt: skip
        levels, scale, zero = integer_weight(layer)
        if (-zero).lt(-128).any() or (-zero).gt(127).any():
            raise UserError(f"layer {name!r} has channels of one sign, whose zero points are not int8; allowed: "
                            "weights='symmetric'.")  # fmt: skip
        self.axis, self.levels_bits = int(transposed), layer.weight_bits
        bias = self._parameters.pop("bias")
        del self._parameters["weight"]
        self.register_buffer("levels", levels.contiguous())
        self.register_buffer("step", 1 / scale)
        self.register_buffer("zero_point", (-zero).long())
        if bias is None or input_step is None:
            self.register_buffer("float_bias", bias)
            return
        self.register_buffer("bias_step", self.step * input_step)
        self.register_buffer("bias_levels", (bias.double() / self.bias_step.double()).round().int())

    @property
    def weight(self) -> Tensor:
        return _OPERATIONS.dequantize_per_channel(self.levels, self.step, self.zero_point, self.axis, *_INT8)

    @property
    def bias(self) -> Tensor | None:
        if "float_bias" in self._buffers:
            return self.float_bias
        return _OPERATIONS.dequantize_per_channel(self.bias_levels, self.bias_step, None, 0, *_INT32)
