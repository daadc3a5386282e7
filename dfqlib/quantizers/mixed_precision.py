"""A bit width for each layer or activation under a budget: sensitivities and Pareto frontier (ZeroQ, section 3.2)."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from dfqlib.bits import BitWidths, check_width
from dfqlib.errors import UserError
from dfqlib.loss_terms import to_floats
from dfqlib.losses import distillation_kl
from dfqlib.progress import track
from dfqlib.quantizers.calibrate import calibrated
from dfqlib.quantizers.convert import quantize_model
from dfqlib.quantizers.describe import weight_bytes
from dfqlib.quantizers.layers import FakeQuantize
from dfqlib.quantizers.sites import relu_sites
from dfqlib.quantizers.trace import trace, weight_layers

mean_kl = functools.partial(distillation_kl, temperature=1.0)  # of (teacher logits, logits), in nats


@torch.no_grad()
def sensitivity(
    teacher: nn.Module, images: Tensor, bits: Sequence[int] = (2, 4, 8), weights: str = "asymmetric"
) -> pd.DataFrame:
    """KL divergence from the teacher's outputs if the weight of one layer alone is quantized (ZeroQ, section 3.2).

    images: (N, 3, H, W), normalised; in ZeroQ the distilled data. Activations stay in float, as their width is the same
    for every assignment; ``weights`` as in :func:`.convert.quantize_model`. Rows: layers in the order they run;
    columns: bit widths; values: :func:`mean_kl`.
    Raises UserError for bits outside 2 to 8 or a teacher that cannot be traced.
    """
    bits = [check_width("bits", width) for width in bits]
    network, table = quantize_model(teacher, BitWidths(None, None), weights=weights), {}
    teacher_logits = network(images)
    for layer in track(weight_layers(network), "sensitivity of each layer"):
        module, divergences = network.get_submodule(layer), []
        for width in bits:
            module.weight_bits = width
            divergences.append(mean_kl(teacher_logits, network(images)))
        module.weight_bits = None
        table[layer] = to_floats(divergences)
    return pd.DataFrame.from_dict(table, orient="index", columns=bits).rename_axis("layer")


def layer_sizes(teacher: nn.Module, bits: Sequence[int] = (2, 4, 8)) -> pd.DataFrame:
    """Bytes of each layer's weight at each bit width, in the layout of :func:`sensitivity`; biases are not counted."""
    network = trace(teacher)
    weights = {layer: network.get_submodule(layer).weight for layer in weight_layers(network)}
    table = {layer: {width: weight_bytes(weight, width) for width in bits} for layer, weight in weights.items()}
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("layer")


@torch.no_grad()
def of_activations(
    teacher: nn.Module, images: Tensor, bits: Sequence[int] = (2, 4, 8)
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """:func:`sensitivity`, and bytes for one image, of what leaves each ReLU in place of weights.

    One activation alone is quantized, over its range on ``images`` (N, 3, H, W); weights stay in float. ZeroQ's paper
    varies weights only. Raises UserError as :func:`sensitivity` does.
    """
    bits, sites = [check_width("bits", width) for width in bits], list(relu_sites(trace(teacher)))
    teacher_logits, table, sizes = teacher(images), {}, {}
    for site in track(sites, "sensitivity of each activation"):
        ones = [calibrated(teacher, BitWidths(None, dict.fromkeys(sites) | {site: width}), images) for width in bits]
        table[site] = to_floats([mean_kl(teacher_logits, one(images)) for one in ones])
        [quantizer] = (module for module in ones[0].modules() if isinstance(module, FakeQuantize))
        quantizer.register_forward_hook(lambda _, inputs, output, site=site: sizes.update({site: output[0].numel()}))
        ones[0](images[:1])
    frames = table, {site: [-(-count * width // 8) for width in bits] for site, count in sizes.items()}
    sensitivities, of_image = (pd.DataFrame.from_dict(each, orient="index", columns=bits) for each in frames)
    return sensitivities.rename_axis("layer"), of_image.rename_axis("layer")


@dataclass(frozen=True)
class Assignment:
    """A bit width for every layer, the bytes its weights take, and the sum of its sensitivities."""

    size: int
    sensitivity: float
    bits: Mapping[str, int]


@dataclass(frozen=True)
class ParetoFrontier:
    """The assignments that no other beats in both size and sensitivity, smallest first; indexed like a list.

    sizes (bytes) and sensitivities: (assignments,); widths: (assignments, layers).
    """

    layers: list[str]
    sizes: np.ndarray
    sensitivities: np.ndarray
    widths: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Assignment:
        bits = dict(zip(self.layers, self.widths[index].tolist(), strict=True))
        return Assignment(int(self.sizes[index]), float(self.sensitivities[index]), bits)

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
    size, total, widths = np.zeros(1, np.int64), np.zeros(1), np.zeros((1, 0), np.int8)
    for layer in sizes.index:
        # Every state with every width of this layer, by size; kept are those with a new least sensitivity.
        states = len(size)
        size = np.concatenate([size + more for more in sizes.loc[layer]])
        total = np.concatenate([total + more for more in sensitivity.loc[layer]])
        order = np.lexsort((total, size))
        best_before = np.minimum.accumulate(np.concatenate([[np.inf], total[order][:-1]]))
        kept = order[total[order] < best_before]
        width, parent = np.divmod(kept, states)
        size, total = size[kept], total[kept]
        widths = np.column_stack([widths[parent], sizes.columns.to_numpy(np.int8)[width]])
    return ParetoFrontier(list(sizes.index), size, total, widths)
