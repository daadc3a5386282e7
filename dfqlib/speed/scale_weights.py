"""Frozen batch norms that scale a student's weights, which are quantized at every forward pass anyway.

This saves a pass over every activation, forward and backward.
"""

import copy
import operator
from collections import Counter

from torch import Tensor, fx, nn

from dfqlib.quantizers.layers import used_weight
from dfqlib.speed.fold_batch_norms import follows_alone
from dfqlib.speed.switches import uses


class ScaledConv2d(nn.Module):
    """A convolution, quantized or not, and the batch norm after it, both the network's own and trainable.

    In eval mode ``gain`` (W * x + b) + ``shift`` is computed as (``gain`` W) * x + (``gain`` b + ``shift``).
    """

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.convolution, self.norm = convolution, norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) to (B, O, h, w)."""
        convolution, norm = self.convolution, self.norm
        if norm.training:  # it normalises by the batch's statistics, which need the activations
            return norm(convolution(x))
        gain, bias = self.affine()
        return convolution._conv_forward(x, used_weight(convolution) * gain[:, None, None, None], bias)

    def affine(self) -> tuple[Tensor, Tensor]:
        """``gain`` and the bias (O,) of the two together."""
        convolution, norm = self.convolution, self.norm
        gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - gain * norm.running_mean
        return gain, bias if convolution.bias is None else bias + gain * convolution.bias


def scale_weights(network: nn.Module) -> nn.Module:
    """A faster graph of ``network``, for a loop that runs it: batch norms scale the weights of the layer before them.

    For a torch.fx network such as a student; any other is returned unchanged. Layers, parameters and buffers are the
    network's own: training one trains the other, and ``network`` itself is described and saved. Hooks on a merged
    convolution or batch norm are not called.
    """
    if not uses("scaled_weights") or not isinstance(network, fx.GraphModule):
        return network
    graph, parts = copy.deepcopy(network.graph), {}
    calls = Counter(node.target for node in graph.nodes)
    for node in list(graph.nodes):
        if node.op in ("call_module", "get_attr"):
            parts[node.target] = operator.attrgetter(node.target)(network)
        if follows_alone(network, node, calls):
            (source,) = node.all_input_nodes
            convolution, source.target = parts[source.target], f"scaled.{source.name}"
            parts[source.target] = ScaledConv2d(convolution, parts[node.target])
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    return fx.GraphModule(parts, graph)
