"""A frozen network with its batch norms folded into its convolutions: the same function, and still the statistics.

Methods that synthesise images compare what enters each batch norm with the statistics that it keeps. In a folded
network only what leaves it is computed; as that is an affine map of what enters, so are its mean and variance.
"""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dfqlib.errors import UserError
from dfqlib.quantizers.trace import trace

# Below this share of its shift a gain leaves too few digits of what entered the batch norm.
SMALLEST_GAIN = 1e-3


class FoldedNorm(nn.Module):
    """In the place of a batch norm that was folded into the convolution before it: hands on what it is given.

    Holds the statistics (C,) that the batch norm keeps, and the affine map ``gain`` x + ``shift`` (C,) that it was.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        gain = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
        self.eps = norm.eps
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.register_buffer("gain", gain)
        self.register_buffer("shift", norm.bias.detach() - gain * norm.running_mean)

    def forward(self, input: Tensor) -> Tensor:  # named as a batch norm's, for calls by name
        return input


def undo_affine_statistics(mean: Tensor, variance: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (..., C) of what enters the map ``gain`` x + ``shift`` (C,), from those of what leaves it."""
    return (mean - shift) / gain, variance / gain.square()


@torch.no_grad()
def fold_batch_norms(network: nn.Module) -> nn.Module:
    """A copy of ``network`` in eval mode in which each batch norm right behind a convolution is folded into it.

    Logits and batch-norm statistics are the same up to rounding; the copy's weights are frozen. A batch norm stays as
    it is where the convolution's output is used elsewhere too, or where a gain is 0 or so small that what entered could
    not be told from what left. A network that torch.fx cannot trace, or that writes over its own tensors in a way not
    known here, is returned as it is.
    """
    try:
        folded = trace(network)
    except UserError:
        return network
    if not _keep_tensors(folded):
        return network
    calls = Counter(node.target for node in folded.graph.nodes)
    for node in folded.graph.nodes:
        if not _may_fold(folded, node, calls):
            continue
        (source,) = node.all_input_nodes
        convolution, norm = folded.get_submodule(source.target), folded.get_submodule(node.target)
        folded.set_submodule(source.target, fuse_conv_bn_eval(convolution, norm))
        folded.set_submodule(node.target, FoldedNorm(norm))
    _overwrite_sums(folded, calls)
    return folded.requires_grad_(False)


def _keep_tensors(network: fx.GraphModule) -> bool:
    """Let no part of ``network`` write over what left a batch norm; False if a part cannot be kept from it."""
    for module in network.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    for node in network.graph.nodes:
        if node.target is operator.iadd:
            node.target = operator.add
        if node.op == "call_function" and "inplace" in node.kwargs:
            node.update_kwarg("inplace", False)
        name = getattr(node.target, "__name__", str(node.target))
        if node.op in ("call_function", "call_method") and name.endswith("_") and not name.endswith("__"):
            return False
    network.recompile()
    return True


def _overwrite_sums(network: fx.GraphModule, calls: Counter[object]) -> None:
    """Let a ReLU write over the sum of a residual unit that nothing else reads: the same numbers in less memory."""
    for node in network.graph.nodes:
        module = network.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.ReLU) and calls[node.target] == 1:
            (source,) = node.all_input_nodes
            module.inplace = source.target in (operator.add, torch.add) and len(source.users) == 1


def _may_fold(network: fx.GraphModule, node: fx.Node, calls: Counter[str]) -> bool:
    """Whether ``node`` is a batch norm behind a convolution of its own, with gains that leave enough digits."""
    if not follows_alone(network, node, calls):
        return False
    norm = network.get_submodule(node.target)
    return bool((norm.weight.abs() > SMALLEST_GAIN * norm.bias.abs()).all())


def follows_alone(network: fx.GraphModule, node: fx.Node, calls: Counter[object]) -> bool:
    """Whether ``node`` is a batch norm, called once, behind a convolution that is called once and for it alone.

    ``calls`` counts the targets of the graph's nodes.
    """
    norm = network.get_submodule(node.target) if node.op == "call_module" else None
    if not isinstance(norm, nn.BatchNorm2d) or not norm.affine or norm.running_mean is None:
        return False
    (source,) = node.all_input_nodes
    return (
        source.op == "call_module"
        and isinstance(network.get_submodule(source.target), nn.Conv2d)
        and len(source.users) == calls[source.target] == calls[node.target] == 1
    )
