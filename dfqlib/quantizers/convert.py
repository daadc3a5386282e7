"""Turn a trained network into its quantized student."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import fx, nn
from torch.nn import functional as F

from dfqlib.bits import BitWidths, Width
from dfqlib.errors import UserError, check_choice
from dfqlib.quantizers.layers import FakeQuantize, QuantConv2d, QuantLinear
from dfqlib.quantizers.observers import OBSERVERS, RunningMinMax
from dfqlib.quantizers.trace import trace, weight_layers

_RELUS = {F.relu, F.relu_, F.relu6, torch.relu, torch.relu_, "relu", "relu_"}  # functions, and methods of a tensor
_ALWAYS_INPLACE = {F.relu_, torch.relu_, "relu_"}


def quantize_model(
    model: nn.Module, bits: BitWidths, observer: str | Callable[[], RunningMinMax] = "moving_average"
) -> fx.GraphModule:
    """A quantized copy of ``model`` to calibrate or fine-tune; ``model`` and its hooks are left as they are.

    Every Conv2d and Linear, first and last included, becomes a layer that fake-quantizes its weight per output channel.
    A :class:`FakeQuantize` with an observer of its own follows each call of a ReLU or ReLU6, whether module or
    function, and nothing else: the input, linear bottlenecks and pooled features stay in float, as in the papers' code.
    The copy is in eval mode (batch-norm statistics frozen) and all its parameters require gradients. Activation ranges
    must be learned before use: ``with observing(student): student(images)``.

    bits: for all layers, or by layer. observer: a name in ``OBSERVERS`` or a function that makes one.
    Raises UserError for missing or unknown layers, and for a model that torch.fx cannot trace, naming the part.
    """
    make_observer = OBSERVERS[check_choice("observer", observer, OBSERVERS)] if isinstance(observer, str) else observer
    student = trace(model)
    for name, width in _by_name("weight", bits.weight, weight_layers(student)).items():
        layer = student.get_submodule(name)
        student.add_submodule(name, (QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear)(layer, width))
    sites = _relu_sites(student)
    for site, width in _by_name("activation", bits.activation, list(sites)).items():
        if width is not None:
            _insert_after(student, sites[site], FakeQuantize(width, make_observer(), site))
    student.graph.lint()
    student.recompile()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return student.to(device).eval().requires_grad_(True)


def is_relu(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` calls a ReLU or ReLU6, be it a module, a function or a tensor's method."""
    if node.op == "call_module":
        return isinstance(model.get_submodule(node.target), (nn.ReLU, nn.ReLU6))
    return node.op in ("call_function", "call_method") and node.target in _RELUS


def _relu_sites(model: fx.GraphModule) -> dict[str, fx.Node]:
    """Every call of a ReLU or ReLU6, named by its module, or "<module>.relu" for a function called inside of one."""
    sites: dict[str, fx.Node] = {}
    seen: Counter[str] = Counter()
    for node in filter(partial(is_relu, model), model.graph.nodes):
        inside = ".".join([*list(node.meta.get("nn_module_stack", ()))[-1:], "relu"])
        name = node.target if node.op == "call_module" else inside
        seen[name] += 1
        sites[name if seen[name] == 1 else f"{name}:{seen[name]}"] = node
    return sites


def _insert_after(model: fx.GraphModule, relu: fx.Node, quantizer: FakeQuantize) -> None:
    """Put ``quantizer`` between a ReLU and everything that uses its output."""
    target = f"fake_quantize.{relu.name}"
    model.add_submodule(target, quantizer)
    order = {node: i for i, node in enumerate(model.graph.nodes)}
    with model.graph.inserting_after(relu):
        quantized = model.graph.call_module(target, (relu,))
    relu.replace_all_uses_with(quantized, delete_user_cb=lambda user: user is not quantized)
    if relu.op == "call_module":
        inplace = model.get_submodule(relu.target).inplace
    else:
        inplace = relu.target in _ALWAYS_INPLACE or relu.kwargs.get("inplace", relu.args[1:] == (True,))
    if inplace:
        # Code that goes on to use the tensor it gave to an in-place ReLU reads the ReLU's output under another name.
        given = relu.all_input_nodes[0]
        for user in [user for user in given.users if order[user] > order[relu]]:
            user.replace_input_with(given, quantized)


def _by_name(parameter: str, widths: Width | Mapping[str, Width], names: list[str]) -> dict[str, Width]:
    """One bit width, or None for float, for each of ``names``."""
    if not isinstance(widths, Mapping):
        return dict.fromkeys(names, widths)
    for name in widths:
        check_choice(f"layer in {parameter} bits", name, names)
    if missing := [name for name in names if name not in widths]:
        raise UserError(f"{parameter} bits give no width for layer {missing[0]!r} ({len(missing)} missing).")
    return {name: widths[name] for name in names}
