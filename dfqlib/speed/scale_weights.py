"""A network to train or to test, whose frozen batch norms work on its weights instead of its activations.

Quantized weights have to be computed at every forward anyway; a batch norm in eval mode only scales them, channel by
channel, and adds a bias. So a pass over every activation is saved, forward and backward, and nothing else changes.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter

from torch import Tensor, fx, nn

from dfqlib.quantizers.layers import used_weight
from dfqlib.speed.fold_batch_norms import follows_alone
from dfqlib.speed.switches import uses


class ScaledConv2d(nn.Module):
    """A convolution, quantized or not, and the batch norm behind it; both remain the network's own and learn.

    In eval mode ``gain`` (W * x + b) + ``shift`` is computed as (``gain`` W) * x + (``gain`` b + ``shift``).
    """

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.convolution, self.norm = convolution, norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) to (B, O, h, w)."""
        convolution, norm = self.convolution, self.norm
        if norm.training:  # its statistics are the batch's, which only the activations tell
            return norm(convolution(x))
        gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - gain * norm.running_mean
        if convolution.bias is not None:
            bias = bias + gain * convolution.bias
        return convolution._conv_forward(x, used_weight(convolution) * gain[:, None, None, None], bias)


def scale_weights(network: nn.Module) -> nn.Module:
    """``network`` by a graph in which each batch norm that follows a convolution alone is part of it.

    A torch.fx network only, such as a student; any other is returned as it is. Layers, parameters and buffers are the
    network's own: what trains one trains the other, and the network is described and saved as it was. Hooks on a
    convolution or batch norm that became one are not called here.
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
