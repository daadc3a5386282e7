"""A bit width for each layer under a size budget: sensitivities and their Pareto frontier (ZeroQ, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqlib.bits import BitWidths, check_width
from dfqlib.errors import UserError
from dfqlib.progress import track
from dfqlib.quantizers.convert import quantize_model
from dfqlib.quantizers.describe import weight_bytes
from dfqlib.quantizers.trace import weight_layers


def mean_kl(teacher_logits: Tensor, logits: Tensor) -> Tensor:
    """Mean over the batch of KL(softmax(teacher_logits) || softmax(logits)) in nats; both (N, classes)."""
    return F.kl_div(
        F.log_softmax(logits, dim=1), F.log_softmax(teacher_logits, dim=1), log_target=True, reduction="batchmean"
    )


@torch.no_grad()
def sensitivity(teacher: nn.Module, images: Tensor, bits: Sequence[int] = (2, 4, 8)) -> pd.DataFrame:
    """KL divergence from the teacher's outputs if the weight of one layer alone is quantized (ZeroQ, section 3.2).

    images: (N, 3, H, W), normalised; in ZeroQ the distilled data. Activations stay in float, as their width is the same
    for every assignment. Rows: layers in the order they run; columns: bit widths; values: :func:`mean_kl`.
    Raises UserError for bits outside 2 to 8 or a teacher that cannot be traced.
    """
    bits = [check_width("bits", width) for width in bits]
    network = quantize_model(teacher, BitWidths(None, None))
    table = pd.DataFrame(index=pd.Index(weight_layers(network), name="layer"), columns=bits, dtype=float)
    run = _ResumableRun(network, images)
    teacher_logits = network(images)
    for layer in track(table.index, "sensitivity of each layer"):
        run.advance_to(layer)
        module, divergences = network.get_submodule(layer), []
        for width in bits:
            module.weight_bits = width
            divergences.append(mean_kl(teacher_logits, run.finish()))
        module.weight_bits = None
        table.loc[layer] = torch.stack(divergences).tolist()
    return table


class _ResumableRun(fx.Interpreter):
    """A forward pass that halts before a layer, to be finished from there as often as that layer changes.

    Saves on average half of the operations of whole passes, and holds only the tensors that are still needed.
    """

    def __init__(self, network: fx.GraphModule, images: Tensor) -> None:
        super().__init__(network)
        self.nodes = list(network.graph.nodes)
        last_use = {used: node for node in self.nodes for used in node.all_input_nodes}
        self.done_with: dict[fx.Node, list[fx.Node]] = {node: [] for node in self.nodes}
        for used, node in last_use.items():
            self.done_with[node].append(used)
        self.args_iter = iter([images])
        self.position = 0

    def advance_to(self, layer: str) -> None:
        """Run up to, but not including, the first call of ``layer``."""
        while (node := self.nodes[self.position]).op != "call_module" or node.target != layer:
            self._step(node)
            self.position += 1

    def finish(self) -> Any:
        """The network's output; the halted state is kept, as in-place operations only reach copies of it."""
        halted = self.env
        self.env = {node: fx.node.map_aggregate(value, _clone) for node, value in halted.items()}
        for node in self.nodes[self.position :]:
            output = self._step(node)
        self.env = halted
        return output

    def _step(self, node: fx.Node) -> Any:
        self.env[node] = value = self.run_node(node)
        for used in self.done_with[node]:
            del self.env[used]
        return value


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def layer_sizes(teacher: nn.Module, bits: Sequence[int] = (2, 4, 8)) -> pd.DataFrame:
    """Bytes of each layer's weight at each bit width, in the layout of :func:`sensitivity`; biases are not counted."""
    bits = [check_width("bits", width) for width in bits]
    network = quantize_model(teacher, BitWidths(None, None))
    weights = {layer: network.get_submodule(layer).weight for layer in weight_layers(network)}
    table = {layer: {width: weight_bytes(weight, width) for width in bits} for layer, weight in weights.items()}
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("layer")


@dataclass(frozen=True)
class Assignment:
    """A bit width for every layer, the bytes its weights take, and the sum of its sensitivities."""

    size: int
    sensitivity: float
    bits: Mapping[str, int]


@dataclass(frozen=True)
class _Step:
    """The undominated states after one more layer: totals, that layer's width, and the state each one came from."""

    sizes: np.ndarray
    sensitivities: np.ndarray
    bits: np.ndarray
    parents: np.ndarray


class ParetoFrontier(Sequence[Assignment]):
    """The assignments no other beats in both size and sensitivity, smallest first.

    ``sizes`` (bytes) and ``sensitivities`` hold all of them as arrays, to draw; an index gives the bit widths as well.
    """

    def __init__(self, layers: list[str], steps: list[_Step]) -> None:
        self._layers = layers
        self._steps = steps
        self.sizes = steps[-1].sizes
        self.sensitivities = steps[-1].sensitivities

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Assignment:
        """Assignment number ``index``, its bit widths read back through the steps of the dynamic programme."""
        state = index = range(len(self))[index]
        bits = {}
        for layer, step in zip(reversed(self._layers), reversed(self._steps), strict=True):
            bits[layer] = int(step.bits[state])
            state = step.parents[state]
        in_order = dict(reversed(bits.items()))
        return Assignment(int(self.sizes[index]), float(self.sensitivities[index]), in_order)

    def __iter__(self) -> Iterator[Assignment]:
        return (self[i] for i in range(len(self)))

    def best_under(self, budget: float) -> Assignment:
        """The assignment with the least sensitivity whose weights take at most ``budget`` bytes; else a UserError."""
        fitting = int(np.searchsorted(self.sizes, budget, side="right"))
        if not fitting:
            raise UserError(f"budget={budget!r} is too small; allowed: at least {self.sizes[0]} bytes.")
        return self[fitting - 1]


def pareto_frontier(sensitivity: pd.DataFrame, sizes: pd.DataFrame) -> ParetoFrontier:
    """The frontier of (size, total sensitivity) over all assignments, by dynamic programming over the layers.

    sensitivity, sizes: (layers, bit widths), as :func:`sensitivity` and :func:`layer_sizes` make them; the total of an
    assignment is the sum over its layers. Exact to the byte: since both totals are sums, a state beaten in both by
    another cannot lead to a point of the frontier, and is dropped. There are at most as many states as distinct sizes.
    """
    if not (sensitivity.index.equals(sizes.index) and sensitivity.columns.equals(sizes.columns)) or sizes.empty:
        raise UserError("sensitivity and sizes must have the same layers and bit widths, at least one of each.")
    step = _Step(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64), np.zeros(1, np.int64))
    steps = []
    for layer in sizes.index:
        step = _add_layer(step, sizes.loc[layer], sensitivity.loc[layer])
        steps.append(step)
    return ParetoFrontier(list(sizes.index), steps)


def _add_layer(step: _Step, sizes: pd.Series, sensitivities: pd.Series) -> _Step:
    """Every state with every width of the next layer, by size; kept is what lowers the least sensitivity so far."""
    size = np.concatenate([step.sizes + s for s in sizes])
    total = np.concatenate([step.sensitivities + s for s in sensitivities])
    order = np.lexsort((total, size))
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], total[order][:-1]]))
    kept = order[total[order] < best_before]
    width, parent = np.divmod(kept, len(step.sizes))
    return _Step(size[kept], total[kept], np.asarray(sizes.index)[width], parent)
