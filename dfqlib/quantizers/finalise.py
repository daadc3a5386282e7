"""The last step of a student: the network that an integer runtime computes, whose accuracy is that of the file."""

import copy
from collections import Counter

import torch
from torch import Tensor, fx, nn

from dfqlib.models.plain_copy import keep_computed_weights
from dfqlib.quantizers.fake_quantize import scale_and_zero_point
from dfqlib.quantizers.layers import FakeQuantize, QuantizedLayer, by_output_channel, integer_weight, used_weight
from dfqlib.quantizers.observers import CommonRange, KnownRange
from dfqlib.quantizers.sites import AVERAGING, JOINING, folds, grids, is_layer, operation

SMALLEST_GAIN = 1e-12  # of a folded batch norm: weights that cannot be told from 0 still have a scale
FINER = 1 - 2**-10  # no average of fewer than 2^11 values is then halfway between two levels
LARGEST_BIAS = 2**30  # in steps, well inside int32


@torch.no_grad()
def finalise(student: fx.GraphModule, round_biases: bool = True) -> fx.GraphModule:
    """A frozen copy of a calibrated ``student`` that computes what an integer runtime does, up to the order of sums.

    Batch norms right after a layer are in its channels' scales and its bias, which changes nothing; levels of channels
    with a negative gain change their sign, where a symmetric -2^(k-1) becomes 2^(k-1) - 1. Biases are rounded to whole
    multiples of (input step x weight step), as a runtime adds them to its int32 sums, unless the layer's input or
    weight is in float; this costs accuracy at four bits. Averages have a grid of their own, 0.1 % finer than that of
    what they average: on the same one many lie halfway between two levels, where the last digit of a float decides.
    With ``round_biases`` off both are left out. A layer that is called several times becomes one for each call. All
    quantized weights lie on their ``grid``, see :func:`.layers.integer_weight`. UserError for a student without
    activation ranges.
    """
    final = copy.deepcopy(student)
    for module in final.modules():
        keep_computed_weights(module)  # biases rounded by bias_bits
    if round_biases:
        _separate_averages(final)
    on_grid = grids(final)
    layers: dict[str, fx.Node] = {}
    for node in [node for node in final.graph.nodes if is_layer(final, node)]:
        if node.target in layers:
            layer = copy.deepcopy(final.get_submodule(node.target))
            node.target = f"{node.target}_{node.name}"
            final.add_submodule(node.target, layer)
        layers[node.target] = node
    for name, node in layers.items():
        layer = final.get_submodule(name)
        gain, bias = layer.weight.new_ones(1), layer.bias
        if folds(final, node):
            (after,) = node.users
            gain, bias = _affine(final.get_submodule(after.target), layer.bias)
            after.replace_all_uses_with(node)
            final.graph.erase_node(after)
        quantizer = on_grid.get(node.all_input_nodes[0]) if round_biases and layer.weight_bits else None
        steps = None if quantizer is None else scale_and_zero_point(*quantizer.range(), quantizer.bits)[0]
        _set(layer, gain, bias, steps)
    final.delete_all_unused_submodules()
    for module in final.modules():
        if isinstance(module, FakeQuantize):
            module.final = True
    final.recompile()
    return final.requires_grad_(False)


def _separate_averages(final: fx.GraphModule) -> None:
    """Give averages that share the quantizer of other values one of their own, over :data:`FINER` of its range."""
    calls = Counter(node.target for node in final.graph.nodes)
    for node in final.graph.nodes:
        if operation(final, node) == "fakequantize" and operation(final, node.args[0]) in AVERAGING:
            shared, node_name = final.get_submodule(node.target), node.args[0].name
            joined = any(operation(final, user) in JOINING for user in node.users)  # which needs one grid
            if calls[node.target] > 1 and not joined:
                low, high = (FINER * bound for bound in shared.range())
                node.target, node.args = f"fake_quantize.{node_name}", (node.args[0], 0)
                grid = CommonRange([KnownRange(low, high)])
                final.add_submodule(node.target, FakeQuantize(shared.bits, grid, f"{shared.name}, {node_name}"))


def _affine(norm: nn.Module, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gain and shift (O,) of a batch norm after a layer with ``bias``: gain (W x) + shift."""
    gain = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    return gain, (0 if norm.bias is None else norm.bias) + gain * ((0 if bias is None else bias) - norm.running_mean)


def _set(layer: QuantizedLayer, gain: Tensor, bias: Tensor | None, input_scale: Tensor | None) -> None:
    """Give ``layer`` its weight times ``gain`` (O,), and ``bias`` (O,) in whole steps if its input has a scale."""

    def column(values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (layer.weight.dim() - 1))

    weight = by_output_channel(layer, used_weight(layer)) * column(gain)
    if layer.weight_bits:
        _, scale, zero = integer_weight(layer)
        scale = scale / gain.abs().clamp(min=SMALLEST_GAIN)
        zero = zero if layer.symmetric else torch.where(gain < 0, 1 - zero, zero)  # levels l become -1 - l
        if input_scale is not None and bias is not None:
            # Beside a bias that needs it, a channel's weights are next to 0, and a coarser grid will do.
            scale = torch.minimum(scale, LARGEST_BIAS / (bias.abs() * input_scale))
            step = 1 / (scale.double() * input_scale)
            bias = ((bias / step).round() * step).to(bias.dtype)
        layer.grid, layer.weight = torch.stack([scale, zero]), nn.Parameter(by_output_channel(layer, weight))
        weight = (by_output_channel(layer, integer_weight(layer)[0]) + column(zero)) / column(scale)
    layer.weight = nn.Parameter(by_output_channel(layer, weight))
    layer.bias = None if bias is None else nn.Parameter(bias)
