"""A network as a torch.fx graph in which each convolution, linear layer and ReLU is one node."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from dfqlib.errors import UserError
from dfqlib.quantizers.layers import FakeQuantize, QuantConv2d, QuantLinear

_QUANTIZED_KIND = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}
_WEIGHT_FUNCTIONS = {F.conv2d, torch.conv2d, F.linear}


def trace(model: nn.Module) -> fx.GraphModule:
    """A copy of ``model`` in eval mode as a torch.fx graph in which each Conv2d, Linear and ReLU is one node.

    Raises UserError naming the module or function that cannot be traced, or that would hide such a layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, (QuantConv2d, QuantLinear, FakeQuantize)):
            raise UserError(
                f"{type(model).__name__} is quantized already (at {name!r}); give the full-precision model."
            )
    tracer = _Tracer()
    copied = _copy_without_hooks(model).eval()
    try:
        graph = tracer.trace(copied)
    except Exception as error:  # whatever the model's own code raises when it meets a torch.fx proxy
        where = tracer.failed_in or f"forward of {type(model).__name__}"
        raise UserError(f"{type(model).__name__} cannot be traced by torch.fx: {where}: {error}") from error
    for node in graph.nodes:
        _refuse_hidden_layers(copied, node)
    return fx.GraphModule(copied, graph, class_name=type(model).__name__)


class _Tracer(fx.Tracer):
    """torch.fx's tracer, which also remembers the innermost module that failed."""

    failed_in = ""

    def call_module(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or f"module {self.path_of_module(module)!r} ({type(module).__name__})"
            raise


def _copy_without_hooks(model: nn.Module) -> nn.Module:
    """Deep copy of ``model``; hooks stay behind, as they would run on torch.fx's proxies and may hold live tensors."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [getattr(module, kind) for module in model.modules() for kind in kinds]
    return copy.deepcopy(model, {id(held): type(held)() for held in hooks})


def _refuse_hidden_layers(model: nn.Module, node: fx.Node) -> None:
    """UserError if ``node`` hides a convolution, a linear layer or a ReLU where it cannot be quantized."""
    network = type(model).__name__
    if node.op == "call_function" and node.target in _WEIGHT_FUNCTIONS:
        weights = ", ".join(repr(a.target) for a in node.all_input_nodes if a.op == "get_attr") or "a computed weight"
        raise UserError(f"{network} calls {node.target.__name__} on {weights}: only modules can be quantized.")
    if node.op == "get_attr":
        owner = node.target.rpartition(".")[0]
        if isinstance(model.get_submodule(owner), (nn.Conv2d, nn.Linear)):
            raise UserError(
                f"{network} reads {node.target!r} without calling {owner!r}, which then cannot be quantized."
            )
    if node.op != "call_module":
        return
    leaf = model.get_submodule(node.target)
    if isinstance(leaf, (nn.Conv2d, nn.Linear)) and type(leaf) not in _QUANTIZED_KIND:
        raise UserError(
            f"layer {node.target!r} is a {type(leaf).__name__}: only plain Conv2d and Linear can be quantized."
        )
    for name, inner in leaf.named_modules():
        if name and isinstance(inner, (nn.Conv2d, nn.Linear, nn.ReLU, nn.ReLU6)):
            raise UserError(
                f"{network} hides {name!r} inside module {node.target!r} ({type(leaf).__name__}), "
                "which torch.fx does not look into."
            )


def weight_layers(model: fx.GraphModule) -> list[str]:
    """Names of the Conv2d and Linear layers of a traced ``model``, each once, in the order they first run."""
    called = (node.target for node in model.graph.nodes if node.op == "call_module")
    return [n for n in dict.fromkeys(called) if isinstance(model.get_submodule(n), (nn.Conv2d, nn.Linear))]
