"""Where activations are quantized: the values of a traced network that need a quantizer, those that lie on a grid."""

import re
from collections import Counter

from torch import fx, nn

from dfqlib.quantizers.layers import QUANTIZED, FakeQuantize

NONLINEARITIES = {name.lower() for name in nn.modules.activation.__all__}
_CLIPS = {"relu", "relu6", "hardtanh", "clamp", "clip"}  # done by what computes their input, as it rounds its output
JOINING = {"cat", "concat", "concatenate", "stack"}
# What picks, moves or repeats values, or sets some to 0: its result lies on the grid of its input.
_KEEPING = JOINING | {
    *("relu", "identity", "dropout", "stochasticdepth", "clone", "detach", "contiguous", "to", "float"),
    *("chunk", "split", "tensorsplit", "unbind", "getitem", "select", "narrow", "roll", "flip", "expand", "repeat"),
    *("flatten", "unflatten", "view", "reshape", "squeeze", "unsqueeze", "permute", "transpose", "swapaxes", "movedim"),
    *("maxpool", "adaptivemaxpool", "amax", "pixelshuffle", "pixelunshuffle", "channelshuffle", "upsamplingnearest"),
    *("pad", "zeropad", "reflectionpad", "replicationpad"),
}
# What stays within the range of its input, on whose grid it is rounded again. Its own range, observed on synthetic
# images, would cut off those of test images, which reach further after the last pooling.
AVERAGING = {"avgpool", "adaptiveavgpool", "mean", "interpolate", "upsample", "upsamplingbilinear"}
_SIZES = {"size", "dim", "numel", "getattr", "gt", "lt", "ge", "le", "eq", "ne", "argmax"}
_BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
ARITHMETIC = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv"}  # in place


def operation(model: fx.GraphModule, node: fx.Node) -> str:
    """What ``node`` computes, in one word for modules, functions and methods alike: "relu6", "maxpool", "add"."""
    if node.op == "call_module":
        name = type(model.get_submodule(node.target)).__name__.removeprefix("Quant")
    elif node.op in ("call_function", "call_method"):
        name = getattr(node.target, "__name__", str(node.target)).replace("_", "")
    else:
        name = "input" if node.op == "placeholder" else node.op
    if name == "getattr" and node.args[1] == "values":
        name = "getitem"
    name = re.sub(r"\dd$", "", name.lower())
    return ARITHMETIC.get(name, name)


def overwrites(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` writes its result into its first input."""
    if node.op == "call_module":
        return getattr(model.get_submodule(node.target), "inplace", False)
    name = getattr(node.target, "__name__", str(node.target))
    named = (name.endswith("_") and not name.endswith("__")) or name in ARITHMETIC
    return node.op in ("call_function", "call_method") and (named or node.kwargs.get("inplace", False))


def is_relu(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` calls a ReLU or ReLU6, be it a module, a function or a tensor's method."""
    return operation(model, node) in ("relu", "relu6")


def is_layer(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` calls a layer whose weights are quantized."""
    return node.op == "call_module" and isinstance(model.get_submodule(node.target), tuple(QUANTIZED))


def folds(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` calls a layer that only a batch norm with fixed statistics follows: both are one layer."""
    if not is_layer(model, node) or len(node.users) != 1:
        return False
    (user,) = node.users
    norm = model.get_submodule(user.target) if user.op == "call_module" else None
    if not isinstance(norm, _BATCH_NORMS) or norm.running_mean is None:
        return False
    # After a linear layer over tokens (B, T, C) a batch norm is of the T tokens.
    return getattr(model.get_submodule(node.target), "out_features", norm.num_features) == norm.num_features


def relu_sites(model: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The papers' sites, by name: every call of a ReLU or ReLU6."""
    return _named(model, [[node] for node in model.graph.nodes if is_relu(model, node)])


def integer_sites(model: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Every value that an integer runtime needs on a grid and that lies on none, by name; those of one grid together.

    These are all tensors computed from the input on the way to a layer with weights, but for what is one operation with
    what follows it (a batch norm after its layer, a ReLU or a clip after anything) and what keeps the grid of its
    input (pooling by maximum, reshaping, a ReLU). Values that are concatenated share a grid, and means of values have
    theirs. What comes after the last layer, the logits, stays in float. In a student: what it has in float of these.
    """
    return _named(model, _walk(model)[0])


def grids(student: fx.GraphModule) -> dict[fx.Node, FakeQuantize]:
    """For each value of a ``student`` that lies on a grid, the quantizer whose grid it is."""
    on_grid = _walk(student)[1].items()
    return {node: student.get_submodule(grid) for node, grid in on_grid if isinstance(grid, str)}


def _walk(model: fx.GraphModule) -> tuple[list[list[fx.Node]], dict[fx.Node, fx.Node | str]]:
    """The sites, grouped by grid; and the grid of each value on one: a quantizer's name, or a group's first node."""
    leads: set[fx.Node] = set()  # to a layer with weights
    for node in reversed(model.graph.nodes):
        if any(user in leads or is_layer(model, user) for user in node.users):
            leads.add(node)
    groups: dict[fx.Node | str, list[fx.Node]] = {}
    on_grid: dict[fx.Node, fx.Node | str] = {}
    values: set[fx.Node] = set()  # tensors that depend on the input
    for node in model.graph.nodes:
        name, sources = operation(model, node), [each for each in node.all_input_nodes if each in values]
        if name in ("output", *_SIZES) or not (sources or name == "input"):
            continue
        values.add(node)
        # A constant among what is concatenated lies on no grid.
        found = {on_grid.get(each) for each in (node.all_input_nodes if name in JOINING else sources)}
        if name == "fakequantize":
            on_grid[node] = node.target
        elif node in leads and name in AVERAGING and found <= groups.keys():
            (on_grid[node],) = found
            groups[on_grid[node]].append(node)
        elif name in _KEEPING and None not in found and (len(found) == 1 or found <= groups.keys()):
            first, *others = [grid for grid in groups if grid in found] or found
            for other in others:
                groups[first] += groups.pop(other)
                on_grid.update({each: first for each, grid in on_grid.items() if grid is other})
            on_grid[node] = first
        elif node in leads and not _is_one_with_the_next(model, node):
            groups[node], on_grid[node] = [node], node
    return list(groups.values()), on_grid


def _is_one_with_the_next(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an integer runtime never stores the value of ``node``, or a student already rounds it at once."""
    nexts = {operation(model, user) for user in node.users}
    several = nexts <= {"getitem", "getattr"} and all(
        isinstance(user.args[1], int) or user.args[1] in ("values", "indices") for user in node.users
    )  # a tuple of values
    return several or folds(model, node) or (len(node.users) == 1 and nexts <= _CLIPS | {"fakequantize"})


def _named(model: fx.GraphModule, groups: list[list[fx.Node]]) -> dict[str, list[fx.Node]]:
    """Each group by its first node's module, or "<module>.<operation>" for a function called inside of one."""
    named: dict[str, list[fx.Node]] = {}
    seen: Counter[str] = Counter()
    for group in groups:
        node, word = group[0], operation(model, group[0])
        inside = [*list(node.meta.get("nn_module_stack", ()))[-1:], "relu" if is_relu(model, node) else word]
        name = node.target if node.op == "call_module" else ".".join(inside)
        name += ".output" if is_layer(model, node) else ""  # the layer's own name is that of its weights
        seen[name] += 1
        named[name if seen[name] == 1 else f"{name}:{seen[name]}"] = group
    return named
