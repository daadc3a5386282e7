"""What the alignment losses compare inside two networks, from one forward pass each.

A :class:`NetworkProbe` runs a network's own layers by an extended graph (torch.fx), which also returns the channel
attention of every residual unit and a Grad-CAM map. It needs no hooks, and no second pass for the map.
"""

import copy
import operator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqlib.errors import UserError, check_choice
from dfqlib.finetuning.grad_cam import cam_weights, grad_cam
from dfqlib.models.batch_norm_statistics import sample_mean_square
from dfqlib.quantizers.layers import used_weight
from dfqlib.quantizers.trace import trace
from dfqlib.schedules import SALIENCY_LAYERS
from dfqlib.speed.scale_weights import scale_weights

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RESHAPES = {torch.flatten, "flatten", "view", "reshape", "squeeze", "contiguous"}


def channel_attention(features: Tensor) -> Tensor:
    """Each channel's share of the energy of ``features`` (B, C, h, w): (B, C), each row of length 1.

    The mean of the squares over space, normalised. Source: HAST, feature alignment.
    """
    return F.normalize(sample_mean_square(features), dim=1)


@dataclass(frozen=True)
class Internals:
    """Logits (B, classes); one attention (B, C) per residual unit; Grad-CAM maps (B, H, W) if they were asked for."""

    logits: Tensor
    attentions: list[Tensor]
    saliency: Tensor | None

    def detach(self) -> Self:
        """The same without gradients."""
        saliency = None if self.saliency is None else self.saliency.detach()
        return Internals(self.logits.detach(), [attention.detach() for attention in self.attentions], saliency)


class NetworkProbe:
    """Called with images (B, 3, H, W), returns the :class:`Internals` of ``network``, whose weights it shares.

    ``network`` is a teacher or a quantized student. ``layer`` is what Grad-CAM weighs: the ``"activations"`` that enter
    the last pooling, as in the papers; or, as in SaFT's released code, the raw output of the last ``"convolution"``,
    before its batch norm and the residual sum. Those maps show one branch only, and also its negative parts. A network
    that does not end in global pooling and a linear layer always gives maps of its last convolution.

    Maps are of each image's own top class; the channel weights carry no gradient, as usual for Grad-CAM. For the
    activations they are the last layer's weights, so no backward pass is needed (``closed_form``); ``autograd=True``
    computes the same maps without this shortcut. UserError if ``network`` cannot be traced or has no convolution.
    """

    def __init__(self, network: nn.Module, layer: str = "activations", autograd: bool = False) -> None:
        check_choice("layer", layer, SALIENCY_LAYERS)
        traced = network if isinstance(network, fx.GraphModule) else trace(network)
        graph = copy.deepcopy(traced.graph)
        for node in graph.nodes:
            if node.target is operator.iadd:
                node.target = operator.add  # an addition in place would overwrite what the attention is computed from
        bodies = residual_bodies(traced, graph)
        pooled, classifier = _global_pooling_head(traced, graph)
        of_pooled = pooled is not None and layer == "activations"
        features = pooled if of_pooled else _last_convolution(traced, graph, classifier)
        self.closed_form = of_pooled and not autograd
        self.classifier = _module(traced, classifier) if classifier else None
        attentions = []
        for body in bodies:
            with graph.inserting_after(body):
                attentions.append(graph.call_function(channel_attention, (body,)))
        output = graph.output_node()
        output.args = ((output.args[0], attentions, features),)
        graph.lint()
        self.units = len(bodies)
        self.module = scale_weights(fx.GraphModule(traced, graph))

    def __call__(self, images: Tensor, saliency: bool = False) -> Internals:
        """One forward pass; with ``saliency`` also the maps, which take a backward pass without the closed form."""
        if saliency and not self.closed_form and not (torch.is_grad_enabled() and images.requires_grad):
            with torch.enable_grad():
                return self._probe(images.detach().requires_grad_(), saliency)
        return self._probe(images, saliency)

    def _probe(self, images: Tensor, saliency: bool) -> Internals:
        logits, attentions, features = self.module(images)
        maps = None
        if saliency:
            weights = cam_weights(self._gradient(logits, features))
            maps = grad_cam(features, weights, tuple(images.shape[-2:]))
        return Internals(logits, list(attentions), maps)

    def _gradient(self, logits: Tensor, features: Tensor) -> Tensor:
        """Of each image's highest logit with respect to ``features`` (B, C, h, w); (B, C, 1, 1) by the closed form."""
        top = logits.argmax(1)
        if not self.closed_form:
            return torch.autograd.grad(logits.gather(1, top[:, None]).sum(), features, retain_graph=True)[0]
        with torch.no_grad():
            rows = used_weight(self.classifier).flatten(1)[top]
            return rows[..., None, None] / features.shape[-2:].numel()


def residual_bodies(traced: fx.GraphModule, graph: fx.Graph) -> list[fx.Node]:
    """The output of each residual unit's body, in order of execution: of each sum, the deeper of the two summands.

    HAST (feature alignment) and SaFT align the bodies' outputs, before the identity is added.
    """
    depth: dict[fx.Node, int] = {}  # convolutions on the longest path to a node
    for node in graph.nodes:
        before = max((depth[each] for each in node.all_input_nodes), default=0)
        depth[node] = before + isinstance(_module(traced, node), nn.Conv2d)
    sums = [node for node in graph.nodes if node.target in _ADDITIONS and len(node.all_input_nodes) == 2]
    return [max(node.all_input_nodes, key=depth.__getitem__) for node in sums]


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(node.target) if node.op == "call_module" else None


def _global_pooling_head(traced: fx.GraphModule, graph: fx.Graph) -> tuple[fx.Node | None, fx.Node | None]:
    """(what is pooled, the classifier) of a network that ends in global pooling and a linear layer; else Nones."""
    node, classifier = graph.output_node().all_input_nodes[0], None
    while node.all_input_nodes:
        module = _module(traced, node)
        if classifier and _is_global_pool(traced, node, _module(traced, classifier).weight.shape[1]):
            return node.all_input_nodes[0], classifier
        is_linear = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
        if classifier is None and is_linear:
            classifier = node
        elif not (node.target in _RESHAPES or isinstance(module, nn.Flatten | nn.Dropout | nn.Identity)):
            break
        node = node.all_input_nodes[0]
    return None, None


def _is_global_pool(traced: fx.GraphModule, node: fx.Node, features: int) -> bool:
    """Whether ``node`` gives the mean over all positions, one value per channel, to a layer of so many ``features``."""
    if node.target in (torch.mean, "mean"):
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return isinstance(dims, list | tuple) and {dim % 4 for dim in dims} == {2, 3}
    is_pool = isinstance(_module(traced, node), nn.AvgPool2d | nn.AdaptiveAvgPool2d)
    # Means over parts of the positions would be more values than there are channels.
    return (is_pool or node.target is F.adaptive_avg_pool2d) and _channels(traced, node.all_input_nodes[0]) == features


def _channels(traced: fx.GraphModule, node: fx.Node) -> int | None:
    """The number of channels at ``node``, from the batch norms or convolutions before it; None without one."""
    module = _module(traced, node)
    if isinstance(module, nn.BatchNorm2d | nn.Conv2d):
        return module.num_features if isinstance(module, nn.BatchNorm2d) else module.out_channels
    if node.target is torch.cat:
        return sum(_channels(traced, each) or 0 for each in node.all_input_nodes)
    return _channels(traced, node.all_input_nodes[0]) if node.all_input_nodes else None


def _last_convolution(traced: fx.GraphModule, graph: fx.Graph, classifier: fx.Node | None) -> fx.Node:
    for node in reversed(graph.nodes):
        if node is not classifier and isinstance(_module(traced, node), nn.Conv2d):
            return node
    raise UserError(f"network={type(traced).__name__} has no convolution, so Grad-CAM has nothing to look at.")
