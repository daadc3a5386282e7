"""How alike the samples of a batch are: their similarity matrix, its eigenpairs, and DSG's loss on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dfqlib.device import channels_last
from dfqlib.errors import check_choice, check_range
from dfqlib.finetuning.streams import GeneratorStream
from dfqlib.generators.optimise_images import synthesise
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
from dfqlib.schedules import GeneratorSchedule


def slack(gap: Tensor, margin: Tensor | float) -> Tensor:
    """max(|gap| - margin, 0): how far a gap exceeds what is allowed. Source: DSG, slack distribution alignment."""
    return (gap.abs() - margin).clamp(min=0)


def slack_squares(
    gaps: tuple[Tensor, Tensor], margins: tuple[Tensor, Tensor], layers: Sequence[BatchNormInput]
) -> Tensor:
    """How far gaps of means and of spreads, (..., sum of C) each, exceed their layers' margins (L,): squares, added."""
    of_means, of_spreads = (
        slack(gap, over_channels(margin, layers)).square() for gap, margin in zip(gaps, margins, strict=True)
    )
    return of_means + of_spreads


def sample_weights(layers: int, samples: int, published: bool = False) -> Tensor:
    """How often the loss of each sample counts in each layer, (layers, samples): twice where i mod L = l, else once.

    So every sample has a layer of its own, which it is to fit best. ``published=True`` is the quirk of DSG's
    post-training code: only the first 20 samples have a layer, whatever the number of layers, and as the gap itself is
    doubled their loss counts four times. Source: DSG, layerwise sample enhancement.
    """
    own, each = torch.arange(layers).unsqueeze(1), torch.arange(samples)
    if published:
        return 1.0 + 3.0 * ((own == each) & (each < 20))
    return 1.0 + (own == each % layers)


def dsg_statistics_loss(
    images: Tensor, layers: Sequence[BatchNormInput], margins: tuple[Tensor, Tensor], weights: Tensor
) -> Tensor:
    """ZeroQ's loss with slack: gaps of each sample's means and standard deviations, as far as they exceed the margins.

    ``images`` (B, 3, H, W) normalised, compared with mean 0 and standard deviation 1 without a margin; each batch
    norm's input (B, C, h, w) with its running mean and variance. ``margins``: of means and of standard deviations, one
    value a layer each, (L,); ``weights`` (L, B), see :func:`sample_weights`. Zeros and ones switch these off. Sums over
    channels and layers, mean over the batch. Source: DSG, slack distribution alignment and layerwise enhancement.
    """
    mean, std = sample_mean_std(images)
    of_images = mean.square().sum() + (1 - std).square().sum()
    squares = slack_squares(sample_gaps(layers), margins, layers)
    return (of_images + (over_channels(weights.T, layers) * squares).sum()) / len(images)


def slack_bns_loss(layers: Sequence[BatchNormInput], margins: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
    """L_BNS with slack: gaps of the batch's means and variances, as far as they exceed the margins.

    ``margins``: of means and of variances, (L,) each. A batch has no gap of one sample to enhance, so a sample that
    counts twice by ``weights`` (L, B) enters that layer's mean and variance twice, and with it the gradient. Zeros and
    ones give L_BNS. Source: DSG, slack distribution alignment and layerwise enhancement, for a generator.
    """
    return mean_of_layers(slack_squares(batch_gaps(layers, weights), margins, layers), layers)


def published_slack_bns_loss(
    layers: Sequence[BatchNormInput], margins: tuple[Tensor, Tensor], enhance: bool = True
) -> Tensor:
    """The slack L_BNS as the published code of DSG's fine-tuning has it, with its quirks; ``margins`` (L,) each.

    | |gap| - margin | leaves no slack at all: a gap of just the margin is sought. In layer l channel l, not sample l,
    counts twice (its gap times the root of 2). Squares are summed over channels, not averaged, so the term is some
    C times larger than GDFQ's. Source: the official code.
    """
    (mean_gaps, variance_gaps), (of_mean, of_variance) = batch_gaps(layers), margins
    squares = (mean_gaps.abs() - over_channels(of_mean, layers)).square()
    squares = squares + (variance_gaps.abs() - over_channels(of_variance, layers)).square()
    # Channel l of layer l; none where a layer has fewer channels.
    own = [part[index : index + 1] for index, part in enumerate(by_layer(squares, layers))] if enhance else []
    return torch.cat([squares, *own]).sum() / len(layers)


def image_prior_loss(images: Tensor, shift: int) -> Tensor:
    """Total variation plus mean length of ``images`` (B, 3, H, W), after rolling both axes by ``shift`` pixels.

    Total variation: the Euclidean norms, over the whole batch, of the differences to the neighbours right, below and on
    both diagonals. Source: DSG's post-training code, after DeepInversion.
    """
    images = images.roll((shift, shift), (2, 3))
    differences = (
        images[..., :-1] - images[..., 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., 1:, :-1] - images[..., :-1, 1:],
        images[..., :-1, :-1] - images[..., 1:, 1:],
    )
    return torch.stack([difference.norm() for difference in differences]).sum() + images.flatten(1).norm(dim=1).mean()


BROADENING = 1e-3  # gaps between eigenvalues below this are treated as if they were about this wide
MAGNITUDE_WEIGHT = 1e-4  # of the eigenvalues' gap beside the eigenvectors' product


def similarity(samples: Tensor) -> Tensor:
    """Cosine of every two ``samples`` (B, ...), each taken as one vector: (B, B), 1 on the diagonal."""
    directions = F.normalize(samples.flatten(1), dim=1)
    return directions @ directions.T


def mean_similarity(samples: Tensor) -> float:
    """Mean cosine of two different ``samples`` (B, ...), B at least 2: 1 if all point the same way."""
    count = len(samples)
    return ((similarity(samples).sum() - count) / (count * (count - 1))).item()


class _Eigenpairs(torch.autograd.Function):
    """torch.linalg.eigh with a gradient that stays finite.

    The gradient of eigenvectors holds 1 / (l_j - l_i), which is infinite where two samples are the same or a generator
    does not yet tell them apart. d / (d^2 + BROADENING^2) in its place is the same for gaps well above BROADENING and
    at most 1 / (2 BROADENING) everywhere.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
        # Apple's backend has no eigh; the matrix is as small as the batch.
        on = matrix.cpu() if matrix.device.type == "mps" else matrix
        values, vectors = (part.to(matrix.device) for part in torch.linalg.eigh(on))
        # An eigenvector is known up to its sign only.
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


def eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B,), from the least to the greatest, and eigenvectors, the columns of (B, B), of a symmetric matrix.

    Each eigenvector has length 1, and its entry of greatest magnitude is positive. The gradient is finite also where
    eigenvalues coincide.
    """
    return _Eigenpairs.apply(matrix)


def spatial_correlation_loss(images: Tensor, noise: Tensor) -> Tensor:
    """1e-4 MSE(l, m) + |sum_k n_k (-<u_k, v_k>)|: the images are to be as little alike as Gaussian noise is.

    l, u: eigenvalues and eigenvectors of the similarity matrix of ``images`` (B, 3, H, W), in the order and with the
    signs of :func:`eigenpairs`; m, v: those of ``noise``, of the same shape; n: m scaled to 0..1. No gradient reaches
    ``noise``. B is at least 2. Source: DSG (TPAMI 2023), spatial correlation; the published code takes the eigenpairs
    of ``torch.eig``, in no order, which newer torch does not have.
    """
    values, vectors = eigenpairs(similarity(images))
    with torch.no_grad():
        wanted, directions = eigenpairs(similarity(noise))
        weights = (wanted - wanted[0]) / (wanted[-1] - wanted[0]).clamp(min=1e-12)
    products = (vectors * directions).sum(0)
    return MAGNITUDE_WEIGHT * F.mse_loss(values, wanted) + (weights * -products).sum().abs()


SHIFT = 30 / 224  # the image prior rolls images by at most this share of their side; published: 30 of 224 pixels
SPREADS = ("std", "variance")
# The four rules for the activation range of one batch that the published code offers, by their names in it.
RANGE_RULES = {"ema": "sample_mean", "percentile": "percentile", "mse": "mse", "minmax": "minmax"}


@dataclass(frozen=True)
class DiversityTerms:
    """What makes samples differ, each to be switched off; ``published=True`` has the published code's quirks instead.

    ``slack``: statistics may stay off by a margin. ``enhancement``: every sample has a layer that it is to fit best.
    ``correlation``: images are to be as little alike as noise is. With all three off what is left is ZeroQ with labels
    and an image prior (PTQ), or GDFQ (QAT). ``published`` changes numbers as :func:`dfqlib.losses.sample_weights` (PTQ)
    and :func:`dfqlib.losses.published_slack_bns_loss` (QAT) tell, and starts PTQ from uniform pixels in place of
    Gaussian ones.
    """

    slack: bool = True
    enhancement: bool = True
    correlation: bool = True
    published: bool = False


class Margins(NamedTuple):
    """How far a layer's statistics may stay off for nothing, in order of execution: of means, and of spreads, (L,)."""

    mean: Tensor
    spread: Tensor


@dataclass(frozen=True)
class NoiseGaps:
    """How far Gaussian noise is from a network's batch-norm statistics.

    Per layer, in order of execution: its name, and for every channel |mean - mu|, |std - sigma| and
    |variance - sigma^2| of the noise, and sigma itself, (C,) each.
    """

    layers: list[str]
    mean: list[Tensor]
    std: list[Tensor]
    variance: list[Tensor]
    sigma: list[Tensor]

    def margins(self, epsilon: float = 0.9, spread: str = "std") -> Margins:
        """The ``epsilon`` quantile (0 to 1) of each layer's gaps over its channels.

        ``spread`` says what the loss compares: ``"std"`` for PTQ, ``"variance"`` for QAT. The larger ``epsilon``, the
        more is allowed; 0 allows what the channel nearest to its statistics needs.
        Source: DSG, slack distribution alignment; 0.9 in the paper.
        """
        check_range("epsilon", epsilon, 0, 1)
        spreads = self.std if check_choice("spread", spread, SPREADS) == "std" else self.variance
        return Margins(*(torch.stack([gap.quantile(epsilon) for gap in gaps]) for gaps in (self.mean, spreads)))

    def no_margins(self) -> Margins:
        """Zeros: nothing is allowed."""
        nothing = torch.zeros(len(self.layers), device=self.mean[0].device)
        return Margins(nothing, nothing)


@torch.no_grad()
def noise_gaps(teacher: Teacher, count: int = 1024, seed: int = 0) -> NoiseGaps:
    """The gaps of ``count`` Gaussian noise images, N(0, 1), taken as one batch, to the teacher's batch-norm statistics.

    Noise is data that anyone has. The authors load their margins from files that they never published.
    UserError for a teacher without batch norms. Source: DSG, slack distribution alignment.
    """
    check_range("noise_images", count, 1, 10**6)
    size, random = teacher.entry.input_size, torch.Generator().manual_seed(seed)
    statistics: dict[tuple[int, str, nn.Module], list[tuple[Tensor, Tensor]]] = {}
    counts = [len(part) for part in torch.arange(count).split(128 if size <= 64 else 32)]
    with BatchNormInputs(teacher.network) as norms:
        for part in counts:
            noise = torch.randn(part, 3, size, size, generator=random).to(teacher.device)
            teacher.network(channels_last(noise))
            for place, layer in enumerate(norms.layers):
                # A batch norm that runs twice in a pass has two places.
                statistics.setdefault((place, layer.name, layer.norm), []).append(layer.mean_var())
    weights = torch.tensor(counts, dtype=torch.float32, device=teacher.device)
    gaps: list[tuple[Tensor, ...]] = []
    for (_, _, norm), parts in statistics.items():
        mean, variance = pooled_mean_var(*(torch.stack(each) for each in zip(*parts, strict=True)), weights)
        std, sigma = (variance + EPSILON).sqrt(), (norm.running_var + EPSILON).sqrt()
        differences = (mean - norm.running_mean, std - sigma, variance - norm.running_var)
        gaps.append((*(difference.abs() for difference in differences), sigma))
    return NoiseGaps([name for _, name, _ in statistics], *(list(each) for each in zip(*gaps, strict=True)))


def layer_weights(parts: DiversityTerms, layers: int, samples: int, device: torch.device) -> Tensor:
    """:func:`dfqlib.losses.sample_weights`, (layers, samples), or ones without enhancement."""
    if not parts.enhancement:
        return torch.ones(layers, samples, device=device)
    return sample_weights(layers, samples, parts.published).to(device)


class CorrelationWithNoise:
    """The spatial correlation loss of images, against fresh Gaussian noise at each call, over the number of layers."""

    def __init__(self, layers: int, device: torch.device, seed: int) -> None:
        # Another stream than that of the images' own start, or both would begin as the same noise.
        self.layers, self.random = layers, torch.Generator(device).manual_seed(seed + 2)

    def __call__(self, images: Tensor) -> Tensor:
        noise = torch.randn(images.shape, generator=self.random, device=images.device)
        return spatial_correlation_loss(images, noise) / self.layers

    def state_dict(self) -> dict[str, Tensor]:
        """The noise to come."""
        return {"random": self.random.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the noise that :meth:`state_dict` tells."""
        self.random.set_state(state["random"])


def start_images(batch: int, size: int, seed: int = 0, published: bool = False) -> Tensor:
    """Where synthesis starts: (batch, 3, size, size), N(0, 1), or as published uniform in [0, 1). Drawn on the CPU."""
    check_range("batch", batch, 2, 10**6)  # one sample is like no other
    draw = torch.rand if published else torch.randn
    return draw(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def synthesise_diverse(
    teacher: Teacher,
    gaps: NoiseGaps,
    epsilon: float = 0.9,
    parts: DiversityTerms = DiversityTerms(),
    batch: int = 40,
    iterations: int = 500,
    learning_rate: float = 0.9,
    patience: int = 260,
    min_learning_rate: float = 1e-4,
    label_weight: float = 2.0,
    prior_weight: float = 0.01,
    seed: int = 0,
    label: str = "",
) -> tuple[Tensor, Tensor, list[float]]:
    """Images for PTQ (batch, 3, H, W), normalised; the labels (batch,) they were asked for; the loss before each step.

    loss = aligned statistics + spatial correlation / L + label_weight CE to random labels + prior_weight image prior,
    the last on a copy rolled by a random offset; see ``dfqlib.losses``. A weight of 0 drops its term. ``gaps`` are
    those of :func:`noise_gaps`, and ``label`` names the loop. The defaults are those of the published script.
    UserError if a setting is out of range; Diverged if the loss diverges. Source: DSG, and its official code.
    """
    for name, weight in (("label_weight", label_weight), ("prior_weight", prior_weight)):
        check_range(name, weight, 0, 10**6)
    size, device = teacher.entry.input_size, teacher.device
    images = channels_last(start_images(batch, size, seed, parts.published).to(device))
    random = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(teacher.entry.classes, (batch,), generator=random).to(device)
    shift = max(1, round(SHIFT * size))
    margins = gaps.margins(epsilon) if parts.slack else gaps.no_margins()
    layers = len(gaps.layers)
    weights = layer_weights(parts, layers, batch, device)
    correlation = CorrelationWithNoise(layers, device, seed)
    with BatchNormInputs(teacher.folded) as norms:

        def loss(images: Tensor) -> Tensor:
            logits = teacher.folded(images)
            terms = {"statistics": dsg_statistics_loss(images, norms.layers, margins, weights)}
            if parts.correlation:
                terms["correlation"] = correlation(images)
            if label_weight:
                terms["CE"] = label_weight * F.cross_entropy(logits, labels)
            if prior_weight:
                offset = int(torch.randint(-shift, shift, (1,), generator=random))  # on the CPU: no device waits
                terms["image prior"] = prior_weight * image_prior_loss(images, offset)
            return add_up(terms)

        settings = (learning_rate, iterations, patience, min_learning_rate)
        images, losses = synthesise(images, loss, *settings, label or f"{batch} diverse images")
    return images, labels, losses


def make_stream(
    teacher: Teacher,
    schedule: GeneratorSchedule,
    gaps: NoiseGaps,
    epsilon: float = 0.9,
    parts: DiversityTerms = DiversityTerms(),
    seed: int = 0,
) -> GeneratorStream:
    """QAT: GDFQ's generator, with the slack L_BNS in place of L_BNS and the spatial correlation beside it.

    See :func:`dfqlib.gdfq.make_stream`; ``gaps`` are those of :func:`noise_gaps`. With all parts off this is GDFQ.
    Source: DSG (TPAMI 2023), data-free quantization-aware training.
    """
    layers = len(gaps.layers)
    margins = gaps.margins(epsilon, "variance") if parts.slack else gaps.no_margins()
    if parts.published:
        statistics_loss = partial(published_slack_bns_loss, margins=margins, enhance=parts.enhancement)
    else:
        weights = layer_weights(parts, layers, schedule.batch, teacher.device)
        statistics_loss = partial(slack_bns_loss, margins=margins, weights=weights)
    loss = partial(generator_loss, bns_weight=schedule.bns_weight, statistics_loss=statistics_loss)
    correlation = CorrelationWithNoise(layers, teacher.device, seed) if parts.correlation else None
    return gdfq.make_stream(teacher, schedule, loss, seed, image_loss=correlation)


@torch.no_grad()
def share_within(network: nn.Module, images: Tensor, margins: Margins) -> list[float]:
    """Per batch norm, in order of execution, the share of all samples' channel means that the margin leaves alone.

    ``images`` (B, 3, H, W), normalised; ``margins`` of :meth:`NoiseGaps.margins`.
    """
    with BatchNormInputs(network) as norms:
        network(images)
        layers = zip(norms.layers, margins.mean, strict=True)
        within = (sample_gaps([layer])[0].abs() <= margin for layer, margin in layers)
        return [each.float().mean().item() for each in within]


@torch.no_grad()
def deviations(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Per batch norm, in order of execution, how far each sample's channel means are off, in sigma: (B, C).

    (m - mu) / sigma for ``images`` (B, 3, H, W), normalised. If a column holds one value, all samples are the same in
    that channel: homogenisation at the distribution level.
    """
    with BatchNormInputs(network) as norms:
        network(images)
        return {
            layer.name: sample_gaps([layer])[0] / (layer.norm.running_var + layer.norm.eps).sqrt()
            for layer in norms.layers
        }


def spread_over_samples(deviations: dict[str, Tensor]) -> dict[str, float]:
    """Per batch norm, how much samples differ: root mean square, over channels, of the standard deviation over samples.

    In sigma, from what :func:`deviations` gives; at least two samples.
    """
    return {name: values.var(0).mean().sqrt().item() for name, values in deviations.items()}
