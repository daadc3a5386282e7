"""What the alignment losses look at inside a network, all of it from one forward pass.

A :class:`Viewer` runs a network's own layers by an extended graph (torch.fx) that also hands out the channel attention
of every residual unit and a Grad-CAM map. Nothing is hooked, so nothing leaks, and no network runs twice for its map.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqlib.errors import UserError, check_choice
from dfqlib.finetuning.grad_cam import cam_weights, convolution_gradient, grad_cam
from dfqlib.models.batch_norm_statistics import sample_mean_square
from dfqlib.quantizers.layers import FakeQuantize, used_weight
from dfqlib.quantizers.trace import trace
from dfqlib.speed.scale_weights import scale_weights


def channel_attention(features: Tensor) -> Tensor:
    """How much of the energy of ``features`` (B, C, h, w) each channel holds: (B, C), each row of length 1.

    The mean of the squares over space, normalised. Source: HAST, feature alignment.
    """
    return F.normalize(sample_mean_square(features), dim=1)


LAYERS = ("activations", "convolution")
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RESHAPES = {torch.flatten, "flatten", "view", "reshape", "squeeze", "contiguous"}
_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}


@dataclass(frozen=True)
class View:
    """Logits (B, classes); one attention (B, C) per residual unit; Grad-CAM maps (B, H, W) if they were asked for."""

    logits: Tensor
    attentions: list[Tensor]
    saliency: Tensor | None

    def detach(self) -> View:
        """The same without gradients."""
        saliency = None if self.saliency is None else self.saliency.detach()
        return View(self.logits.detach(), [attention.detach() for attention in self.attentions], saliency)


class NetworkProbe:
    """Called with images (B, 3, H, W), gives the :class:`View` of ``network``, whose layers and weights it shares.

    ``network`` is a teacher or a quantized student. ``layer`` is what Grad-CAM weighs: the ``"activations"`` that enter
    the last pooling, as the papers say; or, as in SaFT's published code, the last ``"convolution"``'s raw output,
    before its batch norm and the residual sum, which makes maps of another kind: they show one branch alone and also
    its negative parts. A network that does not end in global pooling and a linear layer always gives its last
    convolution's.

    ``closed`` says that the gradient of a class's score is known without a backward pass, which the last pooling and
    linear layer (and batch norms in eval mode) allow; ``autograd=True`` goes without this shortcut to the same maps.
    Saliency is of each image's own top class; the weights of its channels carry no gradient, as is usual for Grad-CAM.
    UserError if ``network`` cannot be traced or has no convolution.
    """

    def __init__(self, network: nn.Module, layer: str = "activations", autograd: bool = False) -> None:
        check_choice("layer", layer, LAYERS)
        traced = network if isinstance(network, fx.GraphModule) else trace(network)
        graph = copy.deepcopy(traced.graph)
        for node in graph.nodes:
            if node.target is operator.iadd:
                node.target = operator.add  # in place it would overwrite what the attention is taken of
        bodies = residual_bodies(traced, graph)
        head = _Head.find(traced, graph)
        if head is None or layer == "convolution":
            seen = _last_convolution(traced, graph, head)
            self.chain = head and _Chain.find(traced, head, seen)
            self.closed = self.chain is not None
        else:
            seen, self.chain, self.closed = head.features, None, True
        self.closed = self.closed and not autograd
        self.classifier = head and traced.get_submodule(head.classifier)
        positive = self.chain.relu if self.chain else seen
        _hand_out(graph, bodies, [seen, positive])
        self.units = len(bodies)
        self.module = scale_weights(fx.GraphModule(traced, graph))

    def __call__(self, images: Tensor, saliency: bool = False) -> View:
        """One forward pass; with ``saliency`` also the maps, for which a network without the shortcut runs backward."""
        if saliency and not self.closed and not (torch.is_grad_enabled() and images.requires_grad):
            with torch.enable_grad():
                return self._view(images.detach().requires_grad_(), saliency)
        return self._view(images, saliency)

    def _view(self, images: Tensor, saliency: bool) -> View:
        logits, attentions, activations, positive = self.module(images)
        maps = None
        if saliency:
            weights = cam_weights(self._gradient(logits, activations, positive))
            maps = grad_cam(activations, weights, tuple(images.shape[-2:]))
        return View(logits, list(attentions), maps)

    def _gradient(self, logits: Tensor, activations: Tensor, positive: Tensor) -> Tensor:
        """Of each image's highest logit with respect to ``activations`` (B, C, h, w), or in a shape that broadcasts."""
        top = logits.argmax(1)
        if not self.closed:
            return torch.autograd.grad(logits.gather(1, top[:, None]).sum(), activations, retain_graph=True)[0]
        with torch.no_grad():
            # Weights of the last layer as it uses them, quantized in a student.
            rows = used_weight(self.classifier).flatten(1)[top]
            rows = rows[..., None, None] / positive.shape[-2:].numel()
            return rows if self.chain is None else convolution_gradient(rows, positive, self.chain.norm)


def residual_bodies(traced: fx.GraphModule, graph: fx.Graph) -> list[fx.Node]:
    """The output of each residual unit's body, in execution order: of every sum, the part with more layers behind it.

    Source: HAST, feature alignment, and SaFT align the bodies' outputs, before the identity is added.
    """
    depth: dict[fx.Node, int] = {}
    for node in graph.nodes:
        counts = node.op == "call_module" and isinstance(traced.get_submodule(node.target), nn.Conv2d)
        depth[node] = max((depth[given] for given in node.all_input_nodes), default=0) + counts
    sums = [node for node in graph.nodes if node.target in _ADDITIONS and len(node.all_input_nodes) == 2]
    return [max(node.all_input_nodes, key=depth.__getitem__) for node in sums]


@dataclass(frozen=True)
class _Head:
    """The end of a network that is nothing but ``features`` (a node), their mean over space, and ``classifier``."""

    features: fx.Node
    classifier: str

    @classmethod
    def find(cls, traced: fx.GraphModule, graph: fx.Graph) -> _Head | None:
        classifier = None
        node = next(node for node in reversed(graph.nodes) if node.op == "output").all_input_nodes[0]
        while node.all_input_nodes:
            module = traced.get_submodule(node.target) if node.op == "call_module" else None
            if classifier and _is_global_pool(traced, node, classifier):
                return cls(node.all_input_nodes[0], classifier)
            if classifier is None and _is_linear(module):
                classifier = node.target
            elif not (node.target in _RESHAPES or isinstance(module, nn.Flatten | nn.Dropout | nn.Identity)):
                return None
            node = node.all_input_nodes[0]
        return None


def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


def _is_global_pool(traced: fx.GraphModule, node: fx.Node, classifier: str) -> bool:
    """Whether ``node`` gives the mean over all positions, one value per channel, to the layer ``classifier``."""
    module = traced.get_submodule(node.target) if node.op == "call_module" else None
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return module.output_size in (1, (1, 1))
    if node.target is F.adaptive_avg_pool2d:
        return _argument(node, "output_size") in (1, (1, 1), [1, 1])
    if node.target in (torch.mean, "mean"):
        dims = _argument(node, "dim")
        return isinstance(dims, list | tuple) and {dim % 4 for dim in dims} == {2, 3}
    # A window of fixed size covers everything if the classifier takes as many features as there are channels.
    return (
        isinstance(module, nn.AvgPool2d)
        and _channels(traced, node) == used_weight(traced.get_submodule(classifier)).shape[1]
    )


def _argument(node: fx.Node, name: str) -> object:
    """The second argument of the call ``node``, given by position or by ``name``; None if it is not given."""
    return node.args[1] if len(node.args) > 1 else node.kwargs.get(name)


def _channels(traced: fx.GraphModule, node: fx.Node) -> int | None:
    """How many channels reach ``node``, from the batch norm or convolution before it; None if there is none."""
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        module = traced.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.BatchNorm2d | nn.Conv2d):
            return module.num_features if isinstance(module, nn.BatchNorm2d) else module.out_channels
    return None


def _last_convolution(traced: fx.GraphModule, graph: fx.Graph, head: _Head | None) -> fx.Node:
    """The last convolution's output, or that before it where the last one is the classifier."""
    for node in reversed(graph.nodes):
        is_module = node.op == "call_module" and not (head and node.target == head.classifier)
        if is_module and isinstance(traced.get_submodule(node.target), nn.Conv2d):
            return node
    raise UserError(f"network={type(traced).__name__} has no convolution, so Grad-CAM has nothing to look at.")


@dataclass(frozen=True)
class _Chain:
    """What lies between the last convolution and the pooling, if that is: batch norm, perhaps a sum, one ReLU."""

    norm: nn.BatchNorm2d
    relu: fx.Node

    @classmethod
    def find(cls, traced: fx.GraphModule, head: _Head, convolution: fx.Node) -> _Chain | None:
        path = _only_path(convolution, head.features)
        modules = [traced.get_submodule(node.target) if node.op == "call_module" else None for node in path]
        path = [node for node, module in zip(path, modules, strict=True) if not isinstance(module, FakeQuantize)]
        modules = [module for module in modules if not isinstance(module, FakeQuantize)]
        sums = len(path) == 4 and path[2].target in _ADDITIONS
        if not (len(path) == 3 or sums) or not isinstance(modules[1], nn.BatchNorm2d):
            return None
        rectified = isinstance(modules[-1], nn.ReLU) or path[-1].target in _RELU
        return cls(modules[1], path[-1]) if rectified else None


def _only_path(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """``first``, the only node that uses it, and so on to ``last``; as far as there is one."""
    path = [first]
    while path[-1] is not last and len(path[-1].users) == 1:
        path.extend(path[-1].users)
    return path if path[-1] is last else path[:1]


def _hand_out(graph: fx.Graph, bodies: list[fx.Node], others: list[fx.Node]) -> None:
    """Let ``graph`` return (its output, [attention of each body], *others)."""
    attentions = []
    for body in bodies:
        with graph.inserting_after(body):
            attentions.append(graph.call_function(channel_attention, (body,)))
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    output.args = ((output.args[0], attentions, *others),)
    graph.lint()
