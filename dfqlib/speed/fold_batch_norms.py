"""Batch norms of a frozen network folded into its convolutions, with their input statistics still available.

A batch norm's output is an affine map of its input, so the input's mean and variance follow from the output's.
"""

import operator
from collections import Counter

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dfqlib.errors import UserError
from dfqlib.quantizers.sites import ARITHMETIC, overwrites
from dfqlib.quantizers.trace import trace

# Below this fraction of its shift, a gain leaves too few digits to recover the batch norm's input.
SMALLEST_GAIN = 1e-3


class FoldedNorm(nn.Module):
    """The identity in place of a folded batch norm, whose running statistics (C,) and affine map it holds.

    The map is ``gain`` x + ``shift`` (C,).
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
    """Mean and variance (..., C) of the input of ``gain`` x + ``shift`` (C,), from those of its output."""
    return (mean - shift) / gain, variance / gain.square()


@torch.no_grad()
def fold_batch_norms(network: nn.Module) -> nn.Module:
    """A frozen copy of ``network`` in eval mode in which each batch norm right after a convolution is folded into it.

    Logits and batch-norm statistics are the same up to rounding. A batch norm is kept where the convolution's output is
    used elsewhere too, or where a gain is so small that the input cannot be recovered from the output. A network that
    torch.fx cannot trace, or that overwrites its tensors in a way not known here, is returned unchanged.
    """
    try:
        folded = trace(network)
    except UserError:
        return network
    if not _keep_tensors(folded):
        return network
    calls = Counter(node.target for node in folded.graph.nodes)
    for node in folded.graph.nodes:
        module = folded.get_submodule(node.target) if node.op == "call_module" else None
        source = next(iter(node.all_input_nodes), None)
        if follows_alone(folded, node, calls) and _is_invertible(module):
            folded.set_submodule(source.target, fuse_conv_bn_eval(folded.get_submodule(source.target), module))
            folded.set_submodule(node.target, FoldedNorm(module))
        elif isinstance(module, nn.ReLU) and calls[node.target] == 1:
            # It may overwrite the sum of a residual unit that nothing else reads: the same numbers in less memory.
            module.inplace = source.target in (operator.add, torch.add) and len(source.users) == 1
    return folded.requires_grad_(False)


def _is_invertible(norm: nn.BatchNorm2d) -> bool:
    """Whether the input of ``norm`` follows from its output; the square of a dead channel's gain, 1e-24, would be 0."""
    return bool((norm.weight.abs() > SMALLEST_GAIN * norm.bias.abs().clamp(min=1e-6)).all())


def _keep_tensors(network: fx.GraphModule) -> bool:
    """Make in-place operations of ``network`` out-of-place, so that no batch norm's output is overwritten.

    False if an operation has no known out-of-place form.
    """
    for module in network.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    for node in network.graph.nodes:
        if (name := getattr(node.target, "__name__", "")) in ARITHMETIC:
            node.target = getattr(operator, ARITHMETIC[name])
        if node.op == "call_function" and "inplace" in node.kwargs:
            node.update_kwarg("inplace", False)
        if overwrites(network, node):
            return False
    network.recompile()
    return True


def follows_alone(network: fx.GraphModule, node: fx.Node, calls: Counter[object]) -> bool:
    """Whether ``node`` is a batch norm, called once, after a convolution that is called once and only for it.

    ``calls`` counts the targets of the graph's nodes.
    """
    norm = network.get_submodule(node.target) if node.op == "call_module" else None
    if not isinstance(norm, nn.BatchNorm2d) or norm.bias is None or norm.running_mean is None:
        return False
    (source,) = node.all_input_nodes
    alone = source.op == "call_module" and len(source.users) == calls[source.target] == calls[node.target] == 1
    return alone and isinstance(network.get_submodule(source.target), nn.Conv2d)
