"""A network as a torch.fx graph in which each layer with weights, each batch norm and each ReLU is one node."""

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqlib.errors import UserError
from dfqlib.models.plain_copy import plain_copy
from dfqlib.quantizers.layers import QUANTIZED, FakeQuantize, QuantizedLayer
from dfqlib.quantizers.sites import is_layer, overwrites

WEIGHT_LAYERS = tuple(QUANTIZED)

_CONVOLUTION = "input", "weight", "bias", "stride", "padding", "dilation", "groups"
_TRANSPOSED = "input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"
_FUNCTIONAL_NORM = "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"
_TORCH_NORM = "input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled"
_PRODUCT = "input", "other"
# What computes the same as a layer, and the names of its arguments.
_Layers = dict[Any, tuple[type[nn.Module], tuple[str, ...]]]
_WEIGHT_FUNCTIONS: _Layers = {
    F.conv1d: (nn.Conv1d, _CONVOLUTION),
    F.conv2d: (nn.Conv2d, _CONVOLUTION),
    F.conv3d: (nn.Conv3d, _CONVOLUTION),
    F.conv_transpose1d: (nn.ConvTranspose1d, _TRANSPOSED),
    F.conv_transpose2d: (nn.ConvTranspose2d, _TRANSPOSED),
    F.conv_transpose3d: (nn.ConvTranspose3d, _TRANSPOSED),
    F.linear: (nn.Linear, ("input", "weight", "bias")),
}
_FUNCTIONS: _Layers = {
    **_WEIGHT_FUNCTIONS,
    F.batch_norm: (nn.BatchNorm2d, _FUNCTIONAL_NORM),
    torch.batch_norm: (nn.BatchNorm2d, _TORCH_NORM),
    **dict.fromkeys((operator.matmul, torch.matmul, "matmul"), (nn.Linear, _PRODUCT)),
}
# Of sizes, which are as they were; their nodes would count as uses of a layer's output.
_CHECKS = {torch._assert, getattr, "size", "dim", *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt)}
_SCALES = nn.LayerNorm, nn.RMSNorm  # whose weights scale elementwise: no bit width is for them


def trace(model: nn.Module, images: Tensor | None = None) -> fx.GraphModule:
    """A copy of ``model`` in eval mode as a torch.fx graph in which each layer, batch norm and ReLU is one node.

    Functions on constant weights (F.conv2d, F.batch_norm, x @ weight, also on a weight computed from parameters) become
    the layers they compute. With ``images`` (B, C, H, W), what depends on sizes is settled for images of that size, in
    batches of any length. Raises UserError naming the module or function that cannot be traced, or that would hide a
    layer.
    """
    network = type(model).__name__
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedLayer, FakeQuantize)):
            raise UserError(f"{network} is already quantized (at {name!r}); pass the full-precision model.")
    if (dtype := next((p.dtype for p in model.parameters()), None)) in (torch.float16, torch.bfloat16):
        raise UserError(f"{network} has weights of {dtype}, too coarse to compute ranges with; pass {network}.float().")
    copied, tracer = plain_copy(model), _Tracer(images)
    kind = type(copied)
    # Options of a network, such as masks, are no inputs: their defaults hold.
    if len(inspect.signature(kind.forward).parameters) > 2:
        copied.__class__ = type(network, (kind,), {"forward": lambda self, images: kind.forward(self, images)})
    try:
        # A graph that is there knows which module each of its calls was made in.
        graph = copied.graph if isinstance(copied, fx.GraphModule) else tracer.trace(copied)
    except Exception as error:  # whatever the model's own code raises when it meets a torch.fx proxy
        where = tracer.failed_in or f"forward of {network}"
        raise UserError(f"{network} cannot be traced by torch.fx: {where}: {error}") from error
    traced = _with_layers(fx.GraphModule(copied, graph, class_name=network), copied)
    _read_results(traced)
    _refuse_hidden_layers(traced, copied)
    return traced


def weight_layers(model: fx.GraphModule) -> list[str]:
    """Names of the layers with weights of a traced ``model``, each once, in the order they first run."""
    return list(dict.fromkeys(node.target for node in model.graph.nodes if is_layer(model, node)))


def norm_name(running_mean: str) -> str:
    """The name of the batch norm whose statistics are in the buffer ``running_mean``: its module's, if it has one."""
    owner, _, attribute = running_mean.rpartition(".")
    return owner if owner and attribute == "running_mean" else running_mean


class _Sized(fx.Proxy):
    """A proxy that knows the tensor it stands for: all sizes but that of the batch are numbers."""

    tracer: "_Tracer"

    @property
    def shape(self) -> tuple[Any, ...]:
        sizes = self.tracer.values[self.node].shape
        return (self.tracer.create_proxy("call_method", "size", (self, 0), {}), *sizes[1:]) if sizes else ()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def device(self) -> fx.proxy.Attribute:
        return _Device(self, "device")

    def dim(self) -> int:
        return self.tracer.values[self.node].dim()

    @property
    def ndim(self) -> int:
        return self.dim()

    def __index__(self) -> int:
        return int(self.tracer.settled(self.node))

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.tracer.settled(self.node))


class _Device(fx.proxy.Attribute):
    """The device of a proxy, which is asked for at each call; its type, which torch.autocast wants, is known."""

    root: _Sized

    @property
    def type(self) -> str:
        return self.root.tracer.values[self.root.node].device.type


class _Tracer(fx.Tracer):
    """torch.fx's tracer, which also remembers the innermost module that failed.

    With ``images``, it computes every node, so that the network's code can ask for sizes and branch on them, though not
    on what depends on the images' values.
    """

    def __init__(self, images: Tensor | None) -> None:
        super().__init__()
        self.failed_in, self.images, self.computing = "", images, False
        self.values: dict[fx.Node, Any] = {}

    def call_module(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if self.computing:
            return forward(*args, **kwargs)
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or f"module {self.path_of_module(module)!r} ({type(module).__name__})"
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *parts: Any, **named: Any) -> fx.Node:
        node = super().create_node(*parts, **named)
        if self.images is not None:
            run = fx.Interpreter(self.root, garbage_collect_values=False, graph=self.graph)
            run.env, run.args_iter, self.computing = self.values, iter([self.images]), True
            try:
                with torch.no_grad():
                    self.values[node] = value = run.run_node(node)
            finally:
                self.computing = False
            node.meta["dims"] = value.dim() if isinstance(value, Tensor) else None
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return super().proxy(node) if self.images is None else _Sized(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return super().to_bool(obj) if self.images is None else bool(self.settled(obj.node))

    def settled(self, node: fx.Node) -> Any:
        """The value of ``node``; an error if other images of the same size might have another one."""

        def is_of_pixels(node: fx.Node) -> bool:
            if isinstance(self.values[node], Tensor):
                return True
            return node.target not in ("size", "dim", "numel", getattr) and any(map(is_of_pixels, node.all_input_nodes))

        if is_of_pixels(node):
            raise ValueError("its code decides by the values of the images, not by their size")
        return self.values[node]

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return super().iter(obj) if self.images is None else iter([obj[i] for i in range(len(self.values[obj.node]))])


def _with_layers(model: fx.GraphModule, origin: nn.Module) -> fx.GraphModule:
    """``model`` with a layer in place of each function in ``_FUNCTIONS`` whose weights do not depend on its input.

    ``origin`` is the network it is the graph of.
    """
    run = fx.Interpreter(model, garbage_collect_values=False)
    known: dict[fx.Node, Any] = {}  # what is computed from parameters alone
    run.env = known
    layers: dict[str, nn.Module] = {}
    called = {node.target for node in model.graph.nodes if node.op == "call_module"}
    for node in list(model.graph.nodes):
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (node.op.startswith("call_") and inputs and known.keys() >= set(inputs)):
            with torch.no_grad():
                known[node] = run.run_node(node)
            continue
        kind, names = _FUNCTIONS.get(node.target if node.op != "call_module" else None, (None, ()))
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        x = given.pop("input", None)
        nodes = {key: value for key, value in given.items() if isinstance(value, fx.Node)}
        if not kind or x in known or not known.keys() >= set(nodes.values()):
            continue
        layer = _layer(kind, given | {key: known[value] for key, value in nodes.items()}, x.meta.get("dims"))
        if layer is None:
            continue
        name = _layer_name(origin, node, nodes)
        if name in called or (name in layers and not _same(layers[name], layer)):
            name = f"{name}_{node.name}"
        layers.setdefault(name, layer)
        with model.graph.inserting_before(node):
            call = model.graph.create_node("call_module", name, (x,))
        call.meta = node.meta
        node.replace_all_uses_with(call)
        model.graph.erase_node(node)
    for node in reversed(model.graph.nodes):
        if not node.users and (node in known or node.target in _CHECKS):
            model.graph.erase_node(node)
    if not layers:
        model.recompile()
        return model
    parts = dict(layers)
    for node in model.graph.nodes:
        if node.op in ("call_module", "get_attr") and node.target not in layers:
            part, owner = operator.attrgetter(node.target)(model), node.target.rpartition(".")[0]
            if owner in layers:  # is one layer now, and may be replaced: an activation inside of it stands beside it
                node.target = "_".join(node.target.rsplit(".", 1))
            parts[node.target] = part
    # A second time, since of a dictionary torch.fx makes modules in no order of execution.
    return fx.GraphModule(fx.GraphModule(parts, model.graph), model.graph, type(model).__name__).eval()


def _read_results(model: fx.GraphModule) -> None:
    """Let all that reads a tensor after an operation wrote into it read that operation's result, which is the same."""
    order = {node: i for i, node in enumerate(model.graph.nodes)}
    for node in model.graph.nodes:
        if overwrites(model, node):
            given = node.all_input_nodes[0]
            given.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: order[user] > order[node])
    model.recompile()


def _layer(kind: type[nn.Module], given: dict[str, Any], dims: int | None) -> nn.Module | None:
    """The layer of the class ``kind`` that computes with the arguments ``given``; None if there is none."""
    weight, bias = given.get("weight"), given.get("bias")
    if kind is nn.BatchNorm2d:
        mean, variance = given["running_mean"], given["running_var"]
        if mean is None or given.get("training"):
            return None
        kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 5: nn.BatchNorm3d}.get(dims, nn.BatchNorm2d)
        layer = kind(len(mean), given.get("eps", 1e-5), device="meta")
        layer.running_mean, layer.running_var, layer.num_batches_tracked = mean, variance, None
        weight = torch.ones_like(mean) if weight is None else weight
        bias = torch.zeros_like(mean) if bias is None else bias
    elif kind is nn.Linear:
        weight = given["other"].T if "other" in given else weight
        if weight.dim() != 2:
            return None
        layer = nn.Linear(*reversed(weight.shape), device="meta")
    else:
        options = {key: value for key, value in given.items() if key not in ("weight", "bias")}
        grouped = weight.shape[1] * options.get("groups", 1)
        channels = grouped, weight.shape[0]
        if issubclass(kind, nn.modules.conv._ConvTransposeNd):
            channels = weight.shape[0], grouped
        layer = kind(*channels, tuple(weight.shape[2:]), **options, device="meta")
    for name, value in (("weight", weight), ("bias", bias)):
        kept = value is None or isinstance(value, nn.Parameter)
        setattr(layer, name, value if kept else nn.Parameter(value.detach(), requires_grad=False))
    return layer


def _layer_name(origin: nn.Module, node: fx.Node, weights: dict[str, fx.Node]) -> str:
    """What to call the layer that ``node`` computes: the module of ``origin`` that has its weights, if there is one."""
    inside = next((path for path, _ in reversed(node.meta.get("nn_module_stack", {}).values())), "")
    if inside and isinstance(origin.get_submodule(inside), WEIGHT_LAYERS):
        return inside
    source = next((weights[key] for key in ("running_mean", "weight", "other") if key in weights), node)
    if source.op != "get_attr":
        return f"{inside}.{node.name}".lstrip(".")
    return norm_name(source.target) if "running_mean" in weights else source.target.removesuffix(".weight")


def _same(layer: nn.Module, other: nn.Module) -> bool:
    tensors = zip(layer.state_dict().values(), other.state_dict().values(), strict=False)
    return repr(layer) == repr(other) and all(torch.equal(*pair) for pair in tensors)


def _refuse_hidden_layers(model: fx.GraphModule, origin: nn.Module) -> None:
    """UserError if ``model``, the graph of ``origin``, hides a layer or a ReLU where it cannot be quantized."""
    network = type(model).__name__
    for node in model.graph.nodes:
        target, owner = node.target, str(node.target).rpartition(".")[0]
        if node.op == "call_function" and target in _WEIGHT_FUNCTIONS:
            raise UserError(
                f"{network} calls {target.__name__} on weights that depend on its input: no range is theirs."
            )
        computes = any(user.target is not getattr for user in node.users)  # with its values, not with its device
        if node.op == "get_attr" and computes and isinstance(origin.get_submodule(owner), WEIGHT_LAYERS):
            raise UserError(f"{network} reads {target!r} without calling {owner!r}: it cannot be quantized.")
        if node.op != "call_module":
            continue
        leaf = model.get_submodule(target)
        kind = type(leaf).__name__
        if isinstance(leaf, WEIGHT_LAYERS) and type(leaf) not in QUANTIZED:
            told = f"{network} has a {type(leaf).__module__}.{kind} at {target!r}, which is no layer of torch.nn"
            raise UserError(f"{told}; pass the network as it was before it was prepared for quantization.")
        for name, inner in leaf.named_modules():
            if name and isinstance(inner, (*WEIGHT_LAYERS, nn.ReLU, nn.ReLU6)):
                raise UserError(f"{network} hides {name!r} inside module {target!r} ({kind}), which is not traced.")
        if not isinstance(leaf, (*WEIGHT_LAYERS, *_SCALES)) and any(each.dim() > 1 for each in leaf.parameters()):
            raise UserError(f"{network} has weights in {target!r} ({kind}), which cannot be quantized.")
