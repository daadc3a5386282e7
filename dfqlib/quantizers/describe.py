"""What is quantized in a student, how much memory it takes, and how long."""

from collections.abc import Mapping

import pandas as pd
import torch
from torch import fx, nn

from dfqlib.quantizers.layers import FakeQuantize, QuantizedLayer, QuantLinear
from dfqlib.quantizers.observers import RunningMinMax
from dfqlib.quantizers.sites import integer_sites, operation


def weight_bytes(weight: torch.Tensor, bits: int | None) -> int:
    """Bytes of ``weight`` packed at ``bits`` each, rounded up, or as it is for None; ranges are not counted."""
    return weight.numel() * weight.element_size() if bits is None else -(-weight.numel() * bits // 8)


def model_bytes(model: nn.Module) -> int:
    """Bytes to store ``model``: quantized weights at their width, all else (biases, batch norm) as it is in memory.

    As in the papers' tables, the ranges of the quantizers are not counted.
    """
    bits = {id(m.weight): m.weight_bits for m in model.modules() if isinstance(m, QuantizedLayer)}
    ranges = {id(b) for m in model.modules() if isinstance(m, RunningMinMax) for b in m.buffers()}
    ranges |= {id(b) for m in model.modules() if isinstance(m, QuantizedLayer) for b in (m.share, m.grid)}
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and id(t) not in ranges]
    return sum(weight_bytes(t, bits.get(id(t))) for t in tensors)


def describe(student: fx.GraphModule, times: Mapping[str, float] | None = None) -> pd.DataFrame:
    """What is quantized, and how: a row per layer and activation in the order they run, then the rest and the total.

    With ``times``, milliseconds of an image by :func:`dfqlib.deploy.latency.latency`, a row more for each way to
    compute it, and a column ``milliseconds``.

    Columns: layer (as the bit-width mappings name it), kind, weight_bits, activation_bits (32 each: float), low, high
    (of the weight over all channels, or the activation range, NaN before it is observed), bytes, float_bytes (in full
    precision). Activations in float that an integer runtime would need as integers (:func:`.sites.integer_sites`) have
    no range; at the end are parameters, other than vectors, of no quantized layer.
    """
    rows, seen = [], set()
    in_float = {group[0]: name for name, group in integer_sites(student).items()}
    for node in student.graph.nodes:
        module = student.get_submodule(node.target) if node.op == "call_module" and node.target not in seen else None
        seen.add(node.target)
        if isinstance(module, QuantizedLayer):
            low, high = module.weight.detach().aminmax()
            sizes = weight_bytes(module.weight, module.weight_bits), weight_bytes(module.weight, None)
            rows.append((node.target, _kind(module), module.weight_bits or 32, None, low.item(), high.item(), *sizes))
        elif isinstance(module, FakeQuantize):
            ends, kind = (end.item() for end in module.ends), operation(student, node.args[0])
            rows.append((module.name, kind, None, module.bits, *ends, 0, 0))
        if node in in_float:
            rows.append((in_float[node], operation(student, node), None, 32, None, None, 0, 0))
    known = {id(m.weight) for m in student.modules() if isinstance(m, QuantizedLayer)}
    for name, parameter in student.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in known:
            low, high, size = *parameter.detach().aminmax(), weight_bytes(parameter, None)
            rows.append((name, "parameter", 32, None, low.item(), high.item(), size, size))
    rest = model_bytes(student) - sum(row[-2] for row in rows)
    rows.append(("", "biases, batch norm", None, None, None, None, rest, rest))
    rows.append(("", "total", None, None, None, None, sum(row[-2] for row in rows), sum(row[-1] for row in rows)))
    columns = ["layer", "kind", "weight_bits", "activation_bits", "low", "high", "bytes", "float_bytes"]
    table = pd.DataFrame(rows, columns=columns)
    if times:
        spent = pd.DataFrame({"layer": "", "kind": list(times), "milliseconds": list(times.values())})
        table = pd.concat([table, spent], ignore_index=True)
    return table.astype(dict.fromkeys(["weight_bits", "activation_bits", "bytes", "float_bytes"], "Int64"))


def _kind(layer: QuantizedLayer) -> str:
    if isinstance(layer, QuantLinear):
        return "linear"
    if layer.transposed:
        return "transposed conv"
    return {layer.in_channels: "depthwise conv", 1: "conv"}.get(layer.groups, "grouped conv")
