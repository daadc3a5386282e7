"""What of a student is quantized, and its size."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import fx, nn

from dfqlib.quantizers.layers import FakeQuantize, QuantConv2d, QuantLinear
from dfqlib.quantizers.observers import RunningMinMax


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
