"""A network as a torch.fx graph in which each convolution, linear layer and ReLU is one node."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from dfqlib.errors import UserError
from dfqlib.quantizers.layers import QUANTIZED, FakeQuantize, QuantizedLayer

_WEIGHT_LAYERS = tuple(QUANTIZED)
_WEIGHT_FUNCTIONS = F.conv2d, torch.conv2d, F.linear


def trace(model: nn.Module) -> fx.GraphModule:
    """A copy of ``model`` in eval mode as a torch.fx graph in which each Conv2d, Linear and ReLU is one node.

    Raises UserError naming the module or function that cannot be traced, or that would hide such a layer.
    """
    network = type(model).__name__
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedLayer, FakeQuantize)):
            raise UserError(f"{network} is already quantized (at {name!r}); pass the full-precision model.")
    # Hooks would run on torch.fx's proxies, and may hold tensors that cannot be copied.
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [getattr(module, kind) for module in model.modules() for kind in kinds]
    copied, tracer = copy.deepcopy(model, {id(held): type(held)() for held in hooks}).eval(), _Tracer()
    try:
        graph = tracer.trace(copied)
    except Exception as error:  # whatever the model's own code raises when it meets a torch.fx proxy
        where = tracer.failed_in or f"forward of {network}"
        raise UserError(f"{network} cannot be traced by torch.fx: {where}: {error}") from error
    for node in graph.nodes:
        _refuse_hidden_layers(copied, node)
    return fx.GraphModule(copied, graph, class_name=network)


def weight_layers(model: fx.GraphModule) -> list[str]:
    """Names of the Conv2d and Linear layers of a traced ``model``, each once, in the order they first run."""
    called = (node.target for node in model.graph.nodes if node.op == "call_module")
    return [name for name in dict.fromkeys(called) if isinstance(model.get_submodule(name), _WEIGHT_LAYERS)]


class _Tracer(fx.Tracer):
    """torch.fx's tracer, which also remembers the innermost module that failed."""

    failed_in = ""

    def call_module(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or f"module {self.path_of_module(module)!r} ({type(module).__name__})"
            raise


def _refuse_hidden_layers(model: nn.Module, node: fx.Node) -> None:
    """UserError if ``node`` hides a convolution, a linear layer or a ReLU where it cannot be quantized."""
    network, target = type(model).__name__, node.target
    if node.op == "call_function" and target in _WEIGHT_FUNCTIONS:
        weights = ", ".join(repr(a.target) for a in node.all_input_nodes if a.op == "get_attr") or "a computed weight"
        raise UserError(f"{network} calls {target.__name__} on {weights}: only modules can be quantized.")
    if node.op == "get_attr" and isinstance(model.get_submodule(owner := target.rpartition(".")[0]), _WEIGHT_LAYERS):
        raise UserError(f"{network} reads {target!r} without calling {owner!r}: it cannot be quantized.")
    if node.op != "call_module":
        return
    leaf = model.get_submodule(target)
    kind = type(leaf).__name__
    if isinstance(leaf, _WEIGHT_LAYERS) and type(leaf) not in _WEIGHT_LAYERS:
        raise UserError(f"layer {target!r} is a {kind}: only plain Conv2d and Linear can be quantized.")
    for name, inner in leaf.named_modules():
        if name and isinstance(inner, (*_WEIGHT_LAYERS, nn.ReLU, nn.ReLU6)):
            raise UserError(f"{network} hides {name!r} inside module {target!r} ({kind}), which is not traced.")
