"""Turn a trained network into its quantized student, and describe what came out."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd
import torch
from torch import fx, nn
from torch.nn import functional as F

from dfqlib.errors import UserError, check_bits, check_choice
from dfqlib.quantizer import OBSERVERS, FakeQuantize, QuantConv2d, QuantLinear, RunningMinMax

Bits = int | None | Mapping[str, int | None]

_QUANTIZED_KIND = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}
_RELU_FUNCTIONS = {F.relu, F.relu_, F.relu6, torch.relu, torch.relu_}
_RELU_METHODS = {"relu", "relu_"}
_ALWAYS_INPLACE = {F.relu_, torch.relu_, "relu_"}
_WEIGHT_FUNCTIONS = {F.conv2d, torch.conv2d, F.linear}


def quantize_model(
    model: nn.Module,
    weight_bits: Bits,
    activation_bits: Bits,
    observer: str | Callable[[], RunningMinMax] = "moving_average",
) -> fx.GraphModule:
    """A quantized copy of ``model`` to calibrate or fine-tune; ``model`` itself and its hooks are left as they are.

    Every Conv2d and Linear, first and last included, becomes a layer that fake-quantizes its weight per output channel;
    after every ReLU and ReLU6, and nowhere else, stands a :class:`FakeQuantize` with an observer of its own, also where
    one ReLU module is called at several places or a function does the work. So the input, linear bottlenecks and pooled
    features stay in float, as in the papers' code. The copy is in eval mode (batch-norm statistics frozen) and all its
    parameters train. Its activation ranges must be learned before use: ``with observing(student): student(images)``.

    weight_bits, activation_bits: 2 to 8; None or 32 leaves float; or a mapping with one of these for every layer, named
    as :func:`describe` names them. observer: a name in ``OBSERVERS`` or a function that makes one.
    Raises UserError for other bits, missing or unknown layers, and a model that torch.fx cannot trace, naming the part.
    """
    make_observer = OBSERVERS[check_choice("observer", observer, OBSERVERS)] if isinstance(observer, str) else observer
    student = trace(model)
    for name, bits in _bits_by_name("weight_bits", weight_bits, weight_layers(student)).items():
        layer = student.get_submodule(name)
        student.add_submodule(name, _QUANTIZED_KIND[type(layer)](layer, bits))
    sites = _relu_sites(student)
    for site, bits in _bits_by_name("activation_bits", activation_bits, list(sites)).items():
        if bits is not None:
            _insert_after(student, sites[site], FakeQuantize(bits, make_observer(), site))
    student.graph.lint()
    student.recompile()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return student.to(device).eval().requires_grad_(True)


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


def _relu_sites(model: fx.GraphModule) -> dict[str, fx.Node]:
    """Every call of a ReLU or ReLU6, named by its module, or "<module>.relu" for a function called inside of one."""
    sites: dict[str, fx.Node] = {}
    seen: Counter[str] = Counter()
    for node in model.graph.nodes:
        is_module = node.op == "call_module" and isinstance(model.get_submodule(node.target), (nn.ReLU, nn.ReLU6))
        is_function = node.op == "call_function" and node.target in _RELU_FUNCTIONS
        if is_module:
            name = node.target
        elif is_function or (node.op == "call_method" and node.target in _RELU_METHODS):
            inside = list(node.meta.get("nn_module_stack", ()))
            name = f"{inside[-1]}.relu" if inside else "relu"
        else:
            continue
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
    if _is_inplace(model, relu):
        # Code that goes on with the tensor it gave to an in-place ReLU reads the ReLU's output under another name.
        given = relu.all_input_nodes[0]
        for user in list(given.users):
            if order[user] > order[relu]:
                user.replace_input_with(given, quantized)


def _is_inplace(model: fx.GraphModule, relu: fx.Node) -> bool:
    if relu.op == "call_module":
        return model.get_submodule(relu.target).inplace
    return relu.target in _ALWAYS_INPLACE or bool(relu.kwargs.get("inplace", relu.args[1:] == (True,)))


def _bits_by_name(parameter: str, bits: Bits, names: list[str]) -> dict[str, int | None]:
    """One bit width, or None for float, for each of ``names``."""
    if not isinstance(bits, Mapping):
        return dict.fromkeys(names, _bits_or_float(parameter, bits))
    for name in bits:
        check_choice(f"layer in {parameter}", name, names)
    missing = [name for name in names if name not in bits]
    if missing:
        raise UserError(f"{parameter} gives no bit width for layer {missing[0]!r} ({len(missing)} missing).")
    return {name: _bits_or_float(f"{parameter}[{name!r}]", bits[name]) for name in names}


def _bits_or_float(parameter: str, bits: int | None) -> int | None:
    return None if bits is None or bits == 32 else check_bits(parameter, bits)


def set_observing(student: nn.Module, on: bool) -> None:
    """Let the observers of ``student`` update their ranges at each forward, or stand still."""
    for module in student.modules():
        if isinstance(module, FakeQuantize):
            module.observing = on


@contextlib.contextmanager
def observing(student: nn.Module) -> Iterator[None]:
    """Inside, each forward of ``student`` updates its activation ranges."""
    set_observing(student, True)
    try:
        yield
    finally:
        set_observing(student, False)


def weight_bytes(weight: torch.Tensor, bits: int | None) -> int:
    """Bytes of ``weight`` packed at ``bits`` each, rounded up; None: as it is. Its ranges are not counted."""
    return weight.numel() * weight.element_size() if bits is None else -(-weight.numel() * bits // 8)


def model_bytes(model: nn.Module) -> int:
    """Bytes to store ``model``: quantized weights at their width, all else (biases, batch norm) as it is in memory.

    As in the papers' tables, the ranges of the quantizers are not counted.
    """
    bits = {id(m.weight): m.weight_bits for m in model.modules() if isinstance(m, (QuantConv2d, QuantLinear))}
    observed = {id(b) for m in model.modules() if isinstance(m, RunningMinMax) for b in m.buffers()}
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and id(t) not in observed]
    return sum(weight_bytes(t, bits.get(id(t))) for t in tensors)


def describe(student: fx.GraphModule) -> pd.DataFrame:
    """What is quantized, and how: a row per layer and activation in the order they run, then the rest and the total.

    Columns: layer (as the bit-width mappings name it), kind, weight_bits (32: float), activation_bits (activations in
    float have no row), low, high (of the weight over all channels, or the activation range), bytes, float_bytes (in
    full precision).
    """
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(node.target for node in student.graph.nodes if node.op == "call_module"):
        module = student.get_submodule(name)
        if isinstance(module, (QuantConv2d, QuantLinear)):
            low, high = module.weight.detach().aminmax()
            row = {
                "layer": name,
                "kind": _kind(module),
                "weight_bits": module.weight_bits or 32,
                "bytes": weight_bytes(module.weight, module.weight_bits),
                "float_bytes": weight_bytes(module.weight, None),
            }
        elif isinstance(module, FakeQuantize):
            low, high = module.observer.low, module.observer.high
            row = {"layer": module.name, "kind": "relu", "activation_bits": module.bits, "bytes": 0, "float_bytes": 0}
        else:
            continue
        rows.append({**row, "low": low.item(), "high": high.item()})
    size, weights = model_bytes(student), sum(row["bytes"] for row in rows)
    float_size = size - weights + sum(row["float_bytes"] for row in rows)
    rows.append({"kind": "biases, batch norm", "bytes": size - weights, "float_bytes": size - weights})
    rows.append({"kind": "total", "bytes": size, "float_bytes": float_size})
    columns = ["layer", "kind", "weight_bits", "activation_bits", "low", "high", "bytes", "float_bytes"]
    table = pd.DataFrame(rows, columns=columns).fillna({"layer": ""})
    return table.astype({"weight_bits": "Int64", "activation_bits": "Int64"})


def _kind(layer: QuantConv2d | QuantLinear) -> str:
    if isinstance(layer, QuantLinear):
        return "linear"
    if layer.groups == 1:
        return "conv"
    return "depthwise conv" if layer.groups == layer.in_channels else "grouped conv"
