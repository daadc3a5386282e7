"""ZeroQ (Cai et al., CVPR 2020): images distilled from batch-norm statistics set the activation ranges."""

from collections import Counter
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor, fx, nn

from dfqlib.device import channels_last
from dfqlib.generators.optimise_images import synthesise
from dfqlib.generators.synthetic_images import SyntheticImages
from dfqlib.loss_terms import add_up
from dfqlib.models.batch_norm_statistics import EPSILON, BatchNormInput, BatchNormInputs, sample_gaps, sample_mean_std
from dfqlib.models.teacher import Teacher
from dfqlib.quantizers.trace import trace
from dfqlib.schedules import ImageSchedule
from dfqlib.speed.precision import run


def zeroq_statistics_loss(images: Tensor, layers: Sequence[BatchNormInput]) -> Tensor:
    """Squared gap of each sample's channel means and standard deviations to the batch-norm statistics.

    ``images`` (B, C, H, W), normalised, are compared with mean 0 and standard deviation 1, like the input of a first
    batch norm. Sums over channels and layers, mean over the batch. Source: ZeroQ, generation of distilled data.
    """
    mean, std = sample_mean_std(images)
    of_images = mean.square().sum() + (1 - std).square().sum()
    mean_gaps, std_gaps = sample_gaps(layers)
    return (of_images + mean_gaps.square().sum() + std_gaps.square().sum()) / len(images)


def start_images(count: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Initial images of the distillation, (count, *shape): uniform integers 0 to 254 minus 127.5, over 5418.75.

    ``shape`` is (C, H, W). Nearly grey. Drawn on the CPU, so a seed gives the same images on every device. Source: the
    released code; the paper (section 3.1) says random data.
    """
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 255, (count, *shape), generator=random).sub(127.5).div(5418.75)


def distil_images(teacher: Teacher, schedule: ImageSchedule, seed: int = 0) -> SyntheticImages:
    """Images optimised as one batch to match the teacher's batch-norm statistics; its losses before each iteration.

    UserError if the teacher has none; Diverged if the loss diverges. Source: section 3.1.
    """
    start = channels_last(start_images(schedule.images, teacher.entry.image_shape, seed).to(teacher.device))
    with BatchNormInputs(teacher.folded) as taps:

        def loss(images: Tensor) -> Tensor:
            run(teacher.folded, images)
            return add_up({"statistics": zeroq_statistics_loss(images, taps.layers)})

        return synthesise(start, loss, schedule, f"distilling {schedule.images} images")


@torch.no_grad()
def statistics_gaps(network: nn.Module, images: Tensor) -> pd.DataFrame:
    """Distance of ``images`` (B, C, H, W) from the batch-norm statistics: one row per layer, in execution order.

    ``mean_gap`` and ``std_gap``: RMS, over samples and channels, of mean - mu and std - sigma, over that of sigma.
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

    Where a batch norm feeds only one ReLU and that only one plain convolution, the gain and bias of the channel with
    the largest bias + 3 |gain| are multiplied by ``factor`` (at least 1) and the convolution's weights for it divided,
    as relu(s x) = s relu(x) for s > 0. The batch norms' inputs, and so distilled images, stay the same. UserError if
    ``network`` cannot be traced.
    """
    network = trace(network)
    modules, calls = dict(network.named_modules()), Counter(node.target for node in network.graph.nodes)
    for node in network.graph.nodes:
        chain = [node]
        while len(chain) < 3 and len(chain[-1].users) == 1:
            chain.extend(chain[-1].users)
        match [modules.get(n.target) if n.op == "call_module" else None for n in chain]:
            # Weights that are used elsewhere too stay as they are.
            case [nn.BatchNorm2d(affine=True) as norm, nn.ReLU(), nn.Conv2d(groups=1) as conv] if (
                calls[chain[0].target] == calls[chain[2].target] == 1
            ):
                widest = (norm.bias + 3 * norm.weight.abs()).argmax()
                norm.weight[widest] *= factor
                norm.bias[widest] *= factor
                conv.weight[:, widest] /= factor
    return network
