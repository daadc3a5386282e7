"""DSG: diverse images, for calibration (PTQ) and from a generator (QAT).

Zhang et al., CVPR 2021; Qin et al., TPAMI 2023.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dfqlib.device import channels_last
from dfqlib.finetuning.streams import GeneratorStream, Stateful
from dfqlib.generators.optimise_images import synthesise
from dfqlib.generators.synthetic_images import SyntheticImages
from dfqlib.loss_terms import add_up
from dfqlib.losses import generator_loss, mean_of_layers
from dfqlib.methods import gdfq
from dfqlib.models.batch_norm_statistics import (
    EPSILON,
    BatchNormInput,
    BatchNormInputs,
    batch_gaps,
    by_layer,
    over_channels,
    pooled_mean_var,
    sample_gaps,
    sample_mean_std,
)
from dfqlib.models.teacher import Teacher
from dfqlib.schedules import DiverseImageSchedule, GeneratorSchedule
from dfqlib.speed.precision import run

BROADENING = 1e-3  # gaps between eigenvalues below this are treated as if they were about this wide
MAGNITUDE_WEIGHT = 1e-4  # of the eigenvalues' gap, beside the eigenvectors' product
SHIFT = 30 / 224  # the image prior rolls images by at most this share of their side; published: 30 of 224 pixels
# Observers for the released code's four rules for the activation range of a batch.
RANGE_RULES = {"ema": "sample_mean", "percentile": "percentile", "mse": "mse", "minmax": "minmax"}


class Margins(NamedTuple):
    """The gaps of each layer's means and spreads that cost nothing, in order of execution: (L,) each."""

    mean: Tensor
    spread: Tensor


@dataclass(frozen=True)
class NoiseGaps:
    """The gaps between Gaussian noise and a network's batch-norm statistics.

    Per layer, in order of execution: its name, and for every channel |mean - mu|, |std - sigma|,
    |variance - sigma^2| of the noise, and sigma, (C,) each.
    """

    layers: list[str]
    mean: list[Tensor]
    std: list[Tensor]
    variance: list[Tensor]
    sigma: list[Tensor]

    def margins(self, epsilon: float = 0.9, spread: Literal["std", "variance"] = "std") -> Margins:
        """The ``epsilon`` quantile (0 to 1) of each layer's gaps over its channels: a larger one allows more.

        ``spread`` is what the loss compares: ``"std"`` for PTQ, ``"variance"`` for QAT.
        Source: DSG, slack distribution alignment; 0.9 in the paper.
        """
        of_each = self.mean, getattr(self, spread)
        return Margins(*(torch.stack([gap.quantile(epsilon) for gap in gaps]) for gaps in of_each))


@torch.no_grad()
def noise_gaps(teacher: Teacher, count: int = 1024, seed: int = 0) -> NoiseGaps:
    """The gaps of ``count`` Gaussian noise images, N(0, 1), as one batch, to the teacher's batch-norm statistics.

    Anyone can draw noise; the authors load their margins from files that they never published.
    UserError for a teacher without batch norms. Source: DSG, slack distribution alignment.
    """
    shape, random = teacher.entry.image_shape, torch.Generator().manual_seed(seed)
    counts = [len(part) for part in torch.arange(count).split(128 if max(shape[1:]) <= 64 else 32)]
    weights, passes = torch.tensor(counts, dtype=torch.float32, device=teacher.device), []
    with BatchNormInputs(teacher.network) as norms:
        for part in counts:
            noise = torch.randn(part, *shape, generator=random).to(teacher.device)
            teacher.network(channels_last(noise))
            passes.append([layer.mean_var() for layer in norms.layers])
        layers = norms.layers
    found = NoiseGaps([layer.name for layer in layers], [], [], [], [])
    for layer, parts in zip(layers, zip(*passes, strict=True), strict=True):
        means, variances = map(torch.stack, zip(*parts, strict=True))
        mean, variance = pooled_mean_var(means, variances, weights)
        found.sigma.append((layer.norm.running_var + EPSILON).sqrt())
        found.mean.append((mean - layer.norm.running_mean).abs())
        found.std.append(((variance + EPSILON).sqrt() - found.sigma[-1]).abs())
        found.variance.append((variance - layer.norm.running_var).abs())
    return found


@dataclass(frozen=True)
class DiversityTerms:
    """The three parts that make samples differ, each of which can be switched off.

    ``slack``: statistics may be off by a margin, that of ``epsilon``. ``enhancement``: each sample has a layer that it
    is to fit best. ``correlation``: images are to be as little alike as noise is. Without all three, PTQ is ZeroQ with
    labels and an image prior, and QAT is GDFQ. ``as_released=True`` follows the released code where it differs from
    the paper: :func:`sample_weights` and :func:`start_images` in PTQ, :func:`released_slack_bns_loss` in QAT.
    """

    slack: bool = True
    enhancement: bool = True
    correlation: bool = True
    as_released: bool = False
    epsilon: float = 0.9

    def margins(self, gaps: NoiseGaps, spread: Literal["std", "variance"] = "std") -> Margins:
        """:meth:`NoiseGaps.margins`, or zeros without slack."""
        margins = gaps.margins(self.epsilon, spread)
        return margins if self.slack else Margins(*map(torch.zeros_like, margins))

    def weights(self, layers: int, samples: int, device: torch.device) -> Tensor:
        """:func:`sample_weights` (layers, samples), or ones without enhancement."""
        each = sample_weights(layers, samples, self.as_released) if self.enhancement else torch.ones(layers, samples)
        return each.to(device)


def slack_squares(gaps: tuple[Tensor, Tensor], margins: Margins, layers: Sequence[BatchNormInput]) -> Tensor:
    """Squares of max(|gap| - margin, 0): ``gaps`` of means and of spreads, (..., sum of C) each, added."""
    pairs = zip(gaps, margins, strict=True)
    return sum((gap.abs() - over_channels(margin, layers)).clamp(min=0).square() for gap, margin in pairs)


def sample_weights(layers: int, samples: int, as_released: bool = False) -> Tensor:
    """How often the loss of sample i counts in layer l, (layers, samples): twice where i mod L = l, else once.

    ``as_released=True`` is a quirk of the PTQ code: only the first 20 samples have a layer of their own, whatever the
    number of layers, and their gap itself is doubled, so that their loss counts four times.
    Source: DSG, layerwise sample enhancement.
    """
    own, each = torch.arange(layers).unsqueeze(1), torch.arange(samples)
    if as_released:
        return 1.0 + 3.0 * ((own == each) & (each < 20))
    return 1.0 + (own == each % layers)


def dsg_statistics_loss(images: Tensor, layers: Sequence[BatchNormInput], margins: Margins, weights: Tensor) -> Tensor:
    """PTQ: :func:`dfqlib.methods.zeroq.zeroq_statistics_loss` with slack and enhancement.

    ``images`` (B, C, H, W) have no margin. Margins of 0 and ``weights`` (L, B) of 1 give ZeroQ's loss. Source: DSG.
    """
    mean, std = sample_mean_std(images)
    of_images = mean.square().sum() + (1 - std).square().sum()
    of_layers = over_channels(weights.T, layers) * slack_squares(sample_gaps(layers), margins, layers)
    return (of_images + of_layers.sum()) / len(images)


def slack_bns_loss(layers: Sequence[BatchNormInput], margins: Margins, weights: Tensor) -> Tensor:
    """QAT: L_BNS with slack and enhancement, of the batch's means and variances.

    A sample that counts twice by ``weights`` (L, B) enters that layer's mean and variance twice. Margins of 0 and
    weights of 1 give L_BNS. Source: DSG, for a generator.
    """
    return mean_of_layers(slack_squares(batch_gaps(layers, weights), margins, layers), layers)


def released_slack_bns_loss(layers: Sequence[BatchNormInput], margins: Margins, enhance: bool = True) -> Tensor:
    """The slack L_BNS of DSG's released fine-tuning code, with its quirks.

    | |gap| - margin | leaves no slack: it seeks a gap of exactly the margin. In layer l it is channel l, not sample l,
    that counts twice. Squares are summed over channels, not averaged: the term is about C times larger than GDFQ's.
    Source: the official code.
    """
    pairs = zip(batch_gaps(layers), margins, strict=True)
    of_means, of_variances = ((gap.abs() - over_channels(margin, layers)).square() for gap, margin in pairs)
    squares = of_means + of_variances
    # Channel l of layer l; none where a layer has fewer channels.
    own = [part[index : index + 1] for index, part in enumerate(by_layer(squares, layers))] if enhance else []
    return torch.cat([squares, *own]).sum() / len(layers)


def similarity(samples: Tensor) -> Tensor:
    """Cosine of every two ``samples`` (B, ...), each taken as one vector: (B, B), 1 on the diagonal."""
    directions = F.normalize(samples.flatten(1), dim=1)
    return directions @ directions.T


def mean_similarity(samples: Tensor) -> float:
    """Mean cosine of two different ``samples`` (B, ...), B at least 2: 1 if all point the same way."""
    count = len(samples)
    return ((similarity(samples).sum() - count) / (count * (count - 1))).item()


class _Eigenpairs(torch.autograd.Function):
    """Eigenvalues (B,), ascending, and eigenvectors, the columns of (B, B), of a symmetric matrix.

    Each eigenvector has length 1, and its entry of greatest magnitude is positive. Where the gradient of
    torch.linalg.eigh has 1 / d, d = l_j - l_i, infinite where two samples are equal, this one has
    d / (d^2 + BROADENING^2): the same for d well above BROADENING, and at most 1 / (2 BROADENING).
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
        # Apple's backend has no eigh; the matrix is only as large as the batch.
        on = matrix.cpu() if matrix.device.type == "mps" else matrix
        values, vectors = (part.to(matrix.device) for part in torch.linalg.eigh(on))
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        vectors = torch.where(largest < 0, -vectors, vectors)
        ctx.save_for_backward(values, vectors)
        return values, vectors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor, grad_vectors: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        gaps = values.unsqueeze(0) - values.unsqueeze(1)
        inner = vectors.T @ grad_vectors * (gaps / (gaps.square() + BROADENING**2))
        gradient = vectors @ (inner + torch.diag(grad_values)) @ vectors.T
        return (gradient + gradient.T) / 2


eigenpairs = _Eigenpairs.apply


def spatial_correlation_loss(images: Tensor, noise: Tensor) -> Tensor:
    """1e-4 MSE(l, m) + |sum_k n_k (-<u_k, v_k>)|: images are to be as little alike as Gaussian noise is.

    l, u: :func:`eigenpairs` of the similarity matrix of ``images`` (B, C, H, W), B at least 2; m, v: those of
    ``noise``, of the same shape and without gradient; n: m scaled to 0..1. Source: DSG (TPAMI 2023), spatial
    correlation; the released code uses ``torch.eig``, whose eigenpairs have no order and which torch no longer has.
    """
    values, vectors = eigenpairs(similarity(images))
    with torch.no_grad():
        wanted, directions = eigenpairs(similarity(noise))
        weights = (wanted - wanted[0]) / (wanted[-1] - wanted[0]).clamp(min=1e-12)
    products = (vectors * directions).sum(0)
    return MAGNITUDE_WEIGHT * F.mse_loss(values, wanted) + (weights * -products).sum().abs()


class CorrelationWithNoise(Stateful):
    """The spatial correlation loss of images, with new Gaussian noise at each call, over the number of layers."""

    remembers = ("random",)

    def __init__(self, layers: int, device: torch.device, seed: int) -> None:
        # Not the seed of the images' start: both would begin as the same noise.
        self.layers, self.random = layers, torch.Generator(device).manual_seed(seed + 2)

    def __call__(self, images: Tensor) -> Tensor:
        noise = torch.randn(images.shape, generator=self.random, device=images.device)
        return spatial_correlation_loss(images, noise) / self.layers


def image_prior_loss(images: Tensor, shift: int) -> Tensor:
    """Total variation plus mean length of ``images`` (B, C, H, W), after rolling both axes by ``shift`` pixels.

    Total variation: the Euclidean norms, over the whole batch, of the differences to the neighbours right, below and on
    both diagonals. Source: DSG's released PTQ code, after DeepInversion.
    """
    images = images.roll((shift, shift), (2, 3))
    straight = images[..., :-1] - images[..., 1:], images[..., :-1, :] - images[..., 1:, :]
    diagonal = images[..., 1:, :-1] - images[..., :-1, 1:], images[..., :-1, :-1] - images[..., 1:, 1:]
    return torch.stack([each.norm() for each in straight + diagonal]).sum() + images.flatten(1).norm(dim=1).mean()


def start_images(count: int, shape: tuple[int, int, int], seed: int = 0, as_released: bool = False) -> Tensor:
    """Where synthesis starts: (count, C, H, W), N(0, 1); as released, uniform in [0, 1). Drawn on the CPU."""
    draw = torch.rand if as_released else torch.randn
    return draw(count, *shape, generator=torch.Generator().manual_seed(seed))


def synthesise_diverse(
    teacher: Teacher,
    gaps: NoiseGaps,
    schedule: DiverseImageSchedule,
    terms: DiversityTerms = DiversityTerms(),
    seed: int = 0,
    label: str = "diverse images",
) -> SyntheticImages:
    """PTQ: one batch of images, the labels they were asked for, and the loss before each iteration.

    Loss: statistics + spatial correlation / L + label_weight CE to random labels + prior_weight image prior, the last
    on a copy rolled by a random offset. A weight of 0 drops its term. Diverged if the loss diverges.
    Source: DSG, and its official code.
    """
    shape, device, count = teacher.entry.image_shape, teacher.device, schedule.images
    start = channels_last(start_images(count, shape, seed, terms.as_released).to(device))
    random = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(teacher.entry.classes, (count,), generator=random).to(device)
    shift = max(1, round(SHIFT * max(shape[1:])))
    margins, weights = terms.margins(gaps), terms.weights(len(gaps.layers), count, device)
    correlation = CorrelationWithNoise(len(gaps.layers), device, seed)
    with BatchNormInputs(teacher.folded) as norms:

        def loss(images: Tensor) -> Tensor:
            logits = run(teacher.folded, images)
            parts = {"statistics": dsg_statistics_loss(images, norms.layers, margins, weights)}
            if terms.correlation:
                parts["correlation"] = correlation(images)
            if schedule.label_weight:
                parts["CE"] = schedule.label_weight * F.cross_entropy(logits, labels)
            if schedule.prior_weight:
                offset = int(torch.randint(-shift, shift, (1,), generator=random))  # on the CPU: no device waits
                parts["image prior"] = schedule.prior_weight * image_prior_loss(images, offset)
            return add_up(parts)

        return replace(synthesise(start, loss, schedule, label), labels=labels)


def make_stream(
    teacher: Teacher,
    schedule: GeneratorSchedule,
    gaps: NoiseGaps,
    terms: DiversityTerms = DiversityTerms(),
    seed: int = 0,
) -> GeneratorStream:
    """QAT: :func:`dfqlib.methods.gdfq.make_stream` with the slack L_BNS, and the spatial correlation added.

    Source: DSG (TPAMI 2023), data-free quantization-aware training.
    """
    layers, margins = len(gaps.layers), terms.margins(gaps, "variance")
    if terms.as_released:
        statistics_loss = partial(released_slack_bns_loss, margins=margins, enhance=terms.enhancement)
    else:
        weights = terms.weights(layers, schedule.batch, teacher.device)
        statistics_loss = partial(slack_bns_loss, margins=margins, weights=weights)
    loss = partial(generator_loss, bns_weight=schedule.bns_weight, statistics_loss=statistics_loss)
    correlation = CorrelationWithNoise(layers, teacher.device, seed) if terms.correlation else None
    return gdfq.make_stream(teacher, schedule, loss, seed, image_loss=correlation)


@torch.no_grad()
def share_within(network: nn.Module, images: Tensor, margins: Margins) -> list[float]:
    """Per batch norm, in order of execution, the share of the images' channel means that are within the margin."""
    with BatchNormInputs(network) as norms:
        network(images)
        pairs = zip(norms.layers, margins.mean, strict=True)
        return [(sample_gaps([layer])[0].abs() <= margin).float().mean().item() for layer, margin in pairs]


@torch.no_grad()
def deviations(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Per batch norm, in order of execution, (m - mu) / sigma (B, C) of the channel means m of each image.

    ``images`` (B, C, H, W), normalised. A column of one value: homogenisation at the distribution level.
    """
    with BatchNormInputs(network) as norms:
        network(images)
        sigmas = ((layer, (layer.norm.running_var + layer.norm.eps).sqrt()) for layer in norms.layers)
        return {layer.name: sample_gaps([layer])[0] / sigma for layer, sigma in sigmas}


def spread_over_samples(deviations: dict[str, Tensor]) -> dict[str, float]:
    """Per batch norm, the standard deviation over (two or more) samples of :func:`deviations`: RMS over channels."""
    return {name: values.var(0).mean().sqrt().item() for name, values in deviations.items()}
