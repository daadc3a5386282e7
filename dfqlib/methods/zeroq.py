"""ZeroQ (Cai et al., CVPR 2020): images distilled from batch-norm statistics set the activation ranges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor, fx, nn

from dfqlib.device import channels_last
from dfqlib.errors import check_range
from dfqlib.generators.optimise_images import synthesise
from dfqlib.loss_terms import add_up
from dfqlib.models.batch_norm_statistics import EPSILON, BatchNormInput, BatchNormInputs, sample_gaps, sample_mean_std
from dfqlib.models.teacher import Teacher
from dfqlib.quantizers.trace import trace


def zeroq_statistics_loss(images: Tensor, layers: Sequence[BatchNormInput]) -> Tensor:
    """Squared gap of each sample's channel means and standard deviations to the batch-norm statistics.

    ``images`` (B, 3, H, W) normalised, compared with mean 0 and standard deviation 1; what enters each batch norm with
    its running mean and variance. Sums over channels and layers, mean over the batch.
    Source: ZeroQ, generation of distilled data.
    """
    mean, std = sample_mean_std(images)
    of_images = mean.square().sum() + (1 - std).square().sum()
    mean_gaps, std_gaps = sample_gaps(layers)
    return (of_images + mean_gaps.square().sum() + std_gaps.square().sum()) / len(images)


def start_images(batch: int, size: int, seed: int = 0) -> Tensor:
    """Where distillation starts: (batch, 3, size, size), uniform whole numbers 0 to 254 minus 127.5, over 5418.75.

    That is nearly grey, within 0.024 of the normalised mean. Drawn on the CPU, so a seed gives the same images on every
    device. Source: the authors' code; the paper (section 3.1) says random data.
    """
    check_range("batch", batch, 1, 10**6)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 255, (batch, 3, size, size), generator=generator).sub(127.5).div(5418.75)


def distil_images(
    teacher: Teacher,
    batch: int = 32,
    iterations: int = 500,
    learning_rate: float = 0.5,
    patience: int = 100,
    min_learning_rate: float = 1e-4,
    seed: int = 0,
) -> tuple[Tensor, list[float]]:
    """Images (batch, 3, H, W), normalised, whose channel statistics match those the teacher's batch norms remember.

    Returns them with the loss before each iteration (:func:`dfqlib.losses.zeroq_statistics_loss`). The defaults are the
    paper's (section 3.1). UserError if a setting is out of range or the teacher has no batch-norm statistics;
    Diverged if the loss diverges.
    """
    images = channels_last(start_images(batch, teacher.entry.input_size, seed).to(teacher.device))
    with BatchNormInputs(teacher.folded) as taps:

        def loss(images: Tensor) -> Tensor:
            teacher.folded(images)
            return add_up({"statistics": zeroq_statistics_loss(images, taps.layers)})

        return synthesise(
            images, loss, learning_rate, iterations, patience, min_learning_rate, f"distilling {batch} images"
        )


@torch.no_grad()
def statistics_gaps(network: nn.Module, images: Tensor) -> pd.DataFrame:
    """How far ``images`` (B, 3, H, W) are from the batch-norm statistics: one row per layer, in execution order.

    ``mean_gap`` and ``std_gap`` are root mean squares, over samples and channels, of mean - mu and of std - sigma,
    divided by that of sigma, where mu and sigma are the layer's own: 0 is a perfect match, 1 is off by one sigma.
    """
    rows = []
    with BatchNormInputs(network) as taps:
        network(images)
        for layer in taps.layers:
            sigma = (layer.norm.running_var + EPSILON).sqrt()
            squares = [gaps.square().mean() / sigma.square().mean() for gaps in sample_gaps([layer])]
            rows.append((layer.name, *(square.sqrt().item() for square in squares)))
    return pd.DataFrame(rows, columns=["layer", "mean_gap", "std_gap"]).set_index("layer")


@torch.no_grad()
def with_outliers(network: nn.Module, factor: float) -> fx.GraphModule:
    """A copy of ``network`` that computes the same function with one outlier among the channels of its activations.

    Wherever a batch norm reaches one plain convolution through one ReLU, and nothing else, the channel that reaches
    highest (bias + 3 |gain|) is stretched: its gain and bias are multiplied by ``factor``, 1 or more, and the
    convolution's weights for it divided, as relu(s x) = s relu(x) for s > 0. What enters the batch norms stays the
    same, and so do images distilled from them. UserError if ``network`` cannot be traced.
    """
    check_range("factor", factor, 1, 1e4)
    network = trace(network)
    modules = dict(network.named_modules())
    calls = Counter(node.target for node in network.graph.nodes)
    for node in network.graph.nodes:
        chain = _only_users(node, 3)
        match [modules.get(n.target) if n.op == "call_module" else None for n in chain]:
            # Weights that serve other places too stay as they are.
            case [nn.BatchNorm2d(affine=True) as norm, nn.ReLU(), nn.Conv2d(groups=1) as conv] if (
                calls[chain[0].target] == calls[chain[2].target] == 1
            ):
                widest = (norm.bias + 3 * norm.weight.abs()).argmax()
                norm.weight[widest] *= factor
                norm.bias[widest] *= factor
                conv.weight[:, widest] /= factor
    return network


def _only_users(node: fx.Node, count: int) -> list[fx.Node]:
    """``node``, the only node that uses it, the only one that uses that, and so on: ``count`` of them, or fewer."""
    chain = [node]
    while len(chain) < count and len(chain[-1].users) == 1:
        chain.extend(chain[-1].users)
    return chain
