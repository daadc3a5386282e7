"""What the alignment losses compare inside two networks, from one forward pass each."""

import copy
import operator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqlib.errors import UserError, check_choice
from dfqlib.finetuning.grad_cam import grad_cam
from dfqlib.models.batch_norm_statistics import sample_mean_square
from dfqlib.quantizers.layers import FakeQuantize, used_weight
from dfqlib.quantizers.sites import is_relu
from dfqlib.quantizers.trace import trace
from dfqlib.schedules import CAMS, SALIENCY_LAYERS
from dfqlib.speed.precision import full, run
from dfqlib.speed.scale_weights import scale_weights

Modules = dict[fx.Node, nn.Module | None]  # every node of a graph, in order of execution, and what it calls
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RESHAPES = {torch.flatten, "flatten", "view", "reshape", "squeeze", "contiguous"}


def channel_attention(features: Tensor) -> Tensor:
    """Each channel's share of the energy of ``features`` (B, C, h, w): (B, C), each row of length 1.

    The mean of the squares over space, normalised. Source: HAST, feature alignment.
    """
    return F.normalize(sample_mean_square(full(features)), dim=1)


@dataclass(frozen=True)
class Internals:
    """Logits (B, classes); one output (B, ...) per residual unit, and one attention (B, C) per unit of maps.

    Grad-CAM maps (B, H, W) if they were asked for.
    """

    logits: Tensor
    attentions: list[Tensor]
    outputs: list[Tensor]
    saliency: Tensor | None

    def detach(self) -> Self:
        attentions, outputs = ([tensor.detach() for tensor in part] for part in (self.attentions, self.outputs))
        saliency = None if self.saliency is None else self.saliency.detach()
        return Internals(self.logits.detach(), attentions, outputs, saliency)


class NetworkProbe:
    """Called with images (B, 3, H, W), returns the :class:`Internals` of ``network``, whose weights it shares.

    It runs the network's own layers by an extended torch.fx graph, so it needs no hooks and no second pass for the map.
    ``network`` is a teacher or a quantized student. ``layer`` is what Grad-CAM weighs: the ``"activations"`` that enter
    the last pooling, as in the papers; or, as in SaFT's released code, the raw output of the last ``"convolution"``,
    before its batch norm and the residual sum. Those maps show one branch only, and also its negative parts. A network
    that does not end in global pooling and a linear layer always gives maps of its last convolution.

    Maps are of each image's own top class; the channel weights carry no gradient, as usual for Grad-CAM. For the
    activations they are the last layer's weights, so no backward pass is needed (``closed_form``); ``autograd=True``
    computes the same maps without this shortcut. ``cam`` is as in :func:`grad_cam`. UserError if ``network`` cannot be
    traced, or if maps are asked for and it has no 2D convolution.
    """

    def __init__(
        self, network: nn.Module, layer: str = "activations", autograd: bool = False, cam: str = "gradcam"
    ) -> None:
        check_choice("layer", layer, SALIENCY_LAYERS)
        self.cam = check_choice("cam", cam, CAMS)
        traced = network if isinstance(network, fx.GraphModule) else trace(network)
        graph = copy.deepcopy(traced.graph)
        for node in graph.nodes:
            if node.target is operator.iadd:
                node.target = operator.add  # an addition in place would overwrite what the attention is computed from
        modules = {n: traced.get_submodule(n.target) if n.op == "call_module" else None for n in graph.nodes}
        bodies, units = _residual_units(traced, modules)
        pooled, classifier = _global_pooling_head(modules, graph.output_node())
        convolutions = [n for n, module in modules.items() if isinstance(module, nn.Conv2d) and n is not classifier]
        of_pooled = pooled is not None and layer == "activations"
        self.closed_form = of_pooled and not autograd
        self.classifier = modules.get(classifier)
        self.units = len(bodies)
        attentions = []
        for body in bodies:
            with graph.inserting_after(body):
                attentions.append(graph.call_function(_attention_of_maps, (body,)))
        features, seen = None, pooled if of_pooled else next(reversed(convolutions), None)
        if seen is not None:
            with graph.inserting_after(seen):  # the logits depend on what a map is the gradient by, in float32
                features = graph.call_function(full, (seen,))
            seen.replace_all_uses_with(features, delete_user_cb=lambda user: user is not features)
        output = graph.output_node()
        output.args = ((output.args[0], attentions, units, features),)
        graph.lint()
        self.module = scale_weights(fx.GraphModule(traced, graph))

    def __call__(self, images: Tensor, saliency: bool = False) -> Internals:
        """One forward pass; with ``saliency`` also the maps, which take a backward pass without the closed form."""
        by_autograd = saliency and not self.closed_form
        if by_autograd and not (torch.is_grad_enabled() and images.requires_grad):
            images = images.detach().requires_grad_()
        with torch.set_grad_enabled(by_autograd or torch.is_grad_enabled()):
            logits, attentions, outputs, features = run(self.module, images)
            if saliency and features is None:
                raise UserError("saliency=True: the network has no 2D convolution for Grad-CAM to look at.")
            size = tuple(images.shape[-2:])
            maps = grad_cam(features, self._gradient(logits, features), size, self.cam) if saliency else None
        # Sums of sizes, or of parameters alone, are no units.
        outputs = [each for each in outputs if isinstance(each, Tensor) and each.shape[:1] == images.shape[:1]]
        return Internals(logits, [each for each in attentions if each is not None], outputs, maps)

    def _gradient(self, logits: Tensor, features: Tensor) -> Tensor:
        """Of each image's highest logit with respect to ``features`` (B, C, h, w); (B, C, 1, 1) by the closed form."""
        top = logits.argmax(1)
        if not self.closed_form:
            return torch.autograd.grad(logits.gather(1, top[:, None]).sum(), features, retain_graph=True)[0]
        with torch.no_grad():
            return used_weight(self.classifier).flatten(1)[top][..., None, None] / features.shape[-2:].numel()


def _attention_of_maps(features: Any) -> Tensor | None:
    """:func:`channel_attention` of ``features`` (B, C, h, w); None of anything else, such as tokens (B, T, C)."""
    return channel_attention(features) if isinstance(features, Tensor) and features.dim() == 4 else None


def _residual_units(network: fx.GraphModule, modules: Modules) -> tuple[list[fx.Node], list[fx.Node]]:
    """The output of each residual unit's body, and of the unit, in order of execution.

    Of each sum, the deeper of the two summands, before the identity is added (HAST and SaFT align these); and the ReLU
    after the sum, or the sum where there is none.
    """
    depth: dict[fx.Node, int] = {}  # convolutions on the longest path to a node
    for node, module in modules.items():
        depth[node] = max((depth[each] for each in node.all_input_nodes), default=0) + isinstance(module, nn.Conv2d)
    sums = [node for node in modules if node.target in _ADDITIONS and len(node.all_input_nodes) == 2]
    bodies = [max(node.all_input_nodes, key=depth.__getitem__) for node in sums]
    quantized = {node: [user for user in node.users if isinstance(modules[user], FakeQuantize)] for node in sums}
    readers = {node: [user for each in (node, *quantized[node]) for user in each.users] for node in sums}
    return bodies, [next((user for user in readers[node] if is_relu(network, user)), node) for node in sums]


def _global_pooling_head(modules: Modules, output: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """(what is pooled, the classifier) of a network that ends in global pooling and a linear layer; else Nones."""
    node, classifier = output.all_input_nodes[0], None
    while node.all_input_nodes:
        module, (source, *_) = modules[node], node.all_input_nodes
        if classifier and _is_global_pool(modules, node, modules[classifier].weight.shape[1]):
            return source, classifier
        is_linear = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
        if classifier is None and is_linear:
            classifier = node
        elif not (node.target in _RESHAPES or isinstance(module, nn.Flatten | nn.Dropout | nn.Identity | FakeQuantize)):
            break
        node = source
    return None, None


def _is_global_pool(modules: Modules, node: fx.Node, features: int) -> bool:
    """Whether ``node`` gives the mean over all positions, one value per channel, to a layer of so many ``features``."""
    if node.target in (torch.mean, "mean"):
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return isinstance(dims, list | tuple) and {dim % 4 for dim in dims} == {2, 3}
    is_pool = isinstance(modules[node], nn.AvgPool2d | nn.AdaptiveAvgPool2d)
    # Means over parts of the positions would be more values than there are channels.
    return (is_pool or node.target is F.adaptive_avg_pool2d) and _channels(modules, node.all_input_nodes[0]) == features


def _channels(modules: Modules, node: fx.Node) -> int:
    """The number of channels at ``node``, from the batch norms or convolutions before it; 0 without one."""
    module = modules[node]
    if isinstance(module, nn.BatchNorm2d | nn.Conv2d):
        return module.num_features if isinstance(module, nn.BatchNorm2d) else module.out_channels
    sources = node.all_input_nodes if node.target is torch.cat else node.all_input_nodes[:1]
    return sum(_channels(modules, source) for source in sources)
